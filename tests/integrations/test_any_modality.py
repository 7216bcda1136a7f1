import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the example's tables come with scikit-learn")

from integrations import any_modality as example

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_views_are_weak_and_differ():
    rows = torch.randn(400, 13, generator=torch.Generator().manual_seed(0)) + 3  # no value is 0 by itself
    generator = torch.Generator().manual_seed(1)
    one, two = (example.weak_view(rows, generator) for _ in range(2))
    assert not torch.equal(one, two)
    for view in (one, two):
        there = view != 0
        assert (~there).float().mean().item() == pytest.approx(example.MISSING, abs=0.03)
        assert (view - rows)[there].std().item() == pytest.approx(example.NOISE, abs=0.01)


def test_a_backbone_learns_and_the_untrained_one_stays():
    rows = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    untrained, start = example.train(rows, k=5, steps=0, seed=3)
    first = [parameter.detach().clone() for parameter in start.parameters()]
    kept, trained = example.train(rows, k=5, steps=4, seed=3)
    for backbone in (untrained, kept):
        torch.testing.assert_close(list(backbone.parameters()), first, rtol=0, atol=0)
    assert not torch.equal(first[0], next(trained.parameters()))


@pytest.mark.parametrize("k", [1, 5])
def test_a_step_is_that_of_the_paper(k, watch, monkeypatch):
    views, rates = [], []
    weak_view = example.weak_view

    def watched_view(batch, generator):
        views.append(weak_view(batch, generator))
        return views[-1]

    rows = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(example, "weak_view", watched_view)
    step = torch.optim.lr_scheduler.CosineAnnealingLR.step
    monkeypatch.setattr(
        torch.optim.lr_scheduler.CosineAnnealingLR,
        "step",
        lambda schedule, *epoch: (step(schedule, *epoch), rates.append(schedule.get_last_lr()[0])),
    )
    example.train(rows, k=k, steps=7, seed=0)
    watch.is_mean_shift(k=k, momentum=example.MOMENTUM, steps=7)
    assert [images is view for (images, _), view in zip(watch.targets, views[::2], strict=True)] == [True] * 7
    assert len(views) == 14
    assert not any(torch.equal(one, other) for one, other in zip(views[::2], views[1::2], strict=True))
    bank = watch.losses[0][0].bank
    assert (bank.size, len(bank), int(bank.pushed)) == (50, 50, 7 * example.BATCH)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_encoders_see_the_training_rows_alone_and_each_is_judged_as_itself(monkeypatch):
    trained, judged = [], []

    def train(rows, k, steps, seed):
        trained.append((rows, k, steps, seed))
        return "untrained", f"k = {k}"

    def judge(known, known_labels, asked, labels, seed):
        judged.append((known, len(known_labels), asked, len(labels), seed))
        return [float(len(judged))]

    monkeypatch.setattr(example, "train", train)
    monkeypatch.setattr(example, "judge", judge)
    monkeypatch.setattr(example, "features_of", lambda backbone, fitted, rows: (backbone, fitted, rows))
    scores = example.measure("wine", seed=3, steps=9)
    assert [(k, steps, seed) for _, k, steps, seed in trained] == [(1, 9, 3), (5, 9, 3)]
    (rows, *_), (same, *_) = trained
    assert torch.equal(rows, same)
    assert rows.shape == (124, 13)  # 70 % of 178
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(13), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.std(dim=0, correction=0), torch.ones(13), rtol=0, atol=1e-5)
    (known, *_), *encoders = judged
    assert torch.equal(known, rows)
    assert {(n, asked, seed) for _, n, _, asked, seed in judged} == {(124, 54, 3)}
    assert [known[0] for known, *_ in encoders] == ["untrained", "k = 1", "k = 5"]
    for (_, fitted, known), _, (_, fitted_too, asked), *_ in encoders:
        assert fitted is fitted_too is known
        assert torch.equal(known, rows)
        assert torch.equal(asked, judged[0][2])
    assert scores == {"raw features": [1.0], "untrained": [2.0], "k = 1 (BYOL)": [3.0], "k = 5 (MSF)": [4.0]}


def test_k_changes_what_is_learned_and_a_seed_repeats_it():
    rows = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    runs = [example.train(rows, k=k, steps=6, seed=0)[1](rows).detach() for k in (1, 5, 5)]
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[1], runs[2])


def test_judge_scores_what_can_be_told_and_nothing_else():
    labels = torch.arange(90) % 3
    told = torch.eye(3)[labels]
    assert example.judge(told, labels, told, labels, seed=0) == [100, 100, 100]
    assert example.judge(told, labels, told, (labels + 1) % 3, seed=0) == [0, 0, 0]
    noise = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(90, 8, generator=torch.Generator().manual_seed(1))
    assert all(15 < score < 55 for score in example.judge(noise, labels, other, labels, seed=0))


def test_few_labels_are_few():
    """Each of two classes lies in two places: one label per class cannot tell both, all labels can."""
    places = torch.arange(80) % 4
    rows, labels = torch.eye(4)[places], places // 2
    full, one, five = example.judge(rows, labels, rows, labels, seed=0)
    assert full == 100
    assert 50 <= one <= 85
    assert one < five


def test_features_do_not_depend_on_the_rows_beside():
    """BatchNorm's statistics come from the rows it was fitted on, whatever it saw before."""
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    backbone = example.train(rows + 1, k=1, steps=3, seed=0)[1]
    together = example.features_of(backbone, rows, rows)
    alone = torch.cat([example.features_of(backbone, rows, row) for row in rows.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    mean = backbone[0][1].running_mean
    torch.testing.assert_close(mean, backbone[0][0](rows).mean(dim=0), rtol=1e-5, atol=1e-6)


def test_the_whole_run_prints_its_tables_and_writes_its_records(tmp_path, capsys):
    example.main(["--seeds", "2", "--steps", "5", "--jsonl", str(tmp_path / "records.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["data"] for record in records] == list(example.DATA)
    printed = capsys.readouterr().out
    for record in records:
        assert example.table(record) in printed
        for scores in record["values"].values():
            assert np.shape(scores) == (2, len(example.COLUMNS))
            assert 0 <= np.min(scores) <= np.max(scores) <= 100
        assert (
            min(np.mean(record["values"]["raw features"], axis=0)) > 75
        )  # standardized columns, labels in the right order


def test_the_report_says_what_the_records_hold():
    report = (RESULTS / "any_modality.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (RESULTS / "any_modality.jsonl").read_text().splitlines()]
    assert [record["data"] for record in records] == list(example.DATA)
    for record in records:
        assert (record["steps"], record["columns"]) == (example.STEPS, list(example.COLUMNS))
        assert record["seeds"] >= 5
        assert example.table(record) in report


def test_table_shows_means_deviations_and_the_difference_seed_by_seed():
    values = {"k = 1 (BYOL)": [[50.0, 1.0, 2.0], [70.0, 1.0, 2.0]], "k = 5 (MSF)": [[51.0, 0.0, 2.0], [73.0, 3.0, 2.0]]}
    lines = example.table({"data": "made", "seeds": 2, "values": values}).splitlines()
    assert lines[0].startswith("| made, 2 seeds | 1-NN |")
    assert lines[2] == "| k = 1 (BYOL) | 60.0 ± 14.1 | 1.0 ± 0.0 | 2.0 ± 0.0 |"
    assert lines[4] == "| k = 5 less k = 1 | +2.0 ± 1.4 | +0.5 ± 2.1 | +0.0 ± 0.0 |"
