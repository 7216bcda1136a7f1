"""Exact search by PyTorch's matrix product and top-k, a chunk of rows at a time; large ones on a CPU by `screen`."""

import torch
from torch import Tensor

from msf_core.search.base import RunningTopk, check_topk_arguments, exact_float32
from msf_core.search.screen import screen_pays, screened_topk

# Bytes of one chunk of rows and of its products, as float32: they should stay in a CPU's cache, and keep a GPU busy.
CPU_CHUNK_BYTES = 4 << 20
CUDA_CHUNK_BYTES = 32 << 20


class TorchSearch:
    """`SearchBackend` on plain PyTorch: any device, extra memory bounded by one chunk."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        check_topk_arguments(queries, rows, k)
        queries, rows = queries.detach(), rows.detach()
        if screen_pays(queries, rows, k):
            return screened_topk(queries, rows, k, otherwise=float32_topk)
        return float32_topk(queries, rows, k)


def float32_topk(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search as `SearchBackend.topk` does, by products in float32 alone."""
    chunk_bytes = CUDA_CHUNK_BYTES if rows.is_cuda else CPU_CHUNK_BYTES
    chunk = max(1024, chunk_bytes // (4 * max(queries.shape)))
    best = RunningTopk(queries, k)
    with torch.no_grad(), exact_float32(rows.device):
        for start in range(0, rows.shape[0], chunk):
            products = _products(queries, rows[start : start + chunk])  # [Q, chunk]
            products.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # top-k ranks NaN first
            similarity, index = products.topk(min(k, products.shape[1]), dim=1)
            del products  # before the next chunk's come
            best.merge(similarity, index + start)
    return best.result()


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Return queries · rowsᵀ [Q, c] in float32; half-precision values are accumulated in float32."""
    if queries.dtype == torch.float32:
        return queries @ rows.T
    if queries.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(queries, rows.T, out_dtype=torch.float32)
    return queries.float() @ rows.float().T
