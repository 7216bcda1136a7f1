"""Measures where the time of an epoch goes, without making the GPU wait."""

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from msf_core.search import find_backend

Item = TypeVar("Item")
LOADER_SHARE = 0.1  # waiting for images for more than this share of an epoch gives a warning


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
        """Return the time of the searches since the last call, after waiting for the GPU to finish them."""
        seconds = self._seconds + _seconds_between(self._events)
        self._seconds, self._events = 0.0, []
        return seconds


class WaitClock:
    """Adds up the time that a loop waits for its next item, on the device that works on the items.

    On a CPU, this is the time it takes to get the item. On a GPU, the host runs ahead, so its own waiting time says
    little. Instead, CUDA events measure how long the GPU is idle between its previous work and the arrival of the item.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def over(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items, and measure the wait for each."""
        while True:
            started = time.perf_counter()
            before = self._event()
            try:
                item = next(items)
            except StopIteration:
                return
            self._seconds += time.perf_counter() - started
            after = self._event()
            if before is not None and after is not None:
                self._events.append((before, after))
            yield item

    def take_seconds(self) -> float:
        """Return the waiting time since the last call, after the GPU has reached the end of it."""
        seconds = _seconds_between(self._events) if self._device.type == "cuda" else self._seconds
        self._seconds, self._events = 0.0, []
        return seconds

    def _event(self) -> torch.cuda.Event | None:
        """Return an event at the end of the GPU's queue, or None on a CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds_between(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """Return the total time between the two events of each pair, after waiting for the GPU to reach them."""
    seconds = 0.0
    for begin, end in pairs:
        end.synchronize()
        seconds += begin.elapsed_time(end) / 1000
    return seconds


def loader_limit(row: dict[str, Any], workers: int, cores: int) -> str:
    """Return a warning if an epoch waited for images for more than `LOADER_SHARE` of its time; else an empty string.

    Args:
        row: the metrics of the epoch, with "data_share" and "images_per_second".
        workers: number of processes per rank that read images; with 0, the training process reads them itself.
        cores: number of cores that each rank may use.
    """
    if row["data_share"] <= LOADER_SHARE:
        return ""
    advice = f"there are {cores} cores for more --workers" if workers < cores else "there are no cores for more of them"
    return (
        f"the loader is the bottleneck: training waited for images for {row['data_share']:.0%} of epoch "
        f"{row['epoch']}, at {row['images_per_second']:.0f} images/s with {workers} workers per rank; {advice}"
        + ("" if workers < cores else ", but smaller files (of 256 pixels, say) are decoded faster")
    )
