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

# The name of int8 rows in a state dict differs from "rows", because torch.distributed.checkpoint copies tensors by name
# and casts them: int8 rows would become floats without their scale.
INT8_ROWS = "int8_rows"


class MemoryBank(nn.Module):
    """Store the newest ``size`` embeddings as unit vectors, with a label and an id each, and search them exactly.

    The bank always holds the same rows as a ``collections.deque(maxlen=size)``. They are saved in the ``state_dict``,
    so a resumed run is bit-identical. A saved bank of another size can be loaded: the newest rows that fit are kept, in
    order. A saved bank with another ``dim`` raises an error, and the bank does not change.

    Args:
        size: number of rows, N. The paper uses 1,024,000 and finds 128,000 as good (section 3.4).
        dim: dimension of the embeddings, D.
        dtype: dtype of the stored rows: float32, float16, bfloat16, or int8 with a float32 scale for each row. Queries
            are rounded to the same dtype, except for int8 rows, where they stay float32. Similarities are accumulated
            in float32.
        device: device of the rows, by default PyTorch's default device. The bank also moves with its parent module.
        backend: "auto", "torch", "faiss", "triton", or any object with the method `SearchBackend.topk`.
        layout: which rows each of W ranks stores under torch.distributed. With one process, all three are the same.

            - "replicated": all rows of all ranks.
            - "sharded": 1/W of these rows. Each rank searches its part; the results are the same as for "replicated".
              The ``state_dict`` has DTensors, for torch.distributed.checkpoint.
            - "local": only its own rows.
        group: process group of the ranks that share the bank; None is the default group.
        persistent: whether the bank is part of the ``state_dict``.

    Raises:
        ValueError: if ``size`` or ``dim`` is below 1, the backend or layout is unknown, or this process is not in the
            group.
        TypeError: if ``dtype`` is not one of these, the backend has no ``topk``, or ``group`` is not a process group.
        ImportError: if a backend requested by name does not work here.

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
        check_anywhere(backend, device)  # raise now, not at the first search
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        super().__init__()
        self.size, self.dim, self.layout, self.persistent = size, dim, layout, persistent
        self.backend = backend
        self._layout = LAYOUTS[layout](size, dim, dtype, device, Ranks(group))
        self._ring = self._layout.ring

    def __len__(self) -> int:
        """Number of filled rows, n, over all ranks that share the bank; at most ``size``."""
        return len(self._ring)

    @property
    def rows(self) -> Tensor:
        """[N, D] unit vectors in the bank's dtype. In a sharded bank at most [⌈N/W⌉, D]."""
        return self._ring.rows

    @property
    def scale(self) -> Tensor | None:
        """[N] float32 for int8 rows, where row i is ``rows[i] * scale[i]``. None for other dtypes."""
        return self._ring.scale

    @property
    def labels(self) -> Tensor:
        """[N] int64 labels of the rows, −1 if unknown."""
        return self._ring.labels

    @property
    def ids(self) -> Tensor | None:
        """[N] int64 ids of the rows, −1 if unknown. None until ids are pushed."""
        return self._ring.ids

    @property
    def pushed(self) -> Tensor:
        """Number of rows pushed so far, an int64 scalar. The next row goes to slot pushed % size."""
        return self._ring.pushed

    @property
    def nonfinite(self) -> Tensor:
        """Number of pushed rows whose norm was not finite, an int64 scalar."""
        return self._ring.nonfinite

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored rows."""
        return self._ring.rows.dtype

    @property
    def group(self) -> Any:
        """Process group of the ranks that share the bank; None is the default group."""
        return self._layout.ranks.group

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, scales, labels and ids in this process."""
        return sum(tensor.nbytes for tensor in self._ring.kept() if tensor is not None)

    @property
    def full(self) -> bool:
        """Whether every slot is filled."""
        return len(self) == self.size

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Store a batch. Once the bank is full, it overwrites the oldest rows. Never synchronizes with the device.

        If ranks share the bank, all of them must push together. Their batches may have different sizes; the rows of
        rank 0 come first. An invalid batch on one rank raises an error on all ranks.

        Args:
            embeddings: [B, D], any float dtype and scale; normalized in float32 (a row shorter than 1e-12 stays
                shorter than 1). B may be 0 or larger than ``size``. A row whose norm is not finite takes a slot, but no
                search finds it, and ``nonfinite`` counts it.
            labels: [B] integers, negative if unknown. Without labels, all are unknown.
            ids: [B] integers, negative if unknown, which identify for example the image of each embedding. Once ids are
                pushed, the bank stores an id with each row. Either all ranks pass ids or none does.

        Returns:
            The slots of these rows, [B] int64; −1 for rows that later rows of the same batch overwrote.

        Raises:
            ValueError: if a shape or device does not match.
            TypeError: if embeddings are not floating point, or labels or ids are not integers.
            RuntimeError: if the ranks that share the bank do not all make this call, if this runs in a replica of
                DataParallel, or if activation checkpointing runs it a second time.
        """
        with self._layout.checking("push"):
            self._check_batch(embeddings, labels, ids)
        return self._layout.push(unit_rows(embeddings), _whole(labels), _whole(ids))[0]

    @torch.no_grad()
    def search(
        self, queries: Tensor, k: int, *, labels: Tensor | None = None, exclude_ids: Tensor | None = None
    ) -> Neighbors:
        """Return the k most similar rows of every query, found by exact search.

        If the bank is sharded, all ranks must search together. Each has its own queries, and their numbers may differ.

        Args:
            queries: [Q, D], any float dtype and scale.
            k: between 1 and ``len(bank)``.
            labels: [Q] integers. Only rows with the label of the query are found; a negative label allows all rows.
            exclude_ids: [Q] integers. Rows with the id of the query are not found; a negative id excludes none.

        Returns:
            `Neighbors`, which never contain unfilled slots.

        Raises:
            ValueError: if k is out of range, a shape or device does not match, or ``exclude_ids`` is given but the bank
                has no ids.
            TypeError: if queries are not floating point, labels or ids are not integers, or k is not an int.
            RuntimeError: if the bank is sharded and the ranks do not all make this call.
        """
        with self._layout.checking("search"):
            k = whole_number("k", k)
            self._check_search(queries, k, labels, exclude_ids)
        asked = Queries(unit_rows(queries).to(self._ring.query_dtype), _whole(labels), _whole(exclude_ids))
        return self.neighbors(self._layout.search(asked, k, self.backend))

    def checking(self, *, pushing: bool) -> AbstractContextManager[None]:
        """Return the context in which `MeanShiftLoss` checks its arguments before `step`, or before `others`.

        An error in this context is raised on all ranks that share the bank, so that none waits forever.
        """
        return self._layout.checking("step" if pushing else "search")

    def step(self, u: Tensor, labels: Tensor | None, ids: Tensor | None, step: Step) -> tuple[Tensor, Found | None]:
        """Push unit rows u [V·B, D] like `push`, and search as described by ``step``. The arguments are not checked.

        Returns:
            The slots of u [V·B], and the k − 1 nearest other rows of each: fewer if the bank has fewer, None if it has
            none.
        """
        return self._layout.step(u, _whole(labels), _whole(ids), step, self.backend)

    def others(self, u: Tensor, k: int, *, labels: Tensor | None, exclude_ids: Tensor | None) -> Found | None:
        """Return the k − 1 nearest rows to unit rows u [B, D], like `step`, but without pushing u."""
        k = min(k - 1, len(self._ring))
        if k < 1:
            return None
        asked = Queries(u.to(self._ring.query_dtype), _whole(labels), _whole(exclude_ids))
        return self._layout.search(asked, k, self.backend)

    def neighbors(self, found: Found) -> Neighbors:
        """Convert the result of a layout's search to the `Neighbors` that `search` returns."""
        similarity, index, embedding, label = found
        if label is None:
            label = self._ring.labels[index]
        missing = index < 0
        if not may_look(missing) or missing.any():
            embedding = embedding.masked_fill(missing[..., None], 0.0)
            label = label.masked_fill(missing, UNKNOWN)
        return Neighbors(similarity.clamp(max=1.0), index, embedding, label)

    def age(self, slots: Tensor) -> Tensor:
        """Return the number of rows pushed after those in the given slots, [...] int64; −1 for slot −1.

        Does not synchronize with the device.
        """
        return ((self.pushed - 1 - slots) % self.size).masked_fill(slots < 0, -1)

    @torch.no_grad()
    def clear(self) -> None:
        """Remove all rows. If the bank stores ids, it continues to do so."""
        self._ring.clear()

    def reset_parameters(self) -> None:
        """Do the same as `clear`. This is PyTorch's name for initializing a module after ``to_empty``."""
        self.clear()

    def keep_ids(self) -> None:
        """Store an id (8 bytes) with each row from now on. The ids of rows already in the bank are unknown."""
        self._ring.keep_ids()

    def check_backend(self, k: int = 1) -> None:
        """Raise unless the search backend can find k neighbors on the current device of the bank.

        Raises:
            ImportError: if a backend requested by name does not work on this device.
            ValueError: if k is larger than the backend supports.
        """
        check_backend(self.backend, self._ring.rows.device, k)

    def check(self, name: str, embeddings: Tensor) -> None:
        """Raise ValueError or TypeError, naming ``name``, unless embeddings are [B, D] floats on the bank's device."""
        check_tensor(name, embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(
                f"{name} must be [B, {self.dim}] because the bank has dim={self.dim}, got {list(embeddings.shape)}"
            )
        if not embeddings.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {embeddings.dtype}")
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
            raise ValueError("exclude_ids needs rows with ids, but no ids were pushed")
        self.check_backend(k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryBank":
        """Move to the device of ``fn`` as `torch.nn.Module` does, but keep the dtype of the rows."""
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
            error_msgs.append(f"{prefix}rows and the other tensors of the bank were not loaded: {problem}")
        else:
            self._ring.load(saved, assign)

    def extra_repr(self) -> str:
        """Describe the size, the number of filled rows and the memory in this process."""
        backend = self.backend if isinstance(self.backend, str) else type(self.backend).__name__
        layout = "" if self.layout == "replicated" else f" layout={self.layout!r},"
        return (
            f"size={self.size}, dim={self.dim}, dtype={_name(self.dtype)}, "
            f"filled={len(self)}, backend={backend!r},{layout} bytes={self.nbytes}"
        )


def _whole(numbers: Tensor | None) -> Tensor | None:
    """Return labels or ids as int64."""
    return None if numbers is None else numbers.to(torch.int64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
