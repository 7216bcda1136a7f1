"""What all methods of `methods.py` share: one recipe for each data set, and the images with their splits.

A `Recipe` holds every setting except the method, its learning rate and the seed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.digits import Digits
from pipeline.data.photos import Photos, workers_of
from pipeline.data.small import SmallImages, Split
from pipeline.data.small_sets import VIEWS, open_small
from pipeline.data.source import DataSource, Share
from pipeline.data.trees import open_folder
from pipeline.evaluation.subsets import share_of_each_class
from pipeline.models.backbones import build_backbone, stem_of
from pipeline.training.settings import PRESETS
from pipeline.views.crops import STRONG, WEAK, View, views_of

VALIDATION = 1 / 6  # of each class's training images, in the sweep: 10,000 of Fashion-MNIST's 60,000
TEST = 1 / 5  # of each class's images, where a folder has no val/
PARTS_SEED = 0  # the same for every seed, so that all runs are tested on the same images


@dataclass(frozen=True)
class Recipe:
    """One data set's settings, the same for all methods."""

    dataset: str
    arch: str
    image_size: int
    batch_size: int
    steps: int
    sweep_steps: int
    lr: float  # the middle of the sweep; falls to 0 along a cosine
    momentum: float  # of every target encoder, constant
    bank_size: int  # rows of every bank and queue
    hidden: int  # units of the heads' hidden layers
    dim: int  # of the embeddings
    wide: int  # width of the heads of SimSiam, Barlow Twins, VICReg and DINO, which need more than `dim`
    prototypes: int  # of SwAV, and clusters of DeepCluster-v2
    k: int = 5  # of MSF
    weight_decay: float = 5e-4  # of weights; biases and BatchNorm have none
    stem: str = "auto"
    weak: View = field(default=WEAK)  # not used for the digits, which have their own views
    strong: View = field(default=STRONG)


_SMALL: dict[str, Any] = {
    "batch_size": 128,
    "steps": 5000,
    "sweep_steps": 1000,
    "lr": 0.2,
    "momentum": 0.98,
    "bank_size": 8192,
    "hidden": 256,
    "dim": 64,
    "wide": 512,
    "prototypes": 128,
}


def _trainers(dataset: str) -> dict[str, Any]:
    """Return the settings that a comparison shares with the trainer's own recipe for a data set."""
    shared = ("batch_size", "lr", "momentum", "bank_size", "hidden", "dim", "weight_decay")
    return {name: PRESETS[dataset][name] for name in shared}


RECIPES = {
    "digits": Recipe(
        "digits",
        arch="digits",
        image_size=16,
        batch_size=64,
        steps=1800,
        sweep_steps=360,
        lr=0.1,
        momentum=0.97,
        bank_size=1024,
        hidden=256,
        dim=64,
        wide=256,
        prototypes=64,
        weight_decay=1e-4,
    ),
    "fashion-mnist": Recipe(
        "fashion-mnist",
        arch="digits",
        image_size=28,
        weak=VIEWS["fashion-mnist"][0],
        strong=VIEWS["fashion-mnist"][1],
        **{**_SMALL, **_trainers("fashion-mnist"), "steps": 4000, "sweep_steps": 800},
    ),
    "cifar10": Recipe("cifar10", arch="resnet18", image_size=32, strong=View(blur=0.0), **_SMALL),
    "folder": Recipe("folder", arch="resnet18", image_size=96, stem="imagenet", **_SMALL),
}


def open_images(
    recipe: Recipe,
    data: str,
    augmentation: str,
    *,
    seed: int,
    device: torch.device,
    validation: bool,
    workers: int = -1,
) -> DataSource:
    """Return the images of a run. In the sweep, "val" is a part of the training images, and no test image is used.

    Args:
        recipe: determines the data set, the views and the batch size.
        data: folder of the images, unless they are the digits.
        augmentation: strength of the views for the target / the online encoder, such as "w/s".
        seed: seed of the order and the views.
        device: device to train on.
        validation: whether to hold out a share of `VALIDATION` of each class's training images.
        workers: processes that read photographs; -1: one per core.

    Raises:
        ValueError: there are no images, or they have no labels.
    """
    share = Share(recipe.batch_size)
    if recipe.dataset == "digits":
        return Digits(augmentation, share, seed, device, VALIDATION if validation else 0.0)
    options: dict[str, Any] = {
        "size": recipe.image_size,
        "share": share,
        "seed": seed,
        "device": device,
        "views": views_of(augmentation, recipe.strong.blur, (recipe.weak, recipe.strong)),
    }
    if recipe.dataset != "folder":
        train, test, _ = open_small(recipe.dataset, Path(data))
        if validation:
            train, test = (
                Split(train.images[places], train.labels[places]) for places in parts_of(train.labels, VALIDATION)
            )
        return SmallImages(train, test, **options)
    photos, val, _ = open_folder(Path(data))
    if not photos.classes:
        raise ValueError(
            f"{data} has no class folders: methods are compared by labels, so put the images into one folder per class"
        )
    if val is None:
        photos, val = photos.held_out(TEST)
    if validation:
        photos, val = photos.held_out(VALIDATION)
    return Photos(photos, val, has_labels=True, workers=workers_of(workers), **options)


def parts_of(labels: Tensor, share: float) -> tuple[list[int], list[int]]:
    """Return the indices of the images to train on and of those held out: this share of each class, at least one.

    Raises:
        ValueError: a class has only one image, which cannot be in both parts.
    """
    held_out = share_of_each_class(labels, 100 * share, PARTS_SEED)
    staying = torch.ones(len(labels), dtype=torch.bool)
    staying[held_out] = False
    if lost := sorted(set(labels.tolist()) - set(labels[staying].tolist())):
        raise ValueError(f"class {lost[0]} has only one image: every class needs at least two, one of them to test on")
    return staying.nonzero().flatten().tolist(), held_out


def new_backbone(recipe: Recipe, image_shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
    """Return a randomly initialized backbone and its number of features."""
    stem = stem_of(recipe.stem, recipe.arch, recipe.image_size)
    return build_backbone(recipe.arch, image_shape, stem)
