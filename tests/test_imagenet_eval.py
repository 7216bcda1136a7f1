"""examples/imagenet_eval.py: each command end to end, its numbers against scikit-learn's, and wrong input."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from test_training import SMALL_NETWORK, blank_pictures, make_tree
from torch import Tensor

import imagenet_eval
import imagenet_train
from evaluating import subsets
from evaluating.encoders import load_encoder
from evaluating.linear import Protocol, Standardize, accuracy, batches_of, train_linear
from msf_core.distributed import Ranks
from training.data import Share, open_source
from training.features import Batch, nearest_neighbour_accuracy

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
    """A run on a small tree whose classes have colours of their own."""
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


def test_nearest_neighbours_are_those_of_scikit_learn() -> None:
    (train, labels), (val, val_labels) = blobs(300, noise=4), blobs(120, seed=1, noise=4)
    result = nearest_neighbour_accuracy(
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
    """In full batches, for long, with the bias regularized there as here."""
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
        found = nearest_neighbour_accuracy([train], 2000, [val])
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
    assert rates == pytest.approx([0.01] * 30 + [0.001] * 30 + [0.0001] * 20)  # 2 batches of 256 and 44 an epoch


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
    assert re.search(r"\| paper, ImageNet: MSF w/s, 200 epochs +\| 62\.0 \|  64\.9 \|", table)
    assert re.search(rf"\| digits on digits +\| {100 * found['nn1']:.1f} \|  {100 * found['nn20']:.1f} \|", table)


def test_an_exported_backbone_is_worth_what_its_checkpoint_is(digits_run: Path, tmp_path: Path) -> None:
    by_file, record = measured("knn", digits_run / "backbone.safetensors", tmp_path / "file.json")
    by_run, _ = measured("knn", digits_run / "checkpoint.pt", tmp_path / "run.json")
    assert by_file == by_run
    assert record["encoder"]["metadata"]["arch"] == "digits"


def test_the_linear_protocol_runs_with_and_without_a_cache(photo_run: Path, tmp_path: Path) -> None:
    flags = ["--workers", 0, "--epochs", 2, "--batch-size", 8]
    _, plain = measured("linear", photo_run, *flags, "--sweep", 0.1, 1, tmp_path / "plain.json")
    result, cached = measured("linear", photo_run, *flags, "--cache", tmp_path / "cached.json")
    assert plain["protocol"]["training view"] == "random resized crop 32 (area 0.08 to 1), horizontal flip"
    assert cached["protocol"]["training view"] == cached["protocol"]["test view"] == "resize 37, centre crop 32"
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
    # The names of a class's images are those of the others' here: with one class in each file name, as ImageNet has.
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

WRONG: dict[str, tuple[list[str], str]] = {
    "no such run": (["knn", "runs/nowhere"], "no run, file or model|no model"),
    "a checkpoint that is not there": (["knn", "nowhere/checkpoint.pt"], "no checkpoint at nowhere/checkpoint.pt"),
    "a file of another kind": (["knn", "{run}/config.json"], "neither a checkpoint"),
    "digits in colour": (["knn", "resnet18", "--dataset", "digits"], "the digits are grey"),
    "no data": (["knn", "resnet18", "--data", "nowhere"], "no such folder: nowhere"),
    "no such weights": (["knn", "resnet18", "--weights", "NONE", "--data", "{tree}"], "weights 'NONE'"),
    "percent": (["few-labels", "{run}", "--percent", "101"], "at most 100"),
    "per class": (["few-labels", "{run}", "--per-class", "9999"], "has only"),
    "a list of strangers": (["few-labels", "{photos}", "--list", "{run}/config.json"], "images that are not there"),
    "a list for digits": (["few-labels", "{run}", "--list", "{run}/config.json"], "goes with a folder"),
    "batch size": (["linear", "{run}", "--batch-size", "0"], "at least 1"),
    "learning rate": (["linear", "{run}", "--lr", "-1"], "above 0"),
    "nn without a number": (["few-labels", "{run}", "--classifier", "nn"], "goes with --per-class"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_a_clear_error(
    digits_run: Path, photo_run: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    tree = photo_run.parent / "tree"
    given = [argument.format(run=digits_run, photos=photo_run, tree=tree) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        imagenet_eval.main([*given, "--out", str(tmp_path / "record.json")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "record.json").exists()


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
