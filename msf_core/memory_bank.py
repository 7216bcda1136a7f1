"""The memory bank of MSF (paper section 2): a first-in-first-out ring of target embeddings, searched exactly."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_core.checks import check_labels, check_tensor
from msf_core.search import SearchBackend, check_backend, find_backend, topk
from msf_core.search.base import ROW_DTYPES

UNKNOWN_LABEL = -1
_BUFFERS = ("rows", "labels", "pushed", "nonfinite")


class Neighbors(NamedTuple):
    """The k nearest rows of Q queries, nearest first.

    A place for which the bank held no finite row has similarity −inf, index −1, a zero embedding and label −1.
    """

    similarity: Tensor
    """[Q, k] float32, cosine similarity, descending."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """[Q, k] int64, slots of the bank."""
    embedding: Tensor
    """[Q, k, D] float32 unit vectors. Half-precision rows are brought back to unit length."""
    label: Tensor
    """[Q, k] int64, −1 where unknown."""


class MemoryBank(nn.Module):
    """The newest ``size`` embeddings as unit rows, each with a label, and exact search among them.

    Contents always equal a ``collections.deque(maxlen=size)`` of everything pushed. All of it is in the
    ``state_dict``: save, load and go on is bit-equal. A saved bank of another size gives the newest rows that
    fit, in order; one of another ``dim`` is an error that leaves the bank as it was.

    Args:
        size: rows that it holds, N. The paper uses 1,024,000 and finds 128,000 as good (section 3.4).
        dim: dimensions of an embedding, D.
        dtype: of the stored rows: float32, float16 or bfloat16. Queries are rounded to it, similarities are
            accumulated in float32.
        backend: "auto", "torch", "faiss", "triton", or any object with a `SearchBackend.topk`.
        persistent: False leaves the bank out of the ``state_dict``.

    Raises:
        ValueError: ``size`` or ``dim`` below 1, or an unknown backend.
        TypeError: another ``dtype``, or a backend without ``topk``.
        ImportError: the backend asked for by name does not work here.

    >>> bank = MemoryBank(size=4, dim=2)
    >>> slots = bank.push(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), labels=torch.tensor([7, 8]))
    >>> found = bank.search(torch.tensor([[0.0, 1.0]]), k=2)
    >>> found.label, found.similarity
    (tensor([[8, 7]]), tensor([[1.0000, 0.8000]]))
    >>> bank
    MemoryBank(size=4, dim=2, dtype=float32, filled=2, backend='auto', bytes=64)
    """

    rows: Tensor
    labels: Tensor
    pushed: Tensor
    nonfinite: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str | SearchBackend = "auto",
        persistent: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in ROW_DTYPES:
            raise TypeError(f"dtype must be torch.float32, float16 or bfloat16, got {dtype}")
        find_backend(backend, torch.device("cpu"))  # says now if it does not work here
        self.size = size
        self.dim = dim
        self.backend = backend
        self.persistent = persistent
        # Slot of the next row: pushed % size. Slots 0 … len − 1 are filled.
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype), persistent)
        self.register_buffer("labels", torch.full((size,), UNKNOWN_LABEL, dtype=torch.int64), persistent)
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64), persistent)
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64), persistent)
        # min(pushed, size), always on the CPU: the host knows it without asking the device. A tensor and not an int,
        # since torch.compile would take an int for a constant and compile again when it moves.
        self._filled = torch.zeros((), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        """Rows filled so far, n; at most ``size``."""
        return int(self._filled)

    @property
    def full(self) -> bool:
        """Whether every slot is filled."""
        return len(self) == self.size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored rows."""
        return self.rows.dtype

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Store a batch, over the oldest rows once the bank is full. Never waits for the device.

        Args:
            embeddings: [B, D], any float dtype and scale; normalized in float32 on the way in (a row shorter than
                1e-12 stays short). B may be 0 or above ``size``. A row whose norm is not finite takes its slot,
                but is never found by a search, and ``nonfinite`` counts it.
            labels: [B], integers; −1, or no labels at all, is unknown.

        Returns:
            The slots of the rows, [B] int64; −1 for those that later rows of the same batch pushed out.

        Raises:
            ValueError: a shape or device that does not fit.
            TypeError: embeddings that are not floating, labels that are not integers.
        """
        self.check("embeddings", embeddings)
        check_labels(labels, embeddings)
        count = embeddings.shape[0]
        kept = min(count, self.size)
        rows = unit_rows(embeddings)
        if labels is None:
            labels = self.labels.new_full((count,), UNKNOWN_LABEL)

        slots = (self.pushed + torch.arange(count, device=self.rows.device)) % self.size
        self.rows.index_copy_(0, slots[count - kept :], rows[count - kept :].to(self.rows.dtype))
        self.labels.index_copy_(0, slots[count - kept :], labels[count - kept :].to(torch.int64))
        self.pushed += count
        self.nonfinite += rows[:, 0].isnan().sum()
        self._filled.add_(count).clamp_(max=self.size)
        slots[: count - kept] = -1
        return slots

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Neighbors:
        """Find the k most similar rows of every query, exactly.

        Args:
            queries: [Q, D], any float dtype and scale.
            k: between 1 and ``len(bank)``.

        Returns:
            `Neighbors`. Unfilled slots are never among them.

        Raises:
            ValueError: k out of range, or a shape or device that does not fit.
            TypeError: queries that are not floating, or a k that is no int.
        """
        self.check("queries", queries)
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int, got {k!r}")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be between 1 and the {len(self)} rows in the bank, got {k}")
        self.check_backend(k)
        return self.take(*self.nearest(queries, k))

    @torch.no_grad()
    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Do the search of `search` alone, for arguments known to be right.

        Returns:
            similarity [Q, k] and index [Q, k], as `search` has them.
        """
        queries = unit_rows(queries).to(self.rows.dtype)
        if isinstance(self.backend, str):
            similarity, index = topk(queries, self.rows, self._filled, k, self.backend)
        else:
            similarity, index = self.backend.topk(queries, self.rows[: len(self)], k)
        return similarity.clamp(max=1.0), index  # rounding leaves rows, half-precision ones above all, a little long

    @torch.no_grad()
    def take(self, similarity: Tensor, index: Tensor) -> Neighbors:
        """Gather embeddings and labels for what `nearest` has found."""
        missing = index < 0
        slots = index.clamp(min=0)
        embedding = self.rows[slots].float()  # [Q, k, D]
        if self.rows.dtype != torch.float32:
            embedding = F.normalize(embedding, dim=2)
        return Neighbors(
            similarity=similarity,
            index=index,
            embedding=embedding.masked_fill_(missing[..., None], 0.0),
            label=self.labels[slots].masked_fill_(missing, UNKNOWN_LABEL),
        )

    @torch.no_grad()
    def clear(self) -> None:
        """Forget every row, as if newly made."""
        self.rows.zero_()
        self.labels.fill_(UNKNOWN_LABEL)
        self.pushed.zero_()
        self.nonfinite.zero_()
        self._filled.zero_()

    def check_backend(self, k: int = 1) -> None:
        """Raise unless the search backend finds k neighbors on the bank's present device.

        Raises:
            ImportError: one asked for by name does not work on that device.
            ValueError: it does not find that many.
        """
        check_backend(self.backend, self.rows.device, k)

    def check(self, name: str, embeddings: Tensor) -> None:
        """Raise ValueError or TypeError, naming ``name``, unless these are [any, D] floats on the bank's device."""
        check_tensor(name, embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(
                f"{name} must be [B, {self.dim}] as the bank has dim={self.dim}, got {list(embeddings.shape)}"
            )
        if not embeddings.is_floating_point():
            raise TypeError(f"{name} must be floating, got {embeddings.dtype}")
        if embeddings.device != self.rows.device:
            raise ValueError(
                f"{name} must be on the bank's device, {self.rows.device}, got {embeddings.device}; "
                f"move the bank with .to({str(embeddings.device)!r})"
            )
        if self.rows.dtype not in ROW_DTYPES:
            raise TypeError(f"the bank's rows must be float32, float16 or bfloat16, but were made {self.rows.dtype}")

    def extra_repr(self) -> str:
        """Describe size, fill and cost."""
        backend = self.backend if isinstance(self.backend, str) else type(self.backend).__name__
        size_bytes = sum(getattr(self, name).nbytes for name in ("rows", "labels"))
        return (
            f"size={self.size}, dim={self.dim}, dtype={str(self.dtype).removeprefix('torch.')}, "
            f"filled={len(self)}, backend={backend!r}, bytes={size_bytes}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        ours = {prefix + name for name in _BUFFERS} if self.persistent else set()
        missing_keys += sorted(ours - state_dict.keys())
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in ours]
        if not ours or not ours <= state_dict.keys():
            return
        rows, labels, pushed, nonfinite = (state_dict[prefix + name] for name in _BUFFERS)
        problem = self._why_not_loadable(rows, labels, pushed, nonfinite)
        if problem:
            error_msgs.append(f"{prefix}rows and its companions were not loaded: {problem}")
            return
        with torch.no_grad():
            self._take_over(rows, labels, pushed, nonfinite)

    def _why_not_loadable(self, rows: Tensor, labels: Tensor, pushed: Tensor, nonfinite: Tensor) -> str | None:
        if not all(isinstance(part, Tensor) for part in (rows, labels, pushed, nonfinite)):
            return "the saved buffers must be tensors"
        if not rows.is_floating_point() or labels.is_floating_point():
            return f"saved rows must be floating and labels whole numbers, got {rows.dtype} and {labels.dtype}"
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != self.dim:
            return f"the bank has dim={self.dim}, the saved rows are {list(rows.shape)}"
        if labels.shape != rows.shape[:1]:
            return f"{rows.shape[0]} saved rows have labels of shape {list(labels.shape)}"
        for name, count in (("pushed", pushed), ("nonfinite", nonfinite)):
            if count.ndim != 0 or count.is_floating_point() or int(count) < 0:
                return f"the saved {name} must be one whole number, got {count}"
        return None

    def _take_over(self, rows: Tensor, labels: Tensor, pushed: Tensor, nonfinite: Tensor) -> None:
        saved_size, total = rows.shape[0], int(pushed)
        if saved_size != self.size:
            kept = min(total, saved_size, self.size)
            newest = torch.arange(total - kept, total, device=rows.device) % saved_size  # slots, oldest first
            rows, labels, total = rows[newest], labels[newest.to(labels.device)], kept
        if rows.dtype != self.rows.dtype:
            rows = F.normalize(rows.float(), dim=1)
        filled = rows.shape[0]  # the saved tensors may be the bank's own: nothing is cleared before it is read
        self.rows[:filled] = rows.to(self.rows)
        self.rows[filled:].zero_()
        self.labels[:filled] = labels.to(self.labels)
        self.labels[filled:] = UNKNOWN_LABEL
        self.pushed.fill_(total)
        self.nonfinite.copy_(nonfinite)
        self._filled.fill_(min(total, self.size))


def unit_rows(x: Tensor) -> Tensor:
    """Return the rows of x [B, D] as float32 unit vectors; all NaN where the norm of a row is not finite."""
    x = x.detach().float()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # [B, 1]
    return F.normalize(x, dim=1).masked_fill_(~norm.isfinite(), torch.nan)
