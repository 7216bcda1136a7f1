"""Exact search by FAISS brute force: `faiss.knn` on the CPU, `faiss.knn_gpu` on CUDA tensors.

Neither copies the tensors. Importing this module imports FAISS.
"""

from types import MappingProxyType
from typing import Any

import faiss
import torch
from torch import Tensor

from msf_core.search.base import Queries, Rows, RunningTopk, check_search_arguments

# On the CPU, FAISS accepts only float32, so half-precision rows are converted in chunks of this many rows.
CPU_CHUNK_ROWS = 4096
# Scratch memory of FAISS on a GPU. FAISS's default is 1.5 GB.
CUDA_SCRATCH_BYTES = 48 << 20
GPU_REMEDY = "pip install 'msf_core[faiss-gpu]' (Linux x86-64)"


def has_cuda() -> bool:
    """Return whether the FAISS installed here can search CUDA tensors."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


class FaissSearch:
    """`SearchBackend` with FAISS."""

    most_neighbors = MappingProxyType({"cuda": 2048})  # by device type; the limit of knn_gpu

    def __init__(self) -> None:
        self._resources: dict[int, Any] = {}  # device index -> faiss.StandardGpuResources

    def why_not(self, device_type: str) -> str | None:
        """Return None if FAISS can search tensors on this type of device here, else the reason."""
        if device_type == "cuda" and not has_cuda():
            return f"this FAISS finds no GPU; {GPU_REMEDY}"
        return None if device_type in ("cpu", "cuda") else f"FAISS does not search {device_type} tensors"

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`. On CUDA, k is at most 2,048."""
        check_search_arguments(Queries(queries), Rows(rows), k)
        queries, rows = queries.detach().contiguous(), rows.detach()
        if rows.is_cuda:
            return self._topk_cuda(queries, rows, k)
        if rows.device.type != "cpu":
            raise ValueError(f"the faiss backend searches CPU and CUDA tensors, got {rows.device}")
        return _topk_cpu(queries, rows, k)

    def _topk_cuda(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not has_cuda():
            raise ValueError(f"{self.why_not('cuda')}, or use backend='torch'")
        if k > self.most_neighbors["cuda"]:
            raise ValueError(f"faiss.knn_gpu finds at most {self.most_neighbors['cuda']} neighbors, got k={k}")
        import faiss.contrib.torch_utils

        device = rows.device.index
        with torch.cuda.device(device):
            if device not in self._resources:
                self._resources[device] = faiss.StandardGpuResources()
                self._resources[device].setTempMemory(CUDA_SCRATCH_BYTES)
            similarity, index = faiss.knn_gpu(
                self._resources[device], queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT, device=device
            )
        return similarity.masked_fill_(index < 0, -torch.inf), index


def _topk_cpu(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if rows.dtype == torch.float32:
        return _knn(queries, rows, k)
    best = RunningTopk(queries, k)
    queries = queries.float()
    for start in range(0, rows.shape[0], CPU_CHUNK_ROWS):
        chunk = rows[start : start + CPU_CHUNK_ROWS].float()
        similarity, index = _knn(queries, chunk, min(k, chunk.shape[0]))
        best.merge(similarity, index + start)
    return best.result()


def _knn(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search with FAISS without copying the tensors. FAISS skips rows with NaN and returns index −1 instead."""
    found = faiss.knn(queries.numpy(), rows.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    similarity, index = map(torch.from_numpy, found)
    return similarity.masked_fill_(index < 0, -torch.inf), index
