"""The flags and their defaults: the paper's settings, or a smaller recipe for small images."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.data.bad_images import ACTIONS, LIST
from pipeline.data.opening import DATASETS
from pipeline.data.source import DataSource
from pipeline.running.flags import Parser, finite, whole
from pipeline.training.loggers import LOGGERS
from pipeline.views.augment import AUGMENTATIONS

METHODS = ("msf", "byol")
STEMS = ("auto", "imagenet", "small")
# Settings that may change when a run is resumed. All others would change its results.
FREE_TO_CHANGE = {"out", "resume", "device", "workers", "eval_every", "checkpoint_every", "data", "backend"}
FREE_TO_CHANGE |= {"bank_layout", "timeout", "keep_every", "logger", "on_bad_image", "skip_baselines"}
# Version 0.2.0: settings that differ from today's defaults, and data sets that it normalized differently.
_OLD = {"stem": "imagenet"}
_NORMALIZED_OTHERWISE = ("cifar10", "cifar100", "stl10")


@dataclass
class Settings:
    """The settings of a run. The defaults are the paper's (section 3.1)."""

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
    symmetric: bool = False
    exclude_same_id: bool = False
    same_label: bool = False
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
    skip_baselines: bool = False
    checkpoint_every: int = 1
    keep_every: int = 0
    logger: str = "tensorboard"
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
    # Tuned on 10,000 training images for two CPU cores (see docs/guides/trainer.md). The views are in small_sets.py.
    "fashion-mnist": {
        "arch": "digits",
        "image_size": 28,
        "bank_size": 8192,
        "momentum": 0.98,
        "hidden": 256,
        "dim": 64,
        "epochs": 12,
        "batch_size": 64,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "workers": 0,
        "eval_every": 4,
    },
    # Sizes and rates follow lightly's recipe below, with the learning rate for a batch of 256.
    "cifar10": {"image_size": 32, **_SMALL},
    "cifar100": {"image_size": 32, **_SMALL},
    "stl10": {"image_size": 96, **_SMALL, "blur": 0.5, "bank_size": 16_384},
}

# CIFAR recipes of other codebases, with the settings that this trainer has. The views are the MSF paper's, and the
# loss is not symmetric, unlike in both codebases. The results in the comments are theirs, for BYOL. None of these
# recipes has been run with this trainer.
RECIPES: dict[str, dict[str, Any]] = {
    "own": {},
    # lightly, docs/source/getting_started/benchmarks/cifar10_benchmark.py: ResNet-18 with the small stem, SGD with
    # lr 0.06 · batch / 128, weight decay 5e-4, a cosine to 0, no blur, projector 512-1024-256, target momentum 0.99.
    # kNN accuracy of BYOL on CIFAR-10 there: 0.869 (batch 128, 200 epochs).
    "lightly-200": {**_LIGHTLY, "batch_size": 128, "lr": 0.06, "epochs": 200},
    # The same file, batch 512 and 800 epochs; the bank is larger there too. 0.911 in its version of 2022.
    "lightly-800": {**_LIGHTLY, "batch_size": 512, "lr": 0.24, "epochs": 800, "bank_size": 8192},
    # solo-learn, scripts/pretrain/cifar/byol.yaml: batch 256, 1,000 epochs, projector and predictor with 4,096 hidden
    # units and 256 outputs, no blur. Linear accuracy of BYOL on CIFAR-10 there: 92.58. It uses LARS with lr 1.0 and
    # weight decay 1e-5, and its target momentum rises from 0.99 to 1. This trainer uses SGD, here with lightly's
    # learning rate and weight decay, and a constant momentum.
    "solo-learn": {**_LIGHTLY, "batch_size": 256, "lr": 0.12, "epochs": 1000, "hidden": 4096},
}

_HELP = {
    "dataset": "data set (default: folder with --data, otherwise digits)",
    "data": "folder with train/ and val/, each with one folder per class, like ImageNet (or a folder of images without "
    "labels); for cifar10, cifar100, fashion-mnist and stl10, the folder to read from or download to; "
    "for fashion-mnist also a folder with its four idx files, compressed or not",
    "val_split": "fraction of each class to hold out for evaluation, if --data has no val/; 0: none",
    "recipe": "CIFAR settings of another codebase, with its ResNet-18; own: the defaults of the data set",
    "arch": "backbone: a torchvision or timm classification model, or 'digits', a small residual network",
    "stem": "stem of torchvision's ResNets: imagenet has 7x7, stride 2 and max-pool; small has 3x3, stride 1 and no "
    "max-pool; auto is small for images up to 64 pixels",
    "image_size": "side of the views, in pixels",
    "augmentation": "views of the target / of the online encoder: s strong, w weak",
    "blur": "probability of blur in a strong view (not for the digits)",
    "views": "two views of each image, or the same view for both encoders, which collapses in the paper",
    "method": "msf; or byol, which is k = 1 without a bank",
    "k": "number of neighbors, including the target embedding itself",
    "k_end": "k at the end of the run; k changes linearly from --k to this value; 0: k is constant",
    "symmetric": "both views go through both encoders: the mean of two losses, for twice the computation",
    "exclude_same_id": "embeddings of older views of the same image are never neighbors",
    "same_label": "only embeddings with the label of the image are neighbors: supervised mean shift (CMSF)",
    "bank_size": "rows of the memory bank",
    "bank_dtype": "dtype of the bank's rows; int8 takes a quarter of the memory of float32",
    "bank_layout": "under torchrun: all rows on every rank (replicated), or a part of the rows on each (sharded)",
    "backend": "search backend of the bank",
    "momentum": "momentum of the target encoder, constant",
    "predictor": "mlp; or none, which makes the encoder collapse",
    "hidden": "hidden units of the projection and the prediction MLP",
    "dim": "dimension of the embeddings",
    "epochs": "passes over the training images",
    "steps": "optimizer steps, instead of --epochs",
    "batch_size": "images per step, over all ranks and micro-batches",
    "accumulate": "micro-batches per optimizer step",
    "batchnorm": "under torchrun: statistics of each rank's images (local), of all ranks' images (sync), or of each "
    "rank's images with the target's images shuffled across ranks (shuffle; as in the authors' code)",
    "lr": "initial learning rate, which decays to 0 along a cosine",
    "sgd_momentum": "momentum of SGD",
    "weight_decay": "weight decay of SGD",
    "precision": "auto: bfloat16 autocast on a GPU that supports it, otherwise float32",
    "seed": "seed of the initial weights, the views and the order of the images",
    "device": "auto: the GPU if there is one",
    "workers": "worker processes per rank that read photographs; -1: this machine's cores divided by its ranks",
    "on_bad_image": "if an image cannot be read, error: stop; skip: train on another image in its place, evaluate "
    f"without it, and list it in the run's {LIST}",
    "timeout": "seconds that ranks wait for each other",
    "eval_every": "epochs between nearest-neighbor evaluations; 0: only at the end",
    "skip_baselines": "do not evaluate the untrained encoder and raw pixels, to save the time of another evaluation",
    "checkpoint_every": "epochs between checkpoints",
    "keep_every": "save the backbone after the first epoch and then every N epochs; 0: only at the end",
    "logger": "log to tensorboard or wandb (pip install wandb), besides metrics.csv and losses.csv; csv and none "
    "write only these files",
    "out": "folder of the run; by default a new one below runs/",
    "resume": "folder of an earlier run, to continue from its checkpoint with its settings; or auto, to continue from "
    "the checkpoint in --out if there is one (after a restart by torchrun, this happens anyway)",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "dataset": DATASETS,
    "augmentation": AUGMENTATIONS,
    "recipe": tuple(RECIPES),
    "stem": STEMS,
    "views": ("two", "same"),
    "method": METHODS,
    "predictor": ("mlp", "none"),
    "bank_dtype": ("float32", "float16", "bfloat16", "int8"),
    "bank_layout": ("replicated", "sharded"),
    "batchnorm": ("local", "sync", "shuffle"),
    "precision": ("auto", "float32", "bfloat16"),
    "logger": LOGGERS,
    "on_bad_image": ACTIONS,
}
# Ranges of numbers. All other numbers must be finite, and integers must not be negative.
_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("k", "bank_size", "hidden", "dim", "epochs", "accumulate"), whole(1)),
    **dict.fromkeys(("checkpoint_every", "timeout"), whole(1)),
    **dict.fromkeys(("lr", "sgd_momentum", "weight_decay"), finite(0)),
    **dict.fromkeys(("momentum", "blur"), finite(0, 1)),
    "image_size": whole(8, 4096),
    "workers": whole(-1),
    "seed": whole(0, 2**63 - 1),
}
_GROUPS: dict[str, tuple[str, ...]] = {
    "images": (
        "dataset",
        "data",
        "image_size",
        "augmentation",
        "blur",
        "views",
        "workers",
        "val_split",
        "on_bad_image",
    ),
    "method": ("method", "k", "k_end", "symmetric", "exclude_same_id", "same_label", "momentum"),
    "memory bank": ("bank_size", "bank_dtype", "bank_layout", "backend"),
    "networks": ("arch", "stem", "hidden", "dim", "predictor"),
    "training": ("recipe", "epochs", "steps", "batch_size", "lr", "sgd_momentum", "weight_decay", "seed"),
    "devices": ("device", "precision", "accumulate", "batchnorm", "timeout"),
    "the run": ("out", "resume", "eval_every", "skip_baselines", "checkpoint_every", "keep_every", "logger"),
}
_METAVARS = {"data": "DIR", "out": "DIR", "resume": "DIR", "arch": "NAME", "backend": "NAME", "device": "NAME"}


def build_parser(description: str, examples: str = "") -> Parser:
    """Return the parser of the flags. Flags that are not given are missing from its result."""
    parser = Parser(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, "more": tuple(field.name for field in fields(Settings) if field.name not in named)}
    defaults = {field.name: field.default for field in fields(Settings)}
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            default = defaults[name]
            options: dict[str, Any] = {"help": _help_of(name, default), "default": argparse.SUPPRESS}
            if isinstance(default, bool):
                options["action"] = "store_true"
            else:
                options["type"] = _TYPES.get(name) or {int: whole(0), float: finite()}.get(type(default), str)
                options["choices"] = _CHOICES.get(name)
                if options["choices"] is None:
                    options["metavar"] = _METAVARS.get(name, {int: "N", float: "X"}.get(type(default), "NAME"))
            group.add_argument(flag_of(name), **options)
    parser.add_argument(
        "--check-images",
        action="store_true",
        default=argparse.SUPPRESS,
        help="read every image, list those that cannot be read, and exit",
    )
    return parser


def flag_of(name: str) -> str:
    """Return the flag of a setting, such as ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def _help_of(name: str, default: Any) -> str:
    if default is False or default == "" or "(default:" in _HELP[name]:
        return _HELP[name]
    digits = PRESETS["digits"].get(name, default)
    return f"{_HELP[name]} (default: {default}" + (")" if digits == default else f", on the digits {digits})")


def complete(given: dict[str, Any]) -> Settings:
    """Return the settings of a new run: the given flags, and the defaults of the data set.

    Raises:
        ValueError: if flags do not fit together.
    """
    dataset = given.get("dataset", "folder" if "data" in given else "digits")
    if dataset == "folder" and "data" not in given:
        raise ValueError("--dataset folder needs --data DIR")
    if dataset == "digits" and "data" in given:
        raise ValueError(f"--data is for --dataset {', '.join(name for name in DATASETS if name != 'digits')}")
    recipe = RECIPES[given.get("recipe", Settings.recipe)]
    if recipe and dataset not in ("cifar10", "cifar100"):
        raise ValueError(f"--recipe {given['recipe']} is for --dataset cifar10 or cifar100, got {dataset}")
    preset = {"dataset": dataset, **PRESETS[dataset], **recipe}
    if "epochs" in given and "steps" in given:
        raise ValueError("--epochs and --steps both set the length of the run: give only one of them")
    if "epochs" in given:
        preset["steps"] = 0
    settings = Settings(**{**preset, **given})
    if settings.method == "byol":
        if given.get("k", 1) != 1:
            raise ValueError(f"--method byol requires k = 1, got --k {settings.k}")
        if settings.k_end:
            raise ValueError(f"--method byol requires k = 1, got --k-end {settings.k_end}")
        settings.k = 1
    check(settings)
    return settings


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """Return the settings of a saved run, with the given flags that may change.

    Settings that an older version did not have get the value that corresponds to its behavior.

    Raises:
        ValueError: if a given flag differs from a setting that must not change, or this version cannot resume the run.
    """
    names = {field.name for field in fields(Settings)}
    if unknown := [flag_of(name) for name in saved if name not in names]:
        raise ValueError(f"the run to resume was saved by a newer version, which has {', '.join(unknown)}")
    if is_old(saved) and saved["dataset"] in _NORMALIZED_OTHERWISE:
        raise ValueError(
            f"the run to resume was saved by version 0.2.0 or older, which normalized {saved['dataset']} differently: "
            "finish it with that version, or start a new run"
        )
    saved = {**asdict(Settings()), **_OLD, **saved}
    differing = [
        f"{flag_of(name)} is {saved[name]!r} there, {value!r} here"
        for name, value in given.items()
        if name not in FREE_TO_CHANGE and saved[name] != value
    ]
    if differing:
        raise ValueError(f"the run to resume has other settings: {'; '.join(differing)}")
    return Settings(**{**saved, **given})


def is_old(saved: dict[str, Any]) -> bool:
    """Return whether settings were saved by version 0.2.0 or older."""
    return "stem" not in saved


def check(settings: Settings) -> None:
    """Raise ValueError, naming the flags, if flags do not fit together."""
    s = settings
    for name in ("k", "k_end"):
        if getattr(s, name) > s.bank_size:
            raise ValueError(f"{flag_of(name)} must be at most --bank-size ({s.bank_size}), got {getattr(s, name)}")
    pushed = s.batch_size // s.accumulate * (2 if s.symmetric else 1)
    if s.method == "msf" and s.bank_size < pushed:
        raise ValueError(
            f"--bank-size must be at least {pushed}, one row per embedding of a batch"
            f"{' (two of each image with --symmetric)' if s.symmetric else ''}, got {s.bank_size}"
        )
    for name in ("exclude_same_id", "same_label"):
        if getattr(s, name) and s.method == "byol":
            raise ValueError(f"{flag_of(name)} chooses among neighbors, and --method byol has none")
        if getattr(s, name) and s.k == 1 and s.k_end <= 1:
            raise ValueError(f"{flag_of(name)} chooses among neighbors, and --k 1 has none besides the target itself")
    if s.dataset == "digits" and s.image_size != 16:
        raise ValueError(f"the digits are 16 pixels wide, got --image-size {s.image_size}")


def check_source(settings: Settings, source: DataSource) -> None:
    """Raise ValueError, naming the flags, if flags do not fit the images."""
    for name in ("batch_size", "k", "k_end"):
        if getattr(settings, name) > source.train_size:
            number = getattr(settings, name)
            raise ValueError(f"{flag_of(name)} {number} is more than the {source.train_size} training images")
    if settings.same_label and not source.has_labels:
        raise ValueError(f"--same-label needs labels, and the training images of {settings.data} have none")


def check_division(settings: Settings, ranks: int) -> None:
    """Raise ValueError unless a batch divides evenly into parts of at least two images, which BatchNorm needs."""
    parts = settings.accumulate * ranks
    if settings.batch_size % parts or settings.batch_size < 2 * parts:
        ways = [f"{ranks} ranks"] * (ranks > 1) + [f"--accumulate {settings.accumulate}"] * (settings.accumulate > 1)
        evenly = f", and divisible by {' x '.join(ways)}" if ways else ""
        raise ValueError(f"--batch-size must be at least {2 * parts} for BatchNorm{evenly}, got {settings.batch_size}")
