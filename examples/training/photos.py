"""Photographs: worker processes decode and crop them, and everything else that makes a view is done on the device."""

import atexit
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as transforms

from training.folders import labels_of, pixels_of
from training.prefetch import SideStream
from training.rendering import Normalization, Rendering
from training.source import Share, Views, epoch_order, seed_of
from training.views import PER_VIEW, STRONG, SUPERVISED, View, crop_boxes, draws, resized_crop, views_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Photos:
    """Data sets of (image, label), read by worker processes.

    A worker sends the two crops of an image as uint8, and the row of draws of which the rest of its views is made.
    ``train`` is what the encoder learns from, ``gallery`` what evaluation calls "train" (the same, unless most
    of it has no labels), ``val`` what it tests on. ``views`` of target and online encoder serve instead of those
    that ``augmentation`` and ``blur`` name.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any] | None,
        *,
        gallery: Dataset[Any] | None = None,
        size: int,
        has_labels: bool,
        augmentation: str,
        blur: float = STRONG.blur,
        share: Share,
        workers: int,
        seed: int,
        device: torch.device,
        views: tuple[View, View] | None = None,
    ) -> None:
        self.image_shape = (3, size, size)
        self.train_size = len(train)  # type: ignore[arg-type]
        self.has_labels, self.has_val = has_labels, val is not None and has_labels
        self.workers: int | None = workers
        self.facts: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self._sets = {"train": _Centred(train if gallery is None else gallery, size)}
        if val is not None:
            self._sets["val"] = _Centred(val, size)
        views = views_of(augmentation, blur) if views is None else views
        self._device = device
        self._normalized = Normalization(IMAGENET_MEAN, IMAGENET_STD, device)
        self._target, self._online, self._classifier = (
            Rendering(view, size, IMAGENET_MEAN, IMAGENET_STD, device) for view in (*views, SUPERVISED)
        )
        self._supervised = Crops(self._sets["train"].images, [SUPERVISED], size, seed, stream=1)
        self._side = SideStream(device)
        self._options: dict[str, Any] = {
            "batch_size": share.batch_size // share.accumulate // share.ranks,
            "num_workers": workers,
            "pin_memory": device.type == "cuda",
            "worker_init_fn": _leave_signals_to_the_parent,
            "generator": torch.Generator(),  # its draws must not disturb those of the model
        }
        self._order = _EpochOrder(self.train_size, seed, share)
        self._loader = DataLoader(
            Crops(train, list(views), size, seed),
            sampler=self._order,
            drop_last=True,
            persistent_workers=workers > 0,
            **self._options,
        )

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """See `DataSource`."""
        self._order.epoch, self._order.first = epoch, first
        return self._side.over(_batches(self._loader), self._rendered)

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        loader = DataLoader(self._sets[split], sampler=indices, **self._options)
        for images, labels in _batches(loader):
            yield self._normalized(self._to_device(images)), labels

    def supervised_views(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        keys = [[(epoch, index) for index in chosen] for chosen in batches]
        options = {name: value for name, value in self._options.items() if name != "batch_size"}
        for crops, rows, labels in _batches(DataLoader(self._supervised, batch_sampler=keys, **options)):
            yield self._classifier(self._to_device(crops), rows[:, :PER_VIEW]), self._to_device(labels)

    def labels(self, split: str) -> Tensor:
        """See `DataSource`."""
        return labels_of(self._sets[split].images)

    def size(self, split: str) -> int:
        """See `DataSource`."""
        return len(self._sets[split])

    def names(self) -> list[str]:
        """See `DataSource`."""
        return [Path(path).name for path, _ in getattr(self._sets["train"].images, "samples", [])]

    def displayable(self, images: Tensor) -> np.ndarray:
        """See `DataSource`."""
        return self._normalized.undone(images).numpy()

    def _rendered(self, batch: list[Tensor]) -> Views:
        target, online, rows, labels = batch
        return (
            self._target(self._to_device(target), rows[:, :PER_VIEW]),
            self._online(self._to_device(online), rows[:, PER_VIEW:]),
            self._to_device(labels),
        )

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)


class Crops(Dataset[tuple[Any, ...]]):
    """A crop of an image for each kind of view, its row of draws and its label, all by (seed, epoch, index) alone."""

    def __init__(self, images: Dataset[Any], kinds: list[View], size: int, seed: int, stream: int = 0) -> None:
        self.images, self.kinds, self.size, self.stream = images, kinds, size, stream
        self.seed = seed_of(seed)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        epoch, index = key
        image, label = pixels_of(self.images, index)
        row = draws(self.seed, epoch, index, 1, self.stream)
        crops = []
        for kind, part in zip(self.kinds, row.split(PER_VIEW, dim=1), strict=False):
            (box,) = crop_boxes(part, image.shape[1], image.shape[2], kind.area)
            crops.append(resized_crop(image, box, self.size))
        return (*crops, row[0], label)


class _Centred(Dataset[tuple[Tensor, int]]):
    """The evaluation view (section 3.2: resize to 256, center crop of 224, or in that proportion), uint8."""

    def __init__(self, images: Dataset[Any], size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = pixels_of(self.images, index)
        resized = transforms.resize(image, [round(self.size * 256 / 224)], antialias=True)
        return transforms.center_crop(resized, [self.size]).contiguous(), label


class _EpochOrder(Sampler[tuple[int, int]]):
    """The (epoch, index) keys of this rank's images of one epoch, from a micro-batch on."""

    def __init__(self, size: int, seed: int, share: Share) -> None:
        self.size, self.seed, self.share = size, seed, share
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        micro_batches = self.share.micro_batches(epoch_order(self.size, self.seed, self.epoch))
        own = micro_batches[self.first :, self.share.rank].flatten()
        return iter([(self.epoch, index) for index in own.tolist()])


def workers_of(wanted: int) -> int:
    """Return how many processes read images for this rank: ``wanted``, or for −1 its part of this machine's cores."""
    return wanted if wanted >= 0 else max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_signals_to_the_parent(worker: int) -> None:
    """Workers end when the parent does; a Ctrl-C or SIGTERM to the whole group must not take them from it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_reading: "WeakSet[Any]" = WeakSet()  # iterators over loaders that may have workers


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return an iterator over a loader, whose workers end when this process comes to its end."""
    batches = iter(loader)
    if loader.num_workers and not len(_reading):
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # what is registered last comes first, so before the workers are waited for
    if loader.num_workers:
        _reading.add(batches)
    return batches


def _end_workers() -> None:
    """Workers ignore SIGTERM, by which Python would end those of a loader that something still refers to."""
    for batches in list(_reading):
        batches._shutdown_workers()
