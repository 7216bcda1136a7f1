"""The rows of a memory bank that this process keeps, as a ring: what enters it, and the nearest of what is there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from msf_core.bank_state import BankState
from msf_core.rows import UNKNOWN, Neighbors, packed, unit_rows, unpacked
from msf_core.search import Queries, SearchBackend, search_bank, search_by


class Ring(BankState):
    """All rows of a `MemoryBank`, or a rank's shard of them; its callers have checked what they hand in."""

    backend: str | SearchBackend

    @property
    def _query_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.int8 else self.dtype

    def _store(self, embeddings: Tensor, labels: Tensor | None, ids: Tensor | None) -> Tensor:
        """Push what is known to be right, and keep of it what belongs here."""
        count = embeddings.shape[0]
        if ids is not None:
            self.keep_ids()
        unit = unit_rows(embeddings)
        rows, scale = packed(unit, self.dtype)
        unknown = self.labels.new_full((count,), UNKNOWN)
        new = (rows, scale, *(unknown if part is None else part.to(torch.int64) for part in (labels, ids)))
        gone = max(0, count - self.size)  # rows that later ones of the same batch push out
        slots = (self.pushed + torch.arange(count, device=self.rows.device)) % self.size
        for kept, part in zip(self._kept(), new, strict=True):
            if kept is None or part is None:
                continue
            if self._shards == 1:
                kept.index_copy_(0, slots[gone:], part[gone:])
            else:
                for here, there in self._own_part(count, gone):
                    kept[here] = part[there]
        self.pushed += count
        self.nonfinite += unit[:, 0].isnan().sum()
        self._pushed.add_(count)
        slots[:gone] = -1
        return slots

    def _own_part(self, count: int, gone: int) -> Iterator[tuple[slice, slice]]:
        """Yield which places of the shard take which of ``count`` new rows, known from the shapes alone."""
        first = (int(self._pushed) + gone) % self.size  # slot of row number ``gone``
        for wrap in (0, self.size):
            begin = max(first, self._begin + wrap)
            end = min(first + count - gone, self._end + wrap)
            if begin < end:
                here = slice(begin - wrap - self._begin, end - wrap - self._begin)
                yield here, slice(begin - first + gone, end - first + gone)

    def _nearest(self, queries: Queries, k: int) -> tuple[Tensor, Tensor]:
        """Return similarity [Q, k] and place [Q, k] among the rows kept here, for unit queries."""
        rows = self._kept()
        if isinstance(self.backend, str):
            filled = self._pushed - self._begin if self._begin else self._pushed
            similarity, index = search_bank(queries, rows, filled, k, self.backend)
        else:
            similarity, index = search_by(self.backend, queries, rows.part(0, len(self) - self._begin), k)
        return similarity.clamp(max=1.0), index  # rounding leaves rows, half-precision ones above all, a little long

    def _take(self, similarity: Tensor, index: Tensor) -> Neighbors:
        """Gather embeddings and labels for what `_nearest` has found."""
        missing = index < 0
        slots = index.clamp(min=0)
        embedding = unpacked(self.rows[slots], None if self.scale is None else self.scale[slots])  # [Q, k, D]
        return Neighbors(
            similarity=similarity,
            index=index,
            embedding=embedding.masked_fill_(missing[..., None], 0.0),
            label=self.labels[slots].masked_fill_(missing, UNKNOWN),
        )

    def _answer(self, queries: Queries, k: int) -> tuple[Tensor, ...]:
        """Return similarity, slot, label, stored row and its scale of the k nearest in this shard, [ΣQ, k, …] each."""
        count = len(queries.values)
        similarity = queries.values.new_full((count, k), -torch.inf, dtype=torch.float32)
        place = self.labels.new_full((count, k), -1)
        there = min(k, max(0, min(len(self), self._end) - self._begin))
        if there and count:
            similarity[:, :there], place[:, :there] = self._nearest(queries, there)
        missing = place < 0

        def there_of(kept: Tensor, absent: int) -> Tensor:
            if not len(kept):  # more ranks than rows
                return kept.new_full((*place.shape, *kept.shape[1:]), absent)
            values = kept[place.clamp(min=0)]
            return values.masked_fill_(missing.view(*missing.shape, *[1] * (kept.ndim - 1)), absent)

        slot = (place + self._begin).masked_fill_(missing, -1)
        answer = (similarity, slot, there_of(self.labels, UNKNOWN), there_of(self.rows, 0))
        return answer if self.scale is None else (*answer, there_of(self.scale, 0))
