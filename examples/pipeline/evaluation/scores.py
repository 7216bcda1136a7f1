"""Scores of a representation: nearest neighbors, a linear probe, few labels, and purity."""

import copy

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from msf_core import knn_classify, neighbor_purity
from msf_core.distributed import Ranks
from msf_core.search import find_backend
from pipeline.data.source import DataSource
from pipeline.evaluation.features import extract, nearest_neighbor_accuracy, part_of_images
from pipeline.running.ranks import shared

Features = dict[str, tuple[Tensor, Tensor]]  # "train" and "val" -> features [n, F] float32, labels [n]

# With more training images, `evaluate` leaves the linear probe and few-label scores to imagenet_eval.py.
PROBE_LIMIT = 60_000
DRAWS = 10
COLUMNS = {
    "nn1": "1-NN",
    "nn20": "20-NN",
    "linear": "linear",
    "one_label": "1 label per class",
    "ten_labels": "10 labels per class",
    "purity": "purity",
}


@torch.no_grad()
def warmed_up(backbone: nn.Module, source: DataSource, ranks: Ranks, batches: int = 20) -> nn.Module:
    """Return a copy whose BatchNorm statistics come from training views: the fair untrained baseline.

    All ranks must call it together, because their BatchNorm may be synchronized.
    """
    backbone = copy.deepcopy(backbone).train()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain average over the batches
            module.reset_running_stats()
    views = source.train_views(epoch=0, first=0)
    for _ in range(batches):
        with shared(ranks):  # otherwise, after an unreadable image, the other ranks would wait in BatchNorm
            batch = next(views, None)
        if batch is None:
            break
        backbone(batch[1])
    return backbone


def nearest_neighbors(backbone: nn.Module, source: DataSource, ranks: Ranks) -> dict[str, float]:
    """Return the accuracy of 1-NN and 20-NN on the test images (paper section 3.2). All ranks must call it."""
    train, val = (part_of_images(backbone, source, split, ranks) for split in ("train", "val"))
    return nearest_neighbor_accuracy(train, source.size("train"), val, ranks)


def evaluate(backbone: nn.Module, source: DataSource, k: int, ranks: Ranks) -> dict[str, float]:
    """Return a row of the table, with the keys of `COLUMNS`. All ranks extract the features; rank 0 computes the row.

    purity: purity of each training image's k nearest training images; the first is the image itself and not counted.
    linear: logistic regression on features that are normalized and standardized as in the paper (section 3.2).
    one_label, ten_labels: 1-NN accuracy with that many labeled images per class, mean of 10 draws.
    """
    if source.size("train") > PROBE_LIMIT:
        return nearest_neighbors(backbone, source, ranks)
    features = {split: extract(backbone, source, split, ranks) for split in ("train", "val")}
    row: dict[str, float] = {}
    with shared(ranks):
        if ranks.rank == 0:
            row = evaluate_features(features, k)
    return row


def evaluate_features(features: Features, k: int) -> dict[str, float]:
    """Return the row of `evaluate` for given features."""
    train, val = features["train"], features["val"]
    row = nearest_neighbor_accuracy([train], len(train[0]), [val])
    row["linear"] = linear_probe(features)
    row["one_label"] = few_labels(features, 1)
    row["ten_labels"] = few_labels(features, 10)
    row["purity"] = purity(*train, k=k)
    return row


def linear_probe(features: Features) -> float:
    """Return the test accuracy of logistic regression on normalized, then standardized features."""
    train, val = (F.normalize(features[split][0], dim=1) for split in ("train", "val"))
    mean, deviation = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, val = ((part - mean) / deviation for part in (train, val))
    probe = LogisticRegression(C=0.1, max_iter=300)
    probe.fit(train.cpu().numpy(), features["train"][1].cpu().numpy())
    return float(probe.score(val.cpu().numpy(), features["val"][1].cpu().numpy()))


def few_labels(features: Features, per_class: int) -> float:
    """Return the 1-NN accuracy with ``per_class`` labeled training images per class, mean of 10 seeded draws."""
    train, train_labels = features["train"]
    val, val_labels = features["val"]
    accuracies = []
    for draw in range(DRAWS):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw)).to(train.device)
        chosen = torch.cat([order[train_labels[order] == label][:per_class] for label in train_labels.unique()])
        accuracies.append(_accuracy(knn_classify(val, train[chosen], train_labels[chosen], k=1), val_labels))
    return sum(accuracies) / DRAWS


def purity(features: Tensor, labels: Tensor, k: int) -> float:
    """Return the purity (paper section 3.4) of each image's k nearest neighbors among all of these images."""
    unit = F.normalize(features, dim=1)
    _, index = find_backend("auto", unit.device).topk(unit, unit, k)
    found = labels[index.clamp(min=0)].masked_fill(index < 0, -1)
    return float(neighbor_purity(found, labels))


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).float().mean())
