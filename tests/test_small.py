"""Small images: whole data sets on the device, idx files, the small stem, and recipes of other libraries."""

import gzip
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from test_imagenet_train import assert_same_run, error_of, stop_at, train
from test_training import CPU, assert_same, batches, joined_of

import imagenet_eval
from pipeline.data.opening import open_source
from pipeline.data.small import SmallImages, Split, statistics
from pipeline.data.small_sets import IDX_FILES, open_small
from pipeline.data.source import Share, epoch_order
from pipeline.models.backbones import build_backbone, export_backbone, small_stem, stem_of
from pipeline.running.seeds import seed_of
from pipeline.training.settings import RECIPES, complete
from pipeline.views.crops import PER_VIEW, SUPERVISED, crop_boxes, draws, resized_crops, views_of

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
GENERATOR = np.random.default_rng(0)


def idx(values: np.ndarray) -> bytes:
    return (
        struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )


def idx_folder(root: Path, train: int = 60, test: int = 20, size: int = 28, packed: bool = False) -> Path:
    """Write four idx files of noise, with a different brightness for each class."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for (images, labels), count in zip(IDX_FILES, (train, test), strict=True):
        classes = np.arange(count, dtype=np.uint8) % 5
        pixels = generator.integers(0, 100, (count, size, size)) + 30 * classes[:, None, None]
        for name, values in ((images, pixels.astype(np.uint8)), (labels, classes)):
            (root / (f"{name}.gz" if packed else name)).write_bytes(
                gzip.compress(idx(values)) if packed else idx(values)
            )
    return root


def source(split: Split, share: Share = Share(8), seed: int = 0, size: int = 12, **options: Any) -> SmallImages:  # noqa: B008
    return SmallImages(split, split, size=size, share=share, seed=seed, device=CPU, **options)


def noise(count: int = 24, channels: int = 3, size: int = 12) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator).byte()
    return Split(images, torch.arange(count) % 3)


# The files


@pytest.mark.parametrize("where", ["idx files", "packed idx files", "torchvision's folder"])
def test_fashion_mnist_is_read_from_its_four_files(tmp_path: Path, where: str) -> None:
    below = "FashionMNIST/raw" if where == "torchvision's folder" else ""
    idx_folder(tmp_path / below, packed=where == "packed idx files")
    learned, test, gallery = open_small("fashion-mnist", tmp_path)
    assert (learned.images.shape, test.images.shape, gallery) == ((60, 1, 28, 28), (20, 1, 28, 28), None)
    assert learned.images.dtype == torch.uint8
    assert test.labels.tolist() == [i % 5 for i in range(20)]
    assert learned.images.float().mean(dim=(1, 2, 3))[4] > learned.images.float().mean(dim=(1, 2, 3))[0] + 90


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_the_published_one() -> None:
    learned, test, _ = open_small("fashion-mnist", DEBIAN)
    assert learned.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    mean, std = statistics(learned.images)
    assert mean == pytest.approx([0.2860] * 3, abs=2e-3)  # commonly quoted for all 60,000: 0.2860 and 0.3530
    assert std == pytest.approx([0.3530] * 3, abs=2e-3)


def spoil(root: Path, how: str) -> None:
    images, labels = (root / name for name in IDX_FILES[0])
    if how == "missing":
        labels.unlink()
    elif how == "magic":
        images.write_bytes(b"\0\0\x0d" + images.read_bytes()[3:])
    elif how == "short":
        images.write_bytes(images.read_bytes()[:-1])
    elif how == "long":
        images.write_bytes(images.read_bytes() + b"!")
    elif how == "count":
        labels.write_bytes(idx(np.zeros(59, dtype=np.uint8)))
    elif how == "packed":
        images.with_suffix(".gz").write_bytes(b"not gzip")
        images.unlink()
    elif how == "size":
        (root / IDX_FILES[1][0]).write_bytes(idx(np.zeros((20, 9, 9), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "has neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte.gz"),
        ("magic", "is not an idx file of bytes in 3 dimensions"),
        ("short", "should hold 47,040 bytes after its header, but has 47,039"),
        ("long", "should hold 47,040 bytes after its header, but has 47,041"),
        ("count", "has 60 images, but train-labels-idx1-ubyte has 59 labels"),
        ("packed", r"idx3-ubyte\.gz cannot be read"),
        ("size", "differ in size"),
    ],
)
def test_damaged_idx_files_are_a_clear_error(tmp_path: Path, how: str, message: str) -> None:
    spoil(idx_folder(tmp_path), how)
    with pytest.raises(ValueError, match=message):
        open_small("fashion-mnist", tmp_path)


def test_cifar_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = GENERATOR.integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 1, 2, 3]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # The published files have known checksums; these do not.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    learned, test, gallery = open_small("cifar10", tmp_path)
    assert (len(learned.images), len(test.images), gallery) == (20, 4, None)
    assert torch.equal(learned.images[5], torch.from_numpy(data[1].reshape(3, 32, 32)))
    assert learned.labels.tolist() == [0, 1, 2, 3] * 5


def test_stl10_learns_from_its_unlabeled_images_and_evaluates_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, count in (("train", 3), ("test", 2), ("unlabeled", 4)):
        np.zeros(count * 3 * 96 * 96, dtype=np.uint8).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *arguments: True)
    learned, test, gallery = open_small("stl10", tmp_path)
    assert learned.labels.tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert (gallery.labels.tolist(), test.images.shape) == ([0, 1, 2], (2, 3, 96, 96))


def test_a_data_set_that_cannot_be_had_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(ValueError, match=r"cifar100 is neither in .* nor could it be downloaded: no network"):
        open_small("cifar100", tmp_path)


# Views


@pytest.mark.parametrize("channels", [1, 3])
def test_views_depend_on_neither_the_batch_nor_the_ranks_nor_on_where_the_epoch_began(channels: int) -> None:
    split = noise(channels=channels)
    first = batches(source(split), epoch=1)
    assert first[0][0].shape == (8, 3, 12, 12)
    assert_same(first[2:], batches(source(split), epoch=1, first=2))
    everything = joined_of(first)
    for share in (Share(24), Share(12), Share(12, accumulate=2), Share(4)):
        assert_same([everything], [joined_of(batches(source(split, share), epoch=1))])
    ranks = [batches(source(split, Share(8, rank=rank, ranks=2)), epoch=1) for rank in range(2)]
    assert_same([everything], [joined_of([part for step in zip(*ranks, strict=True) for part in step])])
    for other in (batches(source(split), epoch=2), batches(source(split, seed=1), epoch=1)):
        assert not torch.equal(other[0][0], first[0][0])
    classifier = [views for views, _ in source(split).supervised_views(1, [[0, 1, 2], [3]])]
    assert torch.equal(torch.cat(classifier), next(iter(source(split).supervised_views(1, [[0, 1, 2, 3]])))[0])
    assert not torch.equal(classifier[0], joined_of(batches(source(split, views=views_of("w/w")), 1))[0][:3])


def test_fashion_mnist_has_views_of_its_own(tmp_path: Path) -> None:
    ramp = np.broadcast_to(9 * np.arange(28, dtype=np.uint8), (24, 28, 28))  # brighter to the right
    (idx_folder(tmp_path, train=24) / IDX_FILES[0][0]).write_bytes(idx(ramp))
    options = {"image_size": 28, "share": Share(24), "workers": 0, "seed": 0, "device": CPU}
    opened = open_source("fashion-mnist", str(tmp_path), augmentation="w/s", **options)
    ((target, online, *_),) = opened.train_views(0, 0)
    weak, strong = (views[:, 0, 14, -1] - views[:, 0, 14, 0] for views in (target, online))
    assert (torch.cat([weak, strong]) > 0).all(), "shoes point to the left: nothing is flipped"
    whole = 27 * 9 / 255 / opened.facts["std"][0]
    assert (weak > 0.8 * whole).all(), "crops are mild, and nothing else changes a weak view"
    assert strong.std() > 3 * weak.std()
    torch.testing.assert_close(online[:, 0], online[:, 2], msg="gray stays gray")


def test_each_view_is_made_of_its_image_and_its_part_of_the_row() -> None:
    split = noise()
    small = source(split, Share(24))
    ((target, online, labels, ids),) = batches(small, epoch=3)
    order, rows = epoch_order(24, 0, 3), draws(seed_of(0), 3, 0, 24)
    assert torch.equal(ids, order)
    assert torch.equal(labels, split.labels[order])
    for place, index in enumerate(order.tolist()):
        for views, part, render in (
            (target, rows[:, :PER_VIEW], small._target),
            (online, rows[:, PER_VIEW:], small._online),
        ):
            row = part[index : index + 1]
            crop = resized_crops(split.images[index : index + 1], crop_boxes(row, 12, 12, (0.2, 1.0)), 12)
            assert torch.equal(views[place], render(crop, row)[0])
    row = draws(seed_of(0), 3, 5, 1, stream=1)[:, :PER_VIEW]
    crop = resized_crops(split.images[5:6], crop_boxes(row, 12, 12, SUPERVISED.area), 12)
    assert torch.equal(next(small.supervised_views(3, [[5]]))[0], small._classifier(crop, row))


def test_images_are_whole_and_normalized_by_the_training_set() -> None:
    split = noise()
    images = torch.cat([part for part, _ in source(split).images("train")])
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4
    shown = source(split).displayable(images)
    np.testing.assert_allclose(shown, split.images.permute(0, 2, 3, 1).numpy() / 255, atol=1e-5)
    larger, labels = next(source(split, size=20).images("val", [5, 3]))
    assert (larger.shape, labels.tolist()) == ((2, 3, 20, 20), [2, 0])


TINY = ["--dataset", "fashion-mnist", "--batch-size", 12, "--hidden", 16, "--dim", 8, "--bank-size", 32, "--epochs", 2]
TINY += ["--eval-every", 0]


@pytest.mark.parametrize("arch", ["resnet18", "digits"])
def test_a_folder_of_idx_files_trains_stops_and_goes_on_exactly(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With the small stem, or the digits' network on three channels: the run, its export and its evaluation agree."""
    flags = [*TINY, "--data", idx_folder(tmp_path / "idx", train=40, size=14, packed=True), "--image-size", 14]
    flags += ["--arch", arch]
    assert train(*flags, "--out", tmp_path / "whole") == 0
    assert ("resnet18 with the stem for small images" in capsys.readouterr().out) == (arch == "resnet18")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, 4)
        assert train(*flags, "--out", tmp_path / "run") == 143
    assert train("--resume", tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    for encoder in ("run", "run/backbone.safetensors"):
        given = ["knn", tmp_path / encoder, "--data", tmp_path / "idx", "--dataset", "fashion-mnist"]
        assert imagenet_eval.main([*map(str, given), "--out", str(tmp_path / "knn.json")]) == 0
        record = json.loads((tmp_path / "knn.json").read_text())
        assert record["results"]["nn1"] == rows["MSF, k = 5"]["nn1"]
        assert record["protocol"]["view"] == "whole images, 14 x 14"


# The stem


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_a_small_stem_keeps_the_pixels_and_its_export_says_so_and_loads_strictly(tmp_path: Path, arch: str) -> None:
    torch.manual_seed(0)
    backbone, _ = build_backbone(arch, (3, 32, 32), "small")
    image = torch.rand(2, 3, 32, 32)
    assert backbone.maxpool(backbone.conv1(image)).shape == (2, 64, 32, 32)
    export_backbone(backbone, tmp_path / "small.safetensors")
    tensors = load_file(tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        assert file.metadata()["stem"] == "small"
    with pytest.raises(RuntimeError, match="size mismatch for conv1"):
        torchvision.models.get_model(arch).load_state_dict(tensors)
    model = small_stem(torchvision.models.get_model(arch))
    model.load_state_dict(tensors, strict=True)
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.equal(model.eval()(image), backbone.eval()(image))


def test_exports_of_a_small_stem_go_where_the_model_exists(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    backbone, _ = build_backbone("resnet18", (3, 32, 32), "small")
    export_backbone(backbone, tmp_path / "small.safetensors", arch="resnet18", image_size=32)

    def export(layout: str) -> int:
        given = ["export", str(tmp_path / "small.safetensors"), "--to", layout, "--folder", str(tmp_path / "out")]
        return imagenet_eval.main([*given, "--out", str(tmp_path / "record.json")])

    assert export("torchvision") == 0
    assert "into a model with the small stem" in capsys.readouterr().out
    with safe_open(tmp_path / "out" / "resnet18-torchvision.safetensors", "pt") as file:
        assert file.metadata()["stem"] == "small"
    for layout in ("timm", "transformers", "detectron2"):
        assert export(layout) == 2
        assert "has no resnet18 with the stem for small images" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["resnet18-torchvision.safetensors"]


def test_auto_is_small_for_resnets_up_to_64_pixels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert [stem_of("auto", "resnet50", size) for size in (28, 64, 65, 224)] == [
        "small",
        "small",
        "imagenet",
        "imagenet",
    ]
    assert {stem_of("auto", arch, 32) for arch in ("digits", "vit_b_16", "resnet5000")} == {"imagenet"}
    assert [stem_of(stem, "resnet18", 32) for stem in ("small", "imagenet")] == ["small", "imagenet"]
    message = error_of(capsys, *TINY, "--arch", "mobilenet_v3_small", "--stem", "small", "--data", idx_folder(tmp_path))
    assert "--stem small is for torchvision's ResNets, got 'mobilenet_v3_small'" in message


# Recipes


def test_recipes_are_settings_that_flags_go_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lightly = complete({"dataset": "cifar10", "recipe": "lightly-200", "k": 3})
    assert (lightly.batch_size, lightly.lr, lightly.weight_decay, lightly.epochs) == (128, 0.06, 5e-4, 200)
    assert (lightly.blur, lightly.k, lightly.arch) == (0.0, 3, "resnet18")
    longer = complete({"dataset": "cifar100", "recipe": "lightly-800"})
    assert longer.lr / longer.batch_size == pytest.approx(lightly.lr / lightly.batch_size)
    solo = complete({"dataset": "cifar10", "recipe": "solo-learn", "epochs": 2})
    assert (solo.batch_size, solo.epochs, solo.hidden) == (256, 2, 4096)
    for dataset in ("cifar10", "cifar100", "fashion-mnist", "stl10"):
        assert complete({"dataset": dataset}).blur == (0.0 if dataset.startswith("cifar") else 0.5)
    assert set(RECIPES) == {"own", "lightly-200", "lightly-800", "solo-learn"}
    assert "--recipe solo-learn is for" in error_of(capsys, "--recipe", "solo-learn", "--data", "x")
    assert "--dataset fashion-mnist" in error_of(capsys, "--data", idx_folder(tmp_path))
    assert "argument --blur: must be at least 0 and at most 1, got 2" in error_of(capsys, "--blur", 2)
    assert "argument --workers: must be at least -1, got -2" in error_of(capsys, "--workers", -2)
