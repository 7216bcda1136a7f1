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
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from msf_core.search.base import Queries, Rows, check_search_arguments, rounded_to_int8
from msf_core.search.triton_kernels import INTERPRETED, group_maxima, select

MOST_NEIGHBORS = 256
MAXIMA_BYTES = 40 << 20  # of the maxima that are held at once
TF32_ERROR = 2**-9 + 2**-12
LANES = 1024  # of `select`: groups are dealt out to so many lanes
MEMBERS = 32  # groups of a lane that are looked at in one go


class Tiles(NamedTuple):
    """Sizes of one launch of `group_maxima`."""

    queries: int
    rows: int
    dims: int
    warps: int
    stages: int


class TritonSearch:
    """`SearchBackend` in Triton, on CUDA devices of compute capability 8.0 or newer."""

    most_neighbors = MappingProxyType({"cuda": MOST_NEIGHBORS, "cpu": MOST_NEIGHBORS})

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
        values = rows.values.detach()
        if k > MOST_NEIGHBORS:
            raise ValueError(f"the triton backend finds at most {MOST_NEIGHBORS} neighbors, got k={k}")
        if not (values.is_cuda or (INTERPRETED and values.device.type == "cpu")):
            raise ValueError(f"the triton backend searches CUDA tensors, got {values.device}")
        # The kernels read what lies beside one another; a column of a table of labels and ids does not.
        queries = Queries(*(None if part is None else part.detach().contiguous() for part in queries))  # type: ignore[arg-type]
        rows = Rows(values, *(None if part is None else part.contiguous() for part in rows[1:]))
        (count, dim), n = queries.values.shape, values.shape[0]
        similarity = queries.values.new_empty((count, k), dtype=torch.float32)
        index = queries.values.new_empty((count, k), dtype=torch.int64)
        if count == 0:
            return similarity, index
        group = choose_group(min(count, 256), n, dim, k, values.element_size())
        groups = triton.cdiv(n, group)
        at_once = min(count, max(1, MAXIMA_BYTES // (4 * groups)))
        if 128 < at_once < count:
            at_once -= at_once % 128  # whole tiles
        tiles = choose_tiles(at_once, dim, values)
        maxima = queries.values.new_empty((at_once, groups), dtype=torch.float32)
        with _device_of(values):
            for start in range(0, count, at_once):
                part = queries.at(slice(start, start + at_once))
                _launch(part, rows, maxima, similarity[start:], index[start:], k, group, tiles)
        return similarity, index


def _launch(
    queries: Queries, rows: Rows, maxima: Tensor, similarity: Tensor, index: Tensor, k: int, group: int, tiles: Tiles
) -> None:
    """Search for at most as many queries as ``maxima`` has lines."""
    (count, dim), (n, groups) = queries.values.shape, (rows.values.shape[0], maxima.shape[1])
    unused = queries.values  # stands for tensors that are not there
    scale, screened, q_scale, error = unused, queries.values, unused, unused
    if rows.scale is not None:
        scale = rows.scale
        screened, q_scale, error = rounded_to_int8(queries.values)
    by_label, by_id = (None not in pair for pair in ((queries.labels, rows.labels), (queries.ids, rows.ids)))
    limits = (
        *((queries.labels, rows.labels) if by_label else (unused, unused)),
        *((queries.ids, rows.ids) if by_id else (unused, unused)),
    )
    flags = {"INT8": rows.scale is not None, "BY_LABEL": by_label, "BY_ID": by_id}
    grid = (triton.cdiv(count, tiles.queries) * triton.cdiv(n, tiles.rows),)
    group_maxima[grid](
        screened,
        rows.values,
        q_scale,
        scale,
        *limits,
        maxima,
        count,
        n,
        groups,
        DIM=dim,
        GROUP=group,
        BLOCK_Q=tiles.queries,
        BLOCK_N=tiles.rows,
        BLOCK_D=tiles.dims,
        WIDEN=INTERPRETED,
        **flags,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    exact = rows.values.dtype in (torch.float16, torch.bfloat16)
    select[(count,)](
        queries.values,
        rows.values,
        error,
        scale,
        *limits,
        maxima,
        similarity,
        index,
        n,
        groups,
        k if exact else groups,
        DIM=dim,
        K=k,
        K_LANES=triton.next_power_of_2(k),
        GROUP=group,
        BLOCK_D=min(128, triton.next_power_of_2(dim)),
        LANES=LANES,
        MEMBERS=MEMBERS,
        ERROR=0.0 if exact else TF32_ERROR,
        **flags,
        num_warps=4,
    )


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


def choose_tiles(count: int, dim: int, rows: Tensor) -> Tiles:
    """Return the tiles for that many queries on the device of ``rows``."""
    shared = 0
    if rows.is_cuda:
        properties = torch.cuda.get_device_properties(rows.device)
        if hasattr(properties, "shared_memory_per_block_optin"):  # PyTorch 2.7
            shared = properties.shared_memory_per_block_optin
        else:
            shared = triton.runtime.driver.active.utils.get_device_properties(rows.device.index)["max_shared_mem"]
    return tiles_for(count, dim, rows.element_size(), shared)


def tiles_for(count: int, dim: int, value_bytes: int, shared_memory: int) -> Tiles:
    """Return tiles whose stages fit the bytes of shared memory that a program may have.

    A tile of 128 queries and 256 rows reads least for each product; it wants 144 KiB for three stages.
    """
    queries = min(128, max(16, triton.next_power_of_2(count)))
    dims = max(16, 32 // value_bytes, min(128 // value_bytes, triton.next_power_of_2(dim)))
    large = shared_memory >= 150 << 10
    if queries == 128 and large:
        return Tiles(queries, 256, dims, warps=8, stages=3)
    return Tiles(queries, 128, dims, warps=4, stages=4 if large else 2)


def _device_of(rows: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()


@cache
def _why_not_launch() -> str | None:
    """Return None if Triton can start kernels here: at the first one it builds a module with the C compiler."""
    try:
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:
        return f"Triton cannot start kernels: {type(error).__name__}: {error}"
    return None
