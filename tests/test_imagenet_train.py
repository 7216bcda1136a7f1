"""examples/imagenet_train.py as its users run it."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from test_training import SMALL_NETWORK, blank_pictures, make_tree

import imagenet_train
from msf_core import Neighbors
from training.data import Digits
from training.health import measure
from training.trainer import Trainer

SCRIPT = Path(imagenet_train.__file__)
TIMES = {"images_per_second", "data_share", "search_share"}
FILES = {
    "checkpoint.pt",
    "backbone.safetensors",
    "metrics.csv",
    "losses.csv",
    "tensorboard",
    "curves.png",
    "neighbors.png",
}
DIGITS = ["--steps", "30", "--eval-every", "1"]
SMALL = [*SMALL_NETWORK, "--batch-size", "4", "--workers", "0", "--epochs", "2"]


def train(*arguments: object, pictures: bool = False) -> int:
    with contextlib.nullcontext() if pictures else blank_pictures():
        return imagenet_train.main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        train(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield (path, leaf) of nested dicts and lists."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from flat(part, f"{name}.{key}")
    else:
        yield name, value


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, bank, optimizer, counters, random state and metrics are equal to the last bit."""
    assert metrics(one) == metrics(other)
    states = [dict(flat(torch.load(folder / "checkpoint.pt", weights_only=True))) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert any("bank.rows" in name for name in states[0])
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name
        elif not name.startswith(".settings.") and name.rpartition(".")[2] not in TIMES:
            assert value == states[1][name] or value != value, name


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Have the signal arrive while that step is under way."""
    train_step = Trainer._train_step

    def interrupted(self: Trainer, *views: torch.Tensor) -> None:
        if self.step == step:
            signal.raise_signal(number)
        train_step(self, *views)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(*DIGITS, "--checkpoint-every", 1, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A tree of twelve images in three classes, the folder of a run on it with its pictures, and what that printed."""
    folder = tmp_path_factory.mktemp("photos")
    tree = make_tree(folder / "tree", train=4)
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("training.timing.LOADER_SHARE", -1.0)  # whatever the machine, its loader is the limit
        assert train("--data", tree, *SMALL, "--out", folder / "run", pictures=True) == 0
    return tree, folder / "run", printed.getvalue()


@pytest.fixture(scope="module")
def unlabelled(photos: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same of a run on the same images without their classes."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for i, image in enumerate(sorted((photos[0] / "train").rglob("*.jpg"))):
        shutil.copy(image, folder / f"{i:03}.jpg")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train("--data", folder, *SMALL, "--out", folder / "run", pictures=True) == 0
    return folder / "run", printed.getvalue()


@pytest.mark.slow
def test_the_digits_job_learns_in_its_short_form_without_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "600", "--eval-every", "10", "--out", folder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert set(rows) == {"raw pixels", "untrained", "MSF, k = 5"}
    assert rows["MSF, k = 5"]["nn1"] >= 0.96
    assert rows["MSF, k = 5"]["one_label"] >= 0.72
    assert "| MSF, k = 5 |" in done.stdout
    assert "600/600" in done.stderr
    assert {path.name for path in folder.iterdir()} == FILES | {"config.json", "results.json"}
    history = metrics(folder)
    assert [int(row["epoch"]) for row in history] == list(range(1, 30))
    assert [int(row["epoch"]) for row in history if row["nn1"]] == [1, 10, 20, 29]
    last = history[-1]
    assert float(last["spread"]) > 0.8
    assert float(last["purity"]) > float(history[0]["purity"])
    for name in ("curves.png", "neighbors.png"):
        width, height = Image.open(folder / name).size
        assert width > 600
        assert height > 400
    assert list((folder / "tensorboard").glob("events*"))
    # A healthy run:
    assert "warning" not in done.stderr + done.stdout
    assert 1.5 < float(last["rank"]) < 64
    assert 0.5 < float(last["similarity"]) <= 1
    assert 0 < float(last["age"]) < 16, "of the 1,024 rows in the bank, 64 a step"
    assert float(last["difference"]) > 0.1


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path, whole: Path) -> None:
    assert train(*DIGITS, "--out", tmp_path / "again") == 0
    assert_same_run(whole, tmp_path / "again")
    assert train("--steps", 1, "--seed", 1, "--out", tmp_path / "other") == 0
    first, other = ((folder / "losses.csv").read_text().splitlines()[1] for folder in (whole, tmp_path / "other"))
    assert first != other


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGTERM), (25, signal.SIGINT), (20, signal.SIGINT)])
def test_a_run_that_is_stopped_goes_on_exactly(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture, step: int, number: int
) -> None:
    # Within the first epoch, within the second, and in the last of the 21 steps of an epoch.
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, step, number)
        assert train(*DIGITS, "--checkpoint-every", 1, "--out", tmp_path / "run") == 128 + number
    assert f"stopped after step {step + 1} of 30; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    torch.manual_seed(99)  # what another process would have
    assert train("--resume", tmp_path / "run") == 0
    if step != 20:  # a stop is not kept waiting by the evaluation that its epoch's end would have
        assert_same_run(whole, tmp_path / "run")
    one, other = (load_file(folder / "backbone.safetensors") for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_resnet50_on_a_folder_is_killed_and_goes_on_exactly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree = make_tree(tmp_path / "tree", train=4, val=1)
    flags = ["--data", tree, "--image-size", "32", "--stem", "imagenet", "--batch-size", "4", "--epochs", "2"]
    flags += ["--bank-size", "64", "--hidden", "128", "--workers", "1"]
    assert train(*flags, "--out", tmp_path / "whole") == 0

    command = [sys.executable, SCRIPT, *flags]
    run = subprocess.Popen(
        [*command, "--out", tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    while run.stderr.read(1) not in (b"%", b""):  # the progress bar is there: training has begun
        pass
    os.killpg(run.pid, signal.SIGTERM)  # as timeout, systemd and Slurm do: the workers get it too
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, output
    stopped = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert stopped < 6
    assert train("--resume", tmp_path / "run", "--workers", 0) == 0, "other workers, the same views"
    assert (
        stopped == 0 or f"from step {stopped}" in capsys.readouterr().out
    )  # the signal may come before the first step
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["arch"], config["k"], config["momentum"], config["dim"]) == ("resnet50", 5, 0.99, 512)
    torchvision.models.resnet50().load_state_dict(load_file(tmp_path / "run" / "backbone.safetensors"), strict=True)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_trains_with_labels_and_without(
    photos: tuple[Path, Path, str], unlabelled: tuple[Path, str], labelled: bool
) -> None:
    run, printed = photos[1:] if labelled else unlabelled
    assert ("| MSF, k = 5 |" in printed) == labelled
    assert ("no labeled test images to evaluate on" in printed) != labelled
    assert "read by 0 workers" in printed
    if labelled:
        assert printed.count("the loader is the limit") == 1, "once, in two epochs"
    assert all((row["purity"] != "") == labelled for row in metrics(run))
    assert {path.name for path in run.iterdir()} >= FILES
    for name in ("curves.png", "neighbors.png"):
        assert min(Image.open(run / name).size) > 400


def test_labels_never_reach_the_weights(photos: tuple[Path, Path, str], unlabelled: tuple[Path, str]) -> None:
    one, other = (load_file(folder / "backbone.safetensors") for folder in (photos[1], unlabelled[0]))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_byol_is_a_run_without_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--steps", 12, "--eval-every", 0]
    assert train("--method", "byol", *few, "--out", tmp_path / "run") == 0
    assert "BYOL (k = 1, no bank)" in capsys.readouterr().out
    assert not any("bank" in name for name in torch.load(tmp_path / "run" / "checkpoint.pt")["criterion"])
    assert train("--k", 1, *few, "--out", tmp_path / "msf") == 0
    one, other = (load_file(tmp_path / name / "backbone.safetensors") for name in ("run", "msf"))
    assert all(torch.equal(one[name], other[name]) for name in one), "k = 1 must be BYOL"


@pytest.mark.parametrize("augmentation", ["s/s", "w/w"])
def test_every_augmentation_trains(tmp_path: Path, augmentation: str) -> None:
    assert train("--augmentation", augmentation, "--steps", 3, "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["augmentation"] == augmentation


def test_a_finished_run_can_be_looked_at_again(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert train("--resume", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == before


def test_a_resume_that_does_not_fit_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 2)
        assert train(*DIGITS, "--out", tmp_path / "run") == 143
    saved = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert "--k is 5 there, 3 here" in error_of(capsys, "--resume", tmp_path / "run", "--k", 3)
    assert "no checkpoint at" in error_of(capsys, "--resume", tmp_path / "nowhere")
    assert "holds a run" in error_of(capsys, *DIGITS, "--out", tmp_path / "run")
    (tmp_path / "damaged.pt").write_bytes(saved[: len(saved) // 2])
    assert "damaged" in error_of(capsys, "--resume", tmp_path / "damaged.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        init = Digits.__init__

        def fewer(self: Digits, *arguments: object) -> None:
            init(self, *arguments)
            self.train_size -= 1

        monkeypatch.setattr(Digits, "__init__", fewer)
        assert "1347 training images, there are 1346" in error_of(capsys, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--k", "2000"], "--k must be at most --bank-size, 1024, got 2000"),
        (["--momentum", "1.5"], "--momentum must be between 0 and 1, got 1.5"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--batch-size", "5000"], "--batch-size 5000 is more than the 1347 training images"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--image-size", "32"], "16 pixels"),
        (["--method", "byol", "--k", "5"], "--method byol is k = 1, got --k 5"),
        (["--dataset", "folder"], "--dataset folder needs --data DIR"),
        (["--dataset", "digits", "--data", "x"], "--data goes with"),
        (["--data", "/nowhere/at/all"], "no such folder: /nowhere/at/all"),
        (["--arch", "resnet5000"], "no model 'resnet5000'"),
        (["--backend", "magic"], "unknown search backend 'magic'"),
        (["--device", "warp"], "warp"),
        (["--epochs", "5", "--steps", "100"], "--epochs and --steps"),
        (["--arch", "googlenet", "--data", "TREE", "--batch-size", "4"], "one feature vector"),
        (["--augmentation", "s/w"], "invalid choice: 's/w'"),
    ],
)
def test_a_wrong_flag_is_a_clear_error_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    if "TREE" in arguments:
        arguments = [str(make_tree(tmp_path / "tree")) if argument == "TREE" else argument for argument in arguments]
    assert message in error_of(capsys, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_divergence_is_said_and_leaves_the_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(*DIGITS, "--checkpoint-every", 1, "--lr", "1e30", "--out", tmp_path / "run") == 1
    assert "the loss became nan" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here: a disk that is always full")
def test_a_full_disk_is_said_costs_no_step_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, whole: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    earlier = (folder / "checkpoint.pt").read_bytes()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["settings"]["steps"] = state["settings"]["steps"] + 20  # it has more to do
    torch.save(state, folder / "checkpoint.pt")
    earlier = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt.tmp").symlink_to("/dev/full")
    assert train("--resume", folder) == 1
    said = capsys.readouterr().err
    assert said.count("warning: ") == 3  # at the ends of two epochs and of the run, which went on in between
    assert "checkpoint.pt could not be written" in said
    assert (folder / "checkpoint.pt").read_bytes() == earlier
    (folder / "checkpoint.pt.tmp").unlink()
    assert train("--resume", folder) == 0
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == state["settings"]["steps"]
    steps = [line.split(",")[0] for line in (folder / "losses.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(1, state["settings"]["steps"] + 1)]


def test_a_fresh_run_without_out_takes_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("--steps", 2) == 0
    assert train("--steps", 2) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits", "digits-2"]


def test_collapse_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without the prediction head: while it trains, and at the end."""
    assert (
        train("--steps", 63, "--momentum", 0.9, "--predictor", "none", "--eval-every", 0, "--out", tmp_path / "run")
        == 0
    )
    assert float(metrics(tmp_path / "run")[-1]["spread"]) < 0.2
    printed = capsys.readouterr()
    assert printed.err.count("the encoder is collapsing") == 1, "once"
    assert "warning: the encoder is collapsing" in printed.out


def test_one_view_for_both_encoders_is_said_although_spread_and_loss_look_well(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train("--steps", 84, "--views", "same", "--eval-every", 0, "--out", tmp_path / "run") == 0
    last = metrics(tmp_path / "run")[-1]
    assert float(last["spread"]) > 0.8
    assert float(last["loss"]) < 0.4
    assert float(last["difference"]) == 0
    printed = capsys.readouterr()
    assert "both encoders see the same view" in printed.err
    assert "collapsing" not in printed.err


def test_k_may_rise_over_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ks: list[int] = []

    def watched(loss: torch.Tensor, u: torch.Tensor, neighbors: Neighbors, *more: object) -> dict[str, torch.Tensor]:
        ks.append(neighbors.index.shape[1])
        return measure(loss, u, neighbors, *more)

    monkeypatch.setattr("training.trainer.measure", watched)
    assert train("--steps", 6, "--k", 1, "--k-end", 9, "--out", tmp_path / "run") == 0
    assert ks == [1, 2, 4, 5, 6, 8]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (settings["k"], settings["k_end"], int(state["criterion"]["_extra_state"])) == (1, 9, 6)
