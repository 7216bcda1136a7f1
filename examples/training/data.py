"""Where images come from: one interface over the digits that ship with scikit-learn, image folders, and CIFAR/STL.

Every random draw is a pure function of (seed, epoch, place): the order of an epoch, and each image's views. So
a run gives the same numbers whatever the number of workers, and one that is resumed in the middle of an epoch
goes on exactly.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from training.augment import (
    DIGITS_VIEWS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    photo_centre,
    photo_supervised,
    photo_view,
)

UNKNOWN = -1
Views = tuple[Tensor, Tensor, Tensor]  # for the target [B, C, H, W], for the online encoder, labels [B]


class UnreadableImage(OSError):
    """An image file that is not one, or cannot be read; the message names it."""


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


class DataSource(Protocol):
    """Training views and evaluation images of one data set."""

    image_shape: tuple[int, int, int]
    train_size: int
    has_labels: bool  # of the training images
    has_val: bool  # labelled images to test on

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """Yield this rank's part of the micro-batches of an epoch, from the first of them on."""
        ...

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of "train" or "val" in order, as evaluation sees them."""
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
        """Return the file names of the "train" images without their folders; nothing where there are no files."""
        ...

    def displayable(self, images: Tensor) -> np.ndarray:
        """Return evaluation images as [B, H, W, 3] in [0, 1]."""
        ...


def seed_of(*parts: int) -> int:
    """Return a 63-bit seed that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch, a permutation [size]."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


class Digits:
    """scikit-learn's optical digits: 1,797 real scans, as 16×16, 1,347 to train on and 450 to test on."""

    image_shape = (1, 16, 16)
    has_labels = has_val = True

    def __init__(self, augmentation: str, share: Share, seed: int, device: torch.device) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        images = F.interpolate(images, size=(16, 16), mode="bicubic", align_corners=False).clamp_(0, 1)
        # The split is the same for every seed, so that runs of several seeds are tested on the same images.
        train, val = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
        self._images = {split: images[ids].to(device) for split, ids in (("train", train), ("val", val))}
        self._labels = {split: torch.tensor(labels[ids]).to(device) for split, ids in (("train", train), ("val", val))}
        self._mean, self._std = float(images[train].mean()), float(images[train].std())
        self._target_view, self._online_view = (DIGITS_VIEWS[strength] for strength in augmentation.split("/"))
        self._share, self._seed = share, seed
        self.train_size = len(train)

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
            yield self._normalized(target), self._normalized(online), labels[chosen[rank]]

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
        grey = (images.cpu() * self._std + self._mean).clamp(0, 1)
        return grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()

    def _normalized(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std


class Photos:
    """Data sets of (PIL image, label), read by worker processes.

    ``train`` is what the encoder learns from, ``gallery`` what evaluation calls "train" (the same, unless most
    of it has no labels), ``val`` what it tests on.
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
        share: Share,
        workers: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.image_shape = (3, size, size)
        self.train_size = len(train)  # type: ignore[arg-type]
        self.has_labels, self.has_val = has_labels, val is not None and has_labels
        target, online = (photo_view(strength, size) for strength in augmentation.split("/"))
        centre = photo_centre(size)
        self._sets = {"train": _Centred(train if gallery is None else gallery, centre)}
        if val is not None:
            self._sets["val"] = _Centred(val, centre)
        self._supervised = _Views(self._sets["train"].images, [photo_supervised(size)], seed)
        self._device = device
        self._options: dict[str, Any] = {
            "batch_size": share.batch_size // share.accumulate // share.ranks,
            "num_workers": workers,
            "pin_memory": device.type == "cuda",
            "worker_init_fn": _leave_signals_to_the_parent,
            "generator": torch.Generator(),  # its draws must not disturb those of the model
        }
        self._order = _EpochOrder(self.train_size, seed, share)
        self._loader = DataLoader(
            _Views(train, [target, online], seed),
            sampler=self._order,
            drop_last=True,
            persistent_workers=workers > 0,
            **self._options,
        )

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """See `DataSource`."""
        self._order.epoch, self._order.first = epoch, first
        for target, online, labels in self._loader:
            yield self._to_device(target), self._to_device(online), labels.to(self._device, non_blocking=True)

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        loader = DataLoader(self._sets[split], sampler=indices, **self._options)
        for images, labels in loader:
            yield self._to_device(images), labels

    def supervised_views(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        keys = [[(epoch, index) for index in chosen] for chosen in batches]
        options = {name: value for name, value in self._options.items() if name != "batch_size"}
        for images, labels in DataLoader(self._supervised, batch_sampler=keys, **options):
            yield self._to_device(images), labels.to(self._device, non_blocking=True)

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
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (images.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def _to_device(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        return images.to(self._device, non_blocking=True, memory_format=layout)


class UnlabelledFolder(Dataset[tuple[Any, int]]):
    """All images below a folder, in the order of their paths, each with the label −1."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (PIL image, −1)."""
        return default_loader(str(self.paths[index])), UNKNOWN


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
) -> DataSource:
    """Return the images of a data set: "digits", "folder" (``data`` is its root), "cifar10", "cifar100" or "stl10".

    Raises:
        ValueError: there are none.
    """
    if dataset == "digits":
        return Digits(augmentation, share, seed, device)
    options: dict[str, Any] = {
        "size": image_size,
        "augmentation": augmentation,
        "share": share,
        "workers": workers,
        "seed": seed,
        "device": device,
    }
    if dataset == "folder":
        train, val, has_labels = open_folder(Path(data))
        return Photos(train, val, has_labels=has_labels, **options)
    train, gallery, val = open_torchvision(dataset, Path(data))
    return Photos(train, val, gallery=gallery, has_labels=True, **options)


def labels_of(images: Dataset[Any]) -> Tensor:
    """Return the labels [n] of a data set of torchvision's, or of a part of one, without reading an image."""
    if isinstance(images, Subset):
        return labels_of(images.dataset)[list(images.indices)]
    for name in ("targets", "labels", "_labels", "y"):
        if hasattr(images, name):
            labels = torch.as_tensor(getattr(images, name))
            break
    else:
        if not hasattr(images, "_samples"):
            raise ValueError(f"{type(images).__name__} does not tell its labels")
        labels = torch.tensor([label for _, label in images._samples])
    places = getattr(images, "target_transform", None)
    return labels if places is None else torch.tensor([places(int(label)) for label in labels])


def open_folder(root: Path) -> tuple[Dataset[Any], Dataset[Any] | None, bool]:
    """Return (training set, test set or None, whether there are labels) of a tree of images.

    ``root/train`` and ``root/val`` with a folder a class are what ImageNet has. Without ``train`` the root itself
    is the training set; without at least two class folders the images have no labels, and nothing is tested on.

    Raises:
        ValueError: no such folder, no images, images beside class folders, val without train, or classes in val
            that train does not have.
    """
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    train_root = root / "train" if (root / "train").is_dir() else root
    if train_root == root and (root / "val").is_dir():
        raise ValueError(f"{root} has a folder val but no folder train")
    loose = any(path.suffix.lower() in IMG_EXTENSIONS for path in train_root.iterdir())
    if loose and len(_class_folders(train_root)) > 1:
        raise ValueError(f"{train_root} has images beside its class folders: which class are they?")
    if len(_class_folders(train_root)) < 2:
        unlabelled = UnlabelledFolder(train_root)
        if not len(unlabelled):
            raise ValueError(f"no images ({', '.join(IMG_EXTENSIONS)}) below {train_root}")
        return unlabelled, None, False
    train = datasets.ImageFolder(str(train_root), allow_empty=True)
    if not _class_folders(root / "val"):
        return train, None, True
    val = datasets.ImageFolder(str(root / "val"), allow_empty=True)
    if strangers := sorted(set(val.classes) - set(train.classes)):
        raise ValueError(f"{root / 'val'} has classes that {train_root} lacks: {', '.join(strangers[:5])}")
    # Labels are places in the list of classes: those of the training set hold for both.
    places = {val.class_to_idx[name]: train.class_to_idx[name] for name in val.classes}
    val.target_transform = places.__getitem__
    return train, val, True


def open_torchvision(name: str, root: Path) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Return training set, labelled training images and test set, downloaded to ``root`` if need be.

    Args:
        name: "cifar10", "cifar100", or "stl10", whose 100,000 unlabelled images are trained on too.
        root: folder of the downloads.

    Raises:
        ValueError: neither there nor to be had.
    """
    try:
        if name == "stl10":
            splits = ("train+unlabeled", "train", "test")
            learn, gallery, test = (datasets.STL10(str(root), split, download=True) for split in splits)
            return learn, gallery, test
        cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        train = cifar(str(root), train=True, download=True)
        return train, train, cifar(str(root), train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is neither in {root} nor could it be downloaded: {error}") from error


class _Views(Dataset[tuple[Any, ...]]):
    """Random views of an image, one of each kind, and its label; the draw depends on (seed, epoch, index) alone."""

    def __init__(self, images: Dataset[Any], kinds: list[Callable[[Any], Tensor]], seed: int) -> None:
        self.images, self.kinds, self.seed = images, kinds, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        epoch, index = key
        image, label = _read(self.images, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return (*(view(image) for view in self.kinds), label)


class _Centred(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Dataset[Any], centre: Callable[[Any], Tensor]) -> None:
        self.images, self.centre = images, centre

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = _read(self.images, index)
        return self.centre(image), label


class _EpochOrder(Sampler[tuple[int, int]]):
    """The (epoch, index) keys of this rank's images of one epoch, from a micro-batch on."""

    def __init__(self, size: int, seed: int, share: Share) -> None:
        self.size, self.seed, self.share = size, seed, share
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        micro_batches = self.share.micro_batches(epoch_order(self.size, self.seed, self.epoch))
        own = micro_batches[self.first :, self.share.rank].flatten()
        return iter([(self.epoch, index) for index in own.tolist()])


def _read(images: Dataset[Any], index: int) -> tuple[Any, int]:
    try:
        item: tuple[Any, int] = images[index]
        return item
    except OSError as error:
        where = getattr(images, "samples", getattr(images, "paths", None))
        raise UnreadableImage(f"cannot read image {where[index] if where else index}: {error}") from error


def _class_folders(root: Path) -> list[Path]:
    """Return the folders directly below that hold images."""
    if not root.is_dir():
        return []
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    return [folder for folder in folders if any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))]


def _leave_signals_to_the_parent(worker: int) -> None:
    """Workers end when the parent does; a Ctrl-C or SIGTERM to the whole group must not take them from it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
