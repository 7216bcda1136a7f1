"""The searches of other libraries, each over the same unit rows and for the same unit queries, rounded beforehand.

A peer returns the indices [Q, k] that it found, so that its recall is judged like ours. None of them fetches the
neighbors' rows; `MemoryBank.search` does, within its time.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring.cases import Problem

Search = Callable[[Tensor], Tensor]
PRODUCT_MOST_BYTES = {"cpu": 300 << 20, "cuda": 16 << 30}  # bytes of the Q×N matrix of product-and-topk


class Unfit(Exception):
    """A peer cannot search this problem; the message says why."""


class Peer(NamedTuple):
    """``build`` makes the search for some rows; it raises ImportError, or `Unfit`."""

    name: str
    package: str
    build: Callable[[Tensor, Problem], Search]


def build_all(rows: Tensor, problem: Problem, only: str | None = None) -> tuple[dict[str, Search], dict[str, str]]:
    """Return name -> search of all peers, or of one alone, that can do it, and name -> reason of the others."""
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
    """Return the version of each peer's package, None where it is absent."""
    found: dict[str, str | None] = {}
    for package in dict.fromkeys(peer.package for peer in PEERS if peer.package not in ("torch", "faiss")):
        try:
            found[package] = str(getattr(importlib.import_module(package), "__version__", "of unknown version"))
        except Exception:  # not installed, or broken in its own way
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
            raise Unfit("faiss.knn takes float32 rows alone")
        array = rows.numpy()
        metric = faiss.METRIC_INNER_PRODUCT
        return lambda queries: torch.from_numpy(faiss.knn(queries.numpy(), array, problem.k, metric=metric)[1])
    if faiss.get_num_gpus() == 0:
        raise Unfit("this FAISS sees no GPU")
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    return lambda queries: faiss.knn_gpu(resources, queries, rows, problem.k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def build_lightly(rows: Tensor, problem: Problem) -> Search:
    """Build lightly's bank, filled with the rows, with the update that a training step does; it knows k = 1 alone."""
    from lightly.models.modules import NNMemoryBankModule

    if problem.k != 1:
        raise Unfit("it finds one neighbor")
    if rows.dtype != torch.float32:
        raise Unfit("its rows are float32")
    bank = NNMemoryBankModule(size=tuple(rows.shape)).to(rows.device)
    bank.bank.copy_(rows)

    def search(queries: Tensor) -> Tensor:
        nearest: Tensor = bank(queries, update=True)
        return nearest.new_full((len(queries), 1), -1, dtype=torch.int64)  # it returns rows but no indices

    return search


def build_flashlib(rows: Tensor, problem: Problem) -> Search:
    """Build flashlib's fused Triton search by squared L2 distance: the same order for unit rows."""
    if problem.device != "cuda":
        raise Unfit("it is fused on CUDA alone")
    from flashlib.primitives.knn import flash_knn

    return lambda queries: flash_knn(queries, rows, problem.k)[1].long()


def build_cuvs(rows: Tensor, problem: Problem) -> Search:
    """Build cuVS's brute force by inner product. Its index and its handles are made once, outside the time."""
    if problem.device != "cuda":
        raise Unfit("it searches CUDA arrays alone")
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
