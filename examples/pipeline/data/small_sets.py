"""The small data sets by name: through torchvision's loaders, or from a folder of idx files (MNIST's format)."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets

from pipeline.data.pixels import labels_of
from pipeline.data.small import Split
from pipeline.views.crops import View

# (images, labels) of the training and of the test set
IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
# Weak and strong views of data sets that are not photographs. Fashion-MNIST: clothes fill the image, so crops are mild;
# all shoes point to the left, so nothing is flipped; gray images have neither saturation nor hue.
VIEWS = {
    "fashion-mnist": (
        View(area=(0.85, 1.0), jitter=0.0, gray=0.0, blur=0.0, flip=0.0),
        View(area=(0.7, 1.0), strengths=(0.4, 0.4, 0.0, 0.0), gray=0.0, blur=0.5, sigma=(0.1, 1.0), flip=0.0),
    ),
}
_BYTES = 8  # code for unsigned bytes in an idx header


def open_small(name: str, root: Path) -> tuple[Split, Split, Split | None]:
    """Return the training set, the test set, and the labeled training images if not all images have labels.

    Args:
        name: "cifar10", "cifar100", "fashion-mnist", or "stl10", whose 100,000 unlabeled images are trained on too.
        root: folder of the downloads; for "fashion-mnist" also a folder with its four idx files, with or without .gz.

    Raises:
        ValueError: the files are missing and cannot be downloaded, or they are damaged.
    """
    if name == "fashion-mnist" and any(_found(root, file) for pair in IDX_FILES for file in pair):
        train, test = (read_pair(root, *pair) for pair in IDX_FILES)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise ValueError(f"the training and test images in {root} differ in size")
        return train, test, None
    try:
        if name == "stl10":
            learned, gallery, test = (
                _split(datasets.STL10(str(root), split, download=True))
                for split in ("train+unlabeled", "train", "test")
            )
            return learned, test, gallery
        kind = {
            "cifar10": datasets.CIFAR10,
            "cifar100": datasets.CIFAR100,
            "fashion-mnist": datasets.FashionMNIST,
        }[name]
        train, test = (_split(kind(str(root), train=part, download=True)) for part in (True, False))
        return train, test, None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is neither in {root} nor could it be downloaded: {error}") from error


def _split(images: Any) -> Split:
    pixels = torch.as_tensor(images.data)
    if pixels.ndim == 3:
        pixels = pixels[:, None]  # gray
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return Split(pixels, labels_of(images).long())


def read_pair(root: Path, images: str, labels: str) -> Split:
    """Return the images and labels of two idx files in a folder.

    Raises:
        ValueError: a file is missing or damaged, or the numbers of images and labels differ.
    """
    pixels, classes = read_idx(root, images, 3), read_idx(root, labels, 1)
    if len(pixels) != len(classes) or not len(pixels):
        raise ValueError(f"{root / images} has {len(pixels)} images, but {labels} has {len(classes)} labels")
    return Split(torch.from_numpy(pixels)[:, None], torch.from_numpy(classes).long())


def read_idx(root: Path, name: str, dimensions: int) -> np.ndarray:
    """Return the contents of an idx file, ``name`` or ``name``.gz, as uint8 in the shape of its header.

    Raises:
        ValueError: it is missing, or not an idx file of unsigned bytes with this number of dimensions.
    """
    path = _found(root, name)
    if path is None:
        raise ValueError(f"{root} has neither {name} nor {name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, _BYTES, dimensions]) or len(content) < header:
        raise ValueError(f"{path} is not an idx file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} should hold {math.prod(shape):,} bytes after its header, but has {len(content) - header:,}"
        )
    pixels: np.ndarray = np.frombuffer(bytearray(content), np.uint8, offset=header).reshape(shape)
    return pixels


def _found(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)
