"""The interface of search backends, and code that they share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT8_ERROR = 1.01  # times the rounding error of a query: int8 rows can be slightly longer than 1, and sums are rounded


class Rows(NamedTuple):
    """n rows to search, with their scales, labels and ids."""

    values: Tensor
    """[n, D] float32, float16 or bfloat16; or int8 with a scale."""
    scale: Tensor | None = None
    """[n] float32: row i is ``values[i] * scale[i]``. A row whose scale is NaN is never found."""
    labels: Tensor | None = None
    """[n] int64, needed if queries have labels."""
    ids: Tensor | None = None
    """[n] int64, needed if queries have ids."""

    def part(self, begin: int, end: int) -> "Rows":
        """Return the rows from begin to end as views."""
        return Rows(*(None if part is None else part[begin:end] for part in self))  # type: ignore[arg-type]

    def floats(self) -> Tensor:
        """Return the rows with their scale applied, [n, D] float32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale[:, None]


class Queries(NamedTuple):
    """Q queries, and which rows each of them may find."""

    values: Tensor
    """[Q, D], in the dtype of the rows; float32 for int8 rows."""
    labels: Tensor | None = None
    """[Q] int64: only rows with this label are found; a negative label allows all rows."""
    ids: Tensor | None = None
    """[Q] int64: rows with this id are not found; a negative id excludes none."""
    own: Tensor | None = None
    """[Q, V] int64: the indices, between 0 and n − 1, of V rows that are not found: the query's own rows, one for each
    view. A backend that supports this has the attribute ``leaves_out_own``; other backends are asked for V more
    neighbors."""

    def at(self, which: Tensor | slice) -> "Queries":
        """Return the selected queries."""
        return Queries(*(None if part is None else part[which] for part in self))  # type: ignore[arg-type]

    @property
    def most_own(self) -> int:
        """Number of own rows that are excluded from each query, V."""
        return 0 if self.own is None else self.own.shape[1]

    @property
    def constrained(self) -> bool:
        """Whether labels or ids limit the search."""
        return self.labels is not None or self.ids is not None

    def forbidden(self, labels: Tensor | None, ids: Tensor | None) -> Tensor | None:
        """Return a bool mask [Q, n] of the rows that labels and ids exclude, or None if there are none.

        Args:
            labels: labels of the rows, [n], or [Q, n] if each query has different rows.
            ids: ids of the rows, likewise.
        """
        wrong = None
        if self.labels is not None and labels is not None:
            wanted = self.labels[:, None]
            wrong = (wanted != labels) & (wanted >= 0)
        if self.ids is not None and ids is not None:
            own = self.ids[:, None]
            same = (own == ids) & (own >= 0)
            wrong = same if wrong is None else wrong | same
        return wrong


@runtime_checkable
class SearchBackend(Protocol):
    """The interface of ``MemoryBank(backend=...)``: any object with this method."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest inner products of every query with the rows.

        Args:
            queries: [Q, D], with the dtype and device of ``rows``.
            rows: [n, D], contiguous, float32, float16 or bfloat16. No row is longer than 1, except for rounding. Do not
                copy all of them.
            k: between 1 and n.

        Returns:
            similarity [Q, k] float32, descending, and index [Q, k] int64 into ``rows``. Products are accumulated in
            float32. A row with NaN is never found. If fewer than k rows are without NaN, the last similarities are −inf
            with index −1.
        """
        ...


@runtime_checkable
class GeneralSearch(SearchBackend, Protocol):
    """A backend that also supports int8 rows, and queries with labels and ids.

    A backend without this method still works with all of these, through `search_by`.
    """

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """Like `SearchBackend.topk`, return the k largest inner products with the rows that each query may find.

        If a query may find fewer than k rows, its last similarities are −inf with index −1.
        """
        ...


def check_search_arguments(queries: Queries, rows: Rows, k: int) -> None:
    """Raise ValueError or TypeError unless these are valid arguments of `GeneralSearch.general_topk`."""
    q, r = queries.values, rows.values
    if q.ndim != 2 or r.ndim != 2 or q.shape[1] != r.shape[1]:
        raise ValueError(f"queries and rows must be [Q, D] and [n, D], got {list(q.shape)} and {list(r.shape)}")
    if r.dtype not in (ROW_DTYPES if rows.scale is None else (torch.int8,)):
        raise TypeError(f"rows must be float32, float16 or bfloat16, or int8 with a scale, got {r.dtype}")
    expected = r.dtype if rows.scale is None else torch.float32
    if q.dtype != expected:
        raise TypeError(f"queries must be {expected} for rows of {r.dtype}, got {q.dtype}")
    if q.device != r.device:
        raise ValueError(f"queries must be on the device of the rows, {r.device}, got {q.device}")
    if not 1 <= k <= r.shape[0]:
        raise ValueError(f"k must be between 1 and the number of rows, {r.shape[0]}, got {k}")


def rounded_to_int8(queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [Q, D] as int8, their scales [Q], and a bound [Q] of the error of a product with a unit vector.

    The scale of a query with NaN is NaN.
    """
    step = queries.abs().amax(dim=1) / 127
    whole = (queries / step[:, None]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).round()
    return whole.to(torch.int8), step, INT8_ERROR * torch.linalg.vector_norm(queries - whole * step[:, None], dim=1)


class RunningTopk:
    """The k best candidates so far, updated with each chunk of rows."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.k = k
        self.similarity = queries.new_empty((queries.shape[0], 0), dtype=torch.float32)  # [Q, ≤ k]
        self.index = queries.new_empty((queries.shape[0], 0), dtype=torch.int64)  # [Q, ≤ k]

    def merge(self, similarity: Tensor, index: Tensor) -> None:
        """Add candidates [Q, c]."""
        similarity = torch.cat([self.similarity, similarity], dim=1)
        index = torch.cat([self.index, index], dim=1)
        self.similarity, best = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
        self.index = index.gather(1, best)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return (similarity [Q, k], index [Q, k]); the index is −1 where the similarity is −inf."""
        return self.similarity, self.index.masked_fill(self.similarity == -torch.inf, -1)


def may_look(tensor: Tensor) -> bool:
    """Return whether a value of the tensor can be read without waiting: on the CPU, and not while it is traced."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


_NOTHING: AbstractContextManager[None] = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast; it costs nothing if autocast is off."""
    if _knows_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


@cache
def _knows_autocast(device_type: str) -> bool:
    known: bool = torch.amp.is_autocast_available(device_type)
    return known


@contextmanager
def _made_exact(device: torch.device) -> Iterator[None]:
    if hasattr(torch.backends, "fp32_precision"):
        matmul = _matmul_of(device)
        # If the value was inherited from torch.backends, restore it as "none", which means inherited.
        inherited = matmul.fp32_precision == torch.backends.fp32_precision
        before, matmul.fp32_precision = "none" if inherited else matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which float32 products are computed in float32, not in TF32 or bfloat16."""
    return _NOTHING if _is_exact(device) else _made_exact(device)


def _is_exact(device: torch.device) -> bool:
    if hasattr(torch.backends, "fp32_precision"):  # PyTorch 2.9
        return _matmul_of(device).fp32_precision in ("ieee", "none")
    return torch.get_float32_matmul_precision() == "highest"


def _matmul_of(device: torch.device) -> Any:
    backends: Any = torch.backends
    return backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
