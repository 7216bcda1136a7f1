"""The rows of a memory bank that this process holds: a first-in-first-out ring, searched where it lies.

A ring trusts its callers: `MemoryBank` has checked and normalized what comes in. It knows nothing of other processes
but which slots of the whole bank are its own.
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

BESIDE = ("rows", "scale", "labels", "ids")  # one entry a slot, where they are kept at all
COUNTS = ("pushed", "nonfinite")
ALWAYS = ("rows", "labels", *COUNTS)


Device = torch.device | str | int | None


class Found(NamedTuple):
    """What a search found, before it is made fit for users as `Neighbors`.

    A place without a neighbor has index −1; its other entries mean nothing.
    """

    similarity: Tensor
    """[Q, k] float32, descending; rounding may leave one a little above 1."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """[Q, k] int64, slots of the bank."""
    embedding: Tensor
    """[Q, k, D] float32 unit vectors."""
    label: Tensor | None = None
    """[Q, k] int64; None where the ring that was searched still has them."""


class Ring:
    """Slots ``begin`` to ``end`` of a bank of ``size`` rows, with a label and, once there is one, an id each.

    Its tensors are no buffers of a module: DDP would send those of rank 0 to all ranks at every forward.
    """

    rows: Tensor
    """[n, D] for the n slots held; unit vectors in the bank's dtype."""
    scale: Tensor | None
    """[n] float32 for int8 rows: row i is ``rows[i] * scale[i]``. Of other dtypes None."""
    labels: Tensor
    """[n] int64 beside the rows, −1 where unknown."""
    ids: Tensor | None
    """[n] int64 likewise; None while no id was pushed."""
    pushed: Tensor
    """Rows pushed so far, an int64 scalar; the next goes to slot pushed % size. Slots 0 … len − 1 are filled."""
    nonfinite: Tensor
    """How many of them had no finite norm, an int64 scalar."""
    query_dtype: torch.dtype
    """Dtype that queries are rounded to: that of the rows, for int8 ones float32."""

    pushed_on_host: Tensor
    """The same as ``pushed``, on the CPU: the host knows it without asking the device. A tensor and not an int, since
    torch.compile would take an int for a constant and compile again when it moves."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, device: Device, begin: int, end: int) -> None:
        self.size, self.dim, self.begin, self.end = size, dim, begin, end
        self.query_dtype = torch.float32 if dtype == torch.int8 else dtype
        self._allocate(dtype, device, with_ids=False)

    def _allocate(self, dtype: torch.dtype, device: Device, with_ids: bool) -> None:
        """Make an empty ring on a device."""
        slots = self.end - self.begin
        with torch.inference_mode(False):  # tensors made in that mode could not be written to outside of it
            self.rows = torch.zeros(slots, self.dim, dtype=dtype, device=device)
            self.scale = torch.zeros(slots, dtype=torch.float32, device=device) if dtype == torch.int8 else None
            self.labels = torch.full((slots,), UNKNOWN, device=device)
            self.ids = torch.full_like(self.labels, UNKNOWN) if with_ids else None
            self.pushed = torch.zeros((), dtype=torch.int64, device=device)
            self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
            on_host = self.pushed.device.type == "cpu"
            self.pushed_on_host = self.pushed if on_host else torch.zeros((), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        """Rows of the whole bank that are filled, at most ``size``."""
        return min(int(self.pushed_on_host), self.size)

    def kept(self) -> Rows:
        """Return all that is kept beside one another."""
        return Rows(self.rows, self.scale, self.labels, self.ids)

    def keep_ids(self) -> None:
        """Keep an id beside each row from now on, 8 bytes; those of rows that are there already are unknown."""
        if self.ids is None:
            with torch.inference_mode(False):  # as in `_allocate`
                self.ids = torch.full_like(self.labels, UNKNOWN)

    def push(self, unit: Tensor, labels: Tensor | None, ids: Tensor | None) -> Tensor:
        """Take unit rows [B, D] of the whole bank in, and keep those that belong here.

        Returns:
            Their slots [B] int64; −1 for those that later rows of the same batch push out.
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
            # What the host knows would become a constant of the graph.
            return torch.arange(count, device=device).add_(self.pushed).remainder_(self.size)
        first = int(self.pushed_on_host) % self.size
        slots = torch.arange(first, first + count, device=device)
        return slots if first + count <= self.size else slots.remainder_(self.size)

    def _own_part(self, count: int, gone: int) -> Iterator[tuple[slice, slice]]:
        """Yield which places of a shard take which of ``count`` new rows, known from the shapes alone."""
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
        """Return similarity [Q, k] float32 and place [Q, k] int64 among the rows held here, −1 where there is none.

        Queries are unit vectors in `query_dtype`; with ``own_elsewhere`` their ``own`` may be no place here. k rows are
        filled.
        """
        if isinstance(backend, str):
            return search_bank(queries, self.kept(), self._filled(), k, backend, own_elsewhere)
        rows = self.kept().part(0, int(self._filled()))
        with torch.no_grad(), without_autocast(self.rows.device):
            return leaving_out_own(partial(search_by, backend), queries, rows, k)

    def _filled(self) -> Tensor:
        """Return how many rows have come to the slots held here, on the CPU; more than there are slots, once full."""
        return self.pushed_on_host - self.begin if self.begin else self.pushed_on_host

    def embeddings(self, places: Tensor) -> Tensor:
        """Return the rows at some places [Q, k], as [Q, k, D] float32 unit vectors; of −1 any row."""
        scale = None if self.scale is None else self.scale[places]
        if places.device.type != "cpu":
            return unpacked(self.rows[places], scale)
        # On a CPU this copies whole rows, where indexing copies value by value.
        return unpacked(F.embedding(places.clamp(min=0), self.rows), scale)

    def _take_over(self, name: str, part: Tensor | None) -> None:
        """Hold a saved tensor itself instead of a copy, if it is what the ring would hold."""
        ours = getattr(self, name)
        if ours is None or part is None:
            return
        local: Tensor = part.to_local() if is_shard(part) else part  # type: ignore[attr-defined]
        like_ours = (local.shape, local.dtype, local.device) == (ours.shape, ours.dtype, ours.device)
        if like_ours and local.is_contiguous() and not local.is_inference():
            setattr(self, name, local.detach())

    def clear(self) -> None:
        """Make it as it was at first; ids that are kept are kept on."""
        self._forget(0)
        for count in (self.pushed, self.nonfinite, self.pushed_on_host):
            count.zero_()

    def _forget(self, first: int) -> None:
        for tensor, empty in zip(self.kept(), (0, 0, UNKNOWN, UNKNOWN), strict=True):
            if tensor is not None:
                tensor[first:] = empty

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module that `fn` moves; the dtype stays what was asked for. Without its contents it is empty."""
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
        """Return all that makes the ring what it is, by name; ``rows``, ``scale``, ``labels`` and ``ids`` by slot."""
        named = {name: getattr(self, name) for name in (*BESIDE, *COUNTS)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def why_not_loadable(self, saved: dict[str, Tensor], assign: bool) -> str | None:
        """Return what is wrong with a saved `state`, of a bank of any size, dtype and layout; None if nothing is."""
        if not all(isinstance(part, Tensor) for part in saved.values()):
            return "the saved buffers must be tensors"
        if any(part.is_meta for part in saved.values()):
            return "the saved buffers are on the meta device and hold nothing"
        if self.rows.is_meta and not assign:
            return "the bank is on the meta device: call to_empty first, or load with assign=True"
        rows = saved["rows"]
        if not rows.is_floating_point() and rows.dtype != torch.int8:
            return f"saved rows must be floating or int8, got {rows.dtype}"
        if (rows.dtype == torch.int8) != ("scale" in saved):
            return f"saved rows have a scale where they are int8 and else none, got {rows.dtype}"
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != self.dim:
            return f"the bank has dim={self.dim}, the saved rows are {list(rows.shape)}"
        for name in ("scale", "labels", "ids"):
            part = saved.get(name)
            if part is None:
                continue
            if part.shape != rows.shape[:1]:
                return f"{rows.shape[0]} saved rows have {name} of shape {list(part.shape)}"
            if is_shard(rows) != is_shard(part):
                return f"saved rows and {name} must both be DTensors, or neither"
            if part.is_floating_point() != (name == "scale"):
                return f"a saved scale must be floating, labels and ids whole numbers, got {name} of {part.dtype}"
        for name in COUNTS:
            count = saved[name]
            if count.ndim != 0 or count.is_floating_point() or int(count) < 0:
                return f"the saved {name} must be one whole number, got {count}"
        return None

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor], assign: bool) -> None:
        """Put the newest saved rows that fit where they belong; of a bank of the same size every row into its slot.

        With ``assign`` go where the saved tensors are, and take them over instead of copying, where they are the same.
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
            """Return where rows of a block from ``begin`` on go, and which they are."""
            slots = torch.arange(begin - first, begin - first + len(block)) % saved_size
            wanted = (slots < kept) & (slots >= self.begin) & (slots < self.end)
            return (slots[wanted] - self.begin).to(ours.device), wanted.to(block.device)

        # The saved tensors may be the ring's own: nothing is cleared before it is read.
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
