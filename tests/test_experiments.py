"""examples/experiments.py: small grids from start to finish, no repeated runs, and wrong input."""

import contextlib
import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
from PIL import Image
from test_training import blank_pictures

import experiments
import imagenet_train
from pipeline.experiments.runs import Run, Runs
from pipeline.figures.paper import spread_of

FAST = ["--jobs", "1", "--", "--steps", "2", "--eval-every", "0", "--skip-baselines"]


def run(folder: Path, *arguments: str) -> int:
    end = [*arguments, "--"].index("--")
    try:
        return experiments.main([*arguments[:end], "--out", str(folder), *arguments[end:]])
    except SystemExit as stopped:
        return int(stopped.code)


@pytest.fixture
def _within_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real trainer, without the seconds that each new process spends on imports."""

    def called(command: list[str], *, stdout: TextIO, stderr: int, env: dict[str, str]) -> SimpleNamespace:
        assert command[:2] == [sys.executable, imagenet_train.__file__]
        with contextlib.redirect_stdout(stdout), blank_pictures():
            return SimpleNamespace(returncode=imagenet_train.main(command[2:]))

    monkeypatch.setattr("pipeline.experiments.runs.subprocess", SimpleNamespace(run=called, STDOUT=subprocess.STDOUT))


@pytest.mark.slow
@pytest.mark.usefixtures("_within_this_process")
def test_a_grid_is_run_once_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "views", "predictor", "--seeds", "1", *FAST) == 0
    printed = capsys.readouterr().out
    assert "views: 2 runs, 0 of them already finished" in printed
    assert "predictor: 2 runs, 1 of them already finished" in printed, "they share one"
    record = json.loads((tmp_path / "views.json").read_text())
    for place, name in enumerate(("k-5-seed-0", "views-same-seed-0")):
        folder = tmp_path / "runs" / name
        (row,) = json.loads((folder / "results.json").read_text())["rows"].values()  # baselines are skipped
        if name == "k-5-seed-0":
            assert f"{row['one_label']:.1%} with one label per class.\n" in (folder / "log.txt").read_text()
        assert record["values"]["nn1"][place] == [row["nn1"]]
        if not place:  # the date of the run, not of the table
            assert record["date"] == json.loads((folder / "results.json").read_text())["date"]
        with (folder / "metrics.csv").open() as file:
            *_, last = csv.DictReader(file)
        assert record["values"]["spread"][place] == [float(last["spread"])]
    table = (tmp_path / "views.md").read_text()
    assert "| the same view |" in table
    assert table in printed
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.width > 600

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a finished run is repeated")

    monkeypatch.setattr("pipeline.experiments.runs.subprocess.run", forbidden)
    before = {path: path.stat().st_mtime for path in (tmp_path / "runs").rglob("*")}
    assert run(tmp_path, "views", "--seeds", "1", *FAST) == 0
    assert {path: path.stat().st_mtime for path in (tmp_path / "runs").rglob("*")} == before
    assert run(tmp_path, "views", "--seeds", "1", "--", "--steps", "3") == 1, "other flags need another folder"
    assert "holds a run with other flags, --steps 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("_within_this_process")
def test_what_a_run_keeps_of_its_epochs_becomes_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "TSNE_IMAGES", 60)
    assert run(tmp_path, "tsne", "neighbors", *FAST, "--steps", "42") == 0
    kept = sorted((tmp_path / "runs" / "keep-every-10-seed-0").glob("backbone-epoch-*"))
    assert [path.name for path in kept] == ["backbone-epoch-0001.safetensors", "backbone-epoch-0002.safetensors"]
    for name in ("tsne", "neighbors"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 400


def test_a_run_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    runs = Runs(tmp_path, ("--data", str(tmp_path / "nowhere")), jobs=1)
    with pytest.raises(RuntimeError, match=r"default-seed-3 ended with status 2: .*no such folder"):
        runs.finish([Run((), 3)])
    assert not runs.finished(Run((), 3))


def test_every_experiment_is_a_grid_of_flags_that_the_trainer_takes(tmp_path: Path) -> None:
    small = ("--dataset", "fashion-mnist", "--data", "somewhere")
    for dataset, common in (("digits", ()), ("folder", ("--data", "somewhere")), ("fashion-mnist", small)):
        for name in experiments.EXPERIMENTS:
            grid = experiments.grid(name, 3, dataset)
            assert len({run.name for run in grid}) == len(grid), "each has a folder of its own"
            for one in grid:
                Runs(tmp_path, common, 1).check(one)
    assert [one.seed for one in experiments.grid("k", 2, "digits")] == [0, 1] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["k", "--data", ""], "argument --data: must not be empty"),
        (["nosuch"], "unknown experiment 'nosuch': choose from k, quick"),
        (["k", "--seeds", "0"], "--seeds must be at least 1"),
        (["k", "--", "--lr", "-1"], "--lr: must be at least 0"),
        (["k", "--", "--dataset", "cifar10"], "--dataset determines the values of a grid: give it before the --"),
        (["k", "--", "--nosuch"], "unrecognized arguments: --nosuch"),
        (["bank", "--", "--k", "100"], "--k must be at most --bank-size (64)"),
    ],
)
def test_wrong_input_is_a_clear_error_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert run(tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mean_and_deviation_are_over_the_seeds() -> None:
    assert spread_of([0.9, 0.92, 0.94]) == "92.0 ± 2.0"
    assert spread_of([0.5]) == "50.0"
    assert spread_of([float("nan")]) == "–"
