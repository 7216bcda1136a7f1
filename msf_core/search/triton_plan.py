"""How the Triton search is launched: sizes of groups, tiles and batches, all of them by plain arithmetic.

Which tiles spill no registers and fit, the tests compile for GPUs that are not here (tests/test_triton_compiled.py).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

EXACT_DTYPES = (torch.float16, torch.bfloat16)  # the first pass multiplies them exactly
MAXIMA_BYTES = 40 << 20  # of the maxima that are held at once
SELECT_WARPS = 8
BATCH_ROWS = 256  # rows that `select` looks at together, at most
BATCH_BYTES = 32 << 10  # of them that it loads at once; with more, only one program fits a multiprocessor
LEAST_GROUPS = 32  # beyond k that are looked at before the precise pass
PRECISE_COST = 4  # of the precise pass, in passes over float32 rows; an estimate
PROGRAMS = 2  # of the precise pass on each multiprocessor


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
    """Values of each of their rows that it loads at once."""

    @property
    def stride(self) -> int:
        """Distance between the lines of the maxima, [at_once, stride]."""
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
    """Return how to search.

    Args:
        count: queries.
        n: rows, [n, dim] of that dtype.
        dim: D.
        k: neighbors.
        dtype: of the rows.
        own: rows of its own that a query leaves out.
        shared_memory: bytes that a program may have.
        processors: multiprocessors of the device.
        group: rows of a group; by default those of `choose_group`.
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


def precise_tiles_for(count: int, dim: int) -> Tiles:
    """Return the tiles of the precise pass, which splits every value into two of TF32."""
    queries = min(64, max(16, _power_of_two(count)))
    return Tiles(queries, 128, max(16, min(32, _power_of_two(dim))), warps=8, stages=2)


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
