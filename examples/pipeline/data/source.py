"""The interface of all data sources, and how the images of a step are divided over micro-batches and ranks.

The order of an epoch and the views of each image are pure functions of the seed, the epoch and the image's index. So a
run gives the same results with any number of workers, and a run that is resumed in the middle of an epoch continues
exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.bad_images import BadImages
from pipeline.running.seeds import seed_of

UNKNOWN = -1
UNREADABLE = -2  # label of an image that could not be read and is black instead
# Views for the target and for the online encoder, each [B, C, H, W]; labels [B]; ids [B], indices in the training set.
Views = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Share:
    """How the images of a step are divided: first into micro-batches, then each micro-batch over the ranks."""

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    ranks: int = 1

    def micro_batches(self, order: Tensor) -> Tensor:
        """Return the order of an epoch as [micro-batches, ranks, images], without the last, incomplete batch."""
        whole = order[: len(order) // self.batch_size * self.batch_size]
        return whole.view(-1, self.ranks, self.batch_size // self.accumulate // self.ranks)


@dataclass(frozen=True)
class Found:
    """What was found on disk, in words: ``lines`` to print, and why there are no test images (``no_val``)."""

    lines: tuple[str, ...] = ()
    no_val: str = ""


class DataSource(Protocol):
    """Training views and evaluation images of one data set."""

    image_shape: tuple[int, int, int]
    train_size: int
    has_labels: bool  # whether the training images have labels
    has_val: bool  # whether there are labeled test images
    workers: int | None  # processes that read images for this rank; None if there are no files to read
    found: Found
    facts: dict[str, Any]  # what users of the trained backbone need: mean and std of its input
    bad: BadImages  # images that could not be read on this rank

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """Yield this rank's part of the micro-batches of an epoch, starting at micro-batch ``first``."""
        ...

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of "train" or "val" in order, prepared for evaluation; labels may be UNREADABLE."""
        ...

    def supervised_views(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of these "train" images, one view each, to train a classifier on."""
        ...

    def labels(self, split: str) -> Tensor:
        """Return the labels [n] of "train" or "val", without reading an image."""
        ...

    def size(self, split: str) -> int:
        """Return the number of images of "train" or "val"."""
        ...

    def names(self) -> list[str]:
        """Return the paths of the "train" images below their folder, with "/"; [] if they are not files."""
        ...

    def displayable(self, images: Tensor) -> np.ndarray:
        """Return evaluation images as [B, H, W, 3] in [0, 1]."""
        ...


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch, a permutation [size]."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
