"""benchmarks/trial_cost.py in Triton's interpreter, with few queries."""

import json
from pathlib import Path

import pytest

from benchmarks import trial_cost
from msf_core import available_backends


@pytest.mark.skipif(available_backends("cpu")["triton"] is not None, reason="Triton's interpreter is needed")
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_the_trial_of_every_dtype_has_a_record(tmp_path: Path, monkeypatch, capsys) -> None:
    for name, value in {"DTYPES": ("bfloat16", "int8"), "DIM": 16, "QUERIES": 8, "K": 2, "REPEATS": 1}.items():
        monkeypatch.setattr(trial_cost, name, value)
    trial_cost.main(["--device", "cpu", "--out", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "trial_cost.jsonl").read_text().splitlines()]
    assert [record["parameters"]["dtype"] for record in records] == ["bfloat16", "int8"]
    assert all(record["derived"]["fault"] is None for record in records)
    assert all(record["median"] > 0 and record["derived"]["first"] > 0 for record in records)
    assert capsys.readouterr().out.count("; passed") == 2
