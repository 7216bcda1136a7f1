"""Where the time of an epoch goes, measured without making the GPU wait."""

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from msf_core.search import find_backend

Item = TypeVar("Item")


class TimedSearch:
    """A search backend that adds up the time of its searches: `MemoryBank(backend=TimedSearch("auto", device))`."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.backend = find_backend(backend, device)
        self.most_neighbors = getattr(self.backend, "most_neighbors", {})
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `SearchBackend.topk`."""
        if rows.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            found = self.backend.topk(queries, rows, k)
            end.record()
            self._events.append((begin, end))
            return found
        started = time.perf_counter()
        found = self.backend.topk(queries, rows, k)
        self._seconds += time.perf_counter() - started
        return found

    def take_seconds(self) -> float:
        """Return the seconds since the last call, once the GPU is done with them."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class WaitClock:
    """Adds up the time that a loop waits for its next item."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items."""
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self.seconds += time.perf_counter() - started
            yield item
