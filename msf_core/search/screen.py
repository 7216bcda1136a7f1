"""Exact search on CPUs that multiply bfloat16 natively: a screen in bfloat16 that leaves few rows to look at.

Rows that follow one another form groups. The products of all rows are computed in bfloat16, several times faster
than in float32, and only the largest of each group is kept. A group whose maximum, with the most that rounding can
have taken off, reaches the k-th best found for sure may hold a neighbor: its rows are multiplied again in float32.

How far a product s̃ of the screen is from q·r, for rows no longer than unit vectors (Cauchy-Schwarz; rounding to
bfloat16 is off by at most 2⁻⁸ of the value):

    |s̃ − q·r| ≤ ‖q − bfloat16(q)‖  +  2⁻⁸·‖q‖  +  D·2⁻²²·‖q‖  +  2⁻⁸·|s̃|
                 rounding of q        of r         of the sum      of the result, which keeps the order

Int8 rows are screened in whole numbers, several times faster again: the queries are rounded to int8 too, and what that
takes off them stands for the first three terms.

Where so many rows are nearly as similar as the k-th that the screen leaves too many, as from a collapsed encoder, the
search goes on without it. The first and the last rows of a block tell that before all of it is screened, and the cost
of multiplying rows again is bounded for the whole search: it takes at most about half as long again as without a
screen.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from msf_core.search.base import Queries, Rows, RunningTopk, exact_float32, rounded_to_int8, without_autocast

GROUP = 16  # rows
CHUNK_ROWS = 2048  # whose bfloat16 copies and products stay in the cache
MOST_QUERIES = 512  # at once
# Rows whose maxima are kept before the candidates among them are looked at: at first the k-th best of one block is
# all that is known, so it has many rows for each neighbor.
BLOCK_ROWS_FOR_EACH_NEIGHBOR, LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS = 1024, 32768, 131072
CANDIDATE_BYTES = 32 << 20  # of one block's candidates
AGAIN_BYTES = 4 << 20  # of rows that are multiplied again at once
# A row multiplied again costs as much as AGAIN / (1 + AGAIN_QUERIES / Q + AGAIN_NEIGHBORS · k / D) rows of a float32
# search. Measured on a Xeon with AMX, D of 256 and 512, k = 5: 21 to 44 for 256 queries and more, 5 to 10 for 8.
AGAIN, AGAIN_QUERIES, AGAIN_NEIGHBORS = 35.0, 15, 6
# Rows multiplied again may cost as much as a float32 search of SAVED of the rows so far, what the screen has saved, and
# of MORE of all rows, for the first block leaves most. With LEAST_QUERIES the screen of float32 rows saves nothing.
SAVED, MORE = 0.7, 0.3
DOUBT = 1.25  # times as many rows as may be left: so many those chunks must promise for a block to be given up
LEAST_QUERIES, LEAST_ROWS_FOR_EACH_NEIGHBOR = 8, 800  # benchmarks/results/cpu_auto.md
# Below these the screen of random rows took 1.1 to 7 times as long as float32 products: on a Xeon with AMX, two
# threads, for D of 64 to 512, 16 to 256 queries, k of 1 and 5.
LEAST_ROWS, LEAST_WORK = 8192, 1 << 27  # the work is Q·n·D
LEAST_FLOAT16_QUERIES = 256  # float16 to bfloat16 takes longer than a product with few queries
ROUNDING = 2.0**-8

Search = Callable[[Queries, Rows, int], tuple[Tensor, Tensor]]


@cache
def is_fast() -> bool:
    """Tell whether this CPU has instructions for products of bfloat16 values."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def screen_pays(queries: Tensor, rows: Tensor, k: int) -> bool:
    """Tell whether the screen makes a search faster: on a CPU that has those instructions, from some size on."""
    least = LEAST_FLOAT16_QUERIES if rows.dtype == torch.float16 else LEAST_QUERIES
    n = rows.shape[0]
    large = n >= LEAST_ROWS and queries.numel() * n >= LEAST_WORK
    large = large and queries.shape[0] >= least and n >= LEAST_ROWS_FOR_EACH_NEIGHBOR * k
    return large and rows.device.type == "cpu" and is_fast()


@torch.no_grad()
def screened_search(queries: Queries, rows: Rows, k: int, otherwise: Search) -> tuple[Tensor, Tensor]:
    """Search as `GeneralSearch.general_topk` does, on the CPU; ``otherwise`` searches what the screen does not save."""
    parts = []
    device = rows.values.device
    with without_autocast(device), exact_float32(device):
        for start in range(0, queries.values.shape[0], MOST_QUERIES):
            parts.append(_search(queries.at(slice(start, start + MOST_QUERIES)), rows, k, otherwise))
    return torch.cat([similarity for similarity, _ in parts]), torch.cat([index for _, index in parts])


def _search(queries: Queries, rows: Rows, k: int, otherwise: Search) -> tuple[Tensor, Tensor]:
    best = RunningTopk(queries.values, k)
    screen = _Screen(queries, rows, best)
    n = rows.values.shape[0]
    whole = n - n % GROUP
    block = min(max(LEAST_BLOCK_ROWS, BLOCK_ROWS_FOR_EACH_NEIGHBOR * k), MOST_BLOCK_ROWS)
    done = 0
    while done < whole and screen.search(rows.part(done, min(done + block, whole)), done):
        done = min(done + block, whole)
    if done < n:
        rest = rows.part(done, n)
        similarity, index = otherwise(queries, rest, min(k, n - done))
        best.merge(similarity, torch.where(index < 0, index, index + done))
    return best.result()


class _Screen:
    """The screen of one search, fed with blocks of rows; what it finds goes into ``best``."""

    def __init__(self, queries: Queries, rows: Rows, best: RunningTopk) -> None:
        self.best = best
        self.n, self.pairs = rows.values.shape[0], 0  # rows of the search; groups that queries looked at again, so far
        self.constraints = queries
        self.queries = queries.values.float()  # [Q, D]
        count, dim = self.queries.shape
        length = torch.linalg.vector_norm(self.queries, dim=1)
        # Every new tensor is made from one that is there: users set default dtypes and devices.
        if rows.scale is not None:
            whole, step, self.error = rounded_to_int8(self.queries)
            self.rounded, self.step = whole.T.contiguous(), step.nan_to_num_().clamp_(min=1e-30)
            self.whole = self.rounded.new_empty(CHUNK_ROWS, count, dtype=torch.int32)
            self.products = self.queries.new_empty(CHUNK_ROWS, count)
        else:
            rounded = self.queries.bfloat16().nan_to_num_()
            rounding = torch.linalg.vector_norm(self.queries - rounded.float(), dim=1)
            of_rows = 0.0 if rows.values.dtype == torch.bfloat16 else ROUNDING
            # [Q], with 1 % for rows of half precision, which may be a little longer than 1; NaN for a query with NaN
            self.error = 1.01 * (rounding + of_rows * length)
            self.rounded = rounded.T
            self.products = rounded.new_empty(CHUNK_ROWS, count)
            self.rows = rounded.new_empty(CHUNK_ROWS, dim)
        self.error += 1.01 * dim * 2.0**-22 * length

    def search(self, rows: Rows, offset: int) -> bool:
        """Take rows [c · GROUP, D] in; return False, having done nothing, where the screen leaves too many."""
        done = offset + rows.values.shape[0]
        maxima = self._maxima(rows, done)
        if maxima is None:
            return False
        wanted = self._wanted(maxima, self.best.k)
        counts = wanted.sum(dim=0)  # [Q]
        if not self._affordable(counts, done):
            return False
        group, query = wanted.nonzero(as_tuple=True)  # [p] each, by group: rows are read in their order
        self.pairs += group.shape[0]
        self._merge(self._again(rows, query, group), group, query, counts, offset)
        return True

    def _maxima(self, rows: Rows, done: int) -> Tensor | None:
        """Return the largest product of each group, [groups, Q]; None where the first and last show too many wanted."""
        n, k = rows.values.shape[0], self.best.k
        maxima = self.queries.new_empty(n // GROUP, self.queries.shape[0], dtype=torch.bfloat16)
        first, last = CHUNK_ROWS, (n - 1) // CHUNK_ROWS * CHUNK_ROWS
        if first >= last:
            self._fill(maxima, rows, 0, n)
            return maxima
        self._fill(maxima, rows, 0, first)
        self._fill(maxima, rows, last, n)
        sample = torch.cat([maxima[: first // GROUP], maxima[last // GROUP :]])
        # Among a part of the groups the one of that rank stands for the k-th best of the block.
        rank = -(-k * len(sample) // len(maxima))
        promised = self._wanted(sample, rank).sum(dim=0) * (len(maxima) / (len(sample) * DOUBT))
        if not self._affordable(promised, done):
            return None
        self._fill(maxima, rows, first, last)
        return maxima

    def _merge(self, products: Tensor, group: Tensor, query: Tensor, counts: Tensor, offset: int) -> None:
        """Merge the rows of the wanted groups into the best.

        Args:
            products: [p, GROUP] float32, of each pair of a query and a group.
            group: [p], of the block.
            query: [p].
            counts: [Q], pairs of each query.
            offset: of the block's first row.
        """
        most = max(int(counts.max()), -(-self.best.k // GROUP))
        similarity = self.queries.new_full((counts.shape[0], most, GROUP), -torch.inf)
        index = group.new_full((counts.shape[0], most, GROUP), -1)
        rank = _rank_within(query, counts)
        similarity[query, rank] = products
        index[query, rank] = group[:, None] * GROUP + torch.arange(GROUP, device=group.device) + offset
        self.best.merge(similarity.flatten(1), index.flatten(1))

    def _affordable(self, counts: Tensor, done: int) -> bool:
        """Tell whether so many groups of each query, [Q], may be multiplied again, the rows before ``done`` being so.

        Both their time, with that of the groups before them, and the memory that holds their rows are bounded.
        """
        (count, dim), k = self.queries.shape, self.best.k
        selection = 0.0 if self.constraints.constrained else AGAIN_NEIGHBORS * k / dim  # fast among few rows
        cost = AGAIN / (1 + AGAIN_QUERIES / count + selection)
        again = cost * GROUP * (self.pairs + float(counts.sum())) / count
        candidates = float(counts.max()) * count * GROUP * (4 + 8)
        saved = SAVED * max(0.0, 1 - LEAST_QUERIES / count) * done
        return again <= saved + MORE * self.n and candidates <= CANDIDATE_BYTES

    def _wanted(self, maxima: Tensor, rank: int) -> Tensor:
        """Tell which groups may hold a neighbor, bool as ``maxima``, if the k-th best reaches the rank-th of them."""
        # A NaN row hides the others of its group; −inf is a group without a row that may be found.
        return ((maxima >= self._least(maxima, rank)) & (maxima > -torch.inf)).logical_or_(maxima.isnan())

    def _least(self, maxima: Tensor, rank: int) -> Tensor:
        """Return the least product of the screen, [Q] bfloat16, that may belong to one of the ``rank`` nearest."""
        surely = torch.full_like(self.error, -torch.inf)  # [Q], the k-th best is at least that
        if maxima.shape[0] >= rank:
            kth = maxima.masked_fill(maxima.isnan(), -torch.inf).topk(rank, dim=0).values[-1].float()
            surely = kth - self.error - 1.01 * ROUNDING * kth.abs()
        if self.best.similarity.shape[1] == self.best.k:
            surely = torch.maximum(surely, self.best.similarity[:, -1])
        return (surely - self.error).bfloat16()  # rounded as the products were, so none of them falls below it

    def _fill(self, maxima: Tensor, rows: Rows, begin: int, end: int) -> None:
        """Write the largest product of each group, [groups, Q] bfloat16, for the rows from begin to end.

        It is NaN where the group has a NaN.
        """
        count = self.queries.shape[0]
        for start in range(begin, min(end, rows.values.shape[0]), CHUNK_ROWS):
            part = rows.part(start, start + CHUNK_ROWS)
            products = self._products(part)
            forbidden = self.constraints.forbidden(part.labels, part.ids)
            if forbidden is not None:
                products.masked_fill_(forbidden.T, -torch.inf)
            largest = products.view(-1, GROUP, count).amax(dim=1)
            if part.scale is not None:
                largest *= self.step
            maxima[start // GROUP : (start + CHUNK_ROWS) // GROUP] = largest

    def _products(self, rows: Rows) -> Tensor:
        """Return products [c, Q] of rows and rounded queries; of int8 rows as multiples of the query's step."""
        values, size = rows.values, rows.values.shape[0]
        if rows.scale is not None:
            whole = torch._int_mm(values, self.rounded, out=self.whole[:size])
            return torch.mul(whole, rows.scale[:, None], out=self.products[:size])
        if values.dtype != torch.bfloat16:
            values = self.rows[:size].copy_(values)
        return torch.mm(values, self.rounded, out=self.products[:size])

    def _again(self, rows: Rows, query: Tensor, group: Tensor) -> Tensor:
        """Return the float32 products of the pairs, [p, GROUP]; −inf for NaN and for rows that may not be found."""
        dim = rows.values.shape[1]
        groups = rows.values.view(-1, GROUP * dim)
        step = max(1, AGAIN_BYTES // (4 * GROUP * dim))
        result = self.queries.new_empty(query.shape[0], 1, GROUP)
        buffer = rows.values.new_empty(step, GROUP * dim)
        for start in range(0, query.shape[0], step):
            part = group[start : start + step]
            torch.index_select(groups, 0, part, out=buffer[: part.shape[0]])
            values = buffer[: part.shape[0]].float().view(-1, GROUP, dim)
            q = self.queries[query[start : start + step]]
            torch.bmm(q[:, None], values.transpose(1, 2), out=result[start : start + step])
        products = result[:, 0]

        def of_groups(beside: Tensor | None) -> Tensor | None:
            return None if beside is None else beside.view(-1, GROUP)[group]

        scale = of_groups(rows.scale)
        if scale is not None:
            products *= scale
        forbidden = self.constraints.at(query).forbidden(of_groups(rows.labels), of_groups(rows.ids))
        if forbidden is not None:
            products.masked_fill_(forbidden, -torch.inf)
        return products.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _rank_within(query: Tensor, counts: Tensor) -> Tensor:
    """Return how many earlier pairs have the same query, for each pair: [2, 0, 2, 2] → [0, 0, 1, 2].

    Args:
        query: [p], in any order.
        counts: [Q], how often each occurs.
    """
    by_query = query.argsort(stable=True)
    begins = counts.cumsum(0) - counts  # [Q], of each query's pairs in that order
    rank = torch.empty_like(query)
    rank[by_query] = torch.arange(query.shape[0], device=query.device) - begins[query[by_query]]
    return rank
