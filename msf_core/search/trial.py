"""A trial of the kernels that "auto" chooses. They are used only after they have found the right rows on this device.

A trial searches about 2,500 generated rows with the D, k and limits of the actual search and up to 160 queries. They
include rows with NaN, whole groups of NaN, copies, and 200 rows that TF32 cannot distinguish. The memory after the last
row contains rows that would be the nearest. The trial compares all similarities with float64 products, and looks for
missing neighbors and for rows that are found twice.

A trial does not use the user's random number generators, and does not change autocast, TF32 or the sync debug mode.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from msf_core.rows import packed, unit_rows
from msf_core.search.base import GeneralSearch, Queries, Rows

ROWS, BEYOND = 2477, 40  # rows that are searched, and rows in the memory after them
LEAST_QUERIES, MOST_QUERIES = 8, 160  # a few for each kind of limit, and more than one tile of the kernels
TOLERANCE = 1e-5  # of a similarity: float32 sums are within it, TF32 and bfloat16 products are not
MESSAGE_LENGTH = 500  # of an error message, because a compiler's can be pages long


class TriedSearch:
    """`GeneralSearch` by ``backend`` if it passes a trial, else by ``fallback``. Both must support `Queries.own`.

    The trial runs at the first search for each device, dtype, D, k and kind of limits, because kernels are compiled for
    each of these combinations. It synchronizes with the device. If the backend does not compile, does not launch or
    finds the wrong rows, there is one warning, and from then on ``fallback`` searches rows of this device and dtype.
    The same happens if a later search, which has more rows than the trial, fails.

    During the capture of a CUDA graph, no trial is possible. A search that has not been tried is captured with
    ``fallback`` and a warning; to avoid this, search once before the capture. A search that fails during the capture
    raises its error, because the capture is lost.

    Raises:
        torch.OutOfMemoryError: if memory runs out; the kernels are not rejected for this.
        RuntimeError: if the device no longer works; ``fallback`` could not search there either.
    """

    leaves_out_own = True

    def __init__(self, backend: GeneralSearch, fallback: GeneralSearch) -> None:
        self.backend = backend
        self.fallback = fallback
        self._passed: set[tuple[object, ...]] = set()
        self._given_up: set[tuple[torch.device, torch.dtype]] = set()
        self._lock = threading.RLock()

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        return self.general_topk(Queries(queries), Rows(rows), k)

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """See `GeneralSearch.general_topk`."""
        if self._trusts(queries, rows, k):
            try:
                return self.backend.general_topk(queries, rows, k)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if _is_capturing(rows.values.device):
                    raise
                self._give_up(rows.values, _reason(error, rows.values.device))
        return self.fallback.general_topk(queries, rows, k)

    def _trusts(self, queries: Queries, rows: Rows, k: int) -> bool:
        """Return whether the backend can be used for the search; run a trial if that is not known."""
        values = rows.values
        kernel = (values.device, values.dtype, values.shape[1], k, *_limits(queries, rows))
        with self._lock:
            if (values.device, values.dtype) in self._given_up:
                return False
            if kernel in self._passed:
                return True
            if _is_capturing(values.device):
                warnings.warn(
                    f"a CUDA graph is being captured before {type(self.backend).__name__} was tried on this kind of "
                    f"search; {type(self.fallback).__name__} is captured instead. Search once before the capture.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return False
            reason = try_out(self.backend, queries, rows, k)
            if reason is not None:
                self._give_up(values, reason)
                return False
            self._passed.add(kernel)
            return True

    def _give_up(self, values: Tensor, reason: str) -> None:
        where = values.device, values.dtype
        with self._lock:
            if where in self._given_up:
                return
            self._given_up.add(where)
        warnings.warn(
            f"{type(self.backend).__name__} does not work for rows of {values.dtype} on {values.device}; "
            f"{type(self.fallback).__name__} searches them instead: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


@torch.no_grad()
def try_out(backend: GeneralSearch, queries: Queries, rows: Rows, k: int) -> str | None:
    """Return None if the backend finds the right rows in a search like the given one, else a description of the fault.

    Raises:
        torch.OutOfMemoryError, RuntimeError: as in `TriedSearch`.
    """
    device = rows.values.device
    with _waiting_allowed(device):
        asked, there = _made_for(queries, rows)
        k = min(k, there.values.shape[0])
        truth = asked.values.double() @ there.floats().double().T  # [Q, n]
        forbidden = asked.forbidden(there.labels, there.ids)
        wrong = truth.isnan() if forbidden is None else truth.isnan() | forbidden
        truth.masked_fill_(wrong, -torch.inf)
        if asked.own is not None:
            truth.scatter_(1, asked.own, -torch.inf)
        try:
            similarity, index = backend.general_topk(asked, there, k)
            _synchronize(device)  # errors of kernels are raised here
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return _reason(error, device)
        return _difference(similarity, index, truth, k)


def _limits(queries: Queries, rows: Rows) -> tuple[bool, bool, int]:
    """Return whether the search is limited by labels and by ids, and the number of own rows that it excludes."""
    by_label, by_id = None not in (queries.labels, rows.labels), None not in (queries.ids, rows.ids)
    return by_label, by_id, queries.most_own


def _made_for(queries: Queries, rows: Rows) -> tuple[Queries, Rows]:
    """Return the queries and rows of a trial, with the device, dtype, D, tiles and limits of the given search."""
    device, dim = rows.values.device, rows.values.shape[1]
    count = min(max(LEAST_QUERIES, queries.values.shape[0]), MOST_QUERIES)
    n = ROWS + BEYOND
    generator = torch.Generator(device).manual_seed(0)
    made, noise = torch.randn(2, n, dim, generator=generator, device=device)
    made, noise = unit_rows(made), unit_rows(noise)
    number = torch.arange(count, device=device)
    near = number * (ROWS // MOST_QUERIES)  # the row next to each query
    asked = unit_rows(made[near] + 0.5 * noise[near])
    by_label, by_id, views = _limits(queries, rows)
    for view in range(1, views):  # the query's other own rows are equally near
        made[near + view] = unit_rows(asked + 0.5 * noise[near + view])
    made[1200:1400] = unit_rows(asked[1] + 0.05 * noise[1200:1400])
    made[300:330] = made[30:60]
    made[11] = 0
    made[7::101, dim // 2] = torch.nan
    made[640:768] = torch.nan
    made[ROWS:] = asked[3]
    asked[2, dim - 1] = torch.nan
    labels = ids = asked_labels = asked_ids = None
    if by_label:  # every fourth query allows any row; another fourth has a label of only one row, or of none
        labels = torch.arange(n, device=device) % 7
        labels[5] = 7
        asked_labels = labels[near].masked_fill(number % 4 == 0, -1)
        asked_labels = torch.where(number % 4 == 1, 7 + number // 4 % 2, asked_labels)
    if by_id:  # each id belongs to two rows; every third query excludes none
        ids = torch.arange(n, device=device) // 2
        asked_ids = (near // 2).masked_fill(number % 3 == 0, -1)
    values, scale = packed(made, rows.values.dtype)
    there = Rows(values, scale, labels, ids).part(0, ROWS)
    own = near[:, None] + torch.arange(views, device=device) if views else None
    return Queries(asked.to(queries.values.dtype), asked_labels, asked_ids, own), there


def _difference(similarity: Tensor, index: Tensor, truth: Tensor, k: int) -> str | None:
    """Compare the k neighbors with the float64 similarities [Q, n], −inf for excluded rows; describe what differs."""
    expected = truth.topk(k, dim=1).values  # [Q, k]
    if similarity.shape != expected.shape or index.shape != expected.shape:
        return f"it returned shapes {list(similarity.shape)} and {list(index.shape)} instead of {list(expected.shape)}"
    absent = expected == -torch.inf
    found = truth.gather(1, index.clamp(0, truth.shape[1] - 1))
    slots = index.sort(dim=1).values
    checks = {
        "its indices point beyond the rows": (index < -1) | (index >= truth.shape[1]),
        "it finds excluded rows, or too few": (index == -1) != absent,
        "it finds rows that are not the nearest": ~((found - expected).abs() <= TOLERANCE) & ~absent,
        "it finds a row twice": (slots[:, 1:] == slots[:, :-1]) & (slots[:, 1:] >= 0),
        "its similarities are wrong": torch.where(
            absent, similarity != -torch.inf, ~((similarity - expected).abs() <= TOLERANCE)
        ),
    }
    failed = torch.stack([check.any() for check in checks.values()]).tolist()
    wrong = [what for what, is_so in zip(checks, failed, strict=True) if is_so]
    return f"in a trial on generated rows, {'; '.join(wrong)}" if wrong else None


def _reason(error: Exception, device: torch.device) -> str:
    """Return the error as text; raise it if the device no longer works."""
    try:
        _synchronize(device)
    except Exception:
        raise error from None
    return f"{type(error).__name__}: {str(error).strip()[:MESSAGE_LENGTH]}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Allow synchronization despite `torch.cuda.set_sync_debug_mode`, because a trial is not the hot path."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
