"""The memory bank of MSF (paper section 2): a first-in-first-out ring of target embeddings, searched exactly."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from msf_core.checks import check_labels, check_not_recomputed, check_not_replica, check_tensor, whole_number
from msf_core.distributed import Ranks
from msf_core.layouts import LAYOUTS, Step
from msf_core.ring import ALWAYS, BESIDE, COUNTS, Device, Found
from msf_core.rows import UNKNOWN, Neighbors, unit_rows
from msf_core.search import Queries, SearchBackend, check_backend
from msf_core.search.base import ROW_DTYPES, may_look
from msf_core.search.registry import check_anywhere

# In a state int8 rows have a name of their own: torch.distributed.checkpoint fills the tensors of a state by name and
# casts, which would make floats of them without their scale.
INT8_ROWS = "int8_rows"


class MemoryBank(nn.Module):
    """The newest ``size`` embeddings as unit rows, each with a label and an id, and exact search among them.

    Contents always equal a ``collections.deque(maxlen=size)`` of everything pushed. All of it is in the
    ``state_dict``: save, load and go on is bit-equal. A saved bank of another size gives the newest rows that
    fit, in order; one of another ``dim`` is an error that leaves the bank as it was.

    Args:
        size: rows that it holds, N. The paper uses 1,024,000 and finds 128,000 as good (section 3.4).
        dim: dimensions of an embedding, D.
        dtype: of the stored rows: float32, float16, bfloat16, or int8 with a float32 scale for each row. Queries are
            rounded to a floating one, and stay float32 for int8; similarities are accumulated in float32.
        device: where the rows lie; by default PyTorch's default device. The bank also moves with its module.
        backend: "auto", "torch", "faiss", "triton", or any object with a `SearchBackend.topk`.
        layout: who keeps what where torch.distributed runs. "replicated": every rank keeps all rows of all ranks.
            "sharded": each rank keeps 1/W of them and answers for it, with the same results; the ``state_dict`` then
            holds DTensors, for torch.distributed.checkpoint. "local": each rank keeps its own. With one process all
            three are the same.
        group: process group of the ranks that share the bank; None is the default group.
        persistent: False leaves the bank out of the ``state_dict``.

    Raises:
        ValueError: ``size`` or ``dim`` below 1, an unknown backend or layout, a group without this process.
        TypeError: another ``dtype``, a backend without ``topk``, a group that is none.
        ImportError: the backend asked for by name does not work here.

    >>> bank = MemoryBank(size=4, dim=2)
    >>> slots = bank.push(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), labels=torch.tensor([7, 8]))
    >>> found = bank.search(torch.tensor([[0.0, 1.0]]), k=2)
    >>> found.label, found.similarity
    (tensor([[8, 7]]), tensor([[1.0000, 0.8000]]))
    >>> bank
    MemoryBank(size=4, dim=2, dtype=float32, filled=2, backend='auto', bytes=64)
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        backend: str | SearchBackend = "auto",
        layout: str = "replicated",
        group: Any = None,
        persistent: bool = True,
    ) -> None:
        size, dim = whole_number("size", size), whole_number("dim", dim)
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in (*ROW_DTYPES, torch.int8):
            raise TypeError(f"dtype must be torch.float32, torch.float16, torch.bfloat16 or torch.int8, got {dtype!r}")
        check_anywhere(backend, device)  # says now if it does not work here
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        super().__init__()
        self.size, self.dim, self.layout, self.persistent = size, dim, layout, persistent
        self.backend = backend
        self._layout = LAYOUTS[layout](size, dim, dtype, device, Ranks(group))
        self._ring = self._layout.ring

    def __len__(self) -> int:
        """Rows filled so far, n, on all ranks that share the bank; at most ``size``."""
        return len(self._ring)

    @property
    def rows(self) -> Tensor:
        """[N, D], of a shard [⌈N/W⌉, D] or less; unit vectors in the bank's dtype."""
        return self._ring.rows

    @property
    def scale(self) -> Tensor | None:
        """[N] float32 for int8 rows: row i is ``rows[i] * scale[i]``. Of other dtypes None."""
        return self._ring.scale

    @property
    def labels(self) -> Tensor:
        """[N] int64 beside the rows, −1 where unknown."""
        return self._ring.labels

    @property
    def ids(self) -> Tensor | None:
        """[N] int64 likewise; None while no id was pushed."""
        return self._ring.ids

    @property
    def pushed(self) -> Tensor:
        """Rows pushed so far, an int64 scalar; the next goes to slot pushed % size. Slots 0 … len − 1 are filled."""
        return self._ring.pushed

    @property
    def nonfinite(self) -> Tensor:
        """How many of them had no finite norm, an int64 scalar."""
        return self._ring.nonfinite

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored rows."""
        return self._ring.rows.dtype

    @property
    def group(self) -> Any:
        """Process group of the ranks that share the bank; None is the default one."""
        return self._layout.ranks.group

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept in this process, a row each."""
        return sum(tensor.nbytes for tensor in self._ring.kept() if tensor is not None)

    @property
    def full(self) -> bool:
        """Whether every slot is filled."""
        return len(self) == self.size

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Store a batch, over the oldest rows once the bank is full. Never waits for the device.

        Under torch.distributed all ranks push together, each a batch of its own, which may differ in B: the rows of
        rank 0 come first. A rank whose batch does not fit makes it an error on all of them.

        Args:
            embeddings: [B, D], any float dtype and scale; normalized in float32 on the way in (a row shorter than
                1e-12 stays short). B may be 0 or above ``size``. A row whose norm is not finite takes its slot,
                but is never found by a search, and ``nonfinite`` counts it.
            labels: [B], integers; a negative one, or no labels at all, is unknown.
            ids: [B], integers: which image, say, each is an embedding of; negative: unknown. From the first ones on the
                bank keeps an id beside each row. All ranks give them, or none.

        Returns:
            The slots of these rows, [B] int64; −1 for those that later rows pushed out at once.

        Raises:
            ValueError: a shape or device that does not fit.
            TypeError: embeddings that are not floating, labels or ids that are not integers.
            RuntimeError: other ranks are not in a push.
        """
        with self._layout.checking("push"):
            self._check_batch(embeddings, labels, ids)
        return self._layout.push(unit_rows(embeddings), _whole(labels), _whole(ids))[0]

    @torch.no_grad()
    def search(
        self, queries: Tensor, k: int, *, labels: Tensor | None = None, exclude_ids: Tensor | None = None
    ) -> Neighbors:
        """Find the k most similar rows of every query, exactly, or of those rows that it may find.

        In a sharded bank all ranks search together, each with queries of its own, which may differ in number.

        Args:
            queries: [Q, D], any float dtype and scale.
            k: between 1 and ``len(bank)``.
            labels: [Q], integers: only rows with a query's label are its neighbors; negative: any label.
            exclude_ids: [Q], integers: rows with that id are none of a query's neighbors; negative: none are excluded.

        Returns:
            `Neighbors`. Unfilled slots are never among them.

        Raises:
            ValueError: k out of range, a shape or device that does not fit, or ``exclude_ids`` where no ids are kept.
            TypeError: queries that are not floating, labels or ids that are not integers, or a k that is no int.
            RuntimeError: other ranks of a sharded bank are not in a search.
        """
        with self._layout.checking("search"):
            k = whole_number("k", k)
            self._check_search(queries, k, labels, exclude_ids)
        asked = Queries(unit_rows(queries).to(self._ring.query_dtype), _whole(labels), _whole(exclude_ids))
        return self.neighbors(self._layout.search(asked, k, self.backend))

    def checking(self, *, pushing: bool) -> AbstractContextManager[None]:
        """Return the context in which `MeanShiftLoss` checks its arguments before `step`, or else before `others`.

        What is raised in it is raised by all processes that share the bank, so that none waits for another in vain.
        """
        return self._layout.checking("step" if pushing else "search")

    def step(self, u: Tensor, labels: Tensor | None, ids: Tensor | None, step: Step) -> tuple[Tensor, Found | None]:
        """Push unit rows u [V·B, D] as `push` does, and find what ``step`` asks for; the loss has checked them.

        Returns:
            The slots of u [V·B], and k − 1 nearest others of each: fewer where the bank holds fewer, None where there
            is nothing.
        """
        return self._layout.step(u, _whole(labels), _whole(ids), step, self.backend)

    def others(self, u: Tensor, k: int, *, labels: Tensor | None, exclude_ids: Tensor | None) -> Found | None:
        """Find k − 1 nearest rows of unit rows u [B, D] that were not pushed, as `step` does."""
        k = min(k - 1, len(self._ring))
        if k < 1:
            return None
        asked = Queries(u.to(self._ring.query_dtype), _whole(labels), _whole(exclude_ids))
        return self._layout.search(asked, k, self.backend)

    def neighbors(self, found: Found) -> Neighbors:
        """Make of what was found what `search` returns."""
        similarity, index, embedding, label = found
        if label is None:
            label = self._ring.labels[index]
        missing = index < 0
        if not may_look(missing) or missing.any():
            embedding = embedding.masked_fill(missing[..., None], 0.0)
            label = label.masked_fill(missing, UNKNOWN)
        return Neighbors(similarity.clamp(max=1.0), index, embedding, label)

    def age(self, slots: Tensor) -> Tensor:
        """Return how many rows were pushed after those in these slots, [...] int64; −1 for −1. Does not wait."""
        return ((self.pushed - 1 - slots) % self.size).masked_fill(slots < 0, -1)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget every row, as if newly made; ids that are kept are kept on."""
        self._ring.clear()

    def reset_parameters(self) -> None:
        """Forget every row: PyTorch's name for `clear`, called where ``to_empty`` has given a module its memory."""
        self.clear()

    def keep_ids(self) -> None:
        """Keep an id beside each row from now on, 8 bytes; those of rows that are there already are unknown."""
        self._ring.keep_ids()

    def check_backend(self, k: int = 1) -> None:
        """Raise unless the search backend finds k neighbors on the bank's present device.

        Raises:
            ImportError: one asked for by name does not work on that device.
            ValueError: it does not find that many.
        """
        check_backend(self.backend, self._ring.rows.device, k)

    def check(self, name: str, embeddings: Tensor) -> None:
        """Raise ValueError or TypeError, naming ``name``, unless these are [any, D] floats on the bank's device."""
        check_tensor(name, embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(
                f"{name} must be [B, {self.dim}] as the bank has dim={self.dim}, got {list(embeddings.shape)}"
            )
        if not embeddings.is_floating_point():
            raise TypeError(f"{name} must be floating, got {embeddings.dtype}")
        if self._ring.rows.is_meta and not embeddings.is_meta:
            raise ValueError("the bank is on the meta device: call to_empty first, or load with assign=True")
        if embeddings.device != self._ring.rows.device:
            raise ValueError(
                f"{name} must be on the bank's device, {self._ring.rows.device}, got {embeddings.device}; "
                f"move the bank with .to({str(embeddings.device)!r})"
            )

    def _check_batch(self, embeddings: Tensor, labels: Tensor | None, ids: Tensor | None) -> None:
        check_not_replica(self)
        check_not_recomputed("MemoryBank.push")
        self.check("embeddings", embeddings)
        check_labels(labels, embeddings)
        check_labels(ids, embeddings, "ids")

    def _check_search(self, queries: Tensor, k: int, labels: Tensor | None, exclude_ids: Tensor | None) -> None:
        self.check("queries", queries)
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be between 1 and the {len(self)} rows in the bank, got {k}")
        check_labels(labels, queries)
        check_labels(exclude_ids, queries, "exclude_ids")
        if exclude_ids is not None and self._ring.ids is None:
            raise ValueError("exclude_ids needs rows that have ids, and no ids were pushed")
        self.check_backend(k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryBank":
        """Follow the module to another device; the dtype stays what was asked for."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._ring.apply(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.persistent:
            for name, tensor in self._ring.state().items():
                key = prefix + (INT8_ROWS if tensor.dtype == torch.int8 else name)
                destination[key] = self._layout.saved(name, tensor.detach())

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
        key_of = {name: prefix + name for name in (*BESIDE, *COUNTS)}
        if prefix + INT8_ROWS in state_dict:
            key_of["rows"] = prefix + INT8_ROWS
        needed, ours = set(), set()
        if self.persistent:
            needed, ours = {key_of[name] for name in ALWAYS}, set(key_of.values())
        missing_keys += sorted(needed - state_dict.keys())
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in ours]
        if not needed or not needed <= state_dict.keys():
            return
        saved = {name: state_dict[key] for name, key in key_of.items() if key in state_dict}
        assign = local_metadata.get("assign_to_params_buffers", False)
        problem = self._ring.why_not_loadable(saved, assign)
        if problem:
            error_msgs.append(f"{prefix}rows and its companions were not loaded: {problem}")
        else:
            self._ring.load(saved, assign)

    def extra_repr(self) -> str:
        """Describe size, fill and cost; bytes are those of this process."""
        backend = self.backend if isinstance(self.backend, str) else type(self.backend).__name__
        layout = "" if self.layout == "replicated" else f" layout={self.layout!r},"
        return (
            f"size={self.size}, dim={self.dim}, dtype={_name(self.dtype)}, "
            f"filled={len(self)}, backend={backend!r},{layout} bytes={self.nbytes}"
        )


def _whole(numbers: Tensor | None) -> Tensor | None:
    """Return labels or ids as they are kept, int64."""
    return None if numbers is None else numbers.to(torch.int64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
