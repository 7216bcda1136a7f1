"""examples/imagenet_train.py as its users run it."""

import asyncio
import contextlib
import copy
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_training import SMALL_NETWORK, blank_pictures, make_tree

import imagenet_train
from msf_core import MemoryBank, Neighbors, mean_shift_loss
from msf_core.distributed import Ranks
from msf_core.rows import unit_rows
from pipeline.data.digits import Digits
from pipeline.training import showing
from pipeline.training.health import measure
from pipeline.training.settings import build_parser, complete, resumed
from pipeline.training.trainer import StopRequest, Trainer

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
    "config.json",
}
DIGITS = ["--steps", "30", "--eval-every", "1"]
SMALL = [*SMALL_NETWORK, "--batch-size", "4", "--workers", "0", "--epochs", "2"]


def train(*arguments: object, pictures: bool = False) -> int:
    with contextlib.nullcontext() if pictures else blank_pictures():
        return imagenet_train.main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert train(*arguments) == 2
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


def logged(folder: Path) -> dict[str, Any]:
    """What TensorBoard shows of a run: (step, value) of scalars except times, steps of the picture, and settings."""
    events = EventAccumulator(str(folder / "tensorboard"), dict.fromkeys(("scalars", "images", "tensors"), 0)).Reload()
    found: dict[str, Any] = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name.rpartition("/")[2] not in TIMES
    }
    found["neighbors"] = [event.step for event in events.Images("neighbors")] if events.Tags()["images"] else []
    session = events.summary_metadata.get("_hparams_/session_start_info")
    if session is not None:
        hparams = HParamsPluginData.FromString(session.plugin_data.content).session_start_info.hparams
        found["hparams"] = {
            name: value.string_value if value.HasField("string_value") else value.number_value
            for name, value in hparams.items()
            if name not in ("out", "resume", "logger", "checkpoint_every", "stem")  # 0.2.0 had no stem
        }
    return found


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Have the signal arrive while that step is under way."""
    train_step = Trainer._train_step

    def interrupted(self: Trainer, *views: torch.Tensor) -> None:
        if self.step == step:
            signal.raise_signal(number)
        train_step(self, *views)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)


def as_0_2_0(settings: dict[str, object]) -> dict[str, object]:
    """Settings as version 0.2.0 saved them."""
    since = {"recipe", "stem", "blur", "symmetric", "exclude_same_id", "same_label"}
    return {name: value for name, value in settings.items() if name not in since}


@pytest.fixture
def _untrained_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_train, "add_rows_before", lambda trainer: trainer.notes.update(before={}))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """The folder of a run, and the status and messages of other runs that tried to write to it."""
    folder, others = tmp_path_factory.mktemp("whole") / "run", []
    train_step = Trainer._train_step

    def with_others(self: Trainer, *views: torch.Tensor) -> None:
        attempts = {2: 1, 22: 3}.get(self.step, 0)  # before the first checkpoint, and after it
        for flags in ([*DIGITS, "--out", folder], ["--resume", folder], ["--resume", "auto", "--out", folder])[
            :attempts
        ]:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                others.append((train(*flags), said.getvalue()))
        train_step(self, *views)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "_train_step", with_others)
        assert train(*DIGITS, "--checkpoint-every", 1, "--out", folder) == 0
    return folder, others


@pytest.fixture(scope="module")
def whole(disturbed: tuple[Path, list[tuple[int, str]]]) -> Path:
    """The folder of a run that nothing interrupted."""
    return disturbed[0]


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
        patch.setattr("pipeline.training.timing.LOADER_SHARE", -1.0)  # the loader is the limit on any machine
        assert train("--data", tree, *SMALL, "--out", folder / "run", pictures=True) == 0
    return tree, folder / "run", printed.getvalue()


@pytest.fixture(scope="module")
def unlabeled(photos: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run on the same images without their classes."""
    folder = tmp_path_factory.mktemp("unlabeled")
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
        [sys.executable, SCRIPT, "--steps", "400", "--eval-every", "10", "--out", folder],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert set(rows) == {"raw pixels", "untrained", "MSF, k = 5"}
    assert rows["MSF, k = 5"]["nn1"] >= 0.96
    assert rows["MSF, k = 5"]["one_label"] >= 0.72
    assert "| MSF, k = 5 |" in done.stdout
    assert done.stderr == "", "no progress bar where there is no terminal"
    assert [line.split(" of ")[0] for line in done.stdout.splitlines() if line.startswith("epoch ")] == [
        f"epoch {number}" for number in range(1, 21)
    ]
    assert {path.name for path in folder.iterdir()} == FILES | {"results.json", ".lock"}
    *_, files = done.stdout.splitlines()
    assert set(files.replace("/,", ",").removeprefix(f"{folder}: ").split(", ")) == FILES | {"results.json"}
    history = metrics(folder)
    assert [int(row["epoch"]) for row in history] == list(range(1, 21))
    assert [int(row["epoch"]) for row in history if row["nn1"]] == [1, 10, 20]
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
    assert f"stopped after step {step + 1} of 30; continue with --resume" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").exists() == (step >= 20), "as soon as there is an epoch to draw"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if step == 4:  # as if an older version had begun it
        state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        torch.save(state | {"settings": as_0_2_0(state["settings"])}, tmp_path / "run" / "checkpoint.pt")
    torch.manual_seed(99)  # what another process would have
    assert train("--resume", tmp_path / "run") == 0
    if step != 20:  # a stop at the end of an epoch does not wait for the evaluation
        assert_same_run(whole, tmp_path / "run")
        assert logged(tmp_path / "run") == logged(whole)
    one, other = (load_file(folder / "backbone.safetensors") for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tensorboard_has_every_number_once_although_the_run_crashed(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.trainer.LOG_EVERY", 1)
    monkeypatch.setattr(imagenet_train, "REDRAW", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        train_step = Trainer._train_step

        def crashing(self: Trainer, *views: torch.Tensor) -> None:
            if self.step == 25:  # the checkpoint is that of step 21
                raise AssertionError("a bug")
            train_step(self, *views)

        patch.setattr(Trainer, "_train_step", crashing)
        with pytest.raises(AssertionError, match="a bug"):
            train(*DIGITS, "--checkpoint-every", 1, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "curves.png").exists()
    assert len(logged(tmp_path / "run")["step/loss"]) == 25
    for _ in range(2):  # continue the run, then look at the finished run again
        assert train("--resume", tmp_path / "run") == 0
        found = logged(tmp_path / "run")
        assert found == logged(whole)
    rows = metrics(whole)
    assert [step for step, _ in found["step/lr"]] == list(range(1, 31))
    assert found["step/lr"][0][1] == pytest.approx(0.1)
    losses = [float(line.split(",")[1]) for line in (whole / "losses.csv").read_text().splitlines()[1:]]
    assert [value for _, value in found["step/loss"]] == pytest.approx(losses)
    for name in ("loss", "purity", "nn20", "spread"):
        assert found[f"epoch/{name}"] == [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows]
    assert not {name.partition("/")[2] for name in found if name.startswith("epoch/")} & {"epoch", "step", "lr"}
    results = json.loads((whole / "results.json").read_text())["rows"]["MSF, k = 5"]
    assert found["final/one_label"] == [(30, pytest.approx(results["one_label"]))]
    assert found["neighbors"] == [30]
    assert found["hparams"]["k"] == 5
    assert found["hparams"]["augmentation"] == "w/s"
    assert not [path for path in (whole / "tensorboard").iterdir() if path.is_dir()], "one run, not two"


def test_a_run_may_be_resumed_with_another_logger(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 25)
        assert train(*DIGITS, "--logger", "none", "--out", tmp_path / "run") == 143
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # not installed
        before = sorted((tmp_path / "run").iterdir())
        assert "pip install wandb" in error_of(capsys, "--resume", tmp_path / "run", "--logger", "wandb")
        assert sorted((tmp_path / "run").iterdir()) == before
    assert train("--resume", tmp_path / "run", "--logger", "tensorboard") == 0
    assert logged(tmp_path / "run") == logged(whole)


@pytest.mark.slow
def test_a_run_on_a_folder_is_killed_and_goes_on_exactly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree = make_tree(tmp_path / "tree", train=4, val=1)
    flags = ["--data", tree, *SMALL, "--workers", "1"]
    assert train(*flags, "--out", tmp_path / "whole") == 0

    command = [sys.executable, SCRIPT, *flags]
    run = subprocess.Popen(
        [*command, "--out", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: os.nice(19),  # so that it does not end before the signal on a busy machine
    )
    for line in run.stdout:
        if line.startswith(b"writes to"):  # it has begun
            break
    os.killpg(run.pid, signal.SIGTERM)  # like timeout, systemd and Slurm: the workers get it too
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, output
    stopped = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert stopped < 6
    assert train("--resume", tmp_path / "run", "--workers", 0) == 0, "other workers must give the same views"
    assert (
        stopped == 0 or f"from step {stopped}" in capsys.readouterr().out
    )  # the signal may come before the first step
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_paper_s_resnet50_trains_on_a_folder(tmp_path: Path) -> None:
    few = ["--image-size", 32, "--stem", "imagenet", "--batch-size", 4, "--steps", 1, "--workers", 0]
    few += ["--hidden", 128, "--bank-size", 64]
    assert train("--data", make_tree(tmp_path / "tree"), *few, "--out", tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["arch"], config["k"], config["momentum"], config["dim"]) == ("resnet50", 5, 0.99, 512)
    torchvision.models.resnet50().load_state_dict(load_file(tmp_path / "run" / "backbone.safetensors"), strict=True)


@pytest.mark.parametrize("labeled", [True, False])
def test_a_folder_trains_with_labels_and_without(
    photos: tuple[Path, Path, str], unlabeled: tuple[Path, str], labeled: bool
) -> None:
    run, printed = photos[1:] if labeled else unlabeled
    assert ("| MSF, k = 5 |" in printed) == labeled
    assert ("no labeled test images to evaluate on" in printed) != labeled
    assert "read by 0 workers" in printed
    if labeled:
        assert printed.count("the loader is the bottleneck") == 1, "once, in two epochs"
    assert all((row["purity"] != "") == labeled for row in metrics(run))
    assert {path.name for path in run.iterdir()} >= FILES
    for name in ("curves.png", "neighbors.png"):
        assert min(Image.open(run / name).size) > 400


def test_labels_never_reach_the_weights(photos: tuple[Path, Path, str], unlabeled: tuple[Path, str]) -> None:
    one, other = (load_file(folder / "backbone.safetensors") for folder in (photos[1], unlabeled[0]))
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


def test_the_picture_of_neighbors_begins_with_the_earliest_that_are_known(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    trainer, _ = imagenet_train.prepare({"resume": str(tmp_path / "run")}, Ranks(), torch.device("cpu"))
    drawn: list[str] = []
    monkeypatch.setattr(showing, "draw_neighbors", lambda path, queries, rows, title: drawn.append(rows[0]["title"]))
    neighbors = trainer.notes.pop("untrained_neighbors")
    # Untrained; in a run that version 0.2.0 began, after its first epoch; or not at all.
    for notes in ({"untrained_neighbors": neighbors}, {"first_neighbors": neighbors}, {}):
        trainer.notes = notes
        showing.picture(trainer, tmp_path / "neighbors.png", "title")
    assert drawn == ["before training", "after epoch 1", "after epoch 2"]


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
        assert "1347 training images, but there are now 1346" in error_of(capsys, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--k 0", "argument --k: must be at least 1, got 0"),
        ("--k 2000", "--k must be at most --bank-size (1024), got 2000"),
        ("--k 1348 --bank-size 4096", "--k 1348 is more than the 1347 training images"),
        ("--momentum 1.5", "argument --momentum: must be at least 0 and at most 1, got 1.5"),
        ("--lr nan", "argument --lr: must be a finite number, at least 0, got nan"),
        ("--weight-decay inf", "argument --weight-decay: must be a finite number, at least 0, got inf"),
        ("--lr -1", "argument --lr: must be at least 0, got -1"),
        ("--steps -1", "argument --steps: must be at least 0, got -1"),
        (f"--seed {2**64}", "argument --seed: must be at most"),
        ("--batch-size 1", "--batch-size must be at least 2"),
        ("--batch-size 5000 --bank-size 5000", "--batch-size 5000 is more than the 1347 training images"),
        ("--bank-size 63", "--bank-size must be at least 64, one row per embedding of a batch, got 63"),
        ("--bank-size 64 --symmetric", "--bank-size must be at least 128, one row per embedding of a batch (two of"),
        ("--image-size 32", "16 pixels wide, got --image-size 32"),
        ("--data TREE --image-size 1", "argument --image-size: must be at least 8, got 1"),
        ("--data TREE --arch test_vit3 --image-size 32", "; 'test_vit3' takes --image-size 160"),
        ("--method byol --k 5", "--method byol requires k = 1, got --k 5"),
        ("--method byol --same-label", "--same-label chooses among neighbors, and --method byol has none"),
        ("--k 1 --exclude-same-id", "--exclude-same-id chooses among neighbors, and --k 1 has none"),
        ("--data TREE/train/class0 --same-label", "--same-label needs labels, and the training images of"),
        ("--dataset folder", "--dataset folder needs --data DIR"),
        ("--dataset digits --data x", "--data is for"),
        ("--data TREE --image-size 100000", "argument --image-size: must be at most 4096, got 100000"),
        ("--data=", "argument --data: must not be empty"),
        ("--resume=", "argument --resume: must not be empty"),
        ("--out=", "argument --out: must not be empty"),
        ("--data /nowhere/at/all", "--data: no such folder: /nowhere/at/all"),
        ("--arch resnet5000", "--arch: no model 'resnet5000' in torchvision or timm: did you mean resnet50"),
        ("--backend magic", "unknown search backend 'magic'"),
        ("--device warp", "--device must be auto, cpu, cuda or a GPU such as cuda:0, got 'warp'"),
        ("--device cuda:99", "--device cuda:99: PyTorch sees "),
        ("--epochs 5 --steps 100", "--epochs and --steps"),
        ("--data TREE --arch googlenet", "one feature vector"),
        ("--augmentation s/w", "invalid choice: 's/w'"),
        ("--resume TREE", "no checkpoint at"),
        ("--out TREE/train/class0/0.jpg", "--out: TREE/train/class0/0.jpg is a file, not a folder"),
        ("--out TREE/train/class0/0.jpg/run", "--out: TREE/train/class0/0.jpg is a file, not a folder"),
        ("--out /proc/run", "--out: nothing can be written to /proc/run"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: str, message: str
) -> None:
    few = ["--batch-size", "4", "--k", "2", "--workers", "0"]
    if "TREE" in arguments:
        tree = str(make_tree(tmp_path / "tree"))
        arguments, message = arguments.replace("TREE", tree), message.replace("TREE", tree)
    there = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
    said = error_of(capsys, *(few if "--data" in arguments else []), *out, *arguments.split())
    assert message in said
    assert said.startswith("imagenet_train.py: error: ")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_two_runs_do_not_share_a_folder(
    capsys: pytest.CaptureFixture, disturbed: tuple[Path, list[tuple[int, str]]], whole: Path
) -> None:
    """Other tests check the final state of the first run."""
    for status, said in disturbed[1]:
        assert status == 2
        assert f"{whole} is in use by another run of this process: choose another --out" in said
    assert len(disturbed[1]) == 4
    assert "holds a run: continue it with --resume" in error_of(capsys, *DIGITS, "--out", whole)


def test_main_returns_a_status_in_a_thread_and_in_an_event_loop_as_notebooks_have_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, photos: tuple[Path, Path, str]
) -> None:
    async def cell() -> list[int]:
        return [
            train("--k", "none"),
            await asyncio.to_thread(train, "--data", photos[0], *SMALL, "--workers", 2, "--out", tmp_path / "run"),
        ]

    assert asyncio.run(cell()) == [2, 0]
    assert "argument --k: must be a whole number, got 'none'" in capsys.readouterr().err
    one, other = (load_file(folder / "backbone.safetensors") for folder in (photos[1], tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("_untrained_is_not_evaluated")
def test_no_memory_and_ctrl_c_are_one_line_and_a_bug_is_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(error: BaseException) -> int:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(Trainer, "train", fail)
        return train("--steps", 1, "--out", tmp_path / "run")

    for error, status, line in (
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 1, "error: CUDA out of memory. Tried to"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),  # the second one: the first lets the step end
    ):
        assert ends(error) == status
        said = capsys.readouterr().err.strip("\n") + "\n"
        assert said.startswith(f"imagenet_train.py: {line}")
        assert said.count("\n") == 1
    with pytest.raises(AssertionError, match="a bug"):
        ends(AssertionError("a bug"))


def poisoned(step: int) -> Callable[..., None]:
    """Return a training step that sets a weight to NaN at the given step."""
    train_step = Trainer._train_step

    def spoiling(self: Trainer, *views: torch.Tensor) -> None:
        train_step(self, *views)
        if self.step == step:
            next(self.online.parameters()).data.view(-1)[0] = torch.nan

    return spoiling


@pytest.mark.usefixtures("_untrained_is_not_evaluated")
@pytest.mark.parametrize(("step", "stop"), [(3, 0), (23, 0), (23, 25)])
def test_divergence_is_said_within_50_steps_and_leaves_the_last_sound_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, step: int, stop: int
) -> None:
    """The NaN comes before the first checkpoint, after it, and before a stop that would write another one."""
    monkeypatch.setattr(Trainer, "_train_step", poisoned(step))
    monkeypatch.setattr("pipeline.training.trainer.CHECK_EVERY", 10)
    if stop:
        stop_at(monkeypatch, stop)
    assert train(*DIGITS, "--checkpoint-every", 1, "--out", tmp_path / "run") == 1
    said = capsys.readouterr().err
    found = stop + 1 if stop else 10 * -(-step // 10)
    assert f"error: the loss became nan by step {found} of 30: start again with a lower --lr than 0.1" in said
    assert ("the last checkpoint is from before that" in said) == (step > 21)
    assert (tmp_path / "run" / "checkpoint.pt").exists() == (step > 21)
    if step > 21:
        assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 21


@pytest.mark.usefixtures("_untrained_is_not_evaluated")
def test_a_rate_that_is_far_too_high_is_said_before_the_loss_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train("--steps", 1, "--lr", 1e30, "--out", tmp_path / "run") == 1
    assert (
        "error: a weight is no longer a finite number by step 1 of 1: start again with a lower"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_what_an_older_version_saved_means_what_it_did_there() -> None:
    """A test above checks that such a run on the digits continues exactly."""
    saved = as_0_2_0(asdict(complete({"data": "x", "arch": "resnet18", "image_size": 32})))
    now = resumed(saved, {"workers": 3})
    assert (now.stem, now.blur, now.recipe, now.symmetric, now.workers) == ("imagenet", 0.5, "own", False, 3)
    for changed, given, message in (
        ({}, {"stem": "small"}, "the run to resume has other settings: --stem is 'imagenet' there, 'small' here"),
        ({"dataset": "cifar10"}, {}, "saved by version 0.2.0 or older, which normalized cifar10 differently"),
        ({"warp_factor": 9}, {}, "saved by a newer version, which has --warp-factor"),
    ):
        with pytest.raises(ValueError, match=message):
            resumed(saved | changed, given)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, which stands in for a full disk")
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
    """Without the prediction head; a warning comes both during training and at the end."""
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

    monkeypatch.setattr("pipeline.training.trainer.measure", watched)
    assert train("--steps", 6, "--k", 1, "--k-end", 9, "--out", tmp_path / "run") == 0
    assert ks == [1, 2, 4, 5, 6, 8]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (settings["k"], settings["k_end"], int(state["criterion"]["_extra_state"])) == (1, 9, 6)


def prepared(folder: Path, *flags: object) -> Trainer:
    given = vars(build_parser("").parse_args(["--out", str(folder), *map(str, flags)]))
    return imagenet_train.prepare(given, Ranks(), torch.device("cpu"))[0]


def test_a_symmetric_loss_takes_each_view_through_both_encoders(tmp_path: Path) -> None:
    trainer = prepared(tmp_path / "run", "--symmetric", "--steps", 1)
    weak, strong, labels, ids = next(trainer.source.train_views(0, 0))
    target, student = copy.deepcopy((trainer.target, trainer.student))
    (z1, z2), (p1, p2) = ([encoder(view) for view in (weak, strong)] for encoder in (target, student))
    expected = (mean_shift_loss(p1, unit_rows(z2)[:, None]) + mean_shift_loss(p2, unit_rows(z1)[:, None])) / 2
    trainer.criterion.k = 1
    torch.testing.assert_close(trainer._backward(0, weak, strong, labels, ids), expected.detach())
    assert torch.equal(trainer.criterion.bank.rows[:128], unit_rows(torch.cat([z1, z2])))
    means = trainer.averages.means()
    assert means["loss"] == pytest.approx(expected.item())
    assert means["spread"] > 0.5


@pytest.mark.parametrize("option", ["--exclude-same-id", "--same-label"])
def test_what_restricts_the_neighbors_in_the_library_does_so_in_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    alike: list[bool] = []

    def watched(
        loss: torch.Tensor, u: torch.Tensor, found: Neighbors, labels: torch.Tensor, views: object, bank: MemoryBank
    ) -> dict[str, torch.Tensor]:
        beside = bank.labels if option == "--same-label" else bank.ids
        others = beside[found.index[:, 1:]][found.index[:, 1:] >= 0]
        own = beside[found.index[:, :1]].expand_as(found.index[:, 1:])[found.index[:, 1:] >= 0]
        alike.extend((others == own).tolist())
        return measure(loss, u, found, labels, views, bank)

    monkeypatch.setattr("pipeline.training.trainer.measure", watched)
    trainer = prepared(
        tmp_path / "run", "--steps", 24, "--bank-size", 2048, "--bank-dtype", "int8", "--symmetric", option
    )
    trainer.train(StopRequest(), lambda row: None)
    assert len(alike) > 1000
    assert set(alike) == {option == "--same-label"}
    assert trainer.criterion.bank.dtype == torch.int8
