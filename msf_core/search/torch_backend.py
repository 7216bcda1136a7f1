"""Exact search by PyTorch's matrix product and top-k, a chunk of rows at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from msf_core.search.base import RunningTopk, check_topk_arguments

# Bytes of one chunk of products, Q × chunk × 4: it should stay in a CPU's cache, and keep a GPU busy.
CPU_CHUNK_BYTES = 4 << 20
CUDA_CHUNK_BYTES = 32 << 20


class TorchSearch:
    """`SearchBackend` on plain PyTorch: any device, extra memory bounded by one chunk."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        check_topk_arguments(queries, rows, k)
        chunk_bytes = CUDA_CHUNK_BYTES if rows.is_cuda else CPU_CHUNK_BYTES
        chunk = max(1024, chunk_bytes // (4 * max(1, queries.shape[0])))
        best = RunningTopk(queries, k)
        with torch.no_grad(), _exact_float32(rows.device):
            for start in range(0, rows.shape[0], chunk):
                products = _products(queries, rows[start : start + chunk])  # [Q, chunk]
                products.nan_to_num_(nan=-torch.inf)  # top-k ranks NaN first
                similarity, index = products.topk(min(k, products.shape[1]), dim=1)
                best.merge(similarity, index + start)
        return best.result()


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Return queries · rowsᵀ [Q, c] in float32; half-precision values are accumulated in float32."""
    if queries.dtype == torch.float32:
        return queries @ rows.T
    if queries.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(queries, rows.T, out_dtype=torch.float32)
    return queries.float() @ rows.float().T


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast, TF32 and bfloat16 arithmetic off: float32 products are float32 products."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    setting = "fp32_precision" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "allow_tf32"
    backends = [backend for backend in backends if hasattr(backend, setting)]
    before = [getattr(backend, setting) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, setting, "ieee" if setting == "fp32_precision" else False)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, setting, value)
