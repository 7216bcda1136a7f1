"""The "auto" backend, which chooses a backend at every search, by device, size and installed packages."""

from functools import cache, partial
from typing import cast

from torch import Tensor

from msf_core.search.base import GeneralSearch, Queries, Rows, SearchBackend, check_search_arguments
from msf_core.search.cpu import is_intel
from msf_core.search.general import leaving_out_own, search_by
from msf_core.search.registry import load_backend, most_neighbors, why_not
from msf_core.search.screen import screen_pays, screened_search
from msf_core.search.trial import TriedSearch

# From benchmarks/results/cpu_auto.md, on two AMD cores. FAISS multiplies blocks of 1,024 rows. If Q·D is at least this
# value, its OpenBLAS reaches full speed, and it is 1.2 to 1.8 times as fast as PyTorch's product and top-k
# (knn_cost_cpu.md); otherwise it takes up to 3 times as long.
FAISS_LEAST_WORK = 256 * 512
# At full speed, FAISS is faster than the screen if the bank has fewer rows per neighbor than this.
SCREEN_LEAST_ROWS = 1000
# For many neighbors from few, short rows, the selection dominates, and FAISS's is faster.
SELECTION_MOST_DIM, SELECTION_MOST_ROWS, SELECTION_LEAST_NEIGHBORS = 256, 400, 50


class AutoSearch:
    """`GeneralSearch` that uses the fastest search measured for each size."""

    leaves_out_own = True

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        return self.general_topk(Queries(queries), Rows(rows), k)

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """See `GeneralSearch.general_topk`."""
        chosen = self.choose(queries, rows, k)
        if screen_pays(queries.values, rows.values, k):
            fast_faiss = chosen is not load_backend("torch") and rows.values.shape[0] < SCREEN_LEAST_ROWS * k
            if not fast_faiss:
                check_search_arguments(queries, rows, k)
                screened = partial(screened_search, otherwise=partial(search_by, chosen))
                return leaving_out_own(screened, queries, rows, k)
        return search_by(chosen, queries, rows, k)

    def choose(self, queries: Queries, rows: Rows, k: int) -> SearchBackend:
        """Return the backend for k neighbors of the queries among the rows, if the screen is not used."""
        device = queries.values.device.type
        if device == "cpu" and _suits_faiss(queries, rows, k) and why_not("faiss", "cpu") is None:
            return load_backend("faiss")
        if device == "cuda" and why_not("triton", "cuda") is None and k <= _most_of_triton():
            return tried_triton()
        return load_backend("torch")


@cache
def tried_triton() -> TriedSearch:
    """Return the search that uses Triton if it passes a trial on the device, and torch otherwise; one per process."""
    return TriedSearch(cast(GeneralSearch, load_backend("triton")), cast(GeneralSearch, load_backend("torch")))


def _most_of_triton() -> int:
    return most_neighbors(load_backend("triton"), "cuda") or 0


def _suits_faiss(queries: Queries, rows: Rows, k: int) -> bool:
    if queries.constrained or rows.scale is not None:  # FAISS does not support these
        return False
    if is_intel():  # on a Xeon, FAISS took 3 to 14 times as long as PyTorch (knn_cost_xeon.md)
        return False
    n, dim = rows.values.shape
    selects = dim <= SELECTION_MOST_DIM and n < SELECTION_MOST_ROWS * k
    large = queries.values.numel() >= FAISS_LEAST_WORK
    return large or (selects and k >= SELECTION_LEAST_NEIGHBORS)
