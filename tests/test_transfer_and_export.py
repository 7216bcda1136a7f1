"""The transfer and export commands of examples/imagenet_eval.py, on small trees laid out as the real data sets are."""

import importlib.util
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.io import savemat
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler, normalize
from test_imagenet_eval import blobs

import imagenet_eval
from pipeline.data.pixels import labels_of
from pipeline.evaluation import transfer
from pipeline.models.backbones import build_backbone, export_backbone
from pipeline.models.encoders import LoadedEncoder
from pipeline.models.export import check_list, export_to

CLASSES, EACH = 3, 8  # images of each class in every split


def picture(path: Path, label: int, number: int) -> None:
    """Write an image of noise in the color of its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng((label, number)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    pixels[..., label] //= 4
    Image.fromarray(pixels).save(path)


def each(offset: int = 0) -> list[tuple[int, int]]:
    return [(label, offset + number) for label in range(CLASSES) for number in range(EACH)]


def make_food(root: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for offset, split in ((0, "train"), (50, "test")):
        names = {f"dish{label}": [f"dish{label}/{offset + n}" for n in range(EACH)] for label in range(CLASSES)}
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))
        for label, number in each(offset):
            picture(base / "images" / f"dish{label}" / f"{number}.jpg", label, number)


def make_sun(root: Path) -> None:
    base = root / "SUN397"
    for label, number in [(label, number) for label in range(CLASSES) for number in range(104)]:
        picture(base / f"p/place{label}" / f"sun_{number}.jpg", label, number)
    (base / "ClassName.txt").write_text("".join(f"/p/place{label}\n" for label in range(CLASSES)))


def make_cifar(root: Path) -> None:
    generator = np.random.default_rng(0)
    labels = [label for label in range(CLASSES) for _ in range(EACH)]
    content = {"data": generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "labels": labels}
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    ten.mkdir()
    hundred.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (ten / name).write_bytes(pickle.dumps(content))
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name in ("train", "test"):
        (hundred / name).write_bytes(pickle.dumps({"data": content["data"], "fine_labels": labels}))
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": list("abc")}))


def make_cars(root: Path) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "O")]
    for split, offset, path in (
        ("train", 0, "devkit/cars_train_annos.mat"),
        ("test", 50, "cars_test_annos_withlabels.mat"),
    ):
        for label, number in each(offset):
            picture(base / f"cars_{split}" / f"{label}_{number}.jpg", label, number)
        rows = np.array([(f"{label}_{number}.jpg", label + 1) for label, number in each(offset)], dtype=kind)
        savemat(base / path, {"annotations": rows})
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["a", "b", "c"], dtype=object)})


def make_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("".join(f"plane {label}\n" for label in range(CLASSES)))
    for offset, split in ((0, "train"), (50, "val"), (100, "test")):
        lines = [f"{label}0{number} plane {label}\n" for label, number in each(offset)]
        (data / f"images_variant_{split}.txt").write_text("".join(lines))
        for label, number in each(offset):
            picture(data / "images" / f"{label}0{number}.jpg", label, number)


def make_flowers(root: Path) -> None:
    base = root / "flowers-102"
    labels = [label for _ in range(3) for label, _ in each()]
    for number, label in enumerate(labels, 1):
        picture(base / "jpg" / f"image_{number:05d}.jpg", label, number)
    parts = np.arange(1, len(labels) + 1).reshape(3, -1)
    savemat(base / "setid.mat", {"trnid": parts[0], "valid": parts[1], "tstid": parts[2]})
    savemat(base / "imagelabels.mat", {"labels": np.array(labels) + 1})


def make_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for offset, split in ((0, "trainval"), (50, "test")):
        lines = [f"pet{label}_{number} {label + 1} 1 1\n" for label, number in each(offset)]
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
        for label, number in each(offset):
            picture(base / "images" / f"pet{label}_{number}.jpg", label, number)


def make_caltech(root: Path) -> None:
    base = root / "caltech101"
    (base / "Annotations").mkdir(parents=True)
    (base / "101_ObjectCategories" / "BACKGROUND_Google").mkdir(parents=True)
    for label in range(CLASSES):
        for number in range(1, 36 + label):
            picture(base / "101_ObjectCategories" / f"thing{label}" / f"image_{number:04d}.jpg", label, number)


def make_textures(root: Path) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for offset, split in ((0, "train1"), (50, "val1"), (100, "test1")):
        (base / "labels" / f"{split}.txt").write_text(
            "".join(f"kind{label}/{number}.jpg\n" for label, number in each(offset))
        )
        for label, number in each(offset):
            picture(base / "images" / f"kind{label}" / f"{number}.jpg", label, number)


MAKERS = {
    "Food101": make_food,
    "SUN397": make_sun,
    "CIFAR10": make_cifar,
    "StanfordCars": make_cars,
    "FGVCAircraft": make_aircraft,
    "Flowers102": make_flowers,
    "OxfordIIITPet": make_pets,
    "Caltech101": make_caltech,
    "DTD": make_textures,
}
SIZES = {"SUN397": (150, 0, 150), "CIFAR10": (120, 0, 24), "Caltech101": (90, 0, 5 + 6 + 7)}
FLAGS = ["--image-size", "32", "--workers", "0"]


@pytest.fixture(scope="module")
def all_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for make in MAKERS.values():
        make(root)
    return root


@pytest.fixture
def _no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files have known checksums; these do not."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *arguments: True)


@pytest.mark.usefixtures("_no_checksums")
def test_the_ten_data_sets_are_divided_as_is_the_custom_and_measured(
    all_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for one in transfer.SETS:
        parts = one.open(all_sets, False, 0)
        sizes = tuple(0 if part is None else len(part) for part in (parts.train, parts.val, parts.test))
        in_three = "val" in one.split.split(" / ")[1:2]
        expected = SIZES.get("CIFAR10" if one.name == "CIFAR100" else one.name, (24, 24 * in_three, 24))
        assert sizes == ((24, 0, 24) if one.name == "CIFAR100" else expected), one.name
        for part in (parts.train, parts.val, parts.test):
            if part is not None:
                labels = labels_of(part)
                assert [part[place][1] for place in (0, len(part) - 1)] == labels[[0, -1]].tolist(), one.name
    flags = [*FLAGS, "--strengths", "0.001", "0.1", "--out", str(tmp_path / "record.json")]
    assert imagenet_eval.main(["transfer", "resnet18", "--data", str(all_sets), *flags]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    results = record["results"]
    names = [one.name for one in transfer.SETS]
    assert list(results) == [*names, "mean"]
    assert results["mean"] == pytest.approx(sum(results[name] for name in names) / 10)
    assert results["Food101"] > 0.9, "the classes have colors of their own"
    assert record["protocol"]["sets"]["DTD"]["metric"] == "top-1"
    assert record["protocol"]["sets"]["Flowers102"]["metric"] == "mean per class"
    assert "paper, ImageNet: MSF w/s (128K)" in capsys.readouterr().out


def test_a_data_set_that_is_not_there_is_reported(
    all_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "record.json"
    (tmp_path / "dtd").symlink_to(all_sets / "dtd")
    flags = ["--sets", "DTD", "StanfordCars", "--strengths", "0.01", *FLAGS]
    assert imagenet_eval.main(["transfer", "resnet18", "--data", str(tmp_path), *flags, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["protocol"]["not measured"] == {"StanfordCars": "Dataset not found."}
    assert list(record["results"]) == ["DTD", "mean of these 1"]
    assert "not measured: StanfordCars: Dataset not found." in capsys.readouterr().out


def test_no_data_set_at_all_and_damaged_ones_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--sets", "DTD", "CIFAR10", *FLAGS, "--out", str(tmp_path / "record.json")]
    (tmp_path / "dtd" / "dtd").mkdir(parents=True)
    assert imagenet_eval.main(["transfer", "resnet18", "--data", str(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--data: none of the data sets is in {tmp_path}: CIFAR10: Dataset not found" in line
    assert "; DTD: " in line


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_the_classifier_is_that_of_scikit_learn_with_the_strength_that_validates_best() -> None:
    train, val, test = (blobs(count, seed=seed, noise=6) for seed, count in enumerate((60, 150, 300)))
    keep = torch.cat([torch.arange(0, 300, 5), torch.arange(1, 100, 5), torch.arange(2, 300, 5)])  # uneven classes
    test = (test[0][keep], test[1][keep])
    found = transfer.classify(train, val, test, per_class=True, strengths=(1e-4, 1e-2, 1.0))
    scores = {}
    for strength in (1e-4, 1e-2, 1.0):
        scaler = StandardScaler().fit(normalize(train[0].numpy()))
        model = LogisticRegression(C=strength, max_iter=1000)
        model.fit(scaler.transform(normalize(train[0].numpy())), train[1].numpy())
        predicted = model.predict(scaler.transform(normalize(val[0].numpy())))
        scores[strength] = balanced_accuracy_score(val[1].numpy(), predicted)
    best = max(scores, key=lambda strength: scores[strength])
    assert found["C"] == best
    assert len(set(scores.values())) > 1
    both, labels = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    scaler = StandardScaler().fit(normalize(both.numpy()))
    model = LogisticRegression(C=best, max_iter=1000).fit(scaler.transform(normalize(both.numpy())), labels.numpy())
    predicted = model.predict(scaler.transform(normalize(test[0].numpy())))
    assert found["accuracy"] == pytest.approx(balanced_accuracy_score(test[1].numpy(), predicted))


# Export


def encoder(arch: str) -> LoadedEncoder:
    """A backbone whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(arch, (3, 64, 64))
    with torch.no_grad():
        for _ in range(2):
            backbone.train()(torch.randn(4, 3, 64, 64) * 2 + 1)
    return LoadedEncoder(backbone.eval(), arch, {})


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("layout", ["torchvision", "timm", "transformers"])
def test_an_export_gives_the_same_features_in_that_library(tmp_path: Path, layout: str, arch: str) -> None:
    done = export_to(layout, encoder(arch), tmp_path, 64)
    if layout == "transformers" and importlib.util.find_spec("transformers") is None:
        assert done.verified == "by the list of its tensors; transformers is not installed"
        assert json.loads((done.path / "config.json").read_text())["depths"] == (
            [2] * 4 if arch == "resnet18" else [3, 4, 6, 3]
        )
    else:
        assert done.verified.startswith(f"by equal features in {layout} ")


def test_features_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(path: str) -> dict[str, Any]:
        return {name: value * 1.01 if name == "conv1.weight" else value for name, value in load_file(path).items()}

    monkeypatch.setattr("pipeline.models.export.load_file", spoiled)
    with pytest.raises(RuntimeError, match="features in torchvision differ"):
        export_to("torchvision", encoder("resnet18"), tmp_path, 64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_detectron2_gets_the_names_and_shapes_of_its_own_resnet(tmp_path: Path, arch: str) -> None:
    given = encoder(arch)
    done = export_to("detectron2", given, tmp_path, 64)
    content = pickle.loads(done.path.read_bytes())
    assert content["matching_heuristics"] is True
    arrays = content["model"]
    assert np.array_equal(arrays["stem.conv1.norm.running_mean"], given.backbone.bn1.running_mean.numpy())
    assert np.array_equal(arrays["res2.0.conv1.weight"], given.backbone.layer1[0].conv1.weight.detach().numpy())
    assert np.array_equal(
        arrays["res5.0.shortcut.weight"], given.backbone.layer4[0].downsample[0].weight.detach().numpy()
    )
    assert np.array_equal(arrays["res5.1.conv2.norm.bias"], given.backbone.layer4[1].bn2.bias.detach().numpy())
    assert not [name for name in arrays if "num_batches" in name or name.startswith(("fc", "layer"))]


def test_a_tensor_too_many_or_of_another_shape_is_named() -> None:
    with pytest.raises(RuntimeError, match="1 tensors are not as expected, the first is b"):
        check_list({"a": torch.ones(2), "b": torch.ones(1)}, {"a": (2,)})
    with pytest.raises(RuntimeError, match="first is a"):
        check_list({"a": torch.ones(2)}, {"a": (3,)})


def test_what_a_library_does_not_have_is_refused(tmp_path: Path) -> None:
    for layout, arch, message in (
        ("transformers", "resnext50_32x4d", "supports neither the groups nor the width of 'resnext50_32x4d'"),
        ("transformers", "digits", "torchvision's ResNets"),
        ("detectron2", "digits", "torchvision's ResNets"),
        ("torchvision", "digits", "torchvision has no 'digits'"),
        ("timm", "digits", "timm has no 'digits'"),
    ):
        shape = (1, 16, 16) if arch == "digits" else (3, 64, 64)
        given = LoadedEncoder(build_backbone(arch, shape)[0], arch, {})
        with pytest.raises(ValueError, match=message):
            export_to(layout, given, tmp_path, shape[1])


def test_the_export_command_writes_what_there_is_a_model_for_and_names_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = LoadedEncoder(build_backbone("resnext50_32x4d", (3, 64, 64))[0], "resnext50_32x4d", {})
    export_backbone(given.backbone, tmp_path / "backbone.safetensors", arch=given.arch, image_size=64)
    flags = ["--folder", str(tmp_path / "out"), "--out", str(tmp_path / "record.json")]
    previous = os.umask(0o027)
    try:
        assert imagenet_eval.main(["export", str(tmp_path / "backbone.safetensors"), *flags]) == 0
        export_to("transformers", encoder("resnet18"), tmp_path / "out", 64)
        export_backbone(given.backbone, tmp_path / "of the trainer.safetensors")
    finally:
        os.umask(previous)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["protocol"].keys() == {"torchvision", "timm", "detectron2", "not measured"}
    printed = capsys.readouterr().out
    names = ["resnext50_32x4d-torchvision.safetensors", "resnext50_32x4d-timm.safetensors"]
    names += ["resnext50_32x4d-detectron2.pkl"]
    assert f"{tmp_path / 'out'}: {', '.join(names)}\n" in printed
    assert "not measured: transformers: transformers' ResNet supports neither" in printed
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    folder = tmp_path / "out" / "resnet18-transformers"
    assert written == {tmp_path / "out" / name for name in names} | {
        folder / "config.json",
        folder / "model.safetensors",
    }
    for path in (*written, tmp_path / "record.json", tmp_path / "of the trainer.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640, path
    assert folder.stat().st_mode & 0o777 == 0o750


def test_an_export_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = encoder("resnet18").backbone
    path = tmp_path / "backbone.safetensors"
    path.write_text("earlier")

    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(backbone, path)
    assert [found.read_text() for found in tmp_path.iterdir()] == ["earlier"]
