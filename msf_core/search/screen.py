"""Exact search on CPUs with fast bfloat16 products: a screen in bfloat16 leaves only a few rows for float32.

Consecutive rows form groups. The products of a query q with all rows are computed in bfloat16, several times faster
than in float32, and only the largest product of each group is kept. If this maximum plus the largest possible rounding
error reaches a lower bound of the k-th best product, the group can contain a neighbor. The products of such groups are
computed again in float32.

For a row r no longer than 1, the error of a product s̃ of the screen is bounded as follows (Cauchy-Schwarz; rounding to
bfloat16 changes a value by at most 2⁻⁸ of it):

    |s̃ − q·r| ≤ ‖q − bfloat16(q)‖  +  2⁻⁸·‖q‖  +  D·2⁻²²·‖q‖  +  2⁻⁸·|s̃|
                 rounding of q        of r         of the sum      of the result, which keeps the order

Int8 rows are screened in integers, which is several times faster again. The queries are rounded to int8 too, and the
norm of their rounding error replaces the first three terms.

If too many rows are nearly as similar as the k-th best, for example from a collapsed encoder, the search continues
without the screen. The first and last rows of a block show this before the rest is screened. The cost of computing
products again is bounded for the whole search, so it takes at most about 1.5 times as long as without a screen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from msf_core.search.base import Queries, Rows, RunningTopk, exact_float32, rounded_to_int8, without_autocast
from msf_core.search.cpu import multiplies_bfloat16_fast, multiplies_int8_fast

GROUP = 16  # rows
CHUNK_ROWS = 2048  # rows whose bfloat16 copies and products fit into the cache
MOST_QUERIES = 512  # searched at once
# A block is the rows whose maxima are kept before their candidates are computed again. At first, only the k-th best of
# one block is known, so a block has many rows per neighbor.
BLOCK_ROWS_FOR_EACH_NEIGHBOR, LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS = 1024, 32768, 131072
CANDIDATE_BYTES = 32 << 20  # of one block's candidates
AGAIN_BYTES = 4 << 20  # of rows whose products are computed again at once
# Computing a row's product again costs as much as AGAIN / (1 + AGAIN_QUERIES / Q + AGAIN_NEIGHBORS · k / D) rows of a
# float32 search. Measured on a Xeon with AMX, D of 256 and 512, k = 5: 21 to 44 for 256 queries or more, 5 to 10 for 8.
AGAIN, AGAIN_QUERIES, AGAIN_NEIGHBORS = 35.0, 15, 6
# Computing products again may cost as much as a float32 search of a share SAVED of the rows so far (the time that the
# screen saves) plus a share MORE of all rows (because the first block leaves the most groups). With LEAST_QUERIES
# queries, the screen of float32 rows saves no time.
SAVED, MORE = 0.7, 0.3
DOUBT = 1.25  # a block is given up if its first and last chunks predict this many times the allowed rows
LEAST_QUERIES, LEAST_ROWS_FOR_EACH_NEIGHBOR = 8, 800  # from benchmarks/results/cpu_auto.md
# Below these limits, the screen of random rows took 1.1 to 7 times as long as float32 products (Xeon with AMX, two
# threads, D of 64 to 512, 16 to 256 queries, k of 1 and 5).
LEAST_ROWS, LEAST_WORK = 8192, 1 << 27  # the work is Q·n·D
LEAST_FLOAT16_QUERIES = 256  # with fewer, converting float16 to bfloat16 takes longer than the products
ROUNDING = 2.0**-8

Search = Callable[[Queries, Rows, int], tuple[Tensor, Tensor]]


def screen_pays(queries: Tensor, rows: Tensor, k: int) -> bool:
    """Return whether the screen makes this search faster: a large search on a CPU with fast low-precision products."""
    least = LEAST_FLOAT16_QUERIES if rows.dtype == torch.float16 else LEAST_QUERIES
    n = rows.shape[0]
    large = n >= LEAST_ROWS and queries.numel() * n >= LEAST_WORK
    large = large and queries.shape[0] >= least and n >= LEAST_ROWS_FOR_EACH_NEIGHBOR * k
    is_fast = multiplies_int8_fast if rows.dtype == torch.int8 else multiplies_bfloat16_fast
    return large and rows.device.type == "cpu" and is_fast()


@torch.no_grad()
def screened_search(queries: Queries, rows: Rows, k: int, otherwise: Search) -> tuple[Tensor, Tensor]:
    """Search like `GeneralSearch.general_topk` on a CPU; ``otherwise`` searches rows for which the screen is slow."""
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
    """The screen of one search, which gets blocks of rows and merges its results into ``best``."""

    def __init__(self, queries: Queries, rows: Rows, best: RunningTopk) -> None:
        self.best = best
        self.n, self.pairs = rows.values.shape[0], 0  # number of rows; (query, group) pairs computed again so far
        self.constraints = queries
        self.queries = queries.values.float()  # [Q, D]
        count, dim = self.queries.shape
        length = torch.linalg.vector_norm(self.queries, dim=1)
        # Create new tensors from existing ones, because users may set default dtypes and devices.
        if rows.scale is not None:
            whole, step, self.error = rounded_to_int8(self.queries)
            self.rounded, self.step = whole.T.contiguous(), step.nan_to_num_().clamp_(min=1e-30)
            self.whole = self.rounded.new_empty(CHUNK_ROWS, count, dtype=torch.int32)
            self.products = self.queries.new_empty(CHUNK_ROWS, count)
        else:
            rounded = self.queries.bfloat16().nan_to_num_()
            rounding = torch.linalg.vector_norm(self.queries - rounded.float(), dim=1)
            of_rows = 0.0 if rows.values.dtype == torch.bfloat16 else ROUNDING
            # [Q], plus 1 % because half-precision rows can be slightly longer than 1; NaN for a query with NaN
            self.error = 1.01 * (rounding + of_rows * length)
            self.rounded = rounded.T
            self.products = rounded.new_empty(CHUNK_ROWS, count)
            self.rows = rounded.new_empty(CHUNK_ROWS, dim)
        self.error += 1.01 * dim * 2.0**-22 * length

    def search(self, rows: Rows, offset: int) -> bool:
        """Search rows [c · GROUP, D]. If the screen leaves too many groups, do nothing and return False."""
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
        """Return the largest product of each group, [groups, Q]; None if the first and last chunks leave too many."""
        n, k = rows.values.shape[0], self.best.k
        maxima = self.queries.new_empty(n // GROUP, self.queries.shape[0], dtype=torch.bfloat16)
        first, last = CHUNK_ROWS, (n - 1) // CHUNK_ROWS * CHUNK_ROWS
        if first >= last:
            self._fill(maxima, rows, 0, n)
            return maxima
        self._fill(maxima, rows, 0, first)
        self._fill(maxima, rows, last, n)
        sample = torch.cat([maxima[: first // GROUP], maxima[last // GROUP :]])
        # In this sample of the groups, the maximum with this rank estimates the k-th best of the block.
        rank = -(-k * len(sample) // len(maxima))
        promised = self._wanted(sample, rank).sum(dim=0) * (len(maxima) / (len(sample) * DOUBT))
        if not self._affordable(promised, done):
            return None
        self._fill(maxima, rows, first, last)
        return maxima

    def _merge(self, products: Tensor, group: Tensor, query: Tensor, counts: Tensor, offset: int) -> None:
        """Merge the rows of the wanted groups into the best candidates.

        Args:
            products: [p, GROUP] float32, the products of p pairs of a query and a group.
            group: [p], the group of each pair, within the block.
            query: [p], the query of each pair.
            counts: [Q], the number of pairs of each query.
            offset: index of the block's first row.
        """
        most = max(int(counts.max()), -(-self.best.k // GROUP))
        similarity = self.queries.new_full((counts.shape[0], most, GROUP), -torch.inf)
        index = group.new_full((counts.shape[0], most, GROUP), -1)
        rank = _rank_within(query, counts)
        similarity[query, rank] = products
        index[query, rank] = group[:, None] * GROUP + torch.arange(GROUP, device=group.device) + offset
        self.best.merge(similarity.flatten(1), index.flatten(1))

    def _affordable(self, counts: Tensor, done: int) -> bool:
        """Return whether this many groups of each query, [Q], may be computed again after ``done`` screened rows.

        This bounds both the time, including that for earlier groups, and the memory of the candidates.
        """
        (count, dim), k = self.queries.shape, self.best.k
        selection = 0.0 if self.constraints.constrained else AGAIN_NEIGHBORS * k / dim  # fast among few rows
        cost = AGAIN / (1 + AGAIN_QUERIES / count + selection)
        again = cost * GROUP * (self.pairs + float(counts.sum())) / count
        candidates = float(counts.max()) * count * GROUP * (4 + 8)
        saved = SAVED * max(0.0, 1 - LEAST_QUERIES / count) * done
        return again <= saved + MORE * self.n and candidates <= CANDIDATE_BYTES

    def _wanted(self, maxima: Tensor, rank: int) -> Tensor:
        """Return a bool mask like ``maxima`` of the groups that can contain one of the ``rank`` nearest rows."""
        # A NaN hides the other rows of its group; −inf means that all rows of the group are excluded.
        return ((maxima >= self._least(maxima, rank)) & (maxima > -torch.inf)).logical_or_(maxima.isnan())

    def _least(self, maxima: Tensor, rank: int) -> Tensor:
        """Return the least product of the screen, [Q] bfloat16, that can belong to one of the ``rank`` nearest rows."""
        surely = torch.full_like(self.error, -torch.inf)  # [Q], a lower bound of the k-th best
        if maxima.shape[0] >= rank:
            kth = maxima.masked_fill(maxima.isnan(), -torch.inf).topk(rank, dim=0).values[-1].float()
            surely = kth - self.error - 1.01 * ROUNDING * kth.abs()
        if self.best.similarity.shape[1] == self.best.k:
            surely = torch.maximum(surely, self.best.similarity[:, -1])
        return (surely - self.error).bfloat16()  # rounded like the products, so none of them falls below it

    def _fill(self, maxima: Tensor, rows: Rows, begin: int, end: int) -> None:
        """Write the largest product of each group, [groups, Q] bfloat16, for the rows from begin to end.

        It is NaN if the group has a NaN.
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
        """Return products [c, Q] of rows and rounded queries; for int8 rows, in multiples of the query's step."""
        values, size = rows.values, rows.values.shape[0]
        if rows.scale is not None:
            whole = torch._int_mm(values, self.rounded, out=self.whole[:size])
            return torch.mul(whole, rows.scale[:, None], out=self.products[:size])
        if values.dtype != torch.bfloat16:
            values = self.rows[:size].copy_(values)
        return torch.mm(values, self.rounded, out=self.products[:size])

    def _again(self, rows: Rows, query: Tensor, group: Tensor) -> Tensor:
        """Return the float32 products of (query, group) pairs, [p, GROUP]; −inf for NaN and for excluded rows."""
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
    """Return, for each pair, how many earlier pairs have the same query: [2, 0, 2, 2] → [0, 0, 1, 2].

    Args:
        query: [p], in any order.
        counts: [Q], how often each query occurs.
    """
    by_query = query.argsort(stable=True)
    begins = counts.cumsum(0) - counts  # [Q], where each query's pairs begin in that order
    rank = torch.empty_like(query)
    rank[by_query] = torch.arange(query.shape[0], device=query.device) - begins[query[by_query]]
    return rank
