"""Any search by a backend that has `SearchBackend.topk` alone: int8 rows, and queries that may not find all rows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msf_core.search.base import GeneralSearch, Queries, Rows, RunningTopk, SearchBackend
from msf_core.search.registry import load_backend, most_neighbors

CHUNK_ROWS = 4096  # int8 rows that are brought to float32 at once
Search = Callable[[Queries, Rows, int], tuple[Tensor, Tensor]]
SPARE = 2  # times as many neighbors as asked for, of which some may be forbidden


def search_by(backend: SearchBackend, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Search as `GeneralSearch.general_topk` does, by that backend.

    One that has ``topk`` alone is asked for more neighbors than k. Queries that are left with fewer than k are
    searched again by the torch backend; on a GPU that makes the host wait.
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
    """Search by V more neighbors, for a ``search`` that knows nothing of ``queries.own``, and leave those rows out.

    Here ``own`` may also be no row at all.
    """
    asked = Queries(queries.values, queries.labels, queries.ids)
    if queries.own is None:
        return search(asked, rows, k)
    similarity, index = search(asked, rows, min(k + queries.own.shape[1], rows.values.shape[0]))
    # At most V a query; where there are fewer the last ones are left out.
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
