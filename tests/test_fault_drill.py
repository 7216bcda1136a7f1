"""benchmarks/fault_drill.py: its plans, and that it would notice failures. Its faults run in tests/distributed."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import fault_drill
from pipeline.models.checkpoint import load_checkpoint


def test_a_plan_has_every_fault_and_is_the_same_for_the_same_seed() -> None:
    plan = fault_drill.make_plan(25, seed=3)
    assert plan == fault_drill.make_plan(25, seed=3) != fault_drill.make_plan(25, seed=4)
    names = Counter(fault["name"] for fault in plan.values())
    assert names[fault_drill.KILL] == 25
    assert set(names) == {
        fault_drill.KILL,
        fault_drill.WRITE,
        fault_drill.DISK,
        fault_drill.STALLS,
        fault_drill.OVERFLOW,
    }
    assert {fault["rank"] for fault in plan.values() if fault["name"] == fault_drill.KILL} == {0, 1}
    assert [int(number) for number in plan] == list(range(len(plan))), "one fault for each start"


def test_the_pickle_that_runs_a_command_would_and_the_trainer_does_not_let_it(tmp_path: Path) -> None:
    from msf_core.distributed import Ranks

    marker = tmp_path / "ran"
    (tmp_path / "checkpoint.pt").write_bytes(fault_drill.pickled_command(marker))
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(tmp_path / "checkpoint.pt", set(), Ranks())
    assert not marker.exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("record", "holds"),
    [
        ({"bit_equal": True}, True),
        ({"bit_equal": False}, False),
        ({"refused": True, "error_names_the_file": True, "ran_code": False}, True),
        ({"refused": False, "error_names_the_file": True, "ran_code": False}, False),
        ({"refused": True, "error_names_the_file": False, "ran_code": False}, False),
        ({"refused": True, "error_names_the_file": True, "ran_code": True}, False),
        ({"loads": False}, False),
    ],
)
def test_what_does_not_hold_is_noticed(record: dict, holds: bool) -> None:
    assert fault_drill.sound(record) == holds


def test_the_committed_record_has_fifty_kills_and_all_of_it_holds() -> None:
    file = Path(fault_drill.__file__).parent / "results" / "fault_drill.jsonl"
    if not file.exists():
        pytest.skip("benchmarks/results has no record of the drill")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(fault_drill.sound(record) for record in records)
    assert sum(record["fault"] == fault_drill.KILL for record in records) >= 50
