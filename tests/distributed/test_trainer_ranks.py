"""The trainer of the example on several ranks, against its own run in one process."""

import contextlib
import functools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from test_imagenet_eval import blobs, views_of
from test_training import SMALL_NETWORK, make_tree
from torch import Tensor, nn

import imagenet_eval
import imagenet_train
from msf_core.distributed import Ranks
from pipeline.data.bad_images import BadImages
from pipeline.data.digits import Digits
from pipeline.data.photos import Photos
from pipeline.data.source import Share
from pipeline.data.trees import open_folder
from pipeline.evaluation import commands, scores
from pipeline.evaluation.linear import Protocol, Standardize, accuracy, train_linear
from pipeline.models.backbones import build_backbone, export_backbone
from pipeline.running.ranks import SyncBatchNormAnywhere, shuffled, synchronized
from pipeline.training.lock import FolderLock
from pipeline.training.settings import build_parser
from pipeline.training.trainer import Diverged, StopRequest, Trainer

STEPS = 10
RECIPE = ["--steps", STEPS, "--batch-size", 16, "--lr", 0.005, "--batchnorm", "sync"]


def train(rank: int, folder: str, *flags: object) -> tuple[list[float], int]:
    """Train; return the losses of all steps, and the number of updates of the target."""
    trainer, _ = prepared(folder, *flags)
    trainer.train(StopRequest(), lambda row: None)
    return trainer.average_losses(), trainer.target.updates


def prepared(folder: str, *flags: object) -> tuple[Trainer, Path]:
    given = vars(build_parser("").parse_args(["--out", folder, *map(str, flags)]))
    return imagenet_train.prepare(given, Ranks(), torch.device("cpu"))


class Stop(StopRequest):
    """Asks for a stop after a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def after(self, step: Callable[..., None]) -> Callable[..., None]:
        def counted(views: Any) -> None:
            step(views)
            self.steps -= 1
            self.signal = 0 if self.steps else signal.SIGTERM

        return counted


@functools.cache
def alone(*flags: object) -> tuple[list[float], int]:
    """Train in one process; return the same as `train`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the ranks
    try:
        with tempfile.TemporaryDirectory() as folder:
            return train(0, f"{folder}/run", *flags)
    finally:
        torch.set_num_threads(threads)


def compare(ranks: Any, folder: Path, *flags: object) -> None:
    """Train on the ranks and in this process alone: for at least one of three seeds, the losses must be the same.

    Rounding can swap two rows that are about equally near, and thus change the neighbors, especially at larger learning
    rates and over more steps. This affects some seeds, and different ones on each kind of CPU; an error affects all.
    """
    for seed in (2, 1, 3):
        expected, updates = alone(*flags, "--seed", seed)
        assert expected[-1] < 0.8 * expected[0]
        runs = ranks.run(train, str(folder / f"run-{seed}"), *flags, "--seed", seed)
        assert all(their_updates == updates == STEPS for _, their_updates in runs)
        apart = [(torch.tensor(losses) / torch.tensor(expected) - 1).abs().max() for losses, _ in runs]
        if max(apart) < 1e-5:
            return
    pytest.fail(f"the losses differ for every seed, for the last one by {max(apart):.0e}")


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_two_synchronized_ranks_have_the_losses_of_one_process(two_ranks: Any, tmp_path: Path, layout: str) -> None:
    compare(two_ranks, tmp_path, *RECIPE, "--bank-layout", layout)


def test_so_have_four(four_ranks: Any, tmp_path: Path) -> None:
    compare(four_ranks, tmp_path, *RECIPE, "--bank-layout", "sharded")


def refused(rank: int, folder: str) -> str:
    with pytest.raises(ValueError, match="batch-size") as raised:
        train(rank, folder, "--batch-size", 33 if rank == 0 else 32)
    return str(raised.value)


def test_what_one_rank_cannot_do_is_an_error_on_all_before_anything_is_written(two_ranks: Any, tmp_path: Path) -> None:
    wrong = "--batch-size must be at least 4 for BatchNorm, and divisible by 2 ranks, got 33"
    assert two_ranks.run(refused, str(tmp_path / "run")) == [wrong, f"rank 0: {wrong}"]
    assert not (tmp_path / "run").exists()


def test_so_have_those_that_accumulate(two_ranks: Any, tmp_path: Path) -> None:
    compare(two_ranks, tmp_path, *RECIPE, "--accumulate", 2)


def test_photos_with_accumulation_move_the_target_once_a_step(two_ranks: Any, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", train=4)
    flags = ["--data", tree, *SMALL_NETWORK, "--batch-size", 8, "--accumulate", 2, "--workers", 0, "--epochs", 2]
    flags += ["--batchnorm", "shuffle"]
    for losses, updates in two_ranks.run(train, str(tmp_path / "run"), *flags):
        assert (len(losses), updates) == (2, 2)


def saves(rank: int, folder: str) -> None:
    trainer, path = prepared(folder, "--steps", "3", "--bank-layout", "sharded")
    assert imagenet_train.save(trainer, path)


def test_a_run_folder_may_have_a_name_that_is_not_utf8(two_ranks: Any, tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path / "run-") + b"\xff")
    two_ranks.run(saves, name)
    assert b"checkpoint.pt" in os.listdir(os.fsencode(name))


def one_sees_it(rank: int, folder: str) -> None:
    out = folder if rank == 0 else f"{folder}-elsewhere"
    with pytest.raises(
        ValueError, match="step to resume from must be the same on all ranks, got 0 on rank 0, -1 on rank 1"
    ):
        train(rank, out, "--resume", "auto", "--steps", 3)


def test_a_rank_that_does_not_see_the_checkpoint_stops_them_all(two_ranks: Any, tmp_path: Path) -> None:
    two_ranks.run(saves, str(tmp_path / "run"))
    two_ranks.run(one_sees_it, str(tmp_path / "run"))


def goes_on(rank: int, folder: str) -> None:
    """Train to the end in one go, and also with a stop within an epoch of three steps, continued by a new trainer."""
    flags = ["--batch-size", 448, "--steps", 6, "--eval-every", 0, "--lr", 0.5]
    trainer, _ = prepared(f"{folder}/whole", *flags)
    for name, value in trainer.online.named_buffers():
        assert torch.equal(value, torch.full_like(value, name.endswith("var"))), (
            f"{name} must not be changed by DDP's first pass"
        )
    trainer.train(StopRequest(), lambda row: None)
    whole, losses = trainer.online.state_dict(), trainer.average_losses()

    (trainer, path), stop = prepared(f"{folder}/run", *flags), Stop(4)
    trainer._train_step = stop.after(trainer._train_step)
    trainer.train(stop, lambda row: None)
    begun = list(trainer.average_losses())
    assert len(begun) == trainer.step == 4
    assert imagenet_train.save(trainer, path)
    trainer, _ = prepared(f"{folder}/run", "--resume", "auto")
    trainer.train(StopRequest(), lambda row: None)
    assert begun + trainer.average_losses() == losses, "must be equal to the last bit"
    for name, value in trainer.online.named_parameters():
        assert torch.equal(value, whole[name]), name


def test_four_ranks_that_begin_anew_go_on_to_the_last_bit(four_ranks: Any, tmp_path: Path) -> None:
    four_ranks.run(goes_on, str(tmp_path))


def finds_a_damaged_shard(rank: int, folder: str) -> str:
    with pytest.raises(ValueError, match="damaged: wrong checksum") as raised:
        train(rank, folder, "--resume", folder)
    return str(raised.value)


def test_one_byte_of_a_shard_is_an_error_on_all_ranks_that_names_the_file(two_ranks: Any, tmp_path: Path) -> None:
    two_ranks.run(saves, str(tmp_path / "run"))
    shard = max((tmp_path / "run").glob("bank-shards-*/*"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    assert all(shard.name in message for message in two_ranks.run(finds_a_damaged_shard, str(tmp_path / "run")))


def has_no_room(rank: int, folder: str) -> bool:
    trainer, path = prepared(folder, "--steps", "3", "--bank-layout", "sharded")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 0:
            monkeypatch.setattr("tempfile.mkdtemp", full)
        assert not imagenet_train.save(trainer, path)
    return imagenet_train.save(trainer, path)


def full(**options: object) -> str:
    raise OSError(28, "No space left on device")


def test_a_full_disk_on_rank_0_is_a_warning_on_all_and_the_next_checkpoint_works(
    two_ranks: Any, tmp_path: Path
) -> None:
    assert two_ranks.run(has_no_room, str(tmp_path / "run")) == [True, True]


# Evaluation


def evaluated(rank: int) -> tuple[dict[str, float], dict[str, float]]:
    ranks = Ranks()
    torch.manual_seed(rank)  # only the BatchNorm statistics of rank 0 count; those of other ranks differ
    source = Digits("w/s", Share(64, rank=rank, ranks=ranks.size), seed=0, device=torch.device("cpu"))
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256))
    backbone(torch.randn(64, 1, 16, 16) * torch.rand(256).view(1, 1, 16, 16))
    return scores.evaluate(backbone, source, 5, ranks), scores.nearest_neighbors(backbone, source, ranks)


def test_all_ranks_evaluate_together_and_get_what_one_process_gets(ranks: Any) -> None:
    row, accuracy = evaluated(0)
    assert row["nn1"] > 0.9
    assert accuracy == {name: row[name] for name in ("nn1", "nn20")}
    for rank, (their_row, their_accuracy) in enumerate(ranks.run(evaluated)):
        assert their_row == (pytest.approx(row) if rank == 0 else {})
        assert their_accuracy == accuracy


def probed(rank: int) -> list[dict[str, float]]:
    """Train on 250 features, so that the last batch is short, and its parts differ between the ranks."""
    ranks = Ranks()
    train, val = blobs(250, noise=4), blobs(100, seed=1, noise=4)
    protocol = Protocol(lrs=(0.01, 0.3), epochs=3, batch_size=64)
    own, own_val = (
        tuple(part[len(part) * rank // ranks.size : len(part) * (rank + 1) // ranks.size] for part in parts)
        for parts in (train, val)
    )
    standardize = Standardize.fitted([own], ranks)
    layers = train_linear(views_of(train, protocol, ranks), standardize, 5, protocol, ranks)
    return [{"weight": layer.weight.detach()} for layer in layers] + accuracy(layers, standardize, [own_val], ranks)


def test_ranks_train_the_linear_layer_that_one_process_trains(ranks: Any) -> None:
    expected = probed(0)
    for found in ranks.run(probed):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def evaluates_while_rank_0_fits(rank: int, folder: str) -> None:
    done = Path(folder, "rank 1 is done")

    def slow_fit(features: object) -> float:
        deadline = time.monotonic() + 60
        while not done.exists():
            assert time.monotonic() < deadline, "rank 1 waits for rank 0"
            time.sleep(0.01)
        return 0.5

    joined = contextlib.nullcontext((Ranks(), torch.device("cpu")))
    flags = ["linear", f"{folder}/digits.safetensors", "--solver", "logistic", "--out", f"{folder}/record.json"]
    with (
        patch.object(imagenet_eval, "joined", lambda device, timeout: joined),
        patch.object(commands, "linear_probe", slow_fit),
    ):
        assert imagenet_eval.evaluate(flags) == 0
    if rank == 1:
        done.touch()


def test_no_rank_waits_while_rank_0_fits_a_classifier(two_ranks: Any, tmp_path: Path) -> None:
    """Fitting may take longer than the ranks' timeout."""
    backbone, _ = build_backbone("digits", (1, 16, 16), "imagenet")
    facts = {"arch": "digits", "dataset": "digits", "image_size": 16}
    export_backbone(backbone, tmp_path / "digits.safetensors", **facts)
    two_ranks.run(evaluates_while_rank_0_fits, str(tmp_path))
    assert json.loads((tmp_path / "record.json").read_text())["results"] == {"linear": 0.5}


def damaged_photos(folder: str, rank: int, ranks: int, on_bad_image: str) -> Photos:
    train, val, _ = open_folder(Path(folder))
    return Photos(
        train,
        val,
        size=32,
        has_labels=True,
        share=Share(8, rank=rank, ranks=ranks),
        workers=0,
        seed=0,
        device=torch.device("cpu"),
        bad=BadImages(on_bad_image),
    )


def small_backbone() -> nn.Sequential:
    return synchronized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.device("cpu"))


def meets_an_unreadable_image(rank: int, folder: str) -> None:
    ranks, backbone = Ranks(), small_backbone()
    source = damaged_photos(folder, rank, 2, "error")
    for evaluates in (
        lambda: scores.evaluate(backbone, source, 5, ranks),
        lambda: scores.nearest_neighbors(backbone, source, ranks),
        lambda: scores.warmed_up(backbone, source, ranks),
    ):
        with pytest.raises(OSError, match=r"cannot read image .*0\.jpg"):
            evaluates()
    assert backbone.training


def does_without(rank: int, folder: str) -> tuple[dict[str, float], Tensor, set[str]]:
    ranks = Ranks()
    source = damaged_photos(folder, rank, ranks.size, "skip")
    accuracy = scores.nearest_neighbors(small_backbone(), source, ranks)
    views = torch.cat([target for target, *_ in source.train_views(0, 0)])
    return accuracy, views, set(source.bad.of_all(ranks))


def test_an_image_that_one_rank_cannot_read_is_an_error_on_all_or_is_skipped_as_one_process_skips_it(
    two_ranks: Any, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path / "tree", train=6)
    spoiled = {str(tree / split / "class0" / "0.jpg") for split in ("train", "val")}
    for path in spoiled:
        Path(path).write_bytes(b"no image")
    two_ranks.run(meets_an_unreadable_image, str(tree))
    accuracy, views, found = does_without(0, str(tree))
    assert found == spoiled
    runs = two_ranks.run(does_without, str(tree))
    assert [run[::2] for run in runs] == [(accuracy, spoiled)] * 2
    assert torch.equal(torch.stack([view.view(2, 4, *view.shape[1:]) for _, view, _ in runs], 1).view_as(views), views)


# BatchNorm


def norms(features: int) -> tuple[nn.BatchNorm1d, nn.BatchNorm1d]:
    torch.manual_seed(1)
    whole = nn.BatchNorm1d(features)
    nn.init.normal_(whole.weight)
    nn.init.normal_(whole.bias)
    synced = nn.BatchNorm1d(features)
    synced.load_state_dict(whole.state_dict())
    synced.__class__ = SyncBatchNormAnywhere
    return whole, synced


def batchnorm_of_all(rank: int, momentum: float | None) -> None:
    world = dist.get_world_size()
    whole, synced = norms(5)
    whole.momentum = synced.momentum = momentum
    for step in range(3):
        x = torch.randn(4 * world, 5, generator=torch.Generator().manual_seed(step)) * 3 + 10
        x_whole, x_part = x.clone().requires_grad_(), x.chunk(world)[rank].clone().requires_grad_()
        weights = torch.randn(4 * world, 5, generator=torch.Generator().manual_seed(9))
        (whole(x_whole) * weights).sum().backward()
        (synced(x_part) * weights.chunk(world)[rank]).sum().backward()
        torch.testing.assert_close(synced(x_part), whole(x_whole).chunk(world)[rank], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x_part.grad, x_whole.grad.chunk(world)[rank], rtol=1e-3, atol=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    whole.eval(), synced.eval()
    torch.testing.assert_close(synced(x), whole(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronized_batchnorm_on_a_cpu_is_that_of_the_whole_batch(ranks: Any, momentum: float | None) -> None:
    ranks.run(batchnorm_of_all, momentum)


def shuffles(rank: int) -> list[int]:
    seen: list[Tensor] = []

    def module(images: Tensor) -> Tensor:
        seen.append(images[:, 0])
        return images * 2

    images = torch.arange(6 * dist.get_world_size()).view(-1, 1).float().chunk(dist.get_world_size())[rank]
    assert torch.equal(shuffled(module, images, Ranks(), 1, 2), images * 2), "each rank gets its own back"
    shuffled(module, images, Ranks(), 1, 3)
    assert not torch.equal(*seen)
    return seen[0].int().tolist()


def test_shuffled_batchnorm_sees_images_of_all_ranks_and_gives_each_its_own_back(ranks: Any) -> None:
    seen = ranks.run(shuffles)
    assert sorted(image for images in seen for image in images) == list(range(6 * ranks.size))
    assert all(len({image // 6 for image in images}) > 1 for images in seen)


# What ends a run ends it on all ranks


def diverges(rank: int, folder: str) -> int:
    given = vars(build_parser("").parse_args(["--out", folder, "--steps", "12"]))
    trainer, _ = imagenet_train.prepare(given, Ranks(), torch.device("cpu"))
    train_step = trainer._train_step

    def spoiled(views: Any) -> None:
        train_step(views)
        if rank == 1:
            trainer.averages.sums[0, 0] = torch.nan

    trainer._train_step = spoiled
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("pipeline.training.trainer.CHECK_EVERY", 5)
        with pytest.raises(Diverged, match="the loss became nan by step 5 of 12"):
            trainer.train(StopRequest(), lambda row: None)
    return trainer.step


def test_a_loss_that_is_nan_on_one_rank_ends_all_at_the_same_step(two_ranks: Any, tmp_path: Path) -> None:
    assert two_ranks.run(diverges, str(tmp_path / "run")) == [5, 5]


def finds_another_run(rank: int, folder: str) -> str:
    given = vars(build_parser("").parse_args(["--out", folder, "--steps", "1"]))
    with FolderLock() as theirs, FolderLock() as ours:
        if rank == 0:
            theirs.take(Path(folder))
        with pytest.raises(ValueError, match="in use by") as raised:
            imagenet_train.prepare(given, Ranks(), torch.device("cpu"), ours)
    return str(raised.value)


def test_a_folder_in_use_is_an_error_on_all_ranks(two_ranks: Any, tmp_path: Path) -> None:
    own, others = two_ranks.run(finds_another_run, str(tmp_path))
    assert others == f"rank 0: {own}"
