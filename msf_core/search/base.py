"""What a search backend is, and what all of them share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@runtime_checkable
class SearchBackend(Protocol):
    """Anything with this method can serve as ``MemoryBank(backend=...)``."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest inner products of every query with the rows.

        Args:
            queries: [Q, D], in the dtype and on the device of ``rows``.
            rows: [n, D], contiguous, float32, float16 or bfloat16, none longer than a unit vector but for rounding.
                Searched where it lies: no copy of its size.
            k: between 1 and n.

        Returns:
            similarity [Q, k] float32, descending; index [Q, k] int64 into ``rows``. Products are accumulated in
            float32. A row that holds a NaN is never found: where fewer than k other rows are there, the last
            similarities are −inf with index −1.
        """
        ...


def check_topk_arguments(queries: Tensor, rows: Tensor, k: int) -> None:
    """Raise ValueError or TypeError where the arguments are not as `SearchBackend.topk` has them."""
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(
            f"queries and rows must be [Q, D] and [n, D], got {list(queries.shape)} and {list(rows.shape)}"
        )
    if rows.dtype not in ROW_DTYPES:
        raise TypeError(f"rows must be float32, float16 or bfloat16, got {rows.dtype}")
    if queries.dtype != rows.dtype:
        raise TypeError(f"queries must have the dtype of the rows, {rows.dtype}, got {queries.dtype}")
    if queries.device != rows.device:
        raise ValueError(f"queries must be on the device of the rows, {rows.device}, got {queries.device}")
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k must be between 1 and the number of rows, {rows.shape[0]}, got {k}")


class RunningTopk:
    """The k best of all the candidates seen so far, a chunk of rows at a time."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.k = k
        self.similarity = queries.new_empty((queries.shape[0], 0), dtype=torch.float32)  # [Q, ≤ k]
        self.index = queries.new_empty((queries.shape[0], 0), dtype=torch.int64)  # [Q, ≤ k]

    def merge(self, similarity: Tensor, index: Tensor) -> None:
        """Take candidates [Q, c] in."""
        similarity = torch.cat([self.similarity, similarity], dim=1)
        index = torch.cat([self.index, index], dim=1)
        self.similarity, best = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
        self.index = index.gather(1, best)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return (similarity [Q, k], index [Q, k]), with index −1 where the similarity is −inf."""
        return self.similarity, self.index.masked_fill(self.similarity == -torch.inf, -1)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast, TF32 and bfloat16 arithmetic off: float32 products are float32 products."""
    if not hasattr(torch.backends, "fp32_precision"):  # before PyTorch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    reduced = {}
    matmuls: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    for backend in matmuls:
        if backend.fp32_precision not in ("ieee", "none"):
            # A value that is inherited is given back as inherited.
            inherited = backend.fp32_precision == torch.backends.fp32_precision
            reduced[backend] = "none" if inherited else backend.fp32_precision
            backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in reduced.items():
            backend.fp32_precision = precision
