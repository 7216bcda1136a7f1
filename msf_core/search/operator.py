"""The search of a bank as a PyTorch operator, ``torch.ops.msf_core.search``, which `torch.compile` does not trace."""

from functools import partial

import torch
from torch import Tensor

from msf_core.search.base import Queries, Rows
from msf_core.search.general import leaving_out_own, search_by
from msf_core.search.registry import load_backend

# torch.library.custom_op would be shorter, but at the first call it imports the compiler, which takes seconds.
_LIBRARY = torch.library.Library("msf_core", "DEF")
# The operator reads ``filled`` on the CPU. If torch.compile recorded a CUDA graph while the bank fills up, the graph
# would replay that value forever.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # PyTorch 2.9
_LIBRARY.define(
    "search(Tensor queries, Tensor rows, Tensor filled, int k, str backend, Tensor? scale, "
    "Tensor? row_labels, Tensor? labels, Tensor? row_ids, Tensor? ids, Tensor? own=None, "
    "bool own_elsewhere=False) -> (Tensor, Tensor)",
    tags=() if _UNSAFE is None else (_UNSAFE,),
)


def search_bank(
    queries: Queries, rows: Rows, filled: Tensor, k: int, backend: str, own_elsewhere: bool = False
) -> tuple[Tensor, Tensor]:
    """Search the first ``filled`` rows, or all rows if there are fewer, with a backend given by name.

    Args:
        queries: Q queries.
        rows: N rows.
        filled: int64 scalar on the CPU, so that reading it does not synchronize with a GPU.
        k: between 1 and n, the smaller of N and ``filled``.
        backend: a name for `load_backend`.
        own_elsewhere: whether indices in ``queries.own`` may be outside of these rows.

    Returns:
        similarity [Q, k] float32 and index [Q, k] int64, as in `GeneralSearch.general_topk`.

    Raises:
        ValueError, TypeError, ImportError: as in `load_backend` and `SearchBackend.topk`.
    """
    if type(queries.values) is Tensor and not torch.compiler.is_compiling():  # nothing is traced
        return _search_rows(queries, rows, filled, k, backend, own_elsewhere)
    q, labels, ids, own = queries
    values, scale, row_labels, row_ids = rows
    similarity, index = torch.ops.msf_core.search(
        q, values, filled, k, backend, scale, row_labels, labels, row_ids, ids, own, own_elsewhere
    )
    return similarity, index


def _search(
    queries: Tensor,
    rows: Tensor,
    filled: Tensor,
    k: int,
    backend: str,
    scale: Tensor | None,
    row_labels: Tensor | None,
    labels: Tensor | None,
    row_ids: Tensor | None,
    ids: Tensor | None,
    own: Tensor | None = None,
    own_elsewhere: bool = False,
) -> tuple[Tensor, Tensor]:
    kept = Rows(rows, scale, row_labels, row_ids)
    return _search_rows(Queries(queries, labels, ids, own), kept, filled, k, backend, own_elsewhere)


def _search_rows(
    queries: Queries, rows: Rows, filled: Tensor, k: int, backend: str, own_elsewhere: bool
) -> tuple[Tensor, Tensor]:
    n = int(filled)
    there = rows if n >= rows.values.shape[0] else rows.part(0, n)
    search = partial(search_by, load_backend(backend))
    return leaving_out_own(search, queries, there, k) if own_elsewhere else search(queries, there, k)


def _fake_search(queries: Tensor, rows: Tensor, filled: Tensor, k: int, *beside: object) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


_LIBRARY.impl("search", _search, "CompositeExplicitAutograd")
torch.library.register_fake("msf_core::search", _fake_search, lib=_LIBRARY)
