"""Exact search by PyTorch's matrix product and top-k, a chunk of rows at a time; large ones on a CPU by `screen`."""

import torch
from torch import Tensor

from msf_core.search.base import Queries, Rows, RunningTopk, check_search_arguments, exact_float32
from msf_core.search.screen import screen_pays, screened_search

# Bytes of one chunk of rows and of its products, as float32: they should stay in a CPU's cache, and keep a GPU busy.
CPU_CHUNK_BYTES = 4 << 20
CUDA_CHUNK_BYTES = 32 << 20


class TorchSearch:
    """`SearchBackend` on plain PyTorch: any device, extra memory bounded by one chunk."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        return self.general_topk(Queries(queries), Rows(rows), k)

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """See `GeneralSearch.general_topk`."""
        check_search_arguments(queries, rows, k)
        if screen_pays(queries.values, rows.values, k):
            return screened_search(queries, rows, k, otherwise=float32_search)
        return float32_search(queries, rows, k)


@torch.no_grad()
def float32_search(queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Search as `GeneralSearch.general_topk` does, by products in float32 alone."""
    n = rows.values.shape[0]
    chunk_bytes = CUDA_CHUNK_BYTES if rows.values.is_cuda else CPU_CHUNK_BYTES
    chunk = max(1024, chunk_bytes // (4 * max(queries.values.shape)))
    best = RunningTopk(queries.values, k)
    with exact_float32(rows.values.device):
        for start in range(0, n, chunk):
            part = rows.part(start, start + chunk)
            products = _products(queries.values, part)  # [Q, chunk]
            forbidden = queries.forbidden(part.labels, part.ids)
            if forbidden is not None:
                products.masked_fill_(forbidden, -torch.inf)
            products.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # top-k ranks NaN first
            similarity, index = products.topk(min(k, products.shape[1]), dim=1)
            del products  # before the next chunk's come
            best.merge(similarity, index + start)
    return best.result()


def _products(queries: Tensor, rows: Rows) -> Tensor:
    """Return queries · rowsᵀ [Q, c] in float32; half-precision values are accumulated in float32."""
    if queries.dtype == torch.float32:
        return queries @ rows.floats().T
    if queries.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(queries, rows.values.T, out_dtype=torch.float32)
    return queries.float() @ rows.floats().T
