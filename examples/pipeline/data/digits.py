"""scikit-learn's digits as a source of images: all of them are on the training device."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from pipeline.data.bad_images import BadImages
from pipeline.data.source import Found, Share, Views, epoch_order
from pipeline.running.seeds import seed_of
from pipeline.views.augment import DIGITS_VIEWS


class Digits:
    """scikit-learn's optical digits: 1,797 real scans, resized to 16×16, 1,347 to train on and 450 to test on.

    With ``validation``, this fraction of the 1,347 is held out to test on, and the 450 are not used.
    """

    image_shape = (1, 16, 16)
    has_labels = has_val = True
    workers: int | None = None
    found = Found()

    def __init__(
        self, augmentation: str, share: Share, seed: int, device: torch.device, validation: float = 0.0
    ) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        images = F.interpolate(images, size=(16, 16), mode="bicubic", align_corners=False).clamp_(0, 1)
        # The split is the same for every seed, so that runs of several seeds are tested on the same images.
        train, val = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
        if validation:  # test on a share of the training images, so that tuning never uses a test image
            train, val = train_test_split(train, test_size=validation, stratify=labels[train], random_state=0)
        self._images = {split: images[ids].to(device) for split, ids in (("train", train), ("val", val))}
        self._labels = {split: torch.tensor(labels[ids]).to(device) for split, ids in (("train", train), ("val", val))}
        self._mean, self._std = float(images[train].mean()), float(images[train].std())
        self._target_view, self._online_view = (DIGITS_VIEWS[strength] for strength in augmentation.split("/"))
        self.bad = BadImages()
        self._share, self._seed = share, seed
        self.train_size = len(train)
        self.facts: dict[str, Any] = {"mean": self._mean, "std": self._std}

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """See `DataSource`."""
        images, labels = self._images["train"], self._labels["train"]
        order = epoch_order(self.train_size, self._seed, epoch).to(images.device)
        rank, micro_batches = self._share.rank, self._share.micro_batches(order)
        for number in range(first, len(micro_batches)):
            chosen = micro_batches[number]  # [ranks, images]
            generator = torch.Generator(images.device).manual_seed(seed_of(self._seed, epoch, number))
            # The views of all ranks are drawn, so that they do not depend on the number of ranks.
            target, online = (
                view(images[chosen.flatten()], generator).reshape(*chosen.shape, *self.image_shape)[rank]
                for view in (self._target_view, self._online_view)
            )
            ids = chosen[rank]
            yield self._normalized(target), self._normalized(online), labels[ids], ids

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        chosen = slice(None) if indices is None else indices
        yield self._normalized(self._images[split][chosen]), self._labels[split][chosen]

    def supervised_views(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`; the view is the weak one."""
        for number, chosen in enumerate(batches):
            images = self._images["train"][chosen]
            generator = torch.Generator(images.device).manual_seed(seed_of(self._seed, epoch, number, self._share.rank))
            yield self._normalized(DIGITS_VIEWS["w"](images, generator)), self._labels["train"][chosen]

    def labels(self, split: str) -> Tensor:
        """See `DataSource`."""
        return self._labels[split].cpu()

    def size(self, split: str) -> int:
        """See `DataSource`."""
        return len(self._labels[split])

    def names(self) -> list[str]:
        """See `DataSource`."""
        return []

    def displayable(self, images: Tensor) -> np.ndarray:
        """See `DataSource`."""
        gray = (images.cpu() * self._std + self._mean).clamp(0, 1)
        return gray.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()

    def _normalized(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std
