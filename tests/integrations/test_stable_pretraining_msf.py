"""The method for stable-pretraining, under the installed library's Module, callbacks and Manager.

It is not part of the `integrations` extra: through an entry point, it adds 14 callbacks to every Lightning Trainer in
the environment, and it installs 45 packages. Run these tests in an environment of their own.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msf_core import knn_classify, reference

pytest.importorskip(
    "stable_pretraining",
    reason="stable-pretraining is not installed; it would change every Lightning Trainer in the environment",
)
pytest.importorskip("sklearn", reason="the example's digits are scikit-learn's")

import lightning as L
import stable_pretraining as spt
from lightning.pytorch.callbacks import ModelCheckpoint
from stable_pretraining.callbacks import TeacherStudentCallback
from torch.utils.data import DataLoader

from integrations import stable_pretraining_msf as example

BATCH, BATCHES, BANK = 8, 5, 24
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, about loggers, workers and steps


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files that the library writes on its own, such as environment.json, go to a temporary folder."""
    monkeypatch.chdir(tmp_path)
    spt.set(verbose="ERROR", cache_dir=str(tmp_path / "cache"))
    yield
    spt.set(verbose="INFO")


class Views(torch.utils.data.Dataset):
    """Images with fixed views, in the format of `digits`; no image is in two different batches of a run."""

    def __init__(self, count: int, training: bool = True) -> None:
        images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(count))
        self.samples = [
            {"image": image + 3 * (number % 3 == 0), "label": number % 3} for number, image in enumerate(images)
        ]
        self.training = training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {"weak": sample, "strong": {**sample, "image": 0.9 * sample["image"]}} if self.training else dict(sample)


def data() -> Any:
    return example.DataModule(
        train=DataLoader(Views(BATCH * BATCHES), BATCH, drop_last=True), val=DataLoader(Views(12, training=False), 6)
    )


def a_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return example.MSF(example.small_convnet(), 96, dim=8, hidden=16, bank_size=BANK, k=3, momentum=0.9, lr=0.1)


def fit(model: Any, *callbacks: Any, epochs: int = 2, accumulate: int = 1, resume: Path | None = None) -> Any:
    """Train under Manager; return the trainer."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        callbacks=[*example.evaluation(model, 96, 3, 30), TeacherStudentCallback(), *callbacks],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    path = None if resume is None else str(resume)
    spt.Manager(trainer, model, data(), 0, ckpt_path=path, weights_only=False)()
    return trainer


def test_the_loss_is_the_papers_of_strong_student_and_weak_teacher() -> None:
    model, batches = a_model(), list(DataLoader(Views(2 * BATCH), BATCH))
    model.log = lambda *_, **__: None
    model.forward(batches[0], "fit")
    u, v, [before] = [], [], [model.criterion.bank.rows[:BATCH].clone()]
    model.teacher.register_forward_hook(lambda _, given, out: u.append((given[0], out[1])))
    model.predictor.register_forward_hook(lambda _, given, out: v.append(out))
    seen: list[Tensor] = []
    model.student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    out = model.forward(batches[1], "fit")

    assert torch.equal(u[0][0], batches[1]["weak"]["image"])
    assert torch.equal(seen[0], batches[1]["strong"]["image"])
    expected = reference.mean_shift_loss(v[0], u[0][1], torch.cat([before, u[0][1]]), k=3)
    torch.testing.assert_close(out["loss"].double(), expected, rtol=1e-5, atol=1e-6)
    out["loss"].backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in model.named_parameters() if not name.startswith("teacher")}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_follows_each_step_of_the_optimizer_and_nothing_else(accumulate: int) -> None:
    model = a_model()
    name = "projector.3.weight"
    expected, student = ([model.student.state_dict()[name].clone()] for _ in range(2))

    class Follow(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            now = model.student.state_dict()[name].clone()
            if not torch.equal(now, student[-1]):  # there was a step
                student.append(now)
                expected.append(0.9 * expected[-1] + 0.1 * now)
            torch.testing.assert_close(model.teacher.module.state_dict()[name], expected[-1], rtol=1e-5, atol=1e-7)
            assert model.teacher.updates == len(student) - 1

    trainer = fit(model, Follow(), accumulate=accumulate)
    steps = {1: 10, 2: 4}[accumulate]
    assert (trainer.global_step, model.teacher.updates, len(student) - 1) == (steps, steps, steps)
    assert model.criterion.steps == 10
    assert int(model.criterion.bank.pushed) == 80, "validation has pushed, or training has not"


@pytest.mark.parametrize("accumulate", [1, 5])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(tmp_path: Path, accumulate: int) -> None:
    """In all but the kNN queue, which the library fills only after it saves the checkpoint of the same step."""
    saver = ModelCheckpoint(filename="{step}", save_top_k=-1, every_n_train_steps=BATCHES // accumulate)
    whole, resumed = a_model(), a_model(seed=1)
    fit(whole, saver, accumulate=accumulate)
    stop, end = (Path(saver.dirpath) / f"step={part * BATCHES // accumulate}.ckpt" for part in (1, 2))
    fit(resumed, accumulate=accumulate, resume=stop)
    assert (resumed.criterion.steps, resumed.teacher.updates) == (10, 10 // accumulate)
    ours, theirs = resumed.state_dict(), torch.load(end, weights_only=False)["state_dict"]
    for name, tensor in whole.state_dict().items():
        if not name.startswith(("callbacks_metrics", "callbacks_modules.ordered_queue")):
            assert torch.equal(tensor, ours[name]), name
            assert torch.equal(tensor, theirs[name]), f"{name} in the checkpoint is not that after the step"
    assert int(ours["criterion.bank.pushed"]) == 80 > BANK


def test_knn_and_probe_judge_the_teachers_features() -> None:
    model = a_model()
    features: list[Tensor] = []
    model.teacher.register_forward_hook(lambda module, given, out: features.append(out[0]) if model.training else None)
    trainer = fit(model)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    asked = [Views(12, training=False)[index] for index in range(12)]
    queries = model.eval().teacher(torch.stack([sample["image"] for sample in asked]))[0]
    truth = torch.tensor([sample["label"] for sample in asked])
    labels = torch.tensor([sample["label"] for sample in Views(BATCH * BATCHES).samples])
    found = knn_classify(queries, torch.cat(features)[-30:], labels[-30:], k=1)
    assert logged["eval/knn_accuracy"] == pytest.approx((found == truth).float().mean().item())
    found = model.callbacks_modules["probe"](queries).argmax(dim=1)
    assert logged["eval/probe_accuracy"] == pytest.approx((found == truth).float().mean().item())
    assert 0 < logged["fit/loss"] < 4
    assert 0 < logged["fit/spread"] < 1.1
    assert 0 < logged["fit/purity"] < 1


def test_defaults_are_the_papers() -> None:
    model = example.MSF(torch.nn.Flatten(), 4)
    assert (model.criterion.k, model.criterion.bank.size, model.criterion.bank.dim) == (5, 128_000, 512)
    assert (model.teacher.momentum, model.predictor[0].out_features) == (0.99, 4096)


def test_weak_views_are_weaker() -> None:
    batch = next(iter(example.digits(32).train_dataloader()))
    images = example.digits(32).train.dataset.dataset
    moved = {}
    for view in ("weak", "strong"):
        of_images = [images[index][0] for index in batch[view]["sample_idx"].tolist()]
        assert [images[index][1] for index in batch[view]["sample_idx"].tolist()] == batch[view]["label"].tolist()
        moved[view] = (batch[view]["image"] - torch.stack(of_images)).abs().mean()
    assert 0.02 < moved["weak"] < 0.8 * moved["strong"]


def test_the_command_trains_and_resumes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    paths = []
    for more in ([], ["--resume"]):
        argv = ["x.py", "--epochs", "1" if not more else "2", "--batch-size", "450", "--out", "out"]
        monkeypatch.setattr(sys, "argv", [*argv, *more, *paths])
        example.main()
        said = capsys.readouterr().out
        assert "accuracy: 0." in said
        paths = [said.rpartition("checkpoint: ")[2].strip()]
        state = torch.load(paths[0], weights_only=False)
        steps = 6 if more else 3
        assert (state["global_step"], int(state["state_dict"]["criterion.bank.pushed"])) == (steps, steps * 450)
