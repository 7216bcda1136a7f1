"""The search of a bank as one PyTorch operator, ``torch.ops.msf_core.topk``: `torch.compile` traces past it."""

import torch
from torch import Tensor

from msf_core.search.registry import load_backend

# torch.library.custom_op would do the same in fewer lines, but imports the compiler, seconds, at the first call.
_LIBRARY = torch.library.Library("msf_core", "DEF")
# It reads a number on the CPU: a CUDA graph of torch.compile's own, recorded while the bank fills, would freeze that.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # PyTorch 2.9
_LIBRARY.define(
    "topk(Tensor queries, Tensor rows, Tensor filled, int k, str backend) -> (Tensor, Tensor)",
    tags=() if _UNSAFE is None else (_UNSAFE,),
)


def topk(queries: Tensor, rows: Tensor, filled: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Search the first ``filled`` rows, all where there are fewer, by the backend of that name.

    Args:
        queries: [Q, D], in the dtype and on the device of ``rows``.
        rows: [N, D].
        filled: int64 scalar on the CPU, so that reading it makes no GPU wait.
        k: between 1 and n, the smaller of N and ``filled``.
        backend: a name as `load_backend` knows it.

    Returns:
        similarity [Q, k] float32 and index [Q, k] int64, as `SearchBackend.topk`.

    Raises:
        ValueError, TypeError, ImportError: as `load_backend` and `SearchBackend.topk`.
    """
    similarity, index = torch.ops.msf_core.topk(queries, rows, filled, k, backend)
    return similarity, index


def _topk(queries: Tensor, rows: Tensor, filled: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    return load_backend(backend).topk(queries, rows[: int(filled)], k)


def _fake_topk(queries: Tensor, rows: Tensor, filled: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


_LIBRARY.impl("topk", _topk, "CompositeExplicitAutograd")
torch.library.register_fake("msf_core::topk", _fake_topk, lib=_LIBRARY)
