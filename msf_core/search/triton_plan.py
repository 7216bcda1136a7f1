"""The launch parameters of the Triton search: sizes of groups, tiles and batches, computed from the sizes of a search.

tests/test_triton_compiled.py compiles the tiles for several GPUs, and checks that they fit and spill no registers.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

EXACT_DTYPES = (torch.float16, torch.bfloat16)  # the first pass computes their products exactly
MAXIMA_BYTES = 40 << 20  # maximum bytes of the maxima of one launch
SELECT_WARPS = 8
BATCH_ROWS = 256  # maximum rows of a batch in `select`
BATCH_BYTES = 32 << 10  # bytes of a batch loaded at once; with more, only one program fits on a multiprocessor
LEAST_GROUPS = 32  # `select` may take at least this many groups, in addition to k, before the precise pass
PRECISE_COST = 4  # cost of the precise pass, in passes over float32 rows; an estimate
PROGRAMS = 2  # programs of the precise pass on each multiprocessor


class Tiles(NamedTuple):
    """Sizes of one launch of `group_maxima`."""

    queries: int
    rows: int
    dims: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The launch parameters of a search."""

    at_once: int
    """Number of queries of one launch."""
    group: int
    """Number of rows of a group."""
    groups: int
    tiles: Tiles
    most: int
    """Maximum number of groups that `select` takes for a query after the first pass."""
    enough: int
    """Number of groups that are certain to contain the k nearest rows if the maxima are exact up to sum rounding."""
    precise: Tiles | None
    """Tiles of the precise pass. None if the first pass is already as precise, or if `select` may take all groups."""
    programs: int
    """Number of programs of the precise pass."""
    batch: int
    """Number of groups of a batch in `select`."""
    batch_dims: int
    """Number of values of each row that `select` loads at once."""

    @property
    def stride(self) -> int:
        """Distance between the rows of the maxima, [at_once, stride]."""
        return -(-self.groups // 16) * 16


@lru_cache(maxsize=4096)
def plan_for(
    count: int,
    n: int,
    dim: int,
    k: int,
    dtype: torch.dtype,
    own: int,
    shared_memory: int,
    processors: int,
    group: int | None = None,
) -> Plan:
    """Return the launch parameters of a search.

    Args:
        count: number of queries.
        n: number of rows.
        dim: dimension of the rows, D.
        k: number of neighbors.
        dtype: dtype of the rows.
        own: number of own rows excluded from each query.
        shared_memory: bytes of shared memory available to a program.
        processors: number of multiprocessors of the device.
        group: number of rows of a group; by default from `choose_group`.
    """
    value_bytes = dtype.itemsize
    group = group or choose_group(min(count, 256), n, dim, k, value_bytes)
    groups = -(-n // group)
    at_once = min(count, max(1, MAXIMA_BYTES // (4 * groups)))
    if 128 < at_once < count:
        at_once -= at_once % 128  # whole tiles
    enough = min(groups, k + own)
    most, precise = enough, None
    if dtype not in EXACT_DTYPES:
        most = min(groups, most_groups(at_once, groups, k, value_bytes))
        precise = precise_tiles_for(at_once, dim) if most < groups else None
    batch = min(_power_of_two(k + own), BATCH_ROWS // group)
    batch_dims = min(512, BATCH_BYTES // (batch * group * max(2, value_bytes)), _power_of_two(dim))
    tiles = tiles_for(at_once, dim, value_bytes, shared_memory)
    programs = PROGRAMS * processors
    return Plan(at_once, group, groups, tiles, most, enough, precise, programs, batch, batch_dims)


def most_groups(count: int, groups: int, k: int, value_bytes: int) -> int:
    """Return how many groups to take at most if maxima are inexact: k, plus as many as cost about one precise pass.

    A group of G rows costs G·D·(bytes of a value) for every query. Fewer than 64 queries cost as much as 64, because
    few programs do not use the whole memory bandwidth. The precise pass costs `PRECISE_COST` times reading n·D·4 bytes.
    """
    return k + max(LEAST_GROUPS, 4 * PRECISE_COST * groups // (value_bytes * max(count, 64)))


def choose_group(count: int, n: int, dim: int, k: int, value_bytes: int) -> int:
    """Return the number of rows of a group, G: a power of two from 16 to 128.

    For Q queries, writing and reading the maxima takes 2·4·Q·n/G bytes, and reading rows again takes
    Q·k·G·D·(bytes of a value). The square root below minimizes the sum. The maxima of ``count`` queries take at most
    `MAXIMA_BYTES` if a G of at most 128 allows it.
    """
    best = (8 * n / (k * dim * value_bytes)) ** 0.5
    group = 16
    while group < 128 and (group * 2**0.5 < best or 4 * count * n / group > MAXIMA_BYTES):
        group *= 2
    return group


def tiles_for(count: int, dim: int, value_bytes: int, shared_memory: int) -> Tiles:
    """Return tiles whose stages fit into the shared memory of a program.

    A tile of 128 queries and 256 rows reads the fewest bytes per product; it needs 144 KiB for three stages. On sm_90,
    an int8 product starts only after the previous one has ended, so int8 tiles are twice as deep there. On other GPUs,
    int8 tiles need registers for scales and sums in addition to the products, and therefore twice as many warps.
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


def precise_tiles_for(count: int, dim: int) -> Tiles:
    """Return the tiles of the precise pass, which splits every value into two of TF32."""
    queries = min(64, max(16, _power_of_two(count)))
    return Tiles(queries, 128, max(16, min(32, _power_of_two(dim))), warps=8, stages=2)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
