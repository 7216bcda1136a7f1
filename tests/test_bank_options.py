"""benchmarks/bank_options.py at a tiny size: every option is timed, with the limits that its name says."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bank_options
from msf_core import MemoryBank, Neighbors, available_backends


def test_every_option_is_timed_and_limits_what_it_says(tmp_path: Path, capsys, monkeypatch) -> None:
    searched: list[tuple[torch.dtype, frozenset[str], bool]] = []
    search = MemoryBank.search

    def watched(bank: MemoryBank, queries: torch.Tensor, k: int, **limits: torch.Tensor) -> Neighbors:
        found = search(bank, queries, k, **limits)
        right = True
        if "labels" in limits:
            right = bool((found.label == limits["labels"][:, None])[found.index >= 0].all())
        if "exclude_ids" in limits:
            assert bank.ids is not None
            right = not (bank.ids[found.index] == limits["exclude_ids"][:, None]).any()
        searched.append((bank.dtype, frozenset(limits), right))
        return found

    monkeypatch.setattr(MemoryBank, "search", watched)
    sizes = ["--rows", "900", "1200", "--dim", "8", "--batch", "16", "--k", "3", "--repeats", "2", "--device", "cpu"]
    bank_options.main([*sizes, "--out", str(tmp_path)])
    assert all(right for *_, right in searched)
    assert len(set(searched)) == 4 * 3

    records = [json.loads(line) for line in (tmp_path / "bank_options.jsonl").read_text().splitlines()]
    backends = 2 if available_backends("cpu")["faiss"] is None else 1
    assert len(records) == 4 * 3 * (backends + 1)
    assert {record["derived"]["bytes"] for record in records if record["parameters"]["dtype"] == "int8"} == {
        900 * (8 + 4 + 8 + 8),
        1200 * (8 + 4 + 8 + 8),
    }
    assert all(0 < record["q20"] <= record["median"] <= record["q80"] for record in records)
    printed = capsys.readouterr().out
    assert "| 1,200 | int8 | auto | same label |" in printed
    assert printed == (tmp_path / "bank_options.md").read_text() + "\n"


def test_too_many_neighbors_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        bank_options.main(["--rows", "4", "--k", "5"])
    assert "--k 5" in capsys.readouterr().err
