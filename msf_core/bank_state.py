"""What a memory bank keeps, and how that moves between devices, into a ``state_dict`` and out of any other's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from msf_core.distributed import Ranks, as_shard, blocks_of, is_shard, shard_bounds
from msf_core.rows import UNKNOWN, packed, unpacked
from msf_core.search import Rows

BESIDE = ("rows", "scale", "labels", "ids")  # one entry a slot, where they are kept at all
COUNTS = ("pushed", "nonfinite")
ALWAYS = ("rows", "labels", *COUNTS)
# In a state int8 rows have a name of their own: torch.distributed.checkpoint fills the tensors of a state by name and
# casts, which would make floats of them without their scale.
INT8_ROWS = "int8_rows"


class BankState(nn.Module):
    """The tensors of a `MemoryBank`, all of them or a rank's shard.

    They are no buffers: DDP would send those of rank 0 to all ranks at every forward, over what they hold.
    """

    rows: Tensor
    """[N, D], of a shard [⌈N/W⌉, D] or less; unit vectors in the bank's dtype."""
    scale: Tensor | None
    """[N] float32 for int8 rows: row i is ``rows[i] * scale[i]``. Of other dtypes None."""
    labels: Tensor
    """[N] int64 beside the rows, −1 where unknown."""
    ids: Tensor | None
    """[N] int64 likewise; None while no id was pushed."""
    pushed: Tensor
    """Rows pushed so far, an int64 scalar; the next goes to slot pushed % size. Slots 0 … len − 1 are filled."""
    nonfinite: Tensor
    """How many of them had no finite norm, an int64 scalar."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, layout: str, ranks: Ranks, persistent: bool) -> None:
        super().__init__()
        self.size, self.dim, self.layout, self.persistent = size, dim, layout, persistent
        self._ranks = ranks
        # A shard is what this rank keeps: the slots from begin to end. Other layouts keep them all.
        self._shards = ranks.size if layout == "sharded" else 1
        self._begin, self._end = shard_bounds(size, self._shards, ranks.rank if self._shards > 1 else 0)
        slots = self._end - self._begin
        self.rows = torch.zeros(slots, dim, dtype=dtype)
        self.scale = torch.zeros(slots, dtype=torch.float32) if dtype == torch.int8 else None
        self.labels = torch.full((slots,), UNKNOWN)
        self.ids = None
        self.pushed = torch.zeros((), dtype=torch.int64)
        self.nonfinite = torch.zeros((), dtype=torch.int64)
        # The same as ``pushed``, always on the CPU: the host knows it without asking the device. A tensor and not an
        # int, since torch.compile would take an int for a constant and compile again when it moves.
        self._pushed = torch.zeros((), dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        """Rows filled so far, n, on all ranks that share the bank; at most ``size``."""
        return min(int(self._pushed), self.size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored rows."""
        return self.rows.dtype

    @property
    def group(self) -> Any:
        """Process group of the ranks that share the bank; None is the default one."""
        return self._ranks.group

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept in this process, a row each."""
        return sum(tensor.nbytes for tensor in self._kept() if tensor is not None)

    def keep_ids(self) -> None:
        """Keep an id beside each row from now on, 8 bytes; those of rows that are there already are unknown."""
        if self.ids is None:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
                self.ids = torch.full_like(self.labels, UNKNOWN)

    def _kept(self) -> Rows:
        return Rows(self.rows, self.scale, self.labels, self.ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BankState":
        """Follow the module to another device; the dtype stays what was asked for."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in (*BESIDE, *COUNTS):
            tensor = getattr(self, name)
            if tensor is not None:
                moved = fn(tensor)
                setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.persistent:
            return
        for name in (*BESIDE, *COUNTS):
            if getattr(self, name) is not None:
                tensor = getattr(self, name).detach()
                sharded = self._shards > 1 and name in BESIDE
                key = prefix + (INT8_ROWS if tensor.dtype == torch.int8 else name)
                destination[key] = as_shard(tensor, self.size, self.group) if sharded else tensor

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
        saved = Rows(*(state_dict.get(key_of[name]) for name in BESIDE))  # type: ignore[arg-type]
        pushed, nonfinite = (state_dict[key_of[name]] for name in COUNTS)
        problem = self._why_not_loadable(saved, pushed, nonfinite)
        if problem:
            error_msgs.append(f"{prefix}rows and its companions were not loaded: {problem}")
            return
        with torch.no_grad():
            self._take_over(saved, int(pushed))
            self.nonfinite.copy_(nonfinite)

    def _why_not_loadable(self, saved: Rows, pushed: Tensor, nonfinite: Tensor) -> str | None:
        rows = saved.values
        beside = {"scale": saved.scale, "labels": saved.labels, "ids": saved.ids}
        there = {name: part for name, part in beside.items() if part is not None}
        if not all(isinstance(part, Tensor) for part in (rows, pushed, nonfinite, *there.values())):
            return "the saved buffers must be tensors"
        if not rows.is_floating_point() and rows.dtype != torch.int8:
            return f"saved rows must be floating or int8, got {rows.dtype}"
        if (rows.dtype == torch.int8) != (saved.scale is not None):
            return f"saved rows have a scale where they are int8 and else none, got {rows.dtype}"
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != self.dim:
            return f"the bank has dim={self.dim}, the saved rows are {list(rows.shape)}"
        for name, part in there.items():
            if part.shape != rows.shape[:1]:
                return f"{rows.shape[0]} saved rows have {name} of shape {list(part.shape)}"
            if is_shard(rows) != is_shard(part):
                return f"saved rows and {name} must both be DTensors, or neither"
            if part.is_floating_point() != (name == "scale"):
                return f"a saved scale must be floating, labels and ids whole numbers, got {name} of {part.dtype}"
        for name, count in (("pushed", pushed), ("nonfinite", nonfinite)):
            if count.ndim != 0 or count.is_floating_point() or int(count) < 0:
                return f"the saved {name} must be one whole number, got {count}"
        return None

    def _take_over(self, saved: Rows, total: int) -> None:
        """Put the newest saved rows that fit where they belong; of a bank of the same size every row into its slot."""
        saved_size, first = saved.values.shape[0], 0
        kept = min(total, self.size)
        if saved_size != self.size:
            kept = min(kept, saved_size)
            first, total = (total - kept) % saved_size, kept
        filled = max(0, min(kept, self._end) - self._begin)
        if saved.ids is not None:
            self.keep_ids()
        elif self.ids is not None:
            self.ids.fill_(UNKNOWN)

        def place(ours: Tensor, begin: int, block: Tensor) -> tuple[Tensor, Tensor]:
            """Return where rows of a block from ``begin`` on go, and which they are."""
            slots = torch.arange(begin - first, begin - first + len(block)) % saved_size
            wanted = (slots < kept) & (slots >= self._begin) & (slots < self._end)
            return (slots[wanted] - self._begin).to(ours.device), wanted.to(block.device)

        # The saved tensors may be the bank's own: nothing is cleared before it is read.
        scale = None
        if saved.scale is not None:
            scale = torch.cat([part for _, part in blocks_of(saved.scale, self.rows.device)])
        for begin, block in blocks_of(saved.values, self.rows.device):
            there, wanted = place(self.rows, begin, block)
            rows, beside = block[wanted], None
            if scale is not None:
                beside = scale[begin : begin + len(block)][wanted.to(scale.device)]
            if rows.dtype != self.dtype:
                rows, beside = packed(unpacked(rows, beside), self.dtype)
            self.rows[there] = rows.to(self.rows.device)
            if self.scale is not None and beside is not None:
                self.scale[there] = beside.to(self.rows.device)
        for ours, part in ((self.labels, saved.labels), (self.ids, saved.ids)):
            if ours is not None and part is not None:
                for begin, block in blocks_of(part, ours.device):
                    there, wanted = place(ours, begin, block)
                    ours[there] = block[wanted].to(ours)
        self._forget(filled)
        self.pushed.fill_(total)
        self._pushed.fill_(total)

    def _forget(self, first: int = 0) -> None:
        """Make what is kept from a place on as it was at first."""
        for tensor, empty in zip(self._kept(), (0, 0, UNKNOWN, UNKNOWN), strict=True):
            if tensor is not None:
                tensor[first:] = empty
