"""benchmarks/tune_triton.py as far as it runs without a GPU: what it tries, and that a trial is a search."""

import pytest
import torch

from benchmarks import tune_triton

triton_backend = pytest.importorskip("msf_core.search.triton_backend", reason="Triton is not installed")


@pytest.mark.parametrize("problem", tune_triton.PROBLEMS[:2])
def test_every_combination_is_one_that_the_kernel_takes(problem) -> None:
    tried = list(tune_triton.combinations(problem, 2))
    assert len(set(tried)) == len(tried) > 10
    for tiles, group in tried:
        assert tiles.rows % group == 0
        assert tiles.queries <= problem.batch


@pytest.mark.skipif(not triton_backend.INTERPRETED, reason="this needs Triton's interpreter")
def test_a_trial_is_a_search_with_those_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = triton_backend._launch
    monkeypatch.setattr(tune_triton, "REPEATS", 1)
    monkeypatch.setattr(triton_backend, "_launch", lambda *a: launched.append(a) or launch(*a))
    rows = torch.nn.functional.normalize(torch.randn(100, 16), dim=1)
    seconds = tune_triton.time_search(rows[:3].clone(), rows, 2, (16, 64, 16, 4, 2), 32)
    assert len(seconds) == 1
    index, plan = launched[-1][4:]
    assert index[:, 0].tolist() == [0, 1, 2]
    assert (plan.group, plan.tiles.rows) == (32, 64)
