"""The recall of rounded rows, compared with a count by hand, and the files that are written."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import int8_recall


def test_recall_is_the_share_of_the_true_neighbors_that_were_found(tmp_path: Path, capsys) -> None:
    rows = F.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    (tmp_path / "run").mkdir()
    state = {"bank.rows": torch.cat([rows, torch.zeros(20, 16)]), "bank.pushed": torch.tensor(300)}
    torch.save({"criterion": state}, tmp_path / "run" / "checkpoint.pt")
    int8_recall.main([str(tmp_path / "run"), "--k", "3", "--out", str(tmp_path / "out")])
    records = [json.loads(line) for line in (tmp_path / "out" / "int8_recall.jsonl").read_text().splitlines()]
    assert [record["parameters"]["dtype"] for record in records] == ["float16", "bfloat16", "int8"]

    products = rows.double() @ rows.double().T
    truth = products.fill_diagonal_(-2).topk(3).indices
    rounded = rows.bfloat16().double()
    found = (rounded @ rounded.T).fill_diagonal_(-2).topk(3).indices
    by_hand = (found[:, :, None] == truth[:, None]).any(2).double().mean().item()
    assert 0.8 < by_hand < 1
    assert abs(records[1]["median"] - by_hand) < 0.005  # ties among rounded products
    assert records[2]["derived"]["bytes"] == 300 * (16 + 4 + 8)
    assert records[0]["median"] >= records[2]["median"] > 0.9
    assert "| run | 300 | 16 | 3 | int8 |" in capsys.readouterr().out
