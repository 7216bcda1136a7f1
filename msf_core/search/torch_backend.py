"""Exact search by PyTorch's matrix product and top-k, one chunk of rows at a time; large CPU searches use `screen`."""

from functools import partial

import torch
from torch import Tensor

from msf_core.search.base import (
    Queries,
    Rows,
    RunningTopk,
    check_search_arguments,
    exact_float32,
    may_look,
    without_autocast,
)
from msf_core.search.general import leaving_out_own
from msf_core.search.screen import screen_pays, screened_search

# Maximum bytes of one chunk of rows, and of its products, in float32: they should fit into a CPU's cache, or keep a GPU
# busy.
CPU_CHUNK_BYTES = 4 << 20
CUDA_CHUNK_BYTES = 32 << 20
# With fewer rows in a chunk, selecting k of them takes longer than their products (Intel Xeon, k = 50).
CPU_CHUNK_ROWS_FOR_EACH_NEIGHBOR, CPU_MOST_CHUNKS_IN_ONE = 160, 4


class TorchSearch:
    """`SearchBackend` in plain PyTorch for any device. The extra memory is bounded by one chunk."""

    leaves_out_own = True

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        return self.general_topk(Queries(queries.detach()), Rows(rows.detach()), k)

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """See `GeneralSearch.general_topk`."""
        check_search_arguments(queries, rows, k)
        if screen_pays(queries.values, rows.values, k):
            return leaving_out_own(partial(screened_search, otherwise=float32_search), queries, rows, k)
        return float32_search(queries, rows, k)


def float32_search(queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Search like `GeneralSearch.general_topk`, without the screen."""
    n = rows.values.shape[0]
    chunk_bytes = CUDA_CHUNK_BYTES if rows.values.is_cuda else CPU_CHUNK_BYTES
    chunk = max(1024, chunk_bytes // (4 * max(queries.values.shape)))
    if not rows.values.is_cuda:
        chunk = min(max(chunk, CPU_CHUNK_ROWS_FOR_EACH_NEIGHBOR * k), CPU_MOST_CHUNKS_IN_ONE * chunk)
    device = rows.values.device
    with without_autocast(device), exact_float32(device):
        if n <= chunk:
            return _one_chunk(queries, rows, k)
        return leaving_out_own(partial(_chunks, chunk=chunk), queries, rows, k)


def _chunks(queries: Queries, rows: Rows, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    best = RunningTopk(queries.values, k)
    for start in range(0, rows.values.shape[0], chunk):
        part = rows.part(start, start + chunk)
        similarity, index = _without_nan(_products(queries, part)).topk(min(k, part.values.shape[0]), dim=1)
        best.merge(similarity, index + start)
    return best.result()


def _one_chunk(queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    products = _products(queries, rows)
    if queries.own is not None:
        products.scatter_(1, queries.own, -torch.inf)
    if may_look(products):  # usually no neighbor is missing
        similarity, index = products.max(dim=1, keepdim=True) if k == 1 else products.topk(k, dim=1)
        if not index.shape[0] or similarity.min().item() > -torch.inf:
            return similarity, index
    similarity, index = _without_nan(products).topk(k, dim=1)
    return similarity, index.masked_fill_(similarity == -torch.inf, -1)


def _without_nan(products: Tensor) -> Tensor:
    """Replace NaN with −inf in place, because top-k ranks NaN first."""
    return products.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _products(queries: Queries, rows: Rows) -> Tensor:
    """Return the products [Q, c] in float32; −inf for excluded rows, NaN for rows with NaN."""
    products = _all_products(queries.values, rows)
    forbidden = queries.forbidden(rows.labels, rows.ids)
    return products if forbidden is None else products.masked_fill_(forbidden, -torch.inf)


def _all_products(queries: Tensor, rows: Rows) -> Tensor:
    """Return queries · rowsᵀ [Q, c] in float32; half-precision values are accumulated in float32."""
    if queries.dtype == torch.float32:
        return queries @ rows.floats().T
    if queries.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(queries, rows.values.T, out_dtype=torch.float32)
    return queries.float() @ rows.floats().T
