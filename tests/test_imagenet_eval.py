"""examples/imagenet_eval.py: each command end to end, its numbers against scikit-learn's, and wrong input."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from test_training import SMALL_NETWORK, blank_pictures, make_tree, photos
from torch import Tensor

import imagenet_eval
import imagenet_train
from msf_core.distributed import Ranks
from pipeline.data.opening import open_source
from pipeline.data.source import Share
from pipeline.evaluation import subsets
from pipeline.evaluation.commands import COMMANDS
from pipeline.evaluation.features import Batch, nearest_neighbor_accuracy
from pipeline.evaluation.linear import Protocol, Standardize, accuracy, batches_of, train_linear
from pipeline.evaluation.paper import comparable
from pipeline.evaluation.record import tables, write_whole
from pipeline.models.encoders import load_encoder
from pipeline.running.ending import LONGEST, in_one_line

CPU = torch.device("cpu")


def blobs(count: int, classes: int = 5, features: int = 12, seed: int = 0, noise: float = 1.5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99)) * 2
    return centres[labels] + noise * torch.randn(count, features, generator=generator) + 1, labels


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with blank_pictures():
        assert imagenet_train.main(["--steps", "42", "--eval-every", "0", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a small tree whose classes have colors of their own."""
    folder = tmp_path_factory.mktemp("runs")
    tree = make_tree(folder / "tree", train=10, val=4)
    flags = [*SMALL_NETWORK, "--batch-size", "10", "--workers", "0", "--steps", "6", "--out", str(folder / "run")]
    with blank_pictures():
        assert imagenet_train.main(["--data", str(tree), *flags]) == 0
    return folder / "run"


def measured(*arguments: object) -> tuple[dict[str, float], dict[str, Any]]:
    out = Path(str(arguments[-1]))
    assert imagenet_eval.main([str(argument) for argument in (*arguments[:-1], "--out", out)]) == 0
    record = json.loads(out.read_text())
    return record["results"], record


# The numbers, against scikit-learn on the same features


def test_nearest_neighbors_are_those_of_scikit_learn() -> None:
    (train, labels), (val, val_labels) = blobs(300, noise=4), blobs(120, seed=1, noise=4)
    result = nearest_neighbor_accuracy(
        [(train[:100], labels[:100]), (train[100:], labels[100:])], 300, [(val, val_labels)]
    )
    for name, k in (("nn1", 1), ("nn20", 20)):
        peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance, k=k: 1 + (1 - distance) / (4 * k))
        expected = peer.fit(train.numpy(), labels.numpy()).score(val.numpy(), val_labels.numpy())
        assert 0.3 < expected < 0.95
        assert result[name] == pytest.approx(expected)


def test_standardized_features_are_those_of_scikit_learn() -> None:
    features, labels = blobs(200)
    features[:, 3] = 0.0  # a constant dimension
    standardize = Standardize.fitted([(features[:70], labels[:70]), (features[70:], labels[70:])], Ranks())
    expected = StandardScaler().fit_transform(normalize(features.double().numpy()))
    np.testing.assert_allclose(standardize(features).numpy(), expected, atol=2e-5)


def test_the_layer_converges_to_the_logistic_regression_of_scikit_learn() -> None:
    """With full batches and many epochs, and with the bias regularized in both."""
    features, labels = blobs(200, classes=3)
    standardize = Standardize.fitted([(features, labels)], Ranks())
    protocol = Protocol(lrs=(0.5,), epochs=800, batch_size=200, weight_decay=0.05, milestones=(700,))
    (layer,) = train_linear(lambda epoch: iter([(features, labels)]), standardize, 3, protocol, Ranks())
    with_ones = np.hstack([standardize(features).numpy(), np.ones((200, 1))])
    peer = LogisticRegression(C=1 / (0.05 * 200), fit_intercept=False, tol=1e-8, max_iter=5000)
    peer.fit(with_ones, labels.numpy())
    ours = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy()
    np.testing.assert_allclose(ours, peer.coef_, atol=2e-4)


def test_logistic_regression_as_a_solver_is_that_of_scikit_learn(digits_run: Path, tmp_path: Path) -> None:
    result, _ = measured("linear", digits_run, "--solver", "logistic", tmp_path / "record.json")
    encoder = load_encoder(str(digits_run), Ranks())
    source = open_source(
        "digits", "", image_size=16, augmentation="w/w", share=Share(64), workers=0, seed=0, device=CPU
    )
    with torch.no_grad():
        (train, labels), (val, val_labels) = (
            (encoder.backbone.eval()(images), labels)
            for images, labels in (next(iter(source.images(split))) for split in ("train", "val"))
        )
    scaler = StandardScaler().fit(normalize(train.numpy()))
    peer = LogisticRegression(C=0.1, max_iter=300).fit(scaler.transform(normalize(train.numpy())), labels.numpy())
    expected = peer.score(scaler.transform(normalize(val.numpy())), val_labels.numpy())
    assert result["linear"] == pytest.approx(expected, abs=1.5 / 450)


def views_of(batch: Batch, protocol: Protocol, ranks: Ranks) -> Any:
    def views(epoch: int) -> Iterator[Batch]:
        for places in batches_of(len(batch[1]), epoch, protocol, ranks):
            yield batch[0][places], batch[1][places]

    return views


def probe(train: Batch, val: Batch, protocol: Protocol, ranks: Ranks) -> list[dict[str, float]]:
    standardize = Standardize.fitted([train], ranks)
    classes = int(train[1].max()) + 1
    layers = train_linear(views_of(train, protocol, ranks), standardize, classes, protocol, ranks)
    return accuracy(list(layers), standardize, [val], ranks)


def test_random_features_give_chance_and_the_labels_themselves_all() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, val_labels = torch.arange(2000) % 10, torch.arange(1000) % 10
    noise = (
        (torch.randn(2000, 16, generator=generator), labels),
        (torch.randn(1000, 16, generator=generator), val_labels),
    )
    truth = ((F.one_hot(labels).float(), labels), (F.one_hot(val_labels).float(), val_labels))
    protocol = Protocol(epochs=5)
    for (train, val), low, high in ((noise, 0.06, 0.14), (truth, 1, 1)):
        found = nearest_neighbor_accuracy([train], 2000, [val])
        (linear,) = probe(train, val, protocol, Ranks())
        assert all(low <= value <= high for value in (*found.values(), linear["top1"]))
        assert 5 * low <= linear["top5"] * (5 if low == 1 else 1) <= 5 * high


def test_top_1_and_top_5_are_counted_over_batches_of_any_size() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.arange(7.0).expand(len(inputs), 7)  # class 6 first, class 1 sixth

    same = Standardize(torch.zeros(1), torch.ones(1))
    labels = torch.tensor([6, 6, 2, 1, 0, 5])
    batches = [(torch.ones(n, 1), part) for n, part in ((1, labels[:1]), (5, labels[1:]))]
    assert accuracy([Fixed()], same, batches, Ranks()) == [{"top1": 2 / 6, "top5": 4 / 6}]


def test_layers_of_a_sweep_are_those_of_single_runs() -> None:
    train, val = blobs(200), blobs(100, seed=1)
    sweep = Protocol(lrs=(0.01, 1.0), epochs=4, batch_size=64)
    together = probe(train, val, sweep, Ranks())
    assert together == [probe(train, val, replace(sweep, lrs=(lr,)), Ranks())[0] for lr in sweep.lrs]
    assert together[0] != together[1]


def test_the_default_protocol_is_the_papers_and_the_rate_falls_at_its_milestones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD, *arguments: Any) -> Any:
        group = self.param_groups[0]
        assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
        rates.append(group["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    train = blobs(300)
    probe(train, train, Protocol(), Ranks())
    assert rates == pytest.approx([0.01] * 30 + [0.001] * 30 + [0.0001] * 20)  # two batches per epoch: 256 and 44


# The commands


def test_digits_are_measured_as_the_trainer_did(digits_run: Path, tmp_path: Path, capsys: Any) -> None:
    printed = json.loads((digits_run / "results.json").read_text())["rows"]["MSF, k = 5"]
    found, record = measured("knn", digits_run, tmp_path / "knn.json")
    few, _ = measured("few-labels", digits_run, "--classifier", "nn", "--per-class", 1, 10, tmp_path / "few.json")
    logistic, _ = measured("linear", digits_run, "--solver", "logistic", tmp_path / "linear.json")
    assert found == {"nn1": printed["nn1"], "nn20": printed["nn20"]}
    assert few == {"top1 1/class": printed["one_label"], "top1 10/class": printed["ten_labels"]}
    assert logistic == {"linear": printed["linear"]}
    assert record["data"] == {
        "dataset": "digits",
        "path": "",
        "training_images": 1347,
        "test_images": 450,
        "classes": 10,
    }
    assert record["encoder"]["settings"]["steps"] == 42
    assert {"device", "versions", "date", "protocol", "seconds"} <= record.keys()
    table = capsys.readouterr().out
    assert re.search(rf"\| digits on digits +\|  {100 * found['nn1']:.1f} \|  {100 * found['nn20']:.1f} \|", table)
    assert "paper" not in table, "the paper's rows are for ImageNet"


def test_an_exported_backbone_is_worth_what_its_checkpoint_is(digits_run: Path, tmp_path: Path) -> None:
    by_file, record = measured("knn", digits_run / "backbone.safetensors", tmp_path / "file.json")
    by_run, _ = measured("knn", digits_run / "checkpoint.pt", tmp_path / "run.json")
    assert by_file == by_run
    assert record["encoder"]["metadata"]["arch"] == "digits"


def test_the_linear_protocol_runs_with_and_without_a_cache(photo_run: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--workers", 0, "--epochs", 2, "--batch-size", 8]
    _, plain = measured("linear", photo_run, *flags, "--sweep", 0.1, 1, tmp_path / "plain.json")
    result, cached = measured("linear", photo_run, *flags, "--cache", "--sweep", 1e38, tmp_path / "cached.json")
    assert "diverged" not in plain["protocol"]
    assert cached["protocol"]["diverged"] == [1e38]
    assert "warning: training diverged at learning rate 1e+38" in capsys.readouterr().err
    assert plain["protocol"]["training view"] == "random resized crop 32 (area 0.08 to 1), horizontal flip"
    assert cached["protocol"]["training view"] == cached["protocol"]["test view"] == "resize 37, center crop 32"
    for record, is_cached in ((plain, False), (cached, True)):
        assert record["protocol"]["features cached, no augmentation"] is is_cached
    assert plain["protocol"]["all"].keys() == {"0.01", "0.1", "1"}
    assert plain["results"]["best top1"] == max(row["top1"] for row in plain["protocol"]["all"].values())
    assert plain["results"]["linear"] == plain["protocol"]["all"]["0.01"]["top1"]
    assert 0 <= result["linear"] <= 1


def test_few_labels_by_share_by_number_and_by_list(photo_run: Path, tmp_path: Path) -> None:
    flags = ["--workers", 0, "--epochs", 1, "--cache"]
    _, shares = measured("few-labels", photo_run, *flags, "--percent", 10, 50, tmp_path / "shares.json")
    assert [shares["protocol"][name]["images"] for name in ("10%", "50%")] == [3, 15]
    _, numbers = measured("few-labels", photo_run, *flags, "--per-class", 2, tmp_path / "numbers.json")
    assert numbers["protocol"]["2/class"]["images"] == 6
    # Here, all classes have the same file names. Add the class to each file name, as in ImageNet.
    tree = make_tree(tmp_path / "tree", train=4)
    for path in (tree / "train").rglob("*.jpg"):
        path.rename(path.with_name(f"{path.parent.name}_{path.name}"))
    (tmp_path / "1percent.txt").write_text("class0_1.jpg\nclass1_3.jpg\nclass2_0.jpg\n")
    result, listed = measured(
        "few-labels", photo_run, "--data", tree, *flags, "--list", tmp_path / "1percent.txt", tmp_path / "listed.json"
    )
    assert listed["protocol"]["1percent.txt"]["images"] == 3
    assert "top1 1percent.txt" in result


def test_a_model_by_name_is_at_random_unless_weights_are_asked_for(photo_run: Path, tmp_path: Path) -> None:
    tree = photo_run.parent / "tree"
    _, record = measured(
        "knn", "resnet18", "--data", tree, "--image-size", 32, "--workers", 0, tmp_path / "record.json"
    )
    assert record["encoder"]["weights"] == "none: random initialization"
    assert record["data"]["training_images"] == 30


# Subsets


def test_listed_images_are_matched_by_their_paths(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", train=2, val=1)
    (tree / "train" / "class2" / "0.jpg").rename(tree / "train" / "class2" / "my photo #1.jpg")
    (tree / "train" / "class2" / "1.jpg").rename(tree / "train" / "class2" / "#2.jpg")
    source = photos(tree)
    names = ["class0/0.jpg", "class0/1.jpg", "class1/0.jpg", "class1/1.jpg", "class2/#2.jpg", "class2/my photo #1.jpg"]
    assert source.names() == names
    path = tmp_path / "list.txt"
    for content, expected in (
        (b"class1/0.jpg\nclass0/0.jpg\n", [0, 2]),
        (b"\xef\xbb\xbfclass1/1.jpg\r\n\r\n# of mine\r\nmy photo #1.jpg\r\n", [3, 5]),
        (b"./class1/0.jpg\nclass1/0.jpg", [2]),
        (b"#2.jpg\nclass2/#2.jpg\n class0/1.jpg \n", [1, 4]),
    ):
        path.write_bytes(content)
        assert subsets.listed(path, source) == expected
    for content, message in (
        (b"0.jpg\n", r"list.txt: 0\.jpg may be class0/0\.jpg or class1/0\.jpg: list paths"),
        (b"class0/0.jpg\nclass0/9.jpg\nclass1/8.jpg", "training set: 2 of 3 listed images, such as class0/9.jpg"),
        (b"class2/0.jpg\n", "training set: 1 of 1 listed images, such as class2/0.jpg"),
        (b"\n# nothing\n", "list.txt lists no images"),
        (b"caf\xe9.jpg", "list.txt is not a text file in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            subsets.listed(path, source)


def test_subsets_are_balanced_and_seeded() -> None:
    labels = torch.tensor([0] * 100 + [1] * 49 + [2] * 3)
    places = subsets.share_of_each_class(labels, 10, seed=3)
    assert labels[places].bincount().tolist() == [10, 5, 1]
    assert places == subsets.share_of_each_class(labels, 10, seed=3) == sorted(set(places))
    assert places != subsets.share_of_each_class(labels, 10, seed=4)
    assert labels[subsets.some_of_each_class(labels, 3, seed=0)].bincount().tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="class 2 has only 3 images"):
        subsets.some_of_each_class(labels, 4, seed=0)


# Wrong input

WRONG: dict[str, tuple[str, str]] = {
    "no folder to write to": ("knn {run} --out=", "argument --out: must not be empty"),
    "no such run": ("knn runs/nowhere", "no run, file or model 'runs/nowhere'"),
    "no such path": ("knn /nonexistent", "no run, file or model '/nonexistent'"),
    "a checkpoint that is not there": ("knn nowhere/checkpoint.pt", "no checkpoint at nowhere/checkpoint.pt"),
    "a file of another kind": ("knn {run}/config.json", "neither a checkpoint"),
    "a checkpoint of something else": ("knn {tmp}/other.pt", "other.pt is not a checkpoint of this script"),
    "no checkpoint": ("knn {tmp}/text.pt", "text.pt is damaged or not a checkpoint of this script"),
    "no safetensors": ("knn {tmp}/text.safetensors", "text.safetensors cannot be read"),
    "digits in color": ("knn resnet18 --dataset digits", "the digits are gray"),
    "a folder of digits": ("knn {run} --data {tree}", "takes the digits, which are gray"),
    "digits from a folder": ("knn {run} --data {tree} --dataset digits", "--data cannot be used"),
    "digits of another size": ("knn {run} --image-size 32", "16 pixels wide, got --image-size 32"),
    "a model without images": ("knn resnet18", "give --data DIR"),
    "no data": ("knn resnet18 --data nowhere", "--data: no such folder: nowhere"),
    "data is a file": ("knn resnet18 --data {run}/config.json", "--data must be a folder, got the file"),
    "no such weights": ("knn resnet18 --weights NONE --data {tree}", "weights 'NONE', only IMAGENET1K_V1"),
    "timm's weights": ("knn resnet10t --weights IMAGENET1K_V1 --data {tree}", "only pretrained"),
    "weights of a run": ("knn {run} --weights DEFAULT", "--weights is for a model .* by name"),
    "arch of a run": ("knn {run} --arch resnet18", "--arch is for a safetensors file"),
    "arch of a name": ("knn resnet18 --arch resnet18 --data {tree}", "--arch is for a safetensors file"),
    "another arch": ("knn {run}/backbone.safetensors --arch resnet18", "--arch resnet18: .* it belongs to digits"),
    "device": ("knn {run} --device gpu", "--device must be auto, .* got 'gpu'"),
    "a device that cannot compute": ("knn {run} --device meta", "--device meta: PyTorch cannot compute on it"),
    "tiny images": ("knn resnet18 --data {tree} --image-size 1", "--image-size: must be at least 8, got 1"),
    "images too small": ("knn vit_b_16 --data {tree} --image-size 32", "--image-size 32: 'vit_b_16' does not take"),
    "out is a folder": ("knn {run} --out {tmp}", "--out must be a file, got the folder"),
    "out below a file": ("knn {run} --out {run}/config.json/x/y.json", "--out: .*config.json is a file"),
    "out is another file": ("knn {run} --out {run}/config.json", "--out: .*config.json exists and is not a record"),
    "out is the encoder": ("knn {run} --out {run}/checkpoint.pt", "--out: .*checkpoint.pt exists and is not a record"),
    "percent": ("few-labels {run} --percent 101", "--percent: must be above 0 and at most 100, got 101"),
    "percent nan": ("few-labels {run} --percent nan", "--percent: must be a finite number"),
    "per class": ("few-labels {run} --per-class 9999", "--per-class 9999: class . has only"),
    "a list of strangers": ("few-labels {photos} --list {run}/config.json", "not in the training set"),
    "a list for digits": ("few-labels {run} --list {run}/config.json", "--list needs a folder"),
    "no list": ("few-labels {photos} --list nowhere", "--list: no such file: nowhere"),
    "a list and a share": ("few-labels {run} --list x --percent 1", "--percent: not allowed with argument --list"),
    "a number and a share": ("few-labels {run} --per-class 1 --percent 1", "--percent: not allowed with"),
    "batch size": ("linear {run} --batch-size 0", "--batch-size: must be at least 1, got 0"),
    "seed": ("linear {run} --seed -1", "--seed: must be at least 0, got -1"),
    "workers": ("knn {run} --workers -2", "--workers: must be at least -1, got -2"),
    "timeout": ("knn {run} --timeout 1e99", "--timeout: must be a whole number, got '1e99'"),
    "learning rate": ("linear {run} --lr -1", "--lr: must be above 0, got -1"),
    "learning rate nan": ("linear {run} --lr nan", "--lr: must be a finite number, above 0, got nan"),
    "sweep": ("linear {run} --sweep 1 inf", "--sweep: must be a finite number, above 0, got inf"),
    "strengths": ("transfer {run} --strengths 0", "--strengths: must be above 0, got 0"),
    "SGD's flags": ("linear {run} --solver logistic --epochs 3 --cache", "cannot use --epochs, --cache"),
    "nn without a number": ("few-labels {run} --classifier nn", "needs --per-class"),
    "nn with a rate": ("few-labels {run} --classifier nn --per-class 1 --lr 1", "cannot use --lr"),
    "transfer without data": ("transfer resnet18", "transfer needs --data DIR"),
    "transfer of a file": ("transfer resnet18 --data {run}/config.json", "--data must be a folder"),
    "transfer of the digits": ("transfer {run} --data {tree}", "the transfer sets are in color"),
    "export below a file": ("export {photos} --folder {run}/config.json/x", "--folder: .*config.json is a file"),
    "export of the digits": ("export {run} --to timm", "--to timm: timm has no 'digits'"),
}


def status_of(*arguments: object) -> int:
    return imagenet_eval.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_line_before_anything_is_computed(
    digits_run: Path,
    photo_run: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    tree = photo_run.parent / "tree"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.evaluation.commands.features_of", None)
    monkeypatch.setattr("pipeline.evaluation.features.features_of", None)
    torch.save({"model": torch.ones(1)}, tmp_path / "other.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("text")
    before = {path: path.read_bytes() for folder in (tmp_path, digits_run) for path in folder.glob("*.*")}
    given = [word.format(run=digits_run, photos=photo_run, tree=tree, tmp=tmp_path) for word in arguments.split()]
    out = [] if "--out" in given else ["--out", tmp_path / "new" / "record.json"]
    assert status_of(*given, *out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"imagenet_eval\.py( \S+)?: error: .*{message}.*", line), line
    assert "Traceback" not in line
    assert not re.search(r"\('|\(\d+,", line), "a Python tuple"
    assert {path: path.read_bytes() for folder in (tmp_path, digits_run) for path in folder.glob("*.*")} == before
    assert not (tmp_path / "new").exists()


def test_an_unreadable_image_ends_it_in_one_line(photo_run: Path, tmp_path: Path, capsys: Any) -> None:
    """Read by this process, and by a worker, whose traceback is in the text of the error."""
    tree = make_tree(tmp_path / "tree", train=2, val=2)
    (tree / "val" / "class1" / "1.jpg").write_bytes(b"no image")
    for workers in (0, 1):
        assert status_of("knn", photo_run, "--data", tree, "--workers", workers, "--out", tmp_path / "record.json") == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "class1/1.jpg" in line] == lines[-1:]
        assert lines[-1].startswith("imagenet_eval.py: error: cannot read image")
        assert not [line for line in lines[:-1] if not re.match(r"\r?features of|\s*$", line)], lines
    assert not (tmp_path / "record.json").exists()


def test_errors_of_any_kind_are_one_line() -> None:
    worker = (
        "Caught UnreadableImage in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n    x\n    ^\nPIL.UnidentifiedImageError: inner\n\nThe above exception was the '
        'direct cause of the following exception:\n\nTraceback (most recent call last):\n  File "b.py", line 2, in g\n'
        "    y\n{}: cannot read image a/0.jpg:\n  no image\n"
    )
    for error, line in (
        (RuntimeError(worker.format("pipeline.data.pixels.UnreadableImage")), "cannot read image a/0.jpg: no image"),
        (OSError(worker.format("OSError")), "cannot read image a/0.jpg: no image"),
        (RuntimeError(worker.format("KeyError")), "KeyError: cannot read image a/0.jpg: no image"),
        (
            RuntimeError("broken\npipe\nException raised from f at x.cpp:1 (most recent call first):\nframe"),
            "broken pipe",
        ),
        (KeyError("x"), "KeyError: 'x'"),
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left on device", "x.json"), "x.json: No space left on device"),
    ):
        assert in_one_line(error) == line
    assert len(in_one_line(ValueError("word " * 1000))) == LONGEST


def test_an_error_that_nobody_foresaw_and_ctrl_c_are_one_line_too(
    digits_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, status, line in (
        (KeyError("x"), 2, "imagenet_eval.py: error: KeyError: 'x'"),
        (KeyboardInterrupt(), 130, "imagenet_eval.py: stopped by Ctrl-C"),
    ):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("pipeline.evaluation.commands.nearest_neighbor_accuracy", fail)
        assert status_of("knn", digits_run, "--out", tmp_path / "record.json") == status
        assert capsys.readouterr().err.split("\n")[-2:] == [line, ""]


@pytest.mark.parametrize("program", [imagenet_eval, imagenet_train], ids=["evaluation", "training"])
def test_ctrl_c_amid_the_imports_is_one_line(tmp_path: Path, program: ModuleType) -> None:
    """A module that is imported early interrupts the process, and swallows a KeyboardInterrupt."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                raise ImportError('interrupted') from None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    script = Path(program.__file__)
    search = os.pathsep.join([str(tmp_path), str(script.parent.parent), str(script.parent)])
    done = subprocess.run(
        [sys.executable, script, "knn", "resnet18"],
        env={**os.environ, "PYTHONPATH": search},
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, f"{script.name}: stopped by Ctrl-C\n")


def test_it_works_in_a_thread(digits_run: Path, photo_run: Path, tmp_path: Path) -> None:
    """As in a notebook or a server: with worker processes, and with errors reported by the status."""
    statuses: list[int] = []
    calls = (["knn", photo_run, "--workers", 1], ["knn", digits_run, "--device", "gpu"])
    for call in calls:
        thread = threading.Thread(target=lambda call=call: statuses.append(status_of(*call, "--out", tmp_path / "r")))
        thread.start()
        thread.join()
    assert statuses == [0, 2]


def test_the_first_process_of_a_machine_speaks_first(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The others wait for torchrun to end them, and report their own error if it does not."""
    said: list[str] = []  # what it had printed before it slept
    monkeypatch.setattr("time.sleep", lambda seconds: said.append(capsys.readouterr().err))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        for flags in (["--seed", "x"], ["--device", "gpu"]):
            for program, command in ((imagenet_eval, ["knn", "x"]), (imagenet_train, [])):
                assert program.main([*command, *flags]) == 2
                assert len(capsys.readouterr().err.splitlines()) == 1
        assert said == [""] * 4 * rank
    assert status_of("--help") == imagenet_train.main(["--help"]) == 0


# The record


def test_a_result_that_cannot_be_written_is_printed(digits_run: Path, capsys: Any) -> None:
    assert status_of("knn", digits_run, "--out", "/dev/full") == 2
    printed = capsys.readouterr()
    record = json.loads(printed.out.partition("could not be written:\n")[2])
    assert f"{100 * record['results']['nn1']:.1f}" in printed.out.partition("the record")[0]
    assert "error: --out: /dev/full could not be written (No space left on device): the record is" in printed.err


def test_a_record_is_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "new" / "record.json", "first")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "new" / "record.json", "second")
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"first"]


def test_20_nn_takes_20_images(photo_run: Path, tmp_path: Path, capsys: Any) -> None:
    tree = make_tree(tmp_path / "tree", train=6, val=1)
    found, record = measured("knn", photo_run, "--data", tree, "--workers", 0, tmp_path / "record.json")
    assert list(found) == ["nn1"]
    assert record["protocol"]["not measured"] == {"nn20": "needs 20 training images, but there are 18"}
    assert "not measured: 20-NN: needs 20 training images, but there are 18\n" in capsys.readouterr().out


def test_the_papers_rows_stand_beside_what_can_be_compared_alone() -> None:
    def shown(command: str, data: dict[str, Any], protocol: dict[str, Any], **row: float) -> str:
        record = {"command": command, "data": data, "protocol": protocol, "results": row}
        return tables("run on folder", row, comparable(record))

    imagenet = {"dataset": "folder", "classes": 1000, "test_images": 50_000}
    table = shown("knn", imagenet, {}, nn1=0.6, nn20=1.0)
    assert re.search(r"\| paper, ImageNet: MSF w/s, 200 epochs +\|  62\.0 \|  64\.9 \|", table)
    assert re.search(r"\| run on folder +\|  60\.0 \| 100\.0 \|", table)
    assert len({len(line) for line in table.splitlines()[::2]}) == 1, "columns of one width"
    for other in ({"dataset": "digits"}, {"classes": 100}, {"test_images": 5000}, {"dataset": "cifar10"}):
        assert "paper" not in shown("knn", imagenet | other, {}, nn1=0.6, nn20=1.0)
    for command, protocol, row, rows in (
        ("linear", {}, {"linear": 0.7, "top5": 0.9}, 8),
        ("linear", {"solver": "scikit-learn's"}, {"linear": 0.7}, 0),
        ("few-labels", {}, {"top1 1%": 0.5, "top5 1%": 0.7, "top1 5%": 0.6}, 5),
        ("few-labels", {}, {"top1 13/class": 0.5}, 0),
        ("transfer", {}, {"DTD": 0.5, "mean": 0.7}, 2),
        ("transfer", {}, {"DTD": 0.5, "mean of these 1": 0.5}, 0),
    ):
        table = shown(command, imagenet, protocol, **row)
        assert table.count("paper, ImageNet") == rows
        assert "–" not in table


def test_help_has_groups_examples_and_no_empty_defaults(capsys: Any) -> None:
    for command in ([], *([name] for name in COMMANDS)):
        assert status_of(*command, "--help") == 0
        text = capsys.readouterr().out
        assert "(default: )" not in text
        assert not re.search(r"default: (None|\[|False)", text)
        assert "examples:\n  python examples/imagenet_eval.py" in text
        assert not command or ("images:" in text) == (command != ["export"])


def test_a_file_that_does_not_say_its_model_or_does_not_fit_is_refused(digits_run: Path, tmp_path: Path) -> None:
    tensors = load_file(digits_run / "backbone.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="give --arch"):
        load_encoder(str(tmp_path / "bare.safetensors"), Ranks())
    assert load_encoder(str(tmp_path / "bare.safetensors"), Ranks(), arch="digits", image_size=16).arch == "digits"
    with pytest.raises(ValueError, match="do not fit"):
        load_encoder(str(tmp_path / "bare.safetensors"), Ranks(), arch="resnet18", image_size=32)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "bare.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"torn\.safetensors cannot be read"):
        load_encoder(str(tmp_path / "torn.safetensors"), Ranks(), arch="digits")
    tensors["stem.0.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "diverged.safetensors")
    with pytest.raises(ValueError, match=r"diverged\.safetensors cannot be used: stem\.0\.weight has values"):
        load_encoder(str(tmp_path / "diverged.safetensors"), Ranks(), arch="digits", image_size=16)
