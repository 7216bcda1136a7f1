"""One function that opens any data set: scikit-learn's digits, a folder, or one of torchvision's small sets."""

from pathlib import Path
from typing import Any

import torch

from pipeline.data.bad_images import BadImages
from pipeline.data.digits import Digits
from pipeline.data.photos import Photos, workers_of
from pipeline.data.small import SmallImages
from pipeline.data.small_sets import VIEWS, open_small
from pipeline.data.source import DataSource, Share
from pipeline.data.trees import open_folder
from pipeline.views.crops import PAPERS, STRONG, views_of

DATASETS = ("digits", "folder", "cifar10", "cifar100", "fashion-mnist", "stl10")


def open_source(
    dataset: str,
    data: str,
    *,
    image_size: int,
    augmentation: str,
    share: Share,
    workers: int,
    seed: int,
    device: torch.device,
    blur: float = STRONG.blur,
    val_split: float = 0.0,
    bad: BadImages | None = None,
) -> DataSource:
    """Return the images of a data set: "digits", "folder" (``data`` is its root), or one of torchvision's.

    ``val_split`` is the fraction of a folder's training images to hold out for testing, see `open_folder`.

    Raises:
        ValueError: there are no images, or ``val_split`` cannot be used with them.
    """
    if not 0 <= val_split < 1:
        raise ValueError(f"--val-split must be at least 0 and below 1, got {val_split}")
    if val_split and dataset != "folder":
        raise ValueError(f"--val-split is for a folder of images, but {dataset} has test images of its own")
    if dataset == "digits":
        return Digits(augmentation, share, seed, device)
    options: dict[str, Any] = {
        "size": image_size,
        "views": views_of(augmentation, blur, VIEWS.get(dataset, PAPERS)),
        "share": share,
        "seed": seed,
        "device": device,
    }
    if dataset == "folder":
        train, val, found = open_folder(Path(data), val_split)
        options |= {"workers": workers_of(workers), "bad": bad}
        return Photos(train, val, found=found, has_labels=bool(train.classes), **options)
    learned, test, gallery = open_small(dataset, Path(data))
    return SmallImages(learned, test, gallery=gallery, **options)
