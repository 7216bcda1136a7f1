"""examples/integrations/lightning_msf.py under Lightning's real Trainer, in one process and in two."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from msf_core import knn_classify

SECONDS = 120  # time limit of two ranks; a hang is a failure


@pytest.fixture(scope="module")
def example() -> Any:
    """The example, imported here because Lightning would cost every process that collects tests ten seconds."""
    pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
    from integrations import lightning_msf

    return lightning_msf


def few_images(example: Any, batch_size: int = 8) -> Any:
    """A datamodule of 40 digits (five batches) to learn from and 20 to classify."""

    class Few(example.Images):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.train, self.val = self.train[:40], self.val[:20]

    return Few(batch_size=batch_size, seed=3)


def a_trainer(example: Any, folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return example.L.Trainer(**{"default_root_dir": folder, "devices": 1, "max_steps": 10, **quiet, **options})


def a_model(example: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return example.MSF(dim=8, hidden=16, bank_size=24, k=3, momentum=0.9)


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Tensors and numbers of a nested state, each by its path."""
    if isinstance(state, dict):
        parts = state.items()
    elif isinstance(state, (list, tuple)):
        parts = enumerate(state)
    else:
        return {name: state}
    return {path: value for key, part in parts for path, value in flat(part, f"{name}/{key}").items()}


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        ours, theirs = flat(one[part], part), flat(other[part], part)
        assert ours.keys() == theirs.keys()
        for path, value in ours.items():
            same = torch.equal(value, theirs[path]) if isinstance(value, Tensor) else value == theirs[path]
            assert same, f"{path} differs"


EACH_STEP = {"every_n_train_steps": 1}
EACH_EPOCH = {"every_n_epochs": 1, "save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("when", "stop", "until"),
    [
        (EACH_STEP, 7, {"max_steps": 14}),
        (EACH_STEP, 4, {"max_steps": 8, "accumulate_grad_batches": 2}),
        (EACH_STEP, 5, {"max_steps": 10}),
        (EACH_EPOCH, 5, {"max_steps": 10}),
        (EACH_EPOCH, 5, {"max_steps": -1, "max_epochs": 2}),
    ],
    ids=["within an epoch", "within one, accumulating", "at its last step", "at its end", "at its end, by epochs"],
)
def test_a_run_resumed_from_a_checkpoint_ends_with_the_bits_of_one_that_was_not_stopped(
    example: Any, tmp_path: Path, when: dict[str, Any], stop: int, until: dict[str, Any]
) -> None:
    """Compare every checkpoint after the one that is resumed from."""

    def run(part: str, **resumed: Any) -> None:
        checkpoints = example.ModelCheckpoint(tmp_path / part, "{step}", save_top_k=-1, **when)
        trainer = a_trainer(example, tmp_path, callbacks=[checkpoints], **until)
        # The initial weights of a resumed run must not matter.
        trainer.fit(a_model(example, seed=len(resumed)), few_images(example), **resumed)

    run("whole")
    run("resumed", ckpt_path=tmp_path / f"whole/step={stop}.ckpt")
    for step in [2 * stop] if when is EACH_EPOCH else range(stop + 1, 2 * stop + 1):
        one, other = (torch.load(tmp_path / part / f"step={step}.ckpt") for part in ("whole", "resumed"))
        assert_same_state(one, other)
        assert int(one["state_dict"]["criterion.bank.pushed"]) > 24, "the bank has not gone round"
    assert not torch.equal(a_model(example).predictor[0].weight, one["state_dict"]["predictor.0.weight"])


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_target_follows_each_step_of_the_optimizer_and_nothing_else(
    example: Any, tmp_path: Path, accumulate: int
) -> None:
    """An epoch has five batches, from which Lightning makes 5, 3 or 2 steps."""
    model = a_model(example)
    name = "1.3.weight"  # of the projection
    expected, online = ([model.encoder.state_dict()[name].clone()] for _ in range(2))

    class Follow(example.L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            now = model.encoder.state_dict()[name].clone()
            if not torch.equal(now, online[-1]):  # there was a step
                online.append(now)
                expected.append(0.9 * expected[-1] + 0.1 * now)
            torch.testing.assert_close(model.target.module.state_dict()[name], expected[-1], rtol=1e-5, atol=1e-7)

    options = {"accumulate_grad_batches": accumulate, "max_steps": -1, "max_epochs": 2, "callbacks": [Follow()]}
    trainer = a_trainer(example, tmp_path, **options, enable_checkpointing=False)
    trainer.fit(model, few_images(example))
    steps = {1: 10, 2: 6, 3: 4}[accumulate]
    assert (trainer.global_step, model.target.updates, len(online) - 1) == (steps, steps, steps)
    assert model.criterion.steps == 10
    assert int(model.criterion.bank.pushed) == 80


def test_it_logs_loss_purity_spread_and_accuracy(example: Any, tmp_path: Path) -> None:
    model, images = a_model(example), few_images(example)
    trainer = a_trainer(example, tmp_path, enable_checkpointing=False)
    trainer.fit(model, images)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 < logged["loss"] < 4
    assert 0 < logged["spread"] < 1.1
    assert 0 < logged["purity"] < 1
    model.eval()
    (features, labels), (queries, truth) = (
        (model.encoder[0](torch.stack([image for image, _ in part])), torch.tensor([label for _, label in part]))
        for part in (images.train, images.val)
    )
    right = knn_classify(queries, features, labels, k=1) == truth
    assert logged["val_1nn"] == pytest.approx(right.float().mean().item())
    assert 0.2 < logged["val_1nn"] < 1
    assert int(model.criterion.bank.pushed) == 80, "validation has pushed"


def test_a_checkpoint_gives_the_module_back(example: Any, tmp_path: Path) -> None:
    model = a_model(example)
    trainer = a_trainer(example, tmp_path, max_steps=4, enable_checkpointing=False)
    trainer.fit(model, few_images(example))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = example.MSF.load_from_checkpoint(tmp_path / "run.ckpt")
    assert len(loaded.criterion.bank) == 24
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def train_on_two_ranks(folder: Path) -> None:
    """Fork two ranks that keep what the tests compare; runs in the process that `two_ranks` starts."""
    from integrations import lightning_msf as example

    torch.set_num_threads(1)
    model, targets, labels = a_model(example), [], []
    model.target.register_forward_hook(lambda module, given, output: targets.append(output.clone()))

    class Keep(example.L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            labels.append(batch[2])
            self.wrapped = type(trainer.strategy.model).__name__

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            kept = {
                "state": module.state_dict(),
                "targets": targets,
                "labels": labels,
                "accuracy": trainer.callback_metrics["val_1nn"],
                "wrapped": self.wrapped,
            }
            torch.save(kept, folder / f"rank{trainer.global_rank}.pt")

    strategy = example.DDPStrategy(process_group_backend="gloo", start_method="fork")
    options = {"strategy": strategy, "devices": 2, "max_epochs": 2, "max_steps": -1, "callbacks": [Keep()]}
    trainer = a_trainer(example, folder, **options, enable_checkpointing=False)
    trainer.fit(model, few_images(example, batch_size=5))


@pytest.fixture(scope="module")
def two_ranks(example: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks kept of two epochs of four steps; from a fresh process, which is safe to fork."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks too
        pytest.fail(f"no end after {SECONDS} s: {process.communicate()[0]}")
    assert process.returncode == 0, said
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_ranks_share_a_bank_of_all_their_targets_in_order(two_ranks: list[dict[str, Any]]) -> None:
    batches = list(zip(*(kept["targets"] for kept in two_ranks), strict=True))
    assert len(batches) == 8
    assert not torch.equal(*batches[0])
    rows = F.normalize(torch.cat([target for batch in batches for target in batch]), dim=1)  # [80, D]
    labels = torch.cat([part for batch in zip(*(kept["labels"] for kept in two_ranks), strict=True) for part in batch])
    newest = torch.arange(80 - 24, 80)
    for kept in two_ranks:
        assert kept["wrapped"] == "DistributedDataParallel"
        assert int(kept["state"]["criterion.bank.pushed"]) == 80
        assert torch.equal(kept["state"]["criterion.bank.labels"][newest % 24], labels[newest])
        torch.testing.assert_close(kept["state"]["criterion.bank.rows"][newest % 24], rows[newest], rtol=0, atol=1e-6)


def test_two_ranks_have_the_same_bank_parameters_and_target(two_ranks: list[dict[str, Any]]) -> None:
    one, other = (kept["state"] for kept in two_ranks)
    statistics = ("running_mean", "running_var")  # of BatchNorm: each rank's own until DDP's next forward
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert name.endswith(statistics) or torch.equal(tensor, other[name]), name


def test_two_ranks_classify_by_the_training_images_of_both(example: Any, two_ranks: list[dict[str, Any]]) -> None:
    images = few_images(example)
    images.setup("fit")
    found: dict[str, list[Tensor]] = {"train": [], "val": []}
    for rank, kept in enumerate(two_ranks):
        model = a_model(example).eval()
        model.load_state_dict(kept["state"])
        for part in found:
            found[part].append(model.encoder[0](torch.stack([image for image, _ in getattr(images, part)[rank::2]])))
    labels, truth = (
        torch.tensor([label for rank in range(2) for _, label in part[rank::2]]) for part in (images.train, images.val)
    )
    right = knn_classify(torch.cat(found["val"]), torch.cat(found["train"]), labels, k=1) == truth
    for kept in two_ranks:
        assert float(kept["accuracy"]) == pytest.approx(right.float().mean().item())
    assert 0.2 < right.float().mean() < 1


if __name__ == "__main__":
    train_on_two_ranks(Path(sys.argv[1]))


def watched(model: Any, kept: set[float]) -> Any:
    """Return a hook that keeps the mean of a module's input during training."""

    def look(module: Any, given: tuple[Tensor, ...]) -> None:
        if model.training:
            kept.add(float(given[0].mean()))

    return look


def test_the_target_gets_the_weak_view_and_the_rate_falls_by_a_cosine(example: Any, tmp_path: Path) -> None:
    images, model, rates = few_images(example), a_model(example), []
    images.setup("fit")
    images.weak, images.strong = torch.zeros_like, torch.ones_like
    images.setup = lambda stage: None
    seen: dict[str, set[float]] = {"target": set(), "encoder": set()}
    for name, kept in seen.items():
        getattr(model, name).register_forward_pre_hook(watched(model, kept))

    class Rates(example.L.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    a_trainer(example, tmp_path, callbacks=[Rates()], enable_checkpointing=False).fit(model, images)
    assert seen == {"target": {0.0}, "encoder": {1.0}}
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])


def test_views_are_of_their_key_and_weak_ones_are_weaker(example: Any) -> None:
    images = few_images(example)
    images.setup("fit")
    views = example.Views(images.train, [images.weak, images.strong], 3)
    assert all(torch.equal(a, b) for a, b in zip(views[1, 5][:2], views[1, 5][:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(views[0, 5][:2], views[1, 5][:2], strict=True))
    moved = torch.stack(
        [torch.stack([(view - images.train[i][0]).abs().mean() for view in views[0, i][:2]]) for i in range(40)]
    )
    assert moved[:, 0].mean() > 0.05
    assert moved[:, 0].mean() < 0.7 * moved[:, 1].mean()


def test_a_short_batch_is_left_out(example: Any, tmp_path: Path) -> None:
    model = a_model(example)
    a_trainer(example, tmp_path, max_epochs=2, max_steps=-1, enable_checkpointing=False).fit(
        model, few_images(example, batch_size=12)
    )
    assert (model.criterion.steps, int(model.criterion.bank.pushed)) == (6, 72)


def test_the_command_trains_on_a_folder_saves_the_end_and_resumes(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for crop in ("RandomResizedCrop", "CenterCrop"):  # to 56 pixels a side instead of 224
        real = getattr(example.v2, crop)
        monkeypatch.setattr(example.v2, crop, lambda size, *more, real=real: real(size // 4, *more))
    for part, count in (("train", 5), ("val", 3)):
        for label in range(2):
            folder = tmp_path / "data" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(
                    256, (40, 36, 3), generator=torch.Generator().manual_seed(number + 9 * label), dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    flags = (
        f"x.py --data {tmp_path}/data --arch resnet18 --batch-size 2 --accumulate 2 --bank-size 16 --out {tmp_path}/out"
    )
    for epochs, more in ((1, ""), (2, f"--resume {tmp_path}/out/last.ckpt")):
        monkeypatch.setattr(sys, "argv", f"{flags} --epochs {epochs} {more}".split())
        example.main()
        assert f"after {3 * epochs} steps" in capsys.readouterr().out
        saved = torch.load(tmp_path / "out" / "last.ckpt")
        assert saved["global_step"] == 3 * epochs
        assert int(saved["state_dict"]["criterion.bank.pushed"]) == 10 * epochs
        assert saved["state_dict"]["criterion.bank.rows"].shape == (16, 64)
        assert "encoder.0.fc.weight" not in saved["state_dict"]
