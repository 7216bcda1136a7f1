"""benchmarks/collapsed.py at a tiny size: every bank is searched with and without the screen, and reported."""

import json
from pathlib import Path

import torch

from benchmarks import collapsed


def test_every_bank_is_timed_with_and_without_the_screen(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("msf_core.search.screen.multiplies_bfloat16_fast", lambda: True)
    monkeypatch.setattr("msf_core.search.screen.multiplies_int8_fast", lambda: True)
    monkeypatch.setattr(collapsed, "SIZES", ((8192, 64, 256, 2),))
    monkeypatch.setattr(collapsed, "KINDS", ("within 0.001", "duplicates"))
    collapsed.main(["--repeats", "1", "--out", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "collapsed.jsonl").read_text().splitlines()]
    assert len(records) == 4 * 3 * 3 * 2
    given_up = {r["parameters"]["kind"]: r["derived"]["share_given_up"] for r in records if r["derived"]}
    assert given_up["random"] < given_up["duplicates"] == given_up["within 0.001"] == 1
    assert capsys.readouterr().out.count("\n| ") == 4 * 3 * 3 + 2


def test_the_banks_are_as_alike_as_they_are_named() -> None:
    for kind in collapsed.KINDS:
        rows, queries = collapsed.made(kind, 1000, 10, 32)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(1000))
        near = (queries @ rows.T > 0.999).float().mean(dim=1)  # [Q], the share of the rows
        expected = {"half": 0.6, "half of the queries": 0.02, "ten clusters": 0.1, "second half": 0.5}.get(kind, 1.0)
        assert kind == "drift" or abs(near[0].item() - expected) < 0.01
