"""Copy batches to the device and turn them into views there, while the previous step computes."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from pipeline.data.source import Views

Batch = TypeVar("Batch")


class SideStream:
    """A separate CUDA stream for preparing batches; on a CPU it does nothing.

    Create it after everything that the batches are made from is on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def over(self, batches: Iterator[Batch], prepare: Callable[[Batch], Views]) -> Iterator[Views]:
        """Yield the result of ``prepare`` for each batch. The current stream waits for it, but the host does not.

        The host is ahead of the GPU: it asks for the next batch while the GPU still computes the previous step.
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
                    tensor.record_stream(current)  # otherwise the side stream could reuse its memory too early
            yield prepared
