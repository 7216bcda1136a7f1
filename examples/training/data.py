"""Where images come from: one interface over the digits that ship with scikit-learn, folders, and small sets."""

from pathlib import Path
from typing import Any

import torch

from training.bad_images import BadImages
from training.digits import Digits
from training.folders import UnlabelledFolder, UnreadableImage, labels_of, open_folder
from training.photos import Photos, workers_of
from training.small import SmallImages
from training.small_sets import open_small
from training.source import UNKNOWN, UNREADABLE, DataSource, Share, Views, epoch_order, seed_of
from training.views import STRONG

__all__ = [
    "UNKNOWN",
    "UNREADABLE",
    "BadImages",
    "DataSource",
    "Digits",
    "Photos",
    "Share",
    "UnlabelledFolder",
    "UnreadableImage",
    "Views",
    "epoch_order",
    "labels_of",
    "open_folder",
    "open_source",
    "seed_of",
    "workers_of",
]


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
    bad: BadImages | None = None,
) -> DataSource:
    """Return the images of a data set: "digits", "folder" (``data`` is its root), or one of torchvision's.

    Raises:
        ValueError: there are none.
    """
    if dataset == "digits":
        return Digits(augmentation, share, seed, device)
    options: dict[str, Any] = {
        "size": image_size,
        "augmentation": augmentation,
        "blur": blur,
        "share": share,
        "seed": seed,
        "device": device,
    }
    if dataset == "folder":
        train, val, has_labels = open_folder(Path(data))
        options |= {"workers": workers_of(workers), "bad": bad}
        return Photos(train, val, has_labels=has_labels, **options)
    learned, test, gallery = open_small(dataset, Path(data))
    return SmallImages(learned, test, gallery=gallery, **options)
