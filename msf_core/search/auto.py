"""The choice that "auto" makes, at every search: by device, size and what is installed."""

from torch import Tensor

from msf_core.search.base import SearchBackend, check_topk_arguments
from msf_core.search.registry import load_backend, why_not
from msf_core.search.screen import screen_pays, screened_topk

# FAISS multiplies blocks of 1,024 rows. On a CPU its OpenBLAS does so at full speed from this many Q·D on, 1.3 to
# 1.5 times faster than PyTorch; below it is up to 4 times slower (benchmarks/results/cpu_auto.md).
FAISS_LEAST_WORK = 256 * 512
TRITON_MOST_NEIGHBORS = 256


class AutoSearch:
    """`SearchBackend` that hands each search to the fastest one measured for its size."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        check_topk_arguments(queries, rows, k)
        chosen = self.choose(queries, k)
        if screen_pays(queries, rows, k):
            return screened_topk(queries.detach(), rows.detach(), k, otherwise=chosen.topk)
        return chosen.topk(queries, rows, k)

    def choose(self, queries: Tensor, k: int) -> SearchBackend:
        """Return the backend for k neighbors of these queries [Q, D], where `screened_topk` is not the fastest."""
        device = queries.device.type
        if device == "cpu" and queries.numel() >= FAISS_LEAST_WORK and why_not("faiss", "cpu") is None:
            return load_backend("faiss")
        if device == "cuda" and k <= TRITON_MOST_NEIGHBORS and why_not("triton", "cuda") is None:
            return load_backend("triton")
        return load_backend("torch")
