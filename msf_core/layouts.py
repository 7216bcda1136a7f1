"""The layouts of a `MemoryBank`: which rows each rank stores when several processes train together.

All layouts have the same methods, which expect arguments that `MemoryBank` has normalized, and checked within
`Local.checking`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from msf_core.distributed import ERRORS, Ranks, as_shard, joined_bytes, shard_bounds, split_bytes, untraced
from msf_core.ring import BESIDE, Device, Found, Ring
from msf_core.rows import UNKNOWN, unpacked
from msf_core.search import Queries, SearchBackend

_NOTHING: AbstractContextManager[None] = nullcontext()


class Step(NamedTuple):
    """What a training step searches for."""

    k: int
    """Number of neighbors of each pushed row, including itself."""
    views: int = 1
    """Number of views of each image, V. The pushed rows are V batches, one after another."""
    same_label: bool = False
    """Whether only rows with the same label are neighbors."""
    exclude_same_id: bool = False
    """Whether rows with the same id are excluded."""

    def limits(self, labels: Tensor | None, ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the labels and ids that limit the search."""
        return labels if self.same_label else None, ids if self.exclude_same_id else None


class Local:
    """Each process stores and searches only its own rows."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, device: Device, ranks: Ranks) -> None:
        self.ranks = ranks
        self.ring = Ring(size, dim, dtype, device, *self._share(size))

    def _share(self, size: int) -> tuple[int, int]:
        """Return the slots [begin, end) that this process stores."""
        return 0, size

    def checking(self, call: str) -> AbstractContextManager[None]:
        """Return the context in which the arguments of a call are checked: "push", "search", or "step" for both.

        An error in this context is raised on all ranks that take part in the call.
        """
        return _NOTHING

    def push(self, unit: Tensor, labels: Tensor | None, ids: Tensor | None) -> tuple[Tensor, int]:
        """Store unit rows [B, D] float32, labels and ids [B] int64.

        Returns:
            The slots [B] int64 of these rows (−1 for rows that later rows of the same batch overwrote), and the number
            of rows that all ranks pushed.
        """
        return self.ring.push(unit, labels, ids), unit.shape[0]

    def search(self, queries: Queries, k: int, backend: str | SearchBackend, *, own_elsewhere: bool = False) -> Found:
        """Return the k nearest rows of unit queries in `Ring.query_dtype`.

        With ``own_elsewhere``, indices in ``queries.own`` may be outside of the rows here.
        """
        similarity, index = self.ring.find(queries, k, backend, own_elsewhere)
        return Found(similarity, index, self.ring.embeddings(index))

    def step(
        self,
        unit: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        step: Step,
        backend: str | SearchBackend,
    ) -> tuple[Tensor, Found | None]:
        """Push a batch, and return its slots and the k − 1 nearest rows of each of its rows.

        Views of the same image are not found. If the bank has fewer than k − 1 other rows, all of them are returned, or
        None if there are none. The other arguments and the slots are those of `push`.
        """
        slots, pushed = self.push(unit, labels, ids)
        others = self._others(unit, step)
        if others == 0:
            return slots, None
        asked = Queries(unit.to(self.ring.query_dtype), *step.limits(labels, ids), _own_slots(slots, step.views))
        return slots, self.search(asked, others, backend, own_elsewhere=pushed > self.ring.size)

    def _others(self, pushed: Tensor, step: Step) -> int:
        """Return the number of neighbors that each pushed row gets; views of the same image do not count."""
        # A batch of this size fills enough rows by itself; for a smaller one, the number of filled rows decides.
        enough = pushed.shape[0] >= step.k - 1 + step.views
        filled = self.ring.size if enough else len(self.ring)
        return max(0, min(step.k - 1, filled - step.views))

    def saved(self, name: str, tensor: Tensor) -> Tensor:
        """Convert an entry of `Ring.state` to the form that the ``state_dict`` stores."""
        return tensor


class Replicated(Local):
    """Every rank stores the rows of all ranks, and searches them without communication."""

    def checking(self, call: str) -> AbstractContextManager[None]:
        """See `Local.checking`."""
        return _NOTHING if call == "search" or self.ranks.size == 1 else self.ranks.sharing_errors(call)

    def push(self, unit: Tensor, labels: Tensor | None, ids: Tensor | None) -> tuple[Tensor, int]:
        """See `Local.push`; the rows of rank 0 come first."""
        if self.ranks.size == 1:
            return super().push(unit, labels, ids)
        return self._push_together(unit, labels, ids)

    @untraced
    def _push_together(self, unit: Tensor, labels: Tensor | None, ids: Tensor | None) -> tuple[Tensor, int]:
        everyones, counts = self._gather("push", unit, labels, ids)
        return self._own(self.ring.push(*everyones), counts), sum(counts)

    def _gather(
        self, call: str, unit: Tensor, labels: Tensor | None, ids: Tensor | None, **same: int | str
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], list[int]]:
        """Return the rows, labels and ids of all ranks, in rank order, and the number of rows of each rank."""
        rows = unit.to(self.ring.query_dtype)
        if labels is None:
            labels = torch.full_like(rows[:, 0], UNKNOWN, dtype=torch.int64)
        parts = [rows, labels] if ids is None else [rows, labels, ids]
        same["presence of ids"] = "without" if ids is None else "with"
        together, counts = self.ranks.bring(call, joined_bytes(parts), same=self._same(**same))
        rows, labels, *more = split_bytes(together, parts)
        return (rows, labels, more[0] if more else None), counts

    def _same(self, **more: int | str) -> dict[str, int | str]:
        """Return the properties that must be the same for the banks of all ranks."""
        return {
            "size": self.ring.size,
            "dim": self.ring.dim,
            "dtype of the bank": str(self.ring.rows.dtype).removeprefix("torch."),
            "number of rows pushed so far": int(self.ring.pushed_on_host),
            **more,
        }

    def _own(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Return this rank's part of the rows of all ranks."""
        first = sum(counts[: self.ranks.rank])
        return rows[first : first + counts[self.ranks.rank]]


class Sharded(Replicated):
    """Each rank stores and searches one of W parts of the rows."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype, device: Device, ranks: Ranks) -> None:
        self.shards = ranks.size
        super().__init__(size, dim, dtype, device, ranks)

    def _share(self, size: int) -> tuple[int, int]:
        return shard_bounds(size, self.shards, self.ranks.rank)

    def checking(self, call: str) -> AbstractContextManager[None]:
        """See `Local.checking`.

        Raises:
            RuntimeError: if the number of ranks has changed since the bank was created.
        """
        ranks = self.ranks.size
        if ranks != self.shards:
            raise RuntimeError(
                f"the bank was sharded for {self.shards} ranks, but now there are {ranks}: "
                "create it after torch.distributed.init_process_group"
            )
        # If the bank is empty, no rank reaches the shared search.
        return _NOTHING if ranks == 1 or (call == "search" and not len(self.ring)) else self.ranks.sharing_errors(call)

    def search(self, queries: Queries, k: int, backend: str | SearchBackend, *, own_elsewhere: bool = False) -> Found:
        """See `Local.search`; all ranks search together, each with its own queries."""
        if self.shards == 1:
            return super().search(queries, k, backend, own_elsewhere=own_elsewhere)
        return self._search_together(queries, k, backend)

    @untraced
    def _search_together(self, queries: Queries, k: int, backend: str | SearchBackend) -> Found:
        limits = [limit for limit in (queries.labels, queries.ids) if limit is not None]
        parts = [queries.values, *limits]
        limited = _named(queries.labels is not None, queries.ids is not None)
        same = self._same(k=k, **{"limits of the search": limited})
        together, counts = self.ranks.bring("search", joined_bytes(parts), same=same)
        values, *given = split_bytes(together, parts)
        labels = None if queries.labels is None else given.pop(0)
        return self._ask_all(Queries(values, labels, given[0] if given else None), k, backend, counts)

    def step(
        self,
        unit: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        step: Step,
        backend: str | SearchBackend,
    ) -> tuple[Tensor, Found | None]:
        """See `Local.step`. The pushed rows are also the queries, so they are sent only once."""
        together = super().step if self.shards == 1 else self._step_together
        return together(unit, labels, ids, step, backend)

    @untraced
    def _step_together(
        self,
        unit: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        step: Step,
        backend: str | SearchBackend,
    ) -> tuple[Tensor, Found | None]:
        limited = _named(step.same_label, step.exclude_same_id)
        same: dict[str, int | str] = {"k": step.k, "views": step.views, "limits of the search": limited}
        (rows, labels, ids), counts = self._gather("step", unit, labels, ids, **same)
        slots = self.ring.push(rows, labels, ids)
        others, mine = self._others(rows, step), self._own(slots, counts)
        if others == 0:
            return mine, None
        own = torch.cat([_own_slots(part, step.views) for part in slots.split(counts)])
        asked = Queries(rows, *step.limits(labels, ids), own)
        return mine, self._ask_all(asked, others, backend, counts)

    def _ask_all(self, queries: Queries, k: int, backend: str | SearchBackend, counts: list[int]) -> Found:
        """Search this shard for all ranks, exchange the results, and return the best ones for this rank."""
        problem: Exception | None = None
        try:
            answers = self._answer(queries, k, backend)
        except Exception as error:
            problem = error if isinstance(error, ERRORS) else RuntimeError(f"{type(error).__name__}: {error}")
            answers = self._no_answer(len(queries.values), k)
        candidates = self.ranks.exchange("answer", answers, counts, problem)  # [W, Q, k, …] each
        similarity, *others = (part.transpose(0, 1).flatten(1, 2) for part in candidates)  # [Q, W·k, …]
        similarity, best = similarity.topk(k, dim=1)
        query = torch.arange(len(best), device=best.device)[:, None]
        index, label, rows, *scale = (part[query, best] for part in others)
        return Found(similarity, index, unpacked(rows, scale[0] if scale else None), label)

    def _answer(self, queries: Queries, k: int, backend: str | SearchBackend) -> tuple[Tensor, ...]:
        """Return similarity, slot, label, row and scale of the k nearest rows in this shard, [Q, k, …] each."""
        ring, count = self.ring, len(queries.values)
        similarity, slot, label, rows, *scale = self._no_answer(count, k)
        there = min(k, max(0, min(len(ring), ring.end) - ring.begin))
        if there and count:
            own = None if queries.own is None else queries.own - ring.begin
            asked = Queries(queries.values, queries.labels, queries.ids, own)
            similarity[:, :there], place = ring.find(asked, there, backend, own_elsewhere=own is not None)
            slot[:, :there] = (place + ring.begin).masked_fill(place < 0, -1)
            label[:, :there] = ring.labels[place]
            rows[:, :there] = ring.rows[place]
            if ring.scale is not None:
                scale[0][:, :there] = ring.scale[place]
        return (similarity, slot, label, rows, *scale)

    def _no_answer(self, count: int, k: int) -> tuple[Tensor, ...]:
        """Return an answer to ``count`` queries in which no neighbor was found."""
        kept = self.ring.rows
        answer = (
            kept.new_full((count, k), -torch.inf, dtype=torch.float32),
            kept.new_full((count, k), -1, dtype=torch.int64),
            kept.new_full((count, k), UNKNOWN, dtype=torch.int64),
            kept.new_zeros((count, k, self.ring.dim)),
        )
        return answer if self.ring.scale is None else (*answer, self.ring.scale.new_zeros((count, k)))

    def saved(self, name: str, tensor: Tensor) -> Tensor:
        """See `Local.saved`: tensors with one entry per slot are saved as this rank's part of a DTensor."""
        if self.shards == 1 or name not in BESIDE:
            return tensor
        return as_shard(tensor, self.ring.size, self.ranks.group)


LAYOUTS: dict[str, type[Local]] = {"replicated": Replicated, "sharded": Sharded, "local": Local}


def _own_slots(slots: Tensor, views: int) -> Tensor:
    """Return the slots of all V views of each row's image, [V·B, V], from the slots of the V·B rows."""
    return slots[:, None] if views == 1 else slots.view(views, -1).T.repeat(views, 1)


def _named(by_label: bool, by_id: bool) -> str:
    return {(False, False): "none", (True, False): "labels", (False, True): "ids", (True, True): "both"}[
        by_label, by_id
    ]
