"""What all tests share: seeds, the hypothesis profile, the gpu marker, and a check of neighbors."""

import os
from collections.abc import Callable

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; set before PyTorch is imported
    for _library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from msf_core import available_backends

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: run its kernels on the CPU

settings.register_profile(
    "msf_core", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("msf_core")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # for augmentations of lightly


@pytest.fixture(scope="session", params=["torch", "faiss"])
def backend_name(request: pytest.FixtureRequest) -> str:
    """Every search backend that works on the CPU."""
    reason = available_backends("cpu")[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def assert_k_nearest() -> Callable[..., None]:
    """The check of (similarity, index); a fixture so that no test file has to import another."""
    return _assert_k_nearest


# For inner products of unit vectors, compared with float64 on the same rounded values. The errors of TF32 and bfloat16
# are 100 times larger.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def _assert_k_nearest(
    similarity: Tensor, index: Tensor, queries: Tensor, rows: Tensor, k: int, largest: float = torch.inf
) -> None:
    """Compare with a float64 brute-force search, row by row; among ties, any choice is correct.

    A backend returns inner products; a bank returns cosines, for which ``largest`` is 1.
    """
    tolerance = TOLERANCE[rows.dtype]
    truth = queries.double() @ rows.double().T  # [Q, n]
    truth = truth.masked_fill(truth.isnan(), -torch.inf)
    expected = truth.topk(k, dim=1).values  # [Q, k]
    assert similarity.shape == index.shape == expected.shape
    assert similarity.dtype == torch.float32
    assert index.dtype == torch.int64

    absent = expected == -torch.inf  # fewer than k rows can be compared
    assert torch.equal(index == -1, absent)
    assert torch.equal(similarity == -torch.inf, absent)
    assert (similarity[:, :-1] >= similarity[:, 1:]).all(), "not descending"
    assert (similarity <= largest).all()
    torch.testing.assert_close(similarity.double(), expected.clamp(max=largest), rtol=0, atol=tolerance)
    found = truth.gather(1, index.clamp(min=0)).masked_fill(absent, -torch.inf)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    slots = index.sort(dim=1).values
    assert not ((slots[:, 1:] == slots[:, :-1]) & (slots[:, 1:] >= 0)).any(), "a neighbor occurs twice"
