"""Small images: the whole data set is on the device as uint8, if it fits, and views are computed there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.bad_images import BadImages
from pipeline.data.prefetch import SideStream
from pipeline.data.source import Found, Share, Views, epoch_order
from pipeline.running.seeds import seed_of
from pipeline.views.crops import PAPERS, PER_VIEW, SUPERVISED, View, crop_boxes, draws, resized_crops
from pipeline.views.rendering import Normalization, Rendering

FREE_SHARE = 0.5  # share of a GPU's free memory that the images may take; larger sets stay in the host's memory
SAMPLE = 10_000  # images from which mean and standard deviation are computed


@dataclass
class Split:
    """Images [n, C, H, W] uint8 with one channel or three, and their labels [n]; −1 for images without a label."""

    images: Tensor
    labels: Tensor


class SmallImages:
    """Images of one size. ``train``, ``gallery``, ``val`` and ``views`` are as in `Photos`."""

    has_labels = has_val = True
    workers: int | None = None
    found = Found()

    def __init__(
        self,
        train: Split,
        val: Split,
        *,
        gallery: Split | None = None,
        size: int,
        share: Share,
        seed: int,
        device: torch.device,
        views: tuple[View, View] = PAPERS,
    ) -> None:
        self.bad = BadImages()
        self.image_shape = (3, size, size)
        self.train_size = len(train.labels)
        mean, std = statistics(train.images)
        self.facts: dict[str, Any] = {"mean": mean, "std": std}
        self._size, self._device, self._share, self._seed = size, device, share, seed
        self._normalized = Normalization(mean, std, device)
        self._learned = _placed(train, device)
        self._sets = {
            "train": self._learned if gallery is None else _placed(gallery, device),
            "val": _placed(val, device),
        }
        self._views = views
        self._target, self._online, self._classifier = (
            Rendering(view, size, mean, std, device) for view in (*self._views, SUPERVISED)
        )
        self._side = SideStream(device)

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """See `DataSource`."""
        micro_batches = self._share.micro_batches(epoch_order(self.train_size, self._seed, epoch))
        rows = draws(seed_of(self._seed), epoch, 0, self.train_size)

        def drawn(chosen: Tensor) -> Views:
            images, labels = _picked(self._learned, chosen, self._device)
            target, online = rows[chosen].split(PER_VIEW, dim=1)
            return (
                self._target(self._cropped(images, target, self._views[0]), target),
                self._online(self._cropped(images, online, self._views[1]), online),
                labels,
                chosen.to(self._device, non_blocking=True),
            )

        return self._side.over(iter(micro_batches[first:, self._share.rank]), drawn)

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`. Images are resized only if the views have another size."""
        places = torch.arange(self.size(split)) if indices is None else torch.tensor(indices)
        for chosen in places.split(self._share.batch_size // self._share.accumulate // self._share.ranks):
            images, labels = _picked(self._sets[split], chosen, self._device)
            if images.shape[-1] != self._size:
                images = F.interpolate(images.float(), self.image_shape[1:], mode="bilinear", antialias=True)
            yield self._normalized(images), labels

    def supervised_views(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        rows = draws(seed_of(self._seed), epoch, 0, self.size("train"), stream=1)[:, :PER_VIEW]
        for places in batches:
            chosen = torch.tensor(places)
            images, labels = _picked(self._sets["train"], chosen, self._device)
            yield self._classifier(self._cropped(images, rows[chosen], SUPERVISED), rows[chosen]), labels

    def labels(self, split: str) -> Tensor:
        """See `DataSource`."""
        return self._sets[split].labels

    def size(self, split: str) -> int:
        """See `DataSource`."""
        return len(self._sets[split].labels)

    def names(self) -> list[str]:
        """See `DataSource`."""
        return []

    def displayable(self, images: Tensor) -> np.ndarray:
        """See `DataSource`."""
        return self._normalized.undone(images).numpy()

    def _cropped(self, images: Tensor, rows: Tensor, view: View) -> Tensor:
        return resized_crops(images, crop_boxes(rows, images.shape[2], images.shape[3], view.area), self._size)


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of the three channels over at most `SAMPLE` images, evenly spaced."""
    sample = images[:: -(-len(images) // SAMPLE)].double() / 255
    std, mean = torch.std_mean(sample, dim=(0, 2, 3))
    return tuple(mean.expand(3).tolist()), tuple(std.clamp(min=1 / 255).expand(3).tolist())


def _placed(split: Split, device: torch.device) -> Split:
    """Return the split, with its images on the device if they fit."""
    if device.type == "cuda" and split.images.nbytes > FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return split
    return Split(split.images.to(device), split.labels)


def _picked(split: Split, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return these images and labels on the device."""
    images = split.images[chosen.to(split.images.device, non_blocking=True)]
    return images.to(device, non_blocking=True), split.labels[chosen].to(device, non_blocking=True)
