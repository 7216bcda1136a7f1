"""Timing of the benchmarks on a GPU: the time with the host hidden, which is NaN for a call that waits."""

import math

import pytest
import torch

from benchmarks.measuring import measure

pytestmark = pytest.mark.gpu


def test_the_host_is_hidden_but_from_a_call_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, values = torch.device("cuda"), torch.ones(1000, device="cuda")
    values.sum()
    assert 0 < measure.time_hidden(values.sum, cuda) < 1
    monkeypatch.setattr(measure, "WAIT_CYCLES", measure.WAIT_CYCLES[:1])
    assert math.isnan(measure.time_hidden(lambda: values.sum().item(), cuda))
