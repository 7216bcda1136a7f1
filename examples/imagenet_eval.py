"""Measure an encoder as the MSF paper does (section 3.2 and 3.3), and set the paper's rows beside it.

Needs: pip install 'msf_core[examples]'

    python examples/imagenet_eval.py knn runs/digits                         a run of imagenet_train.py, on its data
    python examples/imagenet_eval.py linear runs/folder --data IMAGENET      the linear protocol
    python examples/imagenet_eval.py knn resnet50 --weights IMAGENET1K_V2 --data IMAGENET
    torchrun --nproc-per-node=8 examples/imagenet_eval.py linear runs/folder --data IMAGENET     on 8 GPUs

Each writes a JSON record of the whole protocol, beside the encoder or to --out.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluating.encoders import LoadedEncoder, load_encoder
from evaluating.linear import Protocol, Standardize, accuracy, batches_of, train_linear
from evaluating.paper import TABLE_2, TABLE_3, Rows, beside
from evaluating.subsets import listed, share_of_each_class, some_of_each_class
from msf_core.distributed import Ranks
from training.data import DataSource, Share, open_source
from training.evaluation import few_labels, linear_probe
from training.features import Batch, extract, features_of, nearest_neighbour_accuracy, part_of_images
from training.ranks import joined, shared
from training.report import environment
from training.settings import DATASETS


class Evaluation:
    """An encoder, the images that it is measured on, and the ranks that do it."""

    def __init__(self, flags: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.flags, self.ranks, self.device = flags, ranks, device
        self.encoder: LoadedEncoder = load_encoder(flags.encoder, ranks, flags.arch, flags.weights, flags.image_size)
        known = self.encoder.trained_on
        self.dataset: str = flags.dataset or ("folder" if flags.data else known.get("dataset", "folder"))
        self.data: str = flags.data or known.get("data", "data")
        self.image_size: int = flags.image_size or known.get("image_size", 224)
        if self.dataset == "digits" and self.encoder.arch != "digits":
            raise ValueError(f"the digits are grey, {self.encoder.arch} takes colours: give --data DIR or --dataset")
        self.source: DataSource = open_source(
            self.dataset,
            self.data,
            image_size=self.image_size,
            augmentation="w/w",
            share=Share(flags.batch_size, 1, ranks.rank, ranks.size),
            workers=flags.workers,
            seed=flags.seed,
            device=device,
        )
        if not self.source.has_val:
            raise ValueError(f"{self.data} has no labelled images in train/ and val/ to evaluate on")
        if flags.batch_size < ranks.size:
            raise ValueError(f"--batch-size must be at least the {ranks.size} ranks, got {flags.batch_size}")
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.backbone = self.encoder.backbone.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
        labels = self.source.labels("train")
        self.classes = int(labels.max()) + 1

    def part(self, split: str) -> Iterator[Batch]:
        """Yield the features of this rank's part of a split, with progress."""
        with progress_bar(self, f"features of {split}", "image", self.source.size(split) // self.ranks.size) as bar:
            for features, labels in part_of_images(self.backbone, self.source, split, self.ranks):
                bar.update(len(labels))
                yield features, labels

    def all(self, split: str) -> Batch:
        """Return the features of a whole split, on every rank."""
        return extract(self.backbone, self.source, split, self.ranks)


def knn(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, float]]:
    """1-NN and 20-NN by cosine similarity of the features, over the library's own search."""
    dtype = getattr(torch, evaluation.flags.dtype)
    size = evaluation.source.size("train")
    train, val = evaluation.part("train"), evaluation.part("val")
    row = nearest_neighbour_accuracy(train, size, val, evaluation.ranks, dtype)
    protocol = {"view": view(evaluation), "similarity": "cosine", "vote": "majority", "dtype": evaluation.flags.dtype}
    return protocol, row


def linear(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, float]]:
    """The paper's linear protocol on all labels, or logistic regression."""
    if evaluation.flags.solver == "logistic":
        features = {split: evaluation.all(split) for split in ("train", "val")}
        with shared(evaluation.ranks):
            value = linear_probe(features) if evaluation.ranks.rank == 0 else 0.0
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
        if not flags.per_class:
            raise ValueError("--classifier nn goes with --per-class")
        for count in flags.per_class:
            some_of_each_class(labels, count, flags.seed)
        features = {split: evaluation.all(split) for split in ("train", "val")}
        row = {f"top1 {count}/class": few_labels(features, count) for count in flags.per_class}
        return {"classifier": "1-NN", "view": view(evaluation), "draws": 10}, row
    subsets: dict[str, list[int]] = {}
    if flags.list:
        subsets |= {Path(path).name: listed(Path(path), evaluation.source) for path in flags.list}
    elif flags.per_class:
        subsets |= {f"{count}/class": some_of_each_class(labels, count, flags.seed) for count in flags.per_class}
    else:
        subsets |= {f"{share:g}%": share_of_each_class(labels, share, flags.seed) for share in flags.percent}
    protocol: dict[str, Any] = {}
    row = {}
    for name, places in subsets.items():
        described, result = linear_on(evaluation, places)
        protocol[name] = {"images": len(places), **described}
        row |= {f"{measure} {name}": value for measure, value in result.items() if measure.startswith("top")}
    return protocol, row


def linear_on(evaluation: Evaluation, places: list[int]) -> tuple[dict[str, Any], dict[str, float]]:
    """Train layers on these training images; return the protocol, and the accuracy with the paper's learning rate.

    With a sweep "best top1" is that of the best learning rate, chosen on the test images as is customary.
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
        raise ValueError(f"{len(places)} labelled images cannot be divided over {ranks.size} ranks")
    views: Callable[[int], Iterator[Batch]]
    if flags.cache:
        features, labels = cached(evaluation, places)
        standardize = Standardize.fitted([(features, labels)], ranks)

        def views(epoch: int) -> Iterator[Batch]:
            for batch in batches_of(len(places), epoch, protocol, ranks):
                yield features[batch], labels[batch]
    else:
        standardize = Standardize.fitted(features_of(evaluation.backbone, source.images("train", own)), ranks)

        def views(epoch: int) -> Iterator[Batch]:
            batches = [[places[i] for i in batch] for batch in batches_of(len(places), epoch, protocol, ranks)]
            return features_of(evaluation.backbone, source.supervised_views(epoch, batches))

    with progress_bar(evaluation, f"training on {len(places)} images", "epoch", protocol.epochs) as bar:
        layers = train_linear(views, standardize, evaluation.classes, protocol, ranks, lambda loss: shown(bar, loss))
    results = accuracy(list(layers), standardize, evaluation.part("val"), ranks)
    described = {
        **asdict(protocol),
        "optimizer": "SGD, learning rate to a tenth at the milestones",
        "features": "normalized to unit length, then standardized over the labelled training images",
        "training view": view(evaluation) if flags.cache else supervised_view(evaluation),
        "features cached, no augmentation": flags.cache,
        "test view": view(evaluation),
        "all": {f"{lr:g}": result for lr, result in zip(protocol.lrs, results, strict=True)},
    }
    row = dict(results[0])
    if flags.sweep:
        row["best top1"] = max(result["top1"] for result in results)
        described["best top1"] = "of these learning rates the best on the test images"
    return described, row


def progress_bar(evaluation: Evaluation, what: str, unit: str, total: int) -> tqdm:
    """Return a bar that rank 0 shows; a log file gets a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(desc=what, unit=unit, total=total, disable=evaluation.ranks.rank > 0, mininterval=interval)


def shown(bar: tqdm, loss: float) -> None:
    """Count an epoch."""
    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    bar.update()


def cached(evaluation: Evaluation, places: list[int]) -> Batch:
    """Return the features of these training images, on every rank."""
    features, labels = evaluation.all("train")
    chosen = torch.tensor(places, device=features.device)
    return features[chosen], labels[chosen]


def view(evaluation: Evaluation) -> str:
    """Describe how test images are seen."""
    if evaluation.dataset == "digits":
        return "16 x 16, as they are"
    return f"resize {round(evaluation.image_size * 256 / 224)}, centre crop {evaluation.image_size}"


def supervised_view(evaluation: Evaluation) -> str:
    """Describe how training images are seen."""
    if evaluation.dataset == "digits":
        return "weak view"
    return f"random resized crop {evaluation.image_size} (area 0.08 to 1), horizontal flip"


COMMANDS: dict[str, Callable[[Evaluation], tuple[dict[str, Any], dict[str, float]]]] = {
    "knn": knn,
    "linear": linear,
    "few-labels": few,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        add_common(commands.add_parser(name, help=function.__doc__, formatter_class=parser.formatter_class))
    commands.choices["knn"].add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the features that are kept"
    )
    for name in ("linear", "few-labels"):
        sub = commands.choices[name]
        sub.add_argument("--lr", type=positive, default=0.01, help="learning rate")
        sub.add_argument("--sweep", type=positive, nargs="*", default=[], help="learning rates to try too")
        sub.add_argument("--epochs", type=whole, default=40, help="to train for")
        sub.add_argument("--cache", action="store_true", help="extract features once, without augmentation")
    commands.choices["linear"].add_argument(
        "--solver", choices=("sgd", "logistic"), default="sgd", help="the paper's SGD, or logistic regression"
    )
    sub = commands.choices["few-labels"]
    sub.add_argument("--percent", type=positive, nargs="+", default=[1.0, 10.0], help="of each class's labels")
    sub.add_argument("--per-class", type=whole, nargs="+", default=[], help="labels of each class instead")
    sub.add_argument("--list", nargs="+", default=[], help="files that list images instead, as SimCLR's 1percent.txt")
    sub.add_argument("--classifier", choices=("linear", "nn"), default="linear", help="nn: 1-NN, mean of 10 draws")
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all commands have."""
    add = parser.add_argument
    add("encoder", help="a run's folder, checkpoint.pt, backbone.safetensors, or a model of torchvision or timm")
    add("--arch", default="", help="of a safetensors file that does not say")
    add("--weights", default="", help='of a model by name, as IMAGENET1K_V2 (timm: "pretrained"); without: random')
    add("--dataset", choices=DATASETS, default="", help="default: the run's, or folder")
    add("--data", default="", help="ImageFolder tree with train/ and val/; default: the run's")
    add("--image-size", type=whole, default=0, help="default: the run's, or 224")
    add("--batch-size", type=whole, default=256, help="images at a time over all ranks, in training too")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read images, a rank")
    add("--device", default="auto", help="auto: the GPU if there is one")
    add("--seed", type=int, default=0, help="of order, views and draws")
    add("--timeout", type=whole, default=1800, help="seconds that ranks wait for one another")
    add("--out", default="", help="file of the record; default: eval_COMMAND.json beside the encoder, or here")


def whole(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive(text: str) -> float:
    """Parse a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        with joined(flags.device, flags.timeout) as (ranks, device):
            with shared(ranks):
                evaluation = Evaluation(flags, ranks, device)
                path = Path(flags.out) if flags.out else default_record(evaluation)
                path.parent.mkdir(parents=True, exist_ok=True)
            protocol, row = COMMANDS[flags.command](evaluation)
            if ranks.rank == 0:
                report(evaluation, protocol, row, path, time.perf_counter() - started)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        if int(os.environ.get("RANK", 0)) and str(error).startswith("rank "):
            return 2  # the rank that it befell says it, and so does rank 0
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def default_record(evaluation: Evaluation) -> Path:
    """Return where the record goes."""
    name = f"eval_{evaluation.flags.command}"
    if evaluation.encoder.folder is not None:
        return evaluation.encoder.folder / f"{name}.json"
    return Path(f"{name}_{evaluation.encoder.arch}.json")


def report(evaluation: Evaluation, protocol: dict[str, Any], row: dict[str, float], path: Path, seconds: float) -> None:
    """Print the table and write the record."""
    flags, source = evaluation.flags, evaluation.source
    record = {
        "command": flags.command,
        "encoder": {"arch": evaluation.encoder.arch, **evaluation.encoder.source},
        "data": {
            "dataset": evaluation.dataset,
            "path": "" if evaluation.dataset == "digits" else evaluation.data,
            "training_images": source.size("train"),
            "test_images": source.size("val"),
            "classes": evaluation.classes,
        },
        "protocol": protocol,
        "results": row,
        "ranks": evaluation.ranks.size,
        "seconds": round(seconds, 1),
        **environment(evaluation.device),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    percent: Rows = {
        f"{Path(flags.encoder).name} on {evaluation.dataset}": {name: 100 * value for name, value in row.items()}
    }
    paper = TABLE_3 if flags.command == "few-labels" else TABLE_2
    columns = {name: name for name in row} | (
        {"nn1": "1-NN", "nn20": "20-NN"} if flags.command == "knn" else {"linear": "linear"} if "linear" in row else {}
    )
    print(beside(percent, paper, columns))
    print(f"\n{path}: the record, with the whole protocol")


if __name__ == "__main__":
    sys.exit(main())
