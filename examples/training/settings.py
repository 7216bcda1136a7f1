"""The flags, and what they are when not given: the paper's settings, or a small recipe for small images."""

import argparse
import itertools
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from training.augment import AUGMENTATIONS
from training.bad_images import ACTIONS, LIST

DATASETS = ("digits", "folder", "cifar10", "cifar100", "fashion-mnist", "stl10")
METHODS = ("msf", "byol")
STEMS = ("auto", "imagenet", "small")
# What may differ between a run and its continuation. Everything else decides the numbers.
FREE_TO_CHANGE = {"out", "resume", "device", "workers", "eval_every", "checkpoint_every", "data", "backend"}
FREE_TO_CHANGE |= {"bank_layout", "timeout", "keep_every", "on_bad_image"}


@dataclass
class Settings:
    """One run. The defaults are the paper's (section 3.1)."""

    dataset: str = "folder"
    data: str = "data"
    val_split: float = 0.0
    recipe: str = "own"
    arch: str = "resnet50"
    stem: str = "auto"
    image_size: int = 224
    augmentation: str = "w/s"
    blur: float = 0.5
    views: str = "two"
    method: str = "msf"
    k: int = 5
    k_end: int = 0
    bank_size: int = 128_000
    bank_dtype: str = "float32"
    bank_layout: str = "replicated"
    backend: str = "auto"
    momentum: float = 0.99
    predictor: str = "mlp"
    hidden: int = 4096
    dim: int = 512
    epochs: int = 200
    steps: int = 0
    batch_size: int = 256
    accumulate: int = 1
    batchnorm: str = "local"
    lr: float = 0.05
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: str = "auto"
    seed: int = 0
    device: str = "auto"
    workers: int = -1
    on_bad_image: str = "error"
    timeout: int = 1800
    eval_every: int = 0
    checkpoint_every: int = 1
    keep_every: int = 0
    out: str = ""
    resume: str = ""


_LIGHTLY: dict[str, Any] = {
    "arch": "resnet18",
    "blur": 0.0,
    "bank_size": 4096,
    "momentum": 0.99,
    "hidden": 1024,
    "dim": 256,
    "weight_decay": 5e-4,
}
_SMALL = {**_LIGHTLY, "bank_size": 16_384, "batch_size": 256, "lr": 0.12, "eval_every": 20}
PRESETS: dict[str, dict[str, Any]] = {
    "folder": {},
    "digits": {
        "arch": "digits",
        "image_size": 16,
        "bank_size": 1024,
        "momentum": 0.97,
        "hidden": 256,
        "dim": 64,
        "steps": 1800,
        "batch_size": 64,
        "lr": 0.1,
        "workers": 0,
        "eval_every": 5,
        "checkpoint_every": 10,
    },
    # Sizes and rates are those of lightly's recipe below for a batch of 256; Fashion-MNIST is about as small as CIFAR.
    "cifar10": {"image_size": 32, **_SMALL},
    "cifar100": {"image_size": 32, **_SMALL},
    "fashion-mnist": {"image_size": 28, **_SMALL},
    "stl10": {"image_size": 96, **_SMALL, "blur": 0.5, "bank_size": 16_384},
}

# Recipes of the field for CIFAR, as far as they are settings of this trainer: its views are the paper's, and one
# encoder's loss is taken, where both of these codebases take it both ways. What is said of results is theirs, for
# BYOL. None of them was run here, where neither CIFAR nor a GPU was at hand: with this trainer they are unmeasured.
RECIPES: dict[str, dict[str, Any]] = {
    "own": {},
    # lightly, docs/source/getting_started/benchmarks/cifar10_benchmark.py: ResNet-18 with the small stem, SGD with
    # lr 0.06 · batch / 128, weight decay 5e-4, a cosine to 0, no blur, projector 512-1024-256, target momentum 0.99.
    # kNN accuracy of BYOL on CIFAR-10 there: 0.869 (batch 128, 200 epochs).
    "lightly-200": {**_LIGHTLY, "batch_size": 128, "lr": 0.06, "epochs": 200},
    # The same file, batch 512 and 800 epochs; the bank is larger there too. 0.911 in its version of 2022.
    "lightly-800": {**_LIGHTLY, "batch_size": 512, "lr": 0.24, "epochs": 800, "bank_size": 8192},
    # solo-learn, scripts/pretrain/cifar/byol.yaml: batch 256, 1,000 epochs, projector and predictor of 4,096 hidden
    # units and 256 outputs, no blur. Linear accuracy of BYOL on CIFAR-10 there: 92.58. Its optimizer is LARS with
    # lr 1.0 and weight decay 1e-5, its target momentum rises from 0.99 to 1; this trainer has SGD, here with lightly's
    # rate and decay, and a constant momentum.
    "solo-learn": {**_LIGHTLY, "batch_size": 256, "lr": 0.12, "epochs": 1000, "hidden": 4096},
}

_HELP = {
    "dataset": "where the images are from; folder goes with --data",
    "data": "folder with train/ and val/, a folder a class in each, as ImageNet has (or a flat one, without "
    "labels); for cifar10, cifar100, fashion-mnist and stl10 where they are or will be downloaded to; "
    "for fashion-mnist also a folder with its four idx files, packed or not",
    "val_split": "fraction of each class that is held out to evaluate on, for a --data without val/; 0: none",
    "recipe": "settings of another codebase for CIFAR, with its ResNet-18, instead of the data set's own",
    "arch": "backbone: a classification model of torchvision or timm by its name, or 'digits'",
    "stem": "of torchvision's ResNets: imagenet is 7x7, stride 2 and max-pool; small is 3x3, stride 1 without; "
    "auto is small up to 64 pixels",
    "image_size": "side of the views, in pixels",
    "augmentation": "views of the target / of the online encoder: s strong, w weak",
    "blur": "probability of the blur in a strong view (not of the digits)",
    "views": "two of each image; or the same one for both encoders, which the paper found to fail",
    "method": "msf, or byol: k = 1 and no bank",
    "k": "neighbors that serve, the target embedding itself included",
    "k_end": "k at the end, if it is to rise or fall in a straight line; 0: constant",
    "bank_size": "rows of the memory bank",
    "bank_dtype": "dtype of its rows",
    "bank_layout": "under torchrun: all rows on every rank, or a shard on each",
    "backend": "its search backend",
    "momentum": "of the target encoder, constant",
    "predictor": "mlp, or none: without, the encoder collapses",
    "hidden": "hidden units of the projection and the prediction MLP",
    "dim": "dimensions of the embedding",
    "epochs": "passes over the training images",
    "steps": "optimizer steps, instead of --epochs",
    "batch_size": "images a step, over all ranks and micro-batches",
    "accumulate": "micro-batches whose gradients make one step",
    "batchnorm": "under torchrun: statistics of a rank's images, of all ranks' (sync), or of a rank's, the target's "
    "images being shuffled over the ranks (shuffle; as in the authors' code)",
    "lr": "learning rate at the start; falls to 0 along a cosine",
    "sgd_momentum": "momentum of SGD",
    "weight_decay": "weight decay of SGD",
    "precision": "auto: bfloat16 autocast on a GPU that has it, float32 elsewhere",
    "seed": "of weights, views and order",
    "device": "auto: the GPU if there is one",
    "workers": "processes that read photographs, for each rank; -1: this machine's cores, divided by its ranks",
    "on_bad_image": "one that cannot be read: stop with an error, or train on another one in its place and evaluate "
    f"without it (skip); the run's {LIST} names it",
    "timeout": "seconds that ranks wait for one another",
    "eval_every": "epochs between nearest-neighbor evaluations; 0: at the end alone",
    "checkpoint_every": "epochs between checkpoints",
    "keep_every": "epochs between backbones that are kept, the first epoch's too; 0: the last alone",
    "out": "folder of the run; the default is a new one below runs/",
    "resume": "folder of an earlier run: go on from its checkpoint, with its settings; or auto: go on from the one "
    "in --out, if there is one (a restart by torchrun does so in any case)",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "dataset": DATASETS,
    "augmentation": AUGMENTATIONS,
    "recipe": tuple(RECIPES),
    "stem": STEMS,
    "views": ("two", "same"),
    "method": METHODS,
    "predictor": ("mlp", "none"),
    "bank_dtype": ("float32", "float16", "bfloat16"),
    "bank_layout": ("replicated", "sharded"),
    "batchnorm": ("local", "sync", "shuffle"),
    "precision": ("auto", "float32", "bfloat16"),
    "on_bad_image": ACTIONS,
}
_AT_LEAST_ONE = ("image_size", "k", "bank_size", "hidden", "dim", "epochs", "checkpoint_every", "accumulate", "timeout")
_NOT_NEGATIVE = ("steps", "lr", "sgd_momentum", "weight_decay", "seed", "eval_every", "keep_every", "k_end")


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of the flags. A flag that is not given is absent from what it returns."""
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawTextHelpFormatter
    )
    for field in fields(Settings):
        digits = PRESETS["digits"].get(field.name, field.default)
        paper = f"{field.default!r}" if digits == field.default else f"{field.default!r}; digits {digits!r}"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            choices=_CHOICES.get(field.name),
            help=f"{_HELP[field.name]} ({paper})",
        )
    parser.add_argument(
        "--check-images", action="store_true", help="read every image, list those that cannot be read, and end"
    )
    return parser


def complete(given: dict[str, Any]) -> Settings:
    """Return the settings of a fresh run: what was given, over the data set's own defaults.

    Raises:
        ValueError: a value out of range, or flags that do not go together.
    """
    dataset = given.get("dataset", "folder" if "data" in given else "digits")
    if dataset == "folder" and "data" not in given:
        raise ValueError("--dataset folder needs --data DIR")
    if dataset == "digits" and "data" in given:
        raise ValueError(f"--data goes with --dataset {', '.join(name for name in DATASETS if name != 'digits')}")
    recipe = RECIPES[given.get("recipe", Settings.recipe)]
    if recipe and dataset not in ("cifar10", "cifar100"):
        raise ValueError(f"--recipe {given['recipe']} is for --dataset cifar10 or cifar100, got {dataset}")
    preset = {"dataset": dataset, **PRESETS[dataset], **recipe}
    if "epochs" in given and "steps" in given:
        raise ValueError("--epochs and --steps say the same: give one of them")
    if "epochs" in given:
        preset["steps"] = 0
    settings = Settings(**{**preset, **given})
    if settings.method == "byol":
        if given.get("k", 1) != 1:
            raise ValueError(f"--method byol is k = 1, got --k {settings.k}")
        if settings.k_end:
            raise ValueError(f"--method byol is k = 1, got --k-end {settings.k_end}")
        settings.k = 1
    check(settings)
    return settings


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """Return the saved run's settings, with those given that are free to change.

    Raises:
        ValueError: one that decides the numbers was given and differs.
    """
    differing = [
        f"--{name.replace('_', '-')} is {saved[name]!r} there, {value!r} here"
        for name, value in given.items()
        if name not in FREE_TO_CHANGE and saved.get(name) != value
    ]
    if differing:
        raise ValueError(f"the run to resume has other settings: {'; '.join(differing)}")
    if saved.keys() != {field.name for field in fields(Settings)}:
        raise ValueError("the run to resume was saved by another version of this script")
    settings = Settings(**{**saved, **given})
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise ValueError for a value out of range, naming its flag."""
    values = asdict(settings)
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0), (("workers",), -1)):
        for name in names:
            if values[name] < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {values[name]}")
    for name in ("k", "k_end"):
        if values[name] > settings.bank_size:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at most --bank-size, {settings.bank_size}, got {values[name]}")
    if not 0 <= settings.momentum <= 1:
        raise ValueError(f"--momentum must be between 0 and 1, got {settings.momentum}")
    if not 0 <= settings.blur <= 1:
        raise ValueError(f"--blur must be between 0 and 1, got {settings.blur}")
    if settings.dataset == "digits" and settings.image_size != 16:
        raise ValueError(f"the digits are 16 pixels wide, got --image-size {settings.image_size}")


def check_division(settings: Settings, ranks: int) -> None:
    """Raise ValueError unless a step's images can be divided evenly, with at least two for each BatchNorm."""
    parts = settings.accumulate * ranks
    if settings.batch_size % parts or settings.batch_size < 2 * parts:
        ways = [f"{ranks} ranks"] * (ranks > 1) + [f"--accumulate {settings.accumulate}"] * (settings.accumulate > 1)
        evenly = f", divided evenly by {' x '.join(ways)}" if ways else ""
        raise ValueError(f"--batch-size must be at least {2 * parts} for BatchNorm{evenly}, got {settings.batch_size}")


def make_run_folder(out: str, dataset: str) -> Path:
    """Make the folder of a fresh run: ``out``, or a new one below runs/, and return it.

    Raises:
        ValueError: ``out`` has a checkpoint already, which the run would overwrite.
    """
    if out:
        folder = Path(out)
        if (folder / "checkpoint.pt").exists():
            raise ValueError(f"{folder} holds a run: go on with --resume {folder}, or choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in itertools.count(1):
        folder = Path("runs") / (dataset if number == 1 else f"{dataset}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")
