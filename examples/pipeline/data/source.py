"""What every source of images is: its interface, how a step's images are divided, and where randomness comes from.

Every random draw is a pure function of (seed, epoch, place): the order of an epoch, and each image's views. So
a run gives the same numbers whatever the number of workers, and one that is resumed in the middle of an epoch
goes on exactly.
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
UNREADABLE = -2  # the label of an image that could not be read, in place of which there is a black one
# For the target [B, C, H, W], for the online encoder, labels [B], and ids [B]: the images' places in the training set.
Views = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Share:
    """How the images of a step are divided: into micro-batches, one after another, and each of them over the ranks."""

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    ranks: int = 1

    def micro_batches(self, order: Tensor) -> Tensor:
        """Return the places of an epoch's images as [micro-batches, ranks, images]; the last, short batch is left."""
        whole = order[: len(order) // self.batch_size * self.batch_size]
        return whole.view(-1, self.ranks, self.batch_size // self.accumulate // self.ranks)


@dataclass(frozen=True)
class Found:
    """What there is on disk, in words: for the first lines of a run, and why there may be nothing to test on."""

    lines: tuple[str, ...] = ()
    no_val: str = ""


class DataSource(Protocol):
    """Training views and evaluation images of one data set."""

    image_shape: tuple[int, int, int]
    train_size: int
    has_labels: bool  # of the training images
    has_val: bool  # labeled images to test on
    workers: int | None  # processes that read images, for this rank; None where there is nothing to read
    found: Found
    facts: dict[str, Any]  # what a user of the trained backbone needs to know: mean and std of its input
    bad: BadImages  # what could not be read, on this rank

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """Yield this rank's part of the micro-batches of an epoch, from the first of them on."""
        ...

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of "train" or "val" in order, as evaluation sees them; labels may be UNREADABLE."""
        ...

    def supervised_views(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of these "train" images, as a classifier is trained on them: a view each."""
        ...

    def labels(self, split: str) -> Tensor:
        """Return the labels [n] of "train" or "val", without reading an image."""
        ...

    def size(self, split: str) -> int:
        """Return the number of images of "train" or "val"."""
        ...

    def names(self) -> list[str]:
        """Return the paths of the "train" images below their folder, with "/"; nothing where there are no files."""
        ...

    def displayable(self, images: Tensor) -> np.ndarray:
        """Return evaluation images as [B, H, W, 3] in [0, 1]."""
        ...


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch, a permutation [size]."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
