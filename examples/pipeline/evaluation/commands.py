"""The commands of examples/imagenet_eval.py: each returns its protocol and its results."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from msf_core.distributed import Ranks
from pipeline.data.bad_images import BadImages
from pipeline.data.opening import open_source
from pipeline.data.photos import Photos, workers_of
from pipeline.data.source import DataSource, Share
from pipeline.evaluation.features import (
    NEIGHBORS,
    Batch,
    extract,
    features_of,
    nearest_neighbor_accuracy,
    part_of_images,
    readable,
)
from pipeline.evaluation.linear import Protocol, Standardize, accuracy, batches_of, train_linear
from pipeline.evaluation.scores import few_labels, linear_probe
from pipeline.evaluation.subsets import listed, share_of_each_class, some_of_each_class
from pipeline.evaluation.transfer import SETS, Parts, TransferSet, classify
from pipeline.models.encoders import LoadedEncoder, load_encoder
from pipeline.models.export import LAYOUTS, export_to
from pipeline.running.ending import in_one_line
from pipeline.running.flags import existing_folder, writable_folder
from pipeline.running.progress import progress_bar
from pipeline.running.ranks import shared


class Subject:
    """The encoder that a command evaluates, and the ranks that take part."""

    def __init__(self, flags: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.flags, self.ranks, self.device = flags, ranks, device
        self.bad = BadImages(getattr(flags, "on_bad_image", "error"))
        batch_size = getattr(flags, "batch_size", ranks.size)
        if batch_size < ranks.size:
            raise ValueError(f"--batch-size must be at least {ranks.size}, one image per rank, got {batch_size}")
        size = flags.image_size or 0
        self.encoder: LoadedEncoder = load_encoder(flags.encoder, ranks, flags.arch, flags.weights, size)
        self.gray = self.encoder.gray
        self.image_size: int = flags.image_size or self.encoder.trained_on.get("image_size", 16 if self.gray else 224)
        self.backbone = self.encoder.backbone.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._unreadable: dict[str, str] | None = None

    def unreadable(self) -> dict[str, str]:
        """Return the unreadable images of all ranks.

        All ranks must make the first call together, after they have read all images. Later calls do not communicate. If
        only rank 0 has work left, make the first call before it: the other ranks must not wait for rank 0.
        """
        if self._unreadable is None:
            self._unreadable = self.bad.of_all(self.ranks)
        return self._unreadable


class Evaluation(Subject):
    """An encoder, and the images that it is evaluated on."""

    def __init__(self, flags: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        if flags.data and flags.dataset in ("", "folder"):
            existing_folder("--data", flags.data)
        super().__init__(flags, ranks, device)
        known = self.encoder.trained_on
        usual = "folder" if flags.data else known.get("dataset", "digits" if self.gray else "folder")
        self.dataset: str = flags.dataset or usual
        self.data: str = flags.data or known.get("data", "" if self.dataset == "folder" else "data")
        self._check()
        self.source: DataSource = open_source(
            self.dataset,
            self.data,
            image_size=self.image_size,
            augmentation="w/w",
            share=Share(flags.batch_size, 1, ranks.rank, ranks.size),
            workers=flags.workers,
            seed=flags.seed,
            device=device,
            bad=self.bad,
            val_split=self._val_split(),
        )
        if not self.source.has_val:
            held_out = f"; the run held out --val-split {known['val_split']}" if known.get("val_split") else ""
            raise ValueError(f"{self.data} has no labeled images to evaluate on: {self.source.found.no_val}{held_out}")
        labels = self.source.labels("train")
        self.classes = int(labels.max()) + 1

    def _check(self) -> None:
        """Raise ValueError for missing images, or images that the encoder does not accept."""
        flags = self.flags
        if self.dataset == "digits":
            if not self.gray:
                raise ValueError(
                    f"the digits are gray, but {self.encoder.arch} takes color images: give --data DIR or --dataset"
                )
            if flags.data:
                raise ValueError("--data cannot be used with --dataset digits, which come with scikit-learn")
            if self.image_size != 16:
                raise ValueError(f"the digits are 16 pixels wide, got --image-size {self.image_size}")
        elif self.gray:
            raise ValueError(f"{flags.encoder} takes the digits, which are gray: leave out --data and --dataset")
        elif not self.data:
            raise ValueError(f"{flags.encoder} does not name the images to use: give --data DIR, or --dataset")
        elif self.dataset == "folder":
            named = "--data" if flags.data else f"--data is needed, because the images of {flags.encoder} are gone"
            existing_folder(named, self.data)
        elif Path(self.data).is_file():
            existing_folder("--data", self.data)

    def _val_split(self) -> float:
        """Return the fraction to hold out: --val-split or, if the images are those of the run, the run's fraction."""
        known = self.encoder.trained_on
        if self.flags.val_split is not None:
            return float(self.flags.val_split)
        same = self.dataset == "folder" and Path(known.get("data", "")).resolve() == Path(self.data).resolve()
        return float(known.get("val_split", 0.0)) if same else 0.0

    def part(self, split: str) -> Iterator[Batch]:
        """Yield the features of this rank's part of a split, and show a progress bar."""
        with progress_bar(
            f"features of {split}", "image", self.source.size(split) // self.ranks.size, self.ranks
        ) as bar:
            for features, labels in part_of_images(self.backbone, self.source, split, self.ranks):
                bar.update(len(labels))
                yield features, labels

    def all(self, split: str) -> Batch:
        """Return the features of a whole split, on every rank."""
        return extract(self.backbone, self.source, split, self.ranks)


def knn(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, float]]:
    """1-NN and 20-NN by cosine similarity of the features, with the library's own search."""
    dtype = getattr(torch, evaluation.flags.dtype)
    size = evaluation.source.size("train")
    train, val = evaluation.part("train"), evaluation.part("val")
    row = nearest_neighbor_accuracy(train, size, val, evaluation.ranks, dtype)
    protocol: dict[str, Any] = {"view": view(evaluation), "similarity": "cosine", "vote": "majority"}
    protocol["dtype"] = evaluation.flags.dtype
    # With k > n, only n neighbors would vote, so the result would not be that of k-NN.
    too_many = {f"nn{k}": f"needs {k} training images, but there are {size}" for k in NEIGHBORS if k > size}
    if too_many:
        protocol["not measured"] = too_many
    return protocol, {name: value for name, value in row.items() if name not in too_many}


def linear(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, float]]:
    """The paper's linear protocol on all labels, or logistic regression."""
    if evaluation.flags.solver == "logistic":
        features = {split: evaluation.all(split) for split in ("train", "val")}
        evaluation.unreadable()  # exchanged now: later, the other ranks would wait for rank 0
        value = linear_probe(features) if evaluation.ranks.rank == 0 else 0.0  # may take long
        protocol = {
            "solver": "scikit-learn's LogisticRegression(C=0.1, max_iter=300)",
            "view": view(evaluation),
            "features": "normalized to unit length, then standardized over the training set",
        }
        return protocol, {"linear": value}
    protocol, rows = linear_on(evaluation, list(range(evaluation.source.size("train"))))
    return protocol, {"linear": rows["top1"], **{name: value for name, value in rows.items() if name != "top1"}}


def few(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, float]]:
    """The linear protocol, or 1-NN, on few labels."""
    flags, labels = evaluation.flags, evaluation.source.labels("train")
    if flags.classifier == "nn":
        for count in flags.per_class:
            some_of_each_class(labels, count, flags.seed)
        features = {split: evaluation.all(split) for split in ("train", "val")}
        row = {f"top1 {count}/class": few_labels(features, count) for count in flags.per_class}
        return {"classifier": "1-NN", "view": view(evaluation), "draws": 10}, row
    subsets: dict[str, list[int]] = {}
    if flags.list:
        short = len({Path(path).name for path in flags.list}) == len(flags.list)
        subsets |= {Path(path).name if short else path: listed(Path(path), evaluation.source) for path in flags.list}
    elif flags.per_class:
        subsets |= {f"{count}/class": some_of_each_class(labels, count, flags.seed) for count in flags.per_class}
    else:
        subsets |= {f"{share:g}%": share_of_each_class(labels, share, flags.seed) for share in flags.percent}
    for name, places in subsets.items():
        if len(places) < evaluation.ranks.size:
            raise ValueError(f"{name}: {len(places)} images cannot be divided over {evaluation.ranks.size} ranks")
    protocol: dict[str, Any] = {}
    row = {}
    for name, places in subsets.items():
        described, result = linear_on(evaluation, places)
        protocol[name] = {"images": len(places), **described}
        row |= {f"{measure} {name}": value for measure, value in result.items() if measure.startswith("top")}
    return protocol, row


def linear_on(evaluation: Evaluation, places: list[int]) -> tuple[dict[str, Any], dict[str, float]]:
    """Train layers on these training images; return the protocol, and the accuracy with the learning rate --lr.

    With --sweep, "best top1" is the accuracy with the best learning rate, chosen on the test images as is customary.
    """
    flags, ranks, source = evaluation.flags, evaluation.ranks, evaluation.source
    protocol = Protocol(
        lrs=(flags.lr, *(lr for lr in flags.sweep if lr != flags.lr)),
        epochs=flags.epochs,
        batch_size=flags.batch_size,
        seed=flags.seed,
    )
    own = places[len(places) * ranks.rank // ranks.size : len(places) * (ranks.rank + 1) // ranks.size]
    if len(places) < ranks.size:
        raise ValueError(f"{len(places)} labeled images cannot be divided over {ranks.size} ranks")
    views: Callable[[int], Iterator[Batch]]
    if flags.cache:
        features, labels = extract(evaluation.backbone, source, "train", ranks, places)
        standardize = Standardize.fitted([(features, labels)], ranks)

        def views(epoch: int) -> Iterator[Batch]:
            for batch in batches_of(len(labels), epoch, protocol, ranks):
                yield features[batch], labels[batch]
    else:
        standardize = Standardize.fitted(features_of(evaluation.backbone, readable(source.images("train", own))), ranks)

        def views(epoch: int) -> Iterator[Batch]:
            batches = [[places[i] for i in batch] for batch in batches_of(len(places), epoch, protocol, ranks)]
            return features_of(evaluation.backbone, source.supervised_views(epoch, batches))

    with progress_bar(f"training on {len(places)} images", "epoch", protocol.epochs, evaluation.ranks) as bar:
        layers = train_linear(views, standardize, evaluation.classes, protocol, ranks, lambda loss: shown(bar, loss))
    results = accuracy(list(layers), standardize, evaluation.part("val"), ranks)
    described: dict[str, Any] = {
        **asdict(protocol),
        "optimizer": "SGD, learning rate divided by 10 at the milestones",
        "features": "normalized to unit length, then standardized over the labeled training images",
        "training view": view(evaluation) if flags.cache else supervised_view(evaluation),
        "features cached, no augmentation": flags.cache,
        "test view": view(evaluation),
        "all": {f"{lr:g}": result for lr, result in zip(protocol.lrs, results, strict=True)},
    }
    row = dict(results[0])
    for lr, layer in zip(protocol.lrs, layers, strict=True):
        if not all(parameter.isfinite().all() for parameter in layer.parameters()):
            described.setdefault("diverged", []).append(lr)
            if ranks.rank == 0:
                print(f"warning: training diverged at learning rate {lr:g}: ignore its accuracy", file=sys.stderr)
    if flags.sweep:
        row["best top1"] = max(result["top1"] for result in results)
        described["best top1"] = "the best of these learning rates on the test images"
    return described, row


class Transfer(Subject):
    """An encoder, and the folder of the transfer data sets."""

    def __init__(self, flags: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        if not flags.download or Path(flags.data).exists():
            existing_folder("--data", flags.data)
        super().__init__(flags, ranks, device)
        if self.gray:
            raise ValueError(f"{flags.encoder} takes the digits, which are gray: the transfer sets are in color")


def transfer(subject: Transfer) -> tuple[dict[str, Any], dict[str, float]]:
    """Logistic regression on those of the paper's ten data sets that are on disk."""
    flags, ranks = subject.flags, subject.ranks
    chosen = [one for one in SETS if one.name in flags.sets]
    protocol: dict[str, Any] = {
        "view": view_of(subject.image_size),
        "features": "normalized to unit length, then standardized over the training images",
        "solver": "scikit-learn's LogisticRegression, L2, max_iter=1000",
        "strengths C": flags.strengths,
        "sets": {},
        "not measured": {},
    }
    features: dict[str, list[Batch | None]] = {}
    for one in chosen:
        parts = opened(one, subject)
        if isinstance(parts, str):
            protocol["not measured"][one.name] = parts
            continue
        features[one.name] = [
            None if part is None else extract(subject.backbone, photos_of(subject, part), "train", ranks)
            for part in (parts.train, parts.val, parts.test)
        ]
        if ranks.rank == 0:
            print(f"{one.name}: features of {sum(len(part[1]) for part in features[one.name] if part)} images")
    if not features:
        why = "; ".join(f"{name}: {reason}" for name, reason in protocol["not measured"].items())
        raise ValueError(f"--data: none of the data sets is in {flags.data}: {why}")
    subject.unreadable()  # exchanged now: later, the other ranks would wait for rank 0
    row: dict[str, float] = {}
    for one in chosen if ranks.rank == 0 else []:  # may take long
        if one.name in features:
            train, val, test = features[one.name]
            assert train is not None
            assert test is not None
            result = classify(train, val, test, one.per_class, tuple(flags.strengths))
            metric = "mean per class" if one.per_class else "top-1"
            protocol["sets"][one.name] = {"split": one.split, "metric": metric, **result}
            row[one.name] = result["accuracy"]
            print(f"{one.name}: {100 * row[one.name]:.1f} ({metric}, C = {result['C']:g})")
    if len(row) == len(SETS):
        row["mean"] = sum(row.values()) / len(row)
    elif row:
        row[f"mean of these {len(row)}"] = sum(row.values()) / len(row)
    return protocol, row


def opened(one: TransferSet, subject: Subject) -> Parts | str:
    """Return the images of a data set, or the reason why they are missing."""
    flags, ranks = subject.flags, subject.ranks
    found: Parts | str = ""
    for first in (True, False):  # rank 0 may download the data before the others open it
        with shared(ranks):
            if first == (ranks.rank == 0):
                try:
                    found = one.open(Path(flags.data), flags.download and first, flags.seed)
                except Exception as error:  # torchvision's readers raise all kinds of errors on damaged files
                    found = in_one_line(error)
    if ranks.size > 1:
        ranks.agree("set", same={f"{one.name} on disk": isinstance(found, Parts)})
    return found


def photos_of(subject: Subject, images: Dataset[Any]) -> Photos:
    """Return one of torchvision's data sets with the evaluation view."""
    return Photos(
        images,
        None,
        size=subject.image_size,
        has_labels=True,
        share=Share(subject.flags.batch_size, 1, subject.ranks.rank, subject.ranks.size),
        workers=workers_of(subject.flags.workers),
        seed=subject.flags.seed,
        device=subject.device,
        bad=subject.bad,
    )


class Export(Subject):
    """An encoder, and the folder and the layouts in which its backbone is written."""

    def __init__(self, flags: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        super().__init__(flags, ranks, device)
        self.folder = Path(flags.folder) if flags.folder else self.encoder.folder or Path()
        if ranks.rank == 0:
            writable_folder("--folder", self.folder)
        self.refused: dict[str, str] = {}
        for layout in flags.to or LAYOUTS:
            try:
                LAYOUTS[layout].check(self.encoder)
            except (ValueError, ImportError) as error:
                self.refused[layout] = in_one_line(error)
        self.layouts = [layout for layout in flags.to or LAYOUTS if layout not in self.refused]
        if self.refused and (flags.to or not self.layouts):
            raise ValueError("; ".join(f"--to {layout}: {why}" for layout, why in self.refused.items()))


def export(subject: Export) -> tuple[dict[str, Any], dict[str, float]]:
    """Write the backbone in the layouts of other libraries, and verify each file."""
    protocol: dict[str, Any] = {}
    if subject.ranks.rank > 0:
        return protocol, {}
    names = []
    for layout in dict.fromkeys(subject.layouts):
        done = export_to(layout, subject.encoder, subject.folder, subject.image_size)
        protocol[layout] = {"file": str(done.path), "verified": done.verified}
        names += [str(file.relative_to(subject.folder)) for file in done.files]
        print(f"{layout}: {done.path}, verified {done.verified}")
    if subject.refused:
        protocol["not measured"] = subject.refused
    print(f"\n{subject.folder}: {', '.join(names)}")
    return protocol, {}


def shown(bar: tqdm, loss: float) -> None:
    """Advance the bar by an epoch, and show its loss."""
    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    bar.update()


def view(evaluation: Evaluation) -> str:
    """Describe the view of the test images."""
    if evaluation.dataset == "digits":
        return "16 x 16, as they are"
    if evaluation.dataset != "folder":
        return f"whole images, {evaluation.image_size} x {evaluation.image_size}"
    return view_of(evaluation.image_size)


def view_of(size: int) -> str:
    """Describe the evaluation view of photographs at this size."""
    return f"resize {round(size * 256 / 224)}, center crop {size}"


def supervised_view(evaluation: Evaluation) -> str:
    """Describe the views that a classifier is trained on."""
    if evaluation.dataset == "digits":
        return "weak view"
    return f"random resized crop {evaluation.image_size} (area 0.08 to 1), horizontal flip"


COMMANDS: dict[str, tuple[Callable[..., Subject], Callable[[Any], tuple[dict[str, Any], dict[str, float]]]]] = {
    "knn": (Evaluation, knn),
    "linear": (Evaluation, linear),
    "few-labels": (Evaluation, few),
    "transfer": (Transfer, transfer),
    "export": (Export, export),
}
