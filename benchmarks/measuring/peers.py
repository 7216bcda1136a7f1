"""Searches by other libraries (peers), with the same unit rows and the same unit queries, which are rounded beforehand.

A peer returns the indices [Q, k] that it found, from which its recall is computed as for msf_core. Only lightly's bank
also fetches the neighbors' rows; `MemoryBank.search` always does, and its time includes this.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring.cases import Problem

Search = Callable[[Tensor], Tensor]
PRODUCT_MOST_BYTES = {"cpu": 300 << 20, "cuda": 16 << 30}  # bytes of the Q×N matrix of `build_product_topk`


class Unfit(Exception):
    """A peer does not support this problem; the message says why."""


class Peer(NamedTuple):
    """A search by another library. ``build`` creates it for some rows, or raises ImportError or `Unfit`."""

    name: str
    package: str
    build: Callable[[Tensor, Problem], Search]


def build_all(rows: Tensor, problem: Problem, only: str | None = None) -> tuple[dict[str, Search], dict[str, str]]:
    """Build all peers, or ``only`` one; return name -> search, and name -> reason for those that cannot be built."""
    built: dict[str, Search] = {}
    reasons: dict[str, str] = {}
    for peer in PEERS:
        if only not in (None, peer.name):
            continue
        try:
            built[peer.name] = peer.build(rows, problem)
        except Unfit as error:
            reasons[peer.name] = str(error)
        except ImportError as error:
            reasons[peer.name] = f"{peer.package} is not installed or does not import: {error}"
        except Exception as error:  # another library's error must not lose the other measurements
            reasons[peer.name] = f"{type(error).__name__}: {error}"
    return built, reasons


def versions() -> dict[str, str | None]:
    """Return the version of each peer's package, or None if it is not installed."""
    found: dict[str, str | None] = {}
    for package in dict.fromkeys(peer.package for peer in PEERS if peer.package not in ("torch", "faiss")):
        try:
            found[package] = str(getattr(importlib.import_module(package), "__version__", "of unknown version"))
        except Exception:  # not installed, or broken
            found[package] = None
    return found


def build_product_topk(rows: Tensor, problem: Problem) -> Search:
    """Build PyTorch's product and top-k, in the dtype of the rows, with the whole Q×N matrix."""
    needed = problem.batch * problem.rows * rows.element_size()
    if needed > PRODUCT_MOST_BYTES[problem.device]:
        raise Unfit(f"its Q×N matrix would take {needed / 1e9:.1f} GB")
    return lambda queries: torch.topk(queries @ rows.T, problem.k, dim=1).indices


def build_faiss(rows: Tensor, problem: Problem) -> Search:
    """Build a bare `faiss.knn`, or `knn_gpu` with its own scratch memory."""
    import faiss

    if problem.device == "cpu":
        if rows.dtype != torch.float32:
            raise Unfit("faiss.knn accepts only float32 rows")
        array = rows.numpy()
        metric = faiss.METRIC_INNER_PRODUCT
        return lambda queries: torch.from_numpy(faiss.knn(queries.numpy(), array, problem.k, metric=metric)[1])
    if faiss.get_num_gpus() == 0:
        raise Unfit("this FAISS sees no GPU")
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    return lambda queries: faiss.knn_gpu(resources, queries, rows, problem.k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def build_lightly(rows: Tensor, problem: Problem) -> Search:
    """Build lightly's bank, filled with the rows. Each search also updates it, as in training; k must be 1."""
    from lightly.models.modules import NNMemoryBankModule

    if problem.k != 1:
        raise Unfit("it finds only one neighbor")
    if rows.dtype != torch.float32:
        raise Unfit("its rows are float32")
    bank = NNMemoryBankModule(size=tuple(rows.shape)).to(rows.device)
    bank.bank.copy_(rows)

    def search(queries: Tensor) -> Tensor:
        nearest: Tensor = bank(queries, update=True)
        return nearest.new_full((len(queries), 1), -1, dtype=torch.int64)  # it returns rows but no indices

    return search


def build_flashlib(rows: Tensor, problem: Problem) -> Search:
    """Build flashlib's fused Triton search by squared L2 distance, which gives the same order for unit rows."""
    if problem.device != "cuda":
        raise Unfit("it is fused only on CUDA")
    from flashlib.primitives.knn import flash_knn

    return lambda queries: flash_knn(queries, rows, problem.k)[1].long()


def build_cuvs(rows: Tensor, problem: Problem) -> Search:
    """Build cuVS's brute force by inner product. The time does not include creating its index and handles."""
    if problem.device != "cuda":
        raise Unfit("it searches only CUDA arrays")
    from cuvs.common import Resources
    from cuvs.neighbors import brute_force

    if rows.dtype == torch.bfloat16:
        raise Unfit("its rows are float32 or float16")
    resources: Any = Resources()
    index: Any = brute_force.build(rows, metric="inner_product", resources=resources)
    resources.sync()

    def search(queries: Tensor) -> Tensor:
        torch.cuda.current_stream().synchronize()  # it uses its own stream
        found = brute_force.search(index, queries, problem.k, resources=resources)[1]
        resources.sync()
        return torch.as_tensor(found, device="cuda")

    return search


def unit_queries(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Return queries as a peer gets them: unit length, in the dtype of the rows."""
    return F.normalize(u.float(), dim=1).to(dtype)


PEERS = (
    Peer("product and top-k", "torch", build_product_topk),
    Peer("bare faiss.knn", "faiss", build_faiss),
    Peer("lightly bank", "lightly", build_lightly),
    Peer("flashlib", "flashlib", build_flashlib),
    Peer("cuVS", "cuvs", build_cuvs),
)
