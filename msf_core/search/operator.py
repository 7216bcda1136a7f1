"""The search of a bank as one PyTorch operator, ``torch.ops.msf_core.topk``: `torch.compile` traces past it."""

import torch
from torch import Tensor

from msf_core.search.registry import load_backend


@torch.library.custom_op("msf_core::topk", mutates_args=())
def topk(queries: Tensor, rows: Tensor, filled: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Search the first ``filled`` rows by the backend of that name.

    Args:
        queries: [Q, D], in the dtype and on the device of ``rows``.
        rows: [N, D].
        filled: int64 scalar on the CPU, so that reading it makes no GPU wait; n.
        k: between 1 and n.
        backend: a name as `load_backend` knows it.

    Returns:
        similarity [Q, k] float32 and index [Q, k] int64, as `SearchBackend.topk`.

    Raises:
        ValueError, TypeError, ImportError: as `load_backend` and `SearchBackend.topk`.
    """
    return load_backend(backend).topk(queries, rows[: int(filled)], k)


@topk.register_fake
def _(queries: Tensor, rows: Tensor, filled: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)
