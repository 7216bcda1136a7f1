"""Batches that get to the device, and are made into views there, while the step before them computes."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from pipeline.data.source import Views

Batch = TypeVar("Batch")


class SideStream:
    """On a GPU a stream of its own for what prepares batches; on a CPU nothing.

    Make it when everything is on the device that the batches are made of.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def over(self, batches: Iterator[Batch], prepare: Callable[[Batch], Views]) -> Iterator[Views]:
        """Yield what ``prepare`` makes of each batch; the current stream waits for it, the host does not.

        The host is ahead of the GPU: it asks for a batch when it has queued the step before, which still computes.
        """
        for batch in batches:
            if self._stream is None:
                yield prepare(batch)
                continue
            with torch.cuda.stream(self._stream):
                prepared = prepare(batch)
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in prepared:
                if tensor.is_cuda:
                    tensor.record_stream(current)  # its memory is the side stream's to reuse
            yield prepared
