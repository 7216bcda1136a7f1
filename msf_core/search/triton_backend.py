"""Exact search by group maxima, fused in Triton: one pass over the rows, and no Q×N matrix.

Consecutive rows form groups of G rows.

1. `group_maxima` computes the products of a tile of queries with a tile of rows in registers, and writes only the
   largest product of each group, [Q, n / G] values.
2. `select` runs one program per query. It takes groups in the order of their maxima, one batch at a time, computes the
   products of their rows again in float32, and keeps the k best.

After k groups, the k best rows are known: the k maxima of the groups taken are at least as similar as any row of
another group. `select` stops earlier if no remaining maximum is above the k-th best.

If V own rows of a query are excluded, k + V groups are needed. The maximum of a group may be an own row, so the groups
taken contain k + V rows that are at least as similar as any row of another group, and at most V of them are own rows.
Rows excluded by label or id are not in the maxima.

The products of half-precision rows are exact and summed in float32 in both steps, so only similarities that differ by
the rounding of such a sum, about 1e-6, can change places. The products of float32 rows are computed in TF32 in the
first step, which removes 13 of the 23 bits of each factor. The error of a factor is less than 2⁻¹⁰ of it, and that of a
product of two vectors less than `TF32_ERROR`·‖q‖·‖r‖ (Cauchy-Schwarz, with the rounding of the sum). For int8 rows, the
queries are rounded to int8 too, and the bound is the norm of their rounding error. `select` takes groups until no
remaining maximum reaches the k-th best minus the bound (rows are unit vectors), so the result is exact in float32.

If almost all rows are alike (a collapsed encoder), nearly every group is within this bound. Therefore `select` stops
after `most_groups` groups and marks the query as unsettled. A precise pass follows:

3. `group_maxima` again, for blocks with an unsettled query, with each factor split into two TF32 values (TF32x3). The
   error is at most 3·2⁻²⁰·‖q‖·‖r‖, which is usually less than the rounding of the sum.
4. `select` again, for unsettled queries, with k groups (k + V if own rows are excluded), as for half precision.
   Similarities that differ by less than this error can change places.

Steps 3 and 4 are launched at every search that might need them, and end at once if no query does, so the host never
synchronizes. With blocks of 128 queries in step 1 and 64 in step 3, and b bytes per value, a search reads at most this
many bytes of rows:

    ⌈Q/128⌉·n·D·b  +  Q·most_groups·G·D·b  +  ⌈Q/64⌉·n·D·b  +  Q·(k + V)·G·D·b

For Q = 256, n = 1,024,000, D = 512, k = 5 and float32, this is 4.2 + 8.5 + 8.4 + 0.1 GB; taking every group would read
537 GB. Consecutive blocks read the same rows, so most of the first and third terms come from the L2 cache.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import MappingProxyType

import torch
import triton
from torch import Tensor

from msf_core.search.base import Queries, Rows, check_search_arguments, rounded_to_int8
from msf_core.search.triton_kernels import INTERPRETED, group_maxima, select
from msf_core.search.triton_plan import EXACT_DTYPES, SELECT_WARPS, Plan, Tiles, plan_for

OLDEST_TRITON = (3, 3)  # the compiler of 3.2 crashes the process
MOST_NEIGHBORS = 256
TF32_ERROR = 2**-9 + 2**-12
LANES = 1024  # of `select`, over which groups are distributed
MEMBERS = 32  # groups of a lane that are read at once


class TritonSearch:
    """`SearchBackend` in Triton, on CUDA devices of compute capability 8.0 or newer."""

    most_neighbors = MappingProxyType({"cuda": MOST_NEIGHBORS, "cpu": MOST_NEIGHBORS})
    leaves_out_own = True
    """Whether `Queries.own` is supported."""

    def why_not(self, device_type: str) -> str | None:
        """Return None if Triton can search tensors on this type of device here, else the reason."""
        if device_type == "cpu":
            return None if INTERPRETED else "Triton searches CUDA tensors; on the CPU it runs only in its interpreter"
        if device_type != "cuda":
            return f"Triton does not search {device_type} tensors"
        if torch.version.hip is not None:
            return "its kernels are tuned and tested only for CUDA, not for ROCm"
        if _version() < OLDEST_TRITON:
            return f"its kernels need Triton 3.3, which comes with PyTorch 2.7; this is {triton.__version__}"
        if (problem := _why_not_launch()) is not None:
            return problem
        capability = torch.cuda.get_device_capability()
        return None if capability >= (8, 0) else f"it needs compute capability 8.0 or newer; this GPU has {capability}"

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`; k is at most 256. Results are deterministic."""
        return self.general_topk(Queries(queries), Rows(rows), k)

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """See `GeneralSearch.general_topk`; k is at most 256. Results are deterministic."""
        check_search_arguments(queries, rows, k)
        values, device = rows.values, rows.values.device
        if k > MOST_NEIGHBORS:
            raise ValueError(f"the triton backend finds at most {MOST_NEIGHBORS} neighbors, got k={k}")
        if not (device.type == "cuda" or (INTERPRETED and device.type == "cpu")):
            raise ValueError(f"the triton backend searches CUDA tensors, got {device}")
        (count, dim), n = queries.values.shape, values.shape[0]
        similarity = torch.empty((count, k), dtype=torch.float32, device=device)
        index = torch.empty((count, k), dtype=torch.int64, device=device)
        if count == 0:
            return similarity, index
        # The kernels need contiguous tensors; a column of a table of labels and ids is not contiguous.
        queries, rows = Queries(*map(_laid_out, queries)), Rows(*map(_laid_out, rows))  # type: ignore[arg-type]
        plan = plan_for(count, n, dim, k, values.dtype, queries.most_own, *device_limits(device.type, device.index))
        maxima = torch.empty((plan.at_once, plan.stride), dtype=torch.float32, device=device)
        with _current(device):
            if plan.at_once == count:
                _launch(queries, rows, maxima, similarity, index, plan)
                return similarity, index
            for start in range(0, count, plan.at_once):
                part = slice(start, start + plan.at_once)
                _launch(queries.at(part), rows, maxima, similarity[part], index[part], plan)
        return similarity, index


def _launch(queries: Queries, rows: Rows, maxima: Tensor, similarity: Tensor, index: Tensor, plan: Plan) -> None:
    """Launch the search for at most as many queries as ``maxima`` has rows."""
    q, labels, ids, own = queries
    values, scale, row_labels, row_ids = rows
    (count, dim), n, k, groups = q.shape, values.shape[0], similarity.shape[1], plan.groups
    unused = q  # passed to the kernels in place of tensors that do not exist
    screened, q_scale, error = q, unused, unused
    if scale is not None:
        screened, q_scale, error = rounded_to_int8(q)
    by_label, by_id = labels is not None and row_labels is not None, ids is not None and row_ids is not None
    beside = (
        unused if scale is None else scale,
        *((labels, row_labels) if by_label else (unused, unused)),
        *((ids, row_ids) if by_id else (unused, unused)),
    )
    flags = {"DIM": dim, "GROUP": plan.group, "INT8": scale is not None, "BY_LABEL": by_label, "BY_ID": by_id}
    exact = values.dtype in EXACT_DTYPES
    unsettled = unused if exact else torch.empty(count, dtype=torch.int32, device=q.device)

    def write_maxima(of: Tensor, tiles: Tiles, programs: int, precise: bool) -> None:
        group_maxima[(programs,)](
            of,
            values,
            q_scale,
            *beside,
            unsettled,
            maxima,
            count,
            n,
            groups,
            BLOCK_Q=tiles.queries,
            BLOCK_N=tiles.rows,
            BLOCK_D=tiles.dims,
            WIDEN=INTERPRETED,
            PRECISE=precise,
            **flags,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def write_nearest(most: int, precise: bool) -> None:
        select[(count,)](
            q,
            values,
            error,
            *beside,
            unused if own is None else own,
            unsettled,
            maxima,
            similarity,
            index,
            n,
            groups,
            most,
            K=k,
            K_LANES=1 << (k - 1).bit_length(),
            BATCH=plan.batch,
            BLOCK_D=plan.batch_dims,
            LANES=LANES,
            MEMBERS=MEMBERS,
            ERROR=TF32_ERROR,
            EXACT=exact or precise,
            OWN=queries.most_own,
            PRECISE=precise,
            **flags,
            num_warps=SELECT_WARPS,
        )

    tiles = plan.tiles
    write_maxima(screened, tiles, -(-count // tiles.queries) * -(-n // tiles.rows), precise=False)
    write_nearest(plan.most, precise=False)
    if plan.precise is not None:
        write_maxima(q, plan.precise, plan.programs, precise=True)
        write_nearest(plan.enough, precise=True)


def _laid_out(part: Tensor | None) -> Tensor | None:
    if part is None:
        return None
    if part.requires_grad:
        part = part.detach()
    return part if part.is_contiguous() else part.contiguous()


@cache
def device_limits(device_type: str, device: int | None) -> tuple[int, int]:
    """Return the bytes of shared memory available to a program, and the number of multiprocessors."""
    if device_type == "cpu":
        return 0, 1
    properties = torch.cuda.get_device_properties(device)
    if hasattr(properties, "shared_memory_per_block_optin"):  # PyTorch 2.7
        shared = properties.shared_memory_per_block_optin
    else:
        shared = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return shared, properties.multi_processor_count


def _current(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in triton.__version__.split(".")[:2])


@cache
def _why_not_launch() -> str | None:
    """Return None if Triton can launch kernels here, else the reason; the first launch needs a C compiler."""
    try:
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:
        return f"Triton cannot launch kernels: {type(error).__name__}: {error}"
    return None
