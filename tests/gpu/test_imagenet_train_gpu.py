"""examples/imagenet_train.py on a GPU: bfloat16 autocast, channels last, views and bank on the device."""

from pathlib import Path

import pytest
import torch
from test_small import idx_folder, noise
from test_training import make_tree

import imagenet_train
from pipeline.data.prefetch import SideStream
from pipeline.data.small import SmallImages
from pipeline.data.source import Share
from pipeline.training.timing import WaitClock
from pipeline.training.trainer import Trainer
from pipeline.views.crops import PER_VIEW, STRONG, draws
from pipeline.views.rendering import Rendering

pytestmark = pytest.mark.gpu


def test_the_digits_train_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert imagenet_train.main(["--steps", "30", "--device", "cuda", "--out", str(tmp_path / "run")]) == 0
    assert "cuda in bfloat16" in capsys.readouterr().out
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 30
    assert state["criterion"]["bank.pushed"] == 30 * 64
    assert all(torch.isfinite(tensor).all() for tensor in state["online"].values())


@pytest.mark.parametrize("small", [False, True])
def test_images_train_channels_last_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    seen = []
    backward = Trainer._backward

    def watched(self: Trainer, number: int, target: torch.Tensor, online: torch.Tensor, labels: torch.Tensor) -> object:
        seen.append(all(v.is_contiguous(memory_format=torch.channels_last) and v.is_cuda for v in (target, online)))
        return backward(self, number, target, online, labels)

    monkeypatch.setattr(Trainer, "_backward", watched)
    if small:
        flags = ["--dataset", "fashion-mnist", "--data", str(idx_folder(tmp_path / "idx", train=24)), "--hidden", "64"]
    else:
        tree = make_tree(tmp_path / "tree", train=8)
        flags = ["--data", str(tree), "--arch", "resnet18", "--image-size", "64", "--workers", "2"]
    flags += ["--bank-size", "64", "--bank-dtype", "bfloat16", "--batch-size", "8", "--epochs", "2"]
    assert imagenet_train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert seen == [True] * 6
    assert imagenet_train.main(["--resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("size", [32, 224])
def test_views_on_the_gpu_are_those_of_the_cpu(size: int) -> None:
    """Including the compiled jitter; because of rounding, a pixel's hue may be computed in another sector."""
    crops = torch.randint(0, 256, (64, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    rows = draws(0, 0, 0, 64)[:, :PER_VIEW]
    views = [
        Rendering(STRONG, size, (0.0,) * 3, (1.0,) * 3, torch.device(device))(crops.to(device), rows).cpu()
        for device in ("cpu", "cuda")
    ]
    apart = (views[0] - views[1]).abs()
    assert apart.mean() < 1e-6
    assert apart.max() < 1e-3


def test_batches_of_a_side_stream_are_whole_when_they_are_used() -> None:
    device = torch.device("cuda")

    def prepare(number: int) -> tuple[torch.Tensor, ...]:
        torch.cuda._sleep(20_000_000)  # the side stream is late
        return (torch.full((1 << 20,), number, device=device),) * 3

    sums = [views[0].double().sum() for views in SideStream(device).over(iter(range(5)), prepare)]
    assert [float(total) / (1 << 20) for total in sums] == [0, 1, 2, 3, 4]


def test_the_wait_is_the_gpus_and_not_the_hosts() -> None:
    device = torch.device("cuda")
    clock = WaitClock(device)

    for _ in clock.over(iter(range(3))):
        torch.cuda._sleep(100_000_000)  # the step takes long, but its item was available at once
    assert clock.take_seconds() < 0.01


def test_a_set_that_does_not_fit_stays_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    for share in (0.5, 0.0):
        monkeypatch.setattr("pipeline.data.small.FREE_SHARE", share)
        split = noise()
        options = {"size": 12, "share": Share(8), "seed": 0}
        sources.append(SmallImages(split, split, device=torch.device("cuda"), **options))
        assert sources[-1]._learned.images.is_cuda == (share > 0)
    for one, other in zip(*(source.train_views(0, 0) for source in sources), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
