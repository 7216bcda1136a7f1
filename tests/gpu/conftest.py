"""What the GPU tests share: the backends that work on CUDA, and a check that nothing waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from msf_core import available_backends


@pytest.fixture(scope="session", params=["torch", "faiss", "triton"])
def backend_name(request: pytest.FixtureRequest) -> str:
    """Every search backend that works on CUDA."""
    reason = available_backends("cuda")[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def waiting_is_an_error() -> Callable[[], AbstractContextManager[None]]:
    """Everything that waits for the device raises an error within ``with waiting_is_an_error():``."""
    return _waiting_is_an_error


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
