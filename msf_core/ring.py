"""The rows of a memory bank in this process: a first-in-first-out ring buffer, which is searched in place.

A ring stores a range of slots of the whole bank. It does not check its arguments, because `MemoryBank` has checked and
normalized them, and it does not communicate with other processes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msf_core.checks import gives_memory_alone
from msf_core.distributed import blocks_of, is_shard
from msf_core.rows import UNKNOWN, packed, unpacked
from msf_core.search import Queries, Rows, SearchBackend, search_bank, search_by
from msf_core.search.base import without_autocast
from msf_core.search.general import leaving_out_own

BESIDE = ("rows", "scale", "labels", "ids")  # one entry per slot; scale and ids may be missing
COUNTS = ("pushed", "nonfinite")
ALWAYS = ("rows", "labels", *COUNTS)


Device = torch.device | str | int | None


class Found(NamedTuple):
    """The result of a search, from which `Neighbors` are made for users.

    If a query has fewer than k neighbors, the last indices are −1, and their other entries are undefined.
    """

    similarity: Tensor
    """[Q, k] float32, descending; because of rounding, it can be slightly above 1."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """[Q, k] int64, slots of the bank."""
    embedding: Tensor
    """[Q, k, D] float32 unit vectors."""
    label: Tensor | None = None
    """[Q, k] int64; None if they can be read from the ring that was searched."""


class Ring:
    """Slots ``begin`` to ``end`` of a bank of ``size`` rows, with a label each and, once ids are used, an id each.

    Its tensors are not buffers of a module, because DDP would broadcast buffers from rank 0 at every forward.
    """

    rows: Tensor
    """[n, D] unit vectors in the bank's dtype, for the n slots in this process."""
    scale: Tensor | None
    """[n] float32 for int8 rows, where row i is ``rows[i] * scale[i]``. None for other dtypes."""
    labels: Tensor
    """[n] int64 labels of the rows, −1 if unknown."""
    ids: Tensor | None
    """[n] int64 ids of the rows, −1 if unknown. None until ids are pushed."""
    pushed: Tensor
    """Number of rows pushed so far, an int64 scalar. The next row goes to slot pushed % size."""
    nonfinite: Tensor
    """Number of pushed rows whose norm was not finite, an int64 scalar."""
    query_dtype: torch.dtype
    """Dtype to which queries are rounded: that of the rows, or float32 for int8 rows."""

    pushed_on_host: Tensor
    """A copy of ``pushed`` on the CPU, which can be read without synchronizing with the device. It is a tensor because
    torch.compile would treat an int as a constant and recompile when it changes."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, device: Device, begin: int, end: int) -> None:
        self.size, self.dim, self.begin, self.end = size, dim, begin, end
        self.query_dtype = torch.float32 if dtype == torch.int8 else dtype
        self._allocate(dtype, device, with_ids=False)

    def _allocate(self, dtype: torch.dtype, device: Device, with_ids: bool) -> None:
        """Create an empty ring on a device."""
        slots = self.end - self.begin
        with torch.inference_mode(False):  # tensors created in inference mode cannot be written to outside of it
            self.rows = torch.zeros(slots, self.dim, dtype=dtype, device=device)
            self.scale = torch.zeros(slots, dtype=torch.float32, device=device) if dtype == torch.int8 else None
            self.labels = torch.full((slots,), UNKNOWN, device=device)
            self.ids = torch.full_like(self.labels, UNKNOWN) if with_ids else None
            self.pushed = torch.zeros((), dtype=torch.int64, device=device)
            self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
            on_host = self.pushed.device.type == "cpu"
            self.pushed_on_host = self.pushed if on_host else torch.zeros((), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        """Number of filled rows of the whole bank, at most ``size``."""
        return min(int(self.pushed_on_host), self.size)

    def kept(self) -> Rows:
        """Return the rows with their scales, labels and ids."""
        return Rows(self.rows, self.scale, self.labels, self.ids)

    def keep_ids(self) -> None:
        """Store an id (8 bytes) with each row from now on. The ids of rows already in the ring are unknown."""
        if self.ids is None:
            with torch.inference_mode(False):  # as in `_allocate`
                self.ids = torch.full_like(self.labels, UNKNOWN)

    def push(self, unit: Tensor, labels: Tensor | None, ids: Tensor | None) -> Tensor:
        """Push unit rows [B, D] into the whole bank, and store those whose slots are in this process.

        Returns:
            The slots [B] int64 of the pushed rows; −1 for rows that later rows of the same batch overwrote.
        """
        count = unit.shape[0]
        if ids is not None:
            self.keep_ids()
        gone = max(0, count - self.size)
        slots = self._next_slots(count)
        rows, scale = packed(unit, self.rows.dtype)
        if self.end - self.begin < self.size:
            for here, there in self._own_part(count, gone):
                for kept, part in zip(self.kept(), (rows, scale, labels, ids), strict=True):
                    if kept is not None:
                        kept[here] = UNKNOWN if part is None else part[there]
        else:
            new_slots = slots[gone:] if gone else slots
            self.rows.index_copy_(0, new_slots, rows[gone:] if gone else rows)
            for kept, part in ((self.scale, scale), (self.labels, labels), (self.ids, ids)):
                if kept is not None and part is not None:
                    kept.index_copy_(0, new_slots, part[gone:])
                elif kept is not None:
                    kept.index_fill_(0, new_slots, UNKNOWN)
        self.pushed.add_(count)
        if self.pushed_on_host is not self.pushed:
            self.pushed_on_host.add_(count)
        self.nonfinite.add_(unit[:, 0].isnan().sum())
        if gone:
            slots[:gone] = -1
        return slots

    def _next_slots(self, count: int) -> Tensor:
        """Return the slots [B] of the next rows."""
        device = self.rows.device
        if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            # A number on the host would become a constant of the graph.
            return torch.arange(count, device=device).add_(self.pushed).remainder_(self.size)
        first = int(self.pushed_on_host) % self.size
        slots = torch.arange(first, first + count, device=device)
        return slots if first + count <= self.size else slots.remainder_(self.size)

    def _own_part(self, count: int, gone: int) -> Iterator[tuple[slice, slice]]:
        """Yield (places in this shard, matching part of the ``count`` new rows), without device synchronization."""
        first = (int(self.pushed_on_host) + gone) % self.size  # slot of row number ``gone``
        for wrap in (0, self.size):
            begin = max(first, self.begin + wrap)
            end = min(first + count - gone, self.end + wrap)
            if begin < end:
                here = slice(begin - wrap - self.begin, end - wrap - self.begin)
                yield here, slice(begin - first + gone, end - first + gone)

    def find(
        self, queries: Queries, k: int, backend: str | SearchBackend, own_elsewhere: bool
    ) -> tuple[Tensor, Tensor]:
        """Return similarity [Q, k] float32 and place [Q, k] int64 in this ring, −1 for missing neighbors.

        Queries are unit vectors in `query_dtype`. With ``own_elsewhere``, indices in ``queries.own`` may be outside of
        the rows here. At least k rows must be filled.
        """
        if isinstance(backend, str):
            return search_bank(queries, self.kept(), self._filled(), k, backend, own_elsewhere)
        rows = self.kept().part(0, int(self._filled()))
        with torch.no_grad(), without_autocast(self.rows.device):
            return leaving_out_own(partial(search_by, backend), queries, rows, k)

    def _filled(self) -> Tensor:
        """Return the number of filled slots here, on the CPU; once the bank is full, it exceeds the number of slots."""
        return self.pushed_on_host - self.begin if self.begin else self.pushed_on_host

    def embeddings(self, places: Tensor) -> Tensor:
        """Return the rows at places [Q, k] as [Q, k, D] float32 unit vectors; for place −1, an arbitrary row."""
        scale = None if self.scale is None else self.scale[places]
        if places.device.type != "cpu":
            return unpacked(self.rows[places], scale)
        # On a CPU this copies whole rows; indexing would copy value by value.
        return unpacked(F.embedding(places.clamp(min=0), self.rows), scale)

    def _take_over(self, name: str, part: Tensor | None) -> None:
        """Use a saved tensor itself, without a copy, if its shape, dtype and device are those of the ring's tensor."""
        ours = getattr(self, name)
        if ours is None or part is None:
            return
        local: Tensor = part.to_local() if is_shard(part) else part  # type: ignore[attr-defined]
        like_ours = (local.shape, local.dtype, local.device) == (ours.shape, ours.dtype, ours.device)
        if like_ours and local.is_contiguous() and not local.is_inference():
            setattr(self, name, local.detach())

    def clear(self) -> None:
        """Remove all rows. If the ring stores ids, it continues to do so."""
        self._forget(0)
        for count in (self.pushed, self.nonfinite, self.pushed_on_host):
            count.zero_()

    def _forget(self, first: int) -> None:
        for tensor, empty in zip(self.kept(), (0, 0, UNKNOWN, UNKNOWN), strict=True):
            if tensor is not None:
                tensor[first:] = empty

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply ``fn`` like `torch.nn.Module._apply`, but keep the dtypes. Empty the ring if its values are lost."""
        was_meta = self.rows.is_meta
        with torch.inference_mode(False):
            for name in (*BESIDE, *COUNTS):
                tensor = getattr(self, name)
                if tensor is not None:
                    moved = fn(tensor)
                    setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        if self.pushed.device.type == "cpu":
            self.pushed_on_host = self.pushed
        if gives_memory_alone(fn) or (was_meta and not self.rows.is_meta):
            self.clear()

    def state(self) -> dict[str, Tensor]:
        """Return all tensors of the ring by name; those in `BESIDE` have one entry per slot."""
        named = {name: getattr(self, name) for name in (*BESIDE, *COUNTS)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def why_not_loadable(self, saved: dict[str, Tensor], assign: bool) -> str | None:
        """Return why a saved `state`, of a bank of any size, dtype and layout, cannot be loaded; None if it can."""
        if not all(isinstance(part, Tensor) for part in saved.values()):
            return "the saved buffers must be tensors"
        if any(part.is_meta for part in saved.values()):
            return "the saved buffers are on the meta device and have no values"
        if self.rows.is_meta and not assign:
            return "the bank is on the meta device: call to_empty first, or load with assign=True"
        rows = saved["rows"]
        if not rows.is_floating_point() and rows.dtype != torch.int8:
            return f"saved rows must be floating point or int8, got {rows.dtype}"
        if (rows.dtype == torch.int8) != ("scale" in saved):
            return f"saved rows must have a scale if they are int8, and none otherwise, got {rows.dtype}"
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != self.dim:
            return f"the bank has dim={self.dim}, but the saved rows are {list(rows.shape)}"
        for name in ("scale", "labels", "ids"):
            part = saved.get(name)
            if part is None:
                continue
            if part.shape != rows.shape[:1]:
                return f"{rows.shape[0]} saved rows have {name} of shape {list(part.shape)}"
            if is_shard(rows) != is_shard(part):
                return f"saved rows and {name} must both be DTensors, or neither"
            if part.is_floating_point() != (name == "scale"):
                return f"saved scale must be floating point, and labels and ids integers, got {name} of {part.dtype}"
        for name in COUNTS:
            count = saved[name]
            if count.ndim != 0 or count.is_floating_point() or int(count) < 0:
                return f"the saved {name} must be a single integer of at least 0, got {count}"
        return None

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor], assign: bool) -> None:
        """Load the newest saved rows that fit. From a bank of the same size, every row keeps its slot.

        With ``assign``, move the ring to the device of the saved tensors, and use them without a copy if possible.
        """
        if assign and self.rows.device != saved["rows"].device:
            self._allocate(self.rows.dtype, saved["rows"].device, with_ids=self.ids is not None)
        if assign and "ids" in saved:
            self.keep_ids()
        if assign:
            for name in BESIDE:
                self._take_over(name, saved.get(name))
        saved_size, total, first = saved["rows"].shape[0], int(saved["pushed"]), 0
        kept = min(total, self.size)
        if saved_size != self.size:
            kept = min(kept, saved_size)
            first, total = (total - kept) % saved_size, kept
        filled = max(0, min(kept, self.end) - self.begin)
        if "ids" in saved:
            self.keep_ids()
        elif self.ids is not None:
            self.ids.fill_(UNKNOWN)

        def place(ours: Tensor, begin: int, block: Tensor) -> tuple[Tensor, Tensor]:
            """Return the places of the rows in a block that starts at ``begin``, and a mask of the rows to load."""
            slots = torch.arange(begin - first, begin - first + len(block)) % saved_size
            wanted = (slots < kept) & (slots >= self.begin) & (slots < self.end)
            return (slots[wanted] - self.begin).to(ours.device), wanted.to(block.device)

        # The saved tensors may be the ring's own, so read them before clearing anything.
        device, scale = self.rows.device, None
        if "scale" in saved:
            scale = torch.cat([part for _, part in blocks_of(saved["scale"], device)])
        for begin, block in blocks_of(saved["rows"], device):
            here, wanted = place(self.rows, begin, block)
            rows, beside = block[wanted], None
            if rows.dtype == torch.float64:
                rows = rows.float()
            if scale is not None:
                beside = scale[begin : begin + len(block)][wanted.to(scale.device)]
            if rows.dtype != self.rows.dtype:
                rows, beside = packed(unpacked(rows, beside), self.rows.dtype)
            self.rows[here] = rows.to(device)
            if self.scale is not None and beside is not None:
                self.scale[here] = beside.to(device)
        for name in ("labels", "ids"):
            ours = getattr(self, name)
            if ours is not None and name in saved:
                for begin, block in blocks_of(saved[name], device):
                    here, wanted = place(ours, begin, block)
                    ours[here] = block[wanted].to(ours)
        self._forget(filled)
        self.nonfinite.copy_(saved["nonfinite"])
        self.pushed.fill_(total)
        self.pushed_on_host.fill_(total)
