"""Linear classification on the ten data sets of the paper (section 3.3), through torchvision's loaders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from pipeline.data.pixels import labels_of
from pipeline.evaluation.features import Batch
from pipeline.running.seeds import seed_of

STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # weights of the data term: scikit-learn's C


@dataclass
class Parts:
    """The images of one data set; without ``val``, a fifth of ``train`` is used to choose the strength."""

    train: Dataset[Any]
    val: Dataset[Any] | None
    test: Dataset[Any]


@dataclass(frozen=True)
class TransferSet:
    """A data set, its customary split, and its metric."""

    name: str
    open: Callable[[Path, bool, int], Parts]  # arguments: the folder of all sets, whether to download, the seed
    split: str
    per_class: bool = False  # whether to report the mean of the classes' accuracies instead of top-1


def _food101(root: Path, download: bool, seed: int) -> Parts:
    train, test = (datasets.Food101(str(root), split, download=download) for split in ("train", "test"))
    return Parts(train, None, test)


def _sun397(root: Path, download: bool, seed: int) -> Parts:
    images = datasets.SUN397(str(root), download=download)
    return _of_each_class(images, 50, 50, seed)


def _cifar(kind: type[datasets.CIFAR10]) -> Callable[[Path, bool, int], Parts]:
    def opened(root: Path, download: bool, seed: int) -> Parts:
        return Parts(kind(str(root), True, download=download), None, kind(str(root), False, download=download))

    return opened


def _cars(root: Path, download: bool, seed: int) -> Parts:
    train, test = (datasets.StanfordCars(str(root), split, download=download) for split in ("train", "test"))
    return Parts(train, None, test)


def _pets(root: Path, download: bool, seed: int) -> Parts:
    train, test = (datasets.OxfordIIITPet(str(root), split, download=download) for split in ("trainval", "test"))
    return Parts(train, None, test)


def _caltech101(root: Path, download: bool, seed: int) -> Parts:
    return _of_each_class(datasets.Caltech101(str(root), download=download), 30, None, seed)


def _in_three(kind: type) -> Callable[[Path, bool, int], Parts]:
    def opened(root: Path, download: bool, seed: int) -> Parts:
        return Parts(*(kind(str(root), split=split, download=download) for split in ("train", "val", "test")))

    return opened


SETS = (
    TransferSet("Food101", _food101, "train / test"),
    TransferSet("SUN397", _sun397, "50 / 50 images of each class, drawn by the seed"),
    TransferSet("CIFAR10", _cifar(datasets.CIFAR10), "train / test"),
    TransferSet("CIFAR100", _cifar(datasets.CIFAR100), "train / test"),
    TransferSet("StanfordCars", _cars, "train / test"),
    TransferSet("FGVCAircraft", _in_three(datasets.FGVCAircraft), "train / val / test, variants", per_class=True),
    TransferSet("Flowers102", _in_three(datasets.Flowers102), "train / val / test", per_class=True),
    TransferSet("OxfordIIITPet", _pets, "trainval / test", per_class=True),
    TransferSet("Caltech101", _caltech101, "30 images of each class, drawn by the seed / the rest", per_class=True),
    TransferSet("DTD", _in_three(datasets.DTD), "train / val / test, partition 1"),
)


def _of_each_class(images: Dataset[Any], train: int, test: int | None, seed: int) -> Parts:
    """Draw ``train`` images of each class, and ``test`` others or the rest."""
    labels = labels_of(images)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed)))
    places = [order[labels[order] == label] for label in labels.unique()]
    end = None if test is None else train + test
    learned = torch.cat([own[:train] for own in places]).sort().values.tolist()
    tested = torch.cat([own[train:end] for own in places]).sort().values.tolist()
    return Parts(Subset(images, learned), None, Subset(images, tested))


def classify(
    train: Batch, val: Batch | None, test: Batch, per_class: bool, strengths: tuple[float, ...]
) -> dict[str, Any]:
    """Return the test "accuracy" of L2-regularized logistic regression, its "C", and the "validation" scores.

    Features are normalized to unit length and standardized over the training images (paper section 3.2). C is the
    strength with the best score on the validation images or, without these, on a seeded fifth of each class. The final
    classifier is trained on the validation images, too.
    """
    x, y = _arrays(train)
    if val is None:
        own, held = train_test_split(np.arange(len(y)), test_size=0.2, stratify=y, random_state=0)
        x_val, y_val, x_own, y_own = x[held], y[held], x[own], y[own]
        x_all, y_all = x, y
    else:
        (x_own, y_own), (x_val, y_val) = (x, y), _arrays(val)
        x_all, y_all = np.concatenate([x_own, x_val]), np.concatenate([y_own, y_val])
    scaler = StandardScaler().fit(x_own)
    scores = [
        _score(_fitted(scaler.transform(x_own), y_own, strength), scaler.transform(x_val), y_val, per_class)
        for strength in strengths
    ]
    best = strengths[int(np.argmax(scores))]
    scaler = StandardScaler().fit(x_all)
    x_test, y_test = _arrays(test)
    accuracy = _score(_fitted(scaler.transform(x_all), y_all, best), scaler.transform(x_test), y_test, per_class)
    return {"accuracy": accuracy, "C": best, "validation": dict(zip(map(str, strengths), scores, strict=True))}


def _arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    features, labels = batch
    return F.normalize(features, dim=1).cpu().numpy(), labels.cpu().numpy()


def _fitted(x: np.ndarray, y: np.ndarray, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000).fit(x, y)


def _score(model: LogisticRegression, x: np.ndarray, y: np.ndarray, per_class: bool) -> float:
    right = model.predict(x) == y
    if not per_class:
        return float(right.mean())
    return float(np.mean([right[y == label].mean() for label in np.unique(y)]))
