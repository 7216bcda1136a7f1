"""Exact search by group maxima, fused in Triton: one pass over the rows, and no Q×N matrix.

Rows that follow one another form groups of G.

1. `group_maxima`: the products of a tile of queries with a tile of rows stay in registers; only the largest of each
   group is written, [Q, n / G] values.
2. `select`, one program a query: takes groups in the order of their maxima, computes the products of their rows
   again in float32, and keeps the k best.

After k groups the k best are known: any row of another group has k others, the maxima of the groups taken, that are
at least as similar. It may stop before, when no maximum left is above the k-th best.

Half-precision rows are multiplied exactly and summed in float32 in both steps, so only similarities that differ by
the rounding of such a sum, about 1e-6, can change places. Float32 rows are multiplied in TF32 in the first step,
which cuts 13 of the 23 bits of each factor off: each is off by less than 2⁻¹⁰ of its size, and the product of two
vectors by less than `TF32_ERROR`·‖q‖·‖r‖ (Cauchy-Schwarz, with the rounding of the sum). Groups are taken until no
maximum left reaches the k-th best less that bound (rows are unit vectors), so the result is exact in float32.

For int8 rows the queries are rounded to int8 too in the first step, and the bound is the length of what that takes
off a query. Rows that a query may not find take part in neither step.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from msf_core.search.base import Queries, Rows, check_search_arguments, rounded_to_int8
from msf_core.search.triton_kernels import INTERPRETED, group_maxima, select

MOST_NEIGHBORS = 256
MAXIMA_BYTES = 40 << 20  # of the maxima that are held at once
EXACT_DTYPES = (torch.float16, torch.bfloat16)  # the first pass multiplies them exactly
TF32_ERROR = 2**-9 + 2**-12
LANES = 1024  # of `select`: groups are dealt out to so many lanes
MEMBERS = 32  # groups of a lane that are looked at in one go
BATCH_ROWS = 256  # rows that `select` looks at together, at most
BATCH_BYTES = 32 << 10  # of them that it loads at once: more take so many registers that one program is left on an SM
LEAST_GROUPS = 32  # beyond k that are looked at before the precise pass
SELECT_WARPS = 8
PROGRAMS = 2  # of the precise pass on each multiprocessor
PRECISE_COST = 4  # of the precise pass, in passes over float32 rows; an estimate


class Tiles(NamedTuple):
    """Sizes of one launch of `group_maxima`."""

    queries: int
    rows: int
    dims: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How a search is launched; all of it follows from its sizes."""

    at_once: int
    """Queries of one launch."""
    group: int
    """Rows of a group."""
    groups: int
    tiles: Tiles
    most: int
    """Groups that are looked at for a query after the first pass."""
    enough: int
    """Groups that hold the k nearest rows for sure where the maxima have no error but the rounding of a sum."""
    precise: Tiles | None
    """Of the precise pass; None where the first one is as precise, or all groups are looked at after it."""
    programs: int
    """Of the precise pass."""
    batch: int
    """Groups that `select` looks at together."""
    batch_dims: int


class TritonSearch:
    """`SearchBackend` in Triton, on CUDA devices of compute capability 8.0 or newer."""

    most_neighbors = MappingProxyType({"cuda": MOST_NEIGHBORS, "cpu": MOST_NEIGHBORS})
    leaves_out_own = True
    """It serves `Queries.own`."""

    def why_not(self, device_type: str) -> str | None:
        """Return None if it searches that type of device here, else the reason."""
        if device_type == "cpu":
            return None if INTERPRETED else "Triton searches CUDA tensors; its interpreter (slow, for tests) CPU ones"
        if device_type != "cuda":
            return f"Triton does not search {device_type} tensors"
        if torch.version.hip is not None:
            return "its kernels are tuned and tested for CUDA alone, not for ROCm"
        if (problem := _why_not_launch()) is not None:
            return problem
        capability = torch.cuda.get_device_capability()
        return None if capability >= (8, 0) else f"it needs compute capability 8.0, this GPU has {capability}"

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`; k is at most 256. The same bits come at every call."""
        return self.general_topk(Queries(queries), Rows(rows), k)

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """See `GeneralSearch.general_topk`; k is at most 256. The same bits come at every call."""
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
        # The kernels read what lies beside one another; a column of a table of labels and ids does not.
        queries, rows = Queries(*map(_laid_out, queries)), Rows(*map(_laid_out, rows))  # type: ignore[arg-type]
        plan = plan_for(
            count, n, dim, k, values.dtype, queries.own is not None, *_device_limits(device.type, device.index)
        )
        maxima = torch.empty((plan.at_once, -(-plan.groups // 16) * 16), dtype=torch.float32, device=device)
        with _current(device):
            if plan.at_once == count:
                _launch(queries, rows, maxima, similarity, index, plan)
                return similarity, index
            for start in range(0, count, plan.at_once):
                part = slice(start, start + plan.at_once)
                _launch(queries.at(part), rows, maxima, similarity[part], index[part], plan)
        return similarity, index


def _launch(queries: Queries, rows: Rows, maxima: Tensor, similarity: Tensor, index: Tensor, plan: Plan) -> None:
    """Search for at most as many queries as ``maxima`` has lines."""
    q, labels, ids, own = queries
    values, scale, row_labels, row_ids = rows
    (count, dim), n, k, groups = q.shape, values.shape[0], similarity.shape[1], plan.groups
    unused = q  # stands for tensors that are not there
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
            BY_OWN=own is not None,
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


@lru_cache(maxsize=4096)
def plan_for(
    count: int, n: int, dim: int, k: int, dtype: torch.dtype, own: bool, shared_memory: int, processors: int
) -> Plan:
    """Return the plan for those sizes on a device with so many multiprocessors, each with so many bytes of memory."""
    value_bytes = dtype.itemsize
    group = choose_group(min(count, 256), n, dim, k, value_bytes)
    groups = -(-n // group)
    at_once = min(count, max(1, MAXIMA_BYTES // (4 * groups)))
    if 128 < at_once < count:
        at_once -= at_once % 128  # whole tiles
    enough = min(groups, k + own)
    most, precise = enough, None
    if dtype not in EXACT_DTYPES:
        most = min(groups, most_groups(at_once, groups, k, value_bytes))
        precise = precise_tiles_for(at_once, dim, shared_memory) if most < groups else None
    batch = min(_power_of_two(k + own), BATCH_ROWS // group)
    batch_dims = min(512, BATCH_BYTES // (batch * group * max(2, value_bytes)), _power_of_two(dim))
    tiles = tiles_for(at_once, dim, value_bytes, shared_memory)
    programs = PROGRAMS * processors
    return Plan(at_once, group, groups, tiles, most, enough, precise, programs, batch, batch_dims)


def most_groups(count: int, groups: int, k: int, value_bytes: int) -> int:
    """Return how many groups are looked at by inexact maxima: about what the precise pass would cost, and k more.

    A group costs every query G·D·(bytes of a value), and as much as for 64 queries where there are fewer, as a program
    alone does not use the whole memory bandwidth; the precise pass costs `PRECISE_COST` readings of n·D·4 bytes.
    """
    return k + max(LEAST_GROUPS, 4 * PRECISE_COST * groups // (value_bytes * max(count, 64)))


def choose_group(count: int, n: int, dim: int, k: int, value_bytes: int) -> int:
    """Return the rows of a group, G: a power of two from 16 to 128.

    The bytes that G decides on are 2·4·Q·n/G for writing and reading the maxima and Q·k·G·D·(bytes of a value) for
    the rows that are looked at again; their sum is least at the root below. The maxima of ``count`` queries stay
    under `MAXIMA_BYTES` where a G of 128 or less allows it.
    """
    best = (8 * n / (k * dim * value_bytes)) ** 0.5
    group = 16
    while group < 128 and (group * 2**0.5 < best or 4 * count * n / group > MAXIMA_BYTES):
        group *= 2
    return group


def tiles_for(count: int, dim: int, value_bytes: int, shared_memory: int) -> Tiles:
    """Return tiles whose stages fit the bytes of shared memory that a program may have.

    A tile of 128 queries and 256 rows reads least for each product; it wants 144 KiB for three stages. On sm_90 the
    next int8 product begins when the last one has ended, so there they are twice as deep. Elsewhere int8 tiles keep
    scales and sums beside the products, and need twice as many warps to have registers for all.
    """
    queries = min(128, max(16, _power_of_two(count)))
    int8 = value_bytes == 1
    dims = max(16, 32 // value_bytes, min(128 // value_bytes, _power_of_two(dim)))
    large = shared_memory >= 150 << 10
    if queries < 128 or not large:
        return Tiles(queries, 128, dims, warps=8 if int8 and queries == 128 else 4, stages=4 if large else 3)
    if int8 and dims == 128 and shared_memory >= 200 << 10:
        return Tiles(queries, 256, min(256, _power_of_two(dim)), warps=8, stages=2)
    return Tiles(queries, 256, dims, warps=16 if int8 else 8, stages=3)


def precise_tiles_for(count: int, dim: int, shared_memory: int) -> Tiles:
    """Return the tiles of the precise pass, which splits every value into two of TF32."""
    queries = min(64, max(16, _power_of_two(count)))
    return Tiles(queries, 128, max(16, min(32, _power_of_two(dim))), warps=8, stages=2)


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()


def _laid_out(part: Tensor | None) -> Tensor | None:
    if part is None:
        return None
    if part.requires_grad:
        part = part.detach()
    return part if part.is_contiguous() else part.contiguous()


@cache
def _device_limits(device_type: str, device: int | None) -> tuple[int, int]:
    """Return the bytes of shared memory that a program may have, and the multiprocessors."""
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


@cache
def _why_not_launch() -> str | None:
    """Return None if Triton can start kernels here: at the first one it builds a module with the C compiler."""
    try:
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:
        return f"Triton cannot start kernels: {type(error).__name__}: {error}"
    return None
