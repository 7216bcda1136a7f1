"""Searches with labels, ids and int8 rows for backends that have only `SearchBackend.topk`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msf_core.search.base import GeneralSearch, Queries, Rows, RunningTopk, SearchBackend
from msf_core.search.registry import load_backend, most_neighbors

CHUNK_ROWS = 4096  # int8 rows converted to float32 at a time
Search = Callable[[Queries, Rows, int], tuple[Tensor, Tensor]]
SPARE = 2  # request this many times k neighbors, because some may be excluded


def search_by(backend: SearchBackend, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Search like `GeneralSearch.general_topk`, with any backend.

    If labels or ids exclude rows, a backend that has only ``topk`` is asked for more than k neighbors. Queries that
    still have fewer than k are searched again by the torch backend; this synchronizes with a GPU.
    """
    if queries.own is not None and not getattr(backend, "leaves_out_own", False):
        return leaving_out_own(partial(search_by, backend), queries, rows, k)
    if rows.scale is None and not queries.constrained and queries.own is None:
        return backend.topk(queries.values, rows.values, k)
    if hasattr(backend, "general_topk"):  # a `GeneralSearch`; isinstance would take as long as a small search
        general: GeneralSearch = backend  # type: ignore[assignment]
        return general.general_topk(queries, rows, k)
    if not queries.constrained:
        return _topk(backend, queries, rows, k)
    n = rows.values.shape[0]
    more = max(k, min(SPARE * k, n, most_neighbors(backend, rows.values.device.type) or n))
    similarity, index = _topk(backend, queries, rows, more)
    found = index.clamp(min=0)
    labels, ids = (None if beside is None else beside[found] for beside in (rows.labels, rows.ids))
    forbidden = queries.forbidden(labels, ids)
    all_seen = (index[:, -1] < 0) | (more == n)  # [Q]
    if forbidden is not None:
        similarity = similarity.masked_fill(forbidden, -torch.inf)
    best = RunningTopk(queries.values, k)
    best.merge(similarity, index)
    similarity, index = best.result()
    again = ((index[:, -1] < 0) & ~all_seen).nonzero()[:, 0]
    if len(again):
        similarity[again], index[again] = search_by(load_backend("torch"), queries.at(again), rows, k)
    return similarity, index


def leaving_out_own(search: Search, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Exclude each query's own rows with a ``search`` that does not support ``queries.own``.

    V more neighbors are requested, and the own rows are removed. Indices in ``own`` may also be outside of the rows.
    """
    asked = Queries(queries.values, queries.labels, queries.ids)
    if queries.own is None:
        return search(asked, rows, k)
    similarity, index = search(asked, rows, min(k + queries.own.shape[1], rows.values.shape[0]))
    # At most V neighbors are own rows. If there are fewer, the last neighbors are dropped instead.
    own = (index[:, :, None] == queries.own[:, None]).any(dim=2)
    similarity, best = similarity.masked_fill(own, -torch.inf).topk(k, dim=1)
    return similarity, index.masked_fill(own, -1).gather(1, best)


def _topk(backend: SearchBackend, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    if rows.scale is None:
        return backend.topk(queries.values, rows.values, k)
    best = RunningTopk(queries.values, k)
    for start in range(0, rows.values.shape[0], CHUNK_ROWS):
        part = rows.part(start, start + CHUNK_ROWS).floats()
        similarity, index = backend.topk(queries.values, part, min(k, len(part)))
        best.merge(similarity, index + start)
    return best.result()
