"""examples/imagenet_train.py where there is a GPU: bfloat16 autocast, channels last, the bank on the device."""

from pathlib import Path

import pytest
import torch
from test_training import make_tree

import imagenet_train
from training.trainer import Trainer

pytestmark = pytest.mark.gpu


def test_the_digits_train_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert imagenet_train.main(["--steps", "30", "--device", "cuda", "--out", str(tmp_path / "run")]) == 0
    assert "cuda in bfloat16" in capsys.readouterr().out
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 30
    assert state["criterion"]["bank.pushed"] == 30 * 64
    assert all(torch.isfinite(tensor).all() for tensor in state["online"].values())


def test_photos_train_channels_last_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree(tmp_path / "tree", train=8)
    seen = []
    train_step = Trainer._train_step

    def watched(self: Trainer, target_view: torch.Tensor, online_view: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(online_view.is_contiguous(memory_format=torch.channels_last) and online_view.is_cuda)
        train_step(self, target_view, online_view, labels)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    flags = ["--data", str(tree), "--arch", "resnet18", "--image-size", "64", "--batch-size", "8", "--epochs", "2"]
    flags += ["--bank-size", "64", "--bank-dtype", "bfloat16", "--workers", "2", "--out", str(tmp_path / "run")]
    assert imagenet_train.main(flags) == 0
    assert seen == [True] * 6
    assert imagenet_train.main(["--resume", str(tmp_path / "run")]) == 0
