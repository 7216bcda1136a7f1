"""benchmarks/step_overhead.py at a tiny size, and the launches of a step, which it counts."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step_overhead
from benchmarks.measuring.cases import Problem

TINY = Problem(rows=64, dim=16, batch=8, k=5, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def launches() -> dict[str, int]:
    return step_overhead.count_all_launches(TINY)


@pytest.mark.parametrize(
    "options", ["ours", "ours, labels", "ours, exclude_same_id", "ours, same_label", "ours, bfloat16 rows"]
)
def test_a_step_starts_no_more_kernels_than_the_authors_formulation(launches: dict[str, int], options: str) -> None:
    assert 0 < launches["ours, k = 1"] < launches[options] <= min(40, launches[step_overhead.AUTHORS])


def test_every_step_is_timed_beside_the_authors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, launches: dict[str, int]
) -> None:
    monkeypatch.setattr(step_overhead, "SIZES", ((8, 64, 16),))
    monkeypatch.setattr(step_overhead, "WARM_UP", 1)
    step_overhead.main(["--repeats", "3", "--device", "cpu", "--out", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "step_overhead.jsonl").read_text().splitlines()]
    assert {record["parameters"]["what"]: record["derived"]["launches"] for record in records} == launches
    assert all(0 < record["q20"] <= record["median"] <= record["q80"] for record in records)
    assert {record["environment"]["threads"] for record in records} == {1}
    printed = capsys.readouterr().out
    assert f"| 8 | 64 | 16 | {step_overhead.AUTHORS} |" in printed
    assert printed == (tmp_path / "step_overhead.md").read_text() + "\n"


def test_a_launch_is_an_operation_that_makes_or_changes_a_tensor_there() -> None:
    x, host = torch.ones(3, device="meta"), torch.zeros(())
    steps = {
        0: lambda: (x[1:].view(-1), x.detach(), torch.empty(2, device="meta"), host.add_(1)),
        1: lambda: x.add_(1),
        3: lambda: torch.cat([x.float() * 2, x[:1].expand(3) + 1]),
    }
    for expected, step in steps.items():
        assert step_overhead.count_launches(step, "meta") == expected
