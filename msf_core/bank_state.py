"""What a memory bank keeps, and how that moves between devices, into a ``state_dict`` and out of any other's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_core.distributed import Ranks, as_shard, blocks_of, is_shard, shard_bounds

UNKNOWN_LABEL = -1
TENSORS = ("rows", "labels", "pushed", "nonfinite")


class BankState(nn.Module):
    """The tensors of a `MemoryBank`, all of them or a rank's shard.

    They are no buffers: DDP would send those of rank 0 to all ranks at every forward, over what they hold.
    """

    rows: Tensor
    """[N, D], of a shard [⌈N/W⌉, D] or less; unit vectors in the bank's dtype."""
    labels: Tensor
    """[N] int64 beside the rows, −1 where unknown."""
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
        self.rows = torch.zeros(self._end - self._begin, dim, dtype=dtype)
        self.labels = torch.full((self._end - self._begin,), UNKNOWN_LABEL)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BankState":
        """Follow the module to another device; the dtype stays what was asked for."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in TENSORS:
            tensor = getattr(self, name)
            moved = fn(tensor)
            setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.persistent:
            return
        for name in TENSORS:
            tensor = getattr(self, name).detach()
            sharded = self._shards > 1 and tensor.ndim > 0
            destination[prefix + name] = as_shard(tensor, self.size, self.group) if sharded else tensor

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
        ours = {prefix + name for name in TENSORS} if self.persistent else set()
        missing_keys += sorted(ours - state_dict.keys())
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in ours]
        if not ours or not ours <= state_dict.keys():
            return
        rows, labels, pushed, nonfinite = (state_dict[prefix + name] for name in TENSORS)
        problem = self._why_not_loadable(rows, labels, pushed, nonfinite)
        if problem:
            error_msgs.append(f"{prefix}rows and its companions were not loaded: {problem}")
            return
        with torch.no_grad():
            self._take_over(rows, labels, int(pushed))
            self.nonfinite.copy_(nonfinite)

    def _why_not_loadable(self, rows: Tensor, labels: Tensor, pushed: Tensor, nonfinite: Tensor) -> str | None:
        if not all(isinstance(part, Tensor) for part in (rows, labels, pushed, nonfinite)):
            return "the saved buffers must be tensors"
        if not rows.is_floating_point() or labels.is_floating_point():
            return f"saved rows must be floating and labels whole numbers, got {rows.dtype} and {labels.dtype}"
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != self.dim:
            return f"the bank has dim={self.dim}, the saved rows are {list(rows.shape)}"
        if labels.shape != rows.shape[:1]:
            return f"{rows.shape[0]} saved rows have labels of shape {list(labels.shape)}"
        if is_shard(rows) != is_shard(labels):
            return "saved rows and labels must both be DTensors, or neither"
        for name, count in (("pushed", pushed), ("nonfinite", nonfinite)):
            if count.ndim != 0 or count.is_floating_point() or int(count) < 0:
                return f"the saved {name} must be one whole number, got {count}"
        return None

    def _take_over(self, rows: Tensor, labels: Tensor, total: int) -> None:
        """Put the newest saved rows that fit where they belong; of a bank of the same size every row into its slot."""
        saved_size, first = rows.shape[0], 0
        kept = min(total, self.size)
        if saved_size != self.size:
            kept = min(kept, saved_size)
            first, total = (total - kept) % saved_size, kept
        # The saved tensors may be the bank's own: nothing is cleared before it is read.
        for ours, saved in ((self.rows, rows), (self.labels, labels)):
            for begin, block in blocks_of(saved, ours.device):
                slots = torch.arange(begin - first, begin - first + len(block)) % saved_size
                wanted = (slots < kept) & (slots >= self._begin) & (slots < self._end)
                chosen = block[wanted.to(block.device)]
                if ours.is_floating_point() and chosen.dtype != ours.dtype:
                    chosen = F.normalize(chosen.float(), dim=1)
                ours[(slots[wanted] - self._begin).to(ours.device)] = chosen.to(ours)
        filled = max(0, kept - self._begin)
        self.rows[filled:].zero_()
        self.labels[filled:] = UNKNOWN_LABEL
        self.pushed.fill_(total)
        self._pushed.fill_(total)
