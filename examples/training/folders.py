"""Trees of image files: which images there are, which classes, and their pixels as uint8 RGB of any color mode."""

import contextlib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from training.source import UNKNOWN

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # torchvision 0.29 calls its decoders deprecated; Pillow reads the same pixels, more slowly
    decode_image = None


# What torchvision decodes: MPO is a JPEG with more pictures behind it. Its decoder of PNG (0.29) crashes the process on
# a damaged file, and that of GIF takes memory for all pictures of an animation.
FAST = {"JPEG", "MPO", "WEBP"}
# Pillow's limit for an image is an error at twice this size; below that it only warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(OSError):
    """An image file that is not one, or cannot be read; the message names it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read image {printable(path)}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> Any:
        return UnreadableImage, (self.path, self.reason)


def printable(path: str) -> str:
    r"""Return a path that can be printed: bytes that are not UTF-8 as ``\xff``, line breaks as ``\n``."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def read_image(path: str) -> Tensor:
    """Return the pixels [3, H, W] uint8 of an image file, as RGB; of an animation, its first picture.

    Grayscale, palettes and CMYK are converted, an alpha channel is dropped, and 16 bits of gray are scaled to 8, of
    color cut off. JPEG and WebP are decoded by torchvision, everything else, and what it refuses, by Pillow.

    Raises:
        OSError: not a regular file, no image, or one of pixels (floats, 32-bit integers) whose range is not known.
        Exception: whatever a decoder raises on a damaged file; `pixels_of` makes one kind of them all.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for someone to write
        raise OSError("not a regular file")
    data = np.fromfile(path, dtype=np.uint8)
    try:
        image = Image.open(io.BytesIO(data.data))  # the header, and whether there is memory for so many pixels
    except UnidentifiedImageError as error:
        start = data[:16].tobytes()
        what = f"not an image, or too little of one: it begins with {start!r}" if start else "the file is empty"
        raise OSError(what) from error
    with image:
        if decode_image is not None and image.format in FAST:
            with contextlib.suppress(RuntimeError):  # Pillow reads some of these, or says what is wrong
                pixels: Tensor = decode_image(torch.from_numpy(data), mode=ImageReadMode.RGB)
                return pixels
        return as_rgb(image)


def as_rgb(image: Image.Image | Tensor) -> Tensor:
    """Return [3, H, W] uint8 of a Pillow image; a tensor is one already."""
    if isinstance(image, Tensor):
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = torch.from_numpy(np.array(image).astype(np.float64))
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise OSError(f"pixels of mode {image.mode} have no known range: save it with 8 or 16 bits a channel")
        return _eight_bits(values)[None].expand(3, -1, -1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _eight_bits(values: Tensor) -> Tensor:
    return values.double().div(257).round().to(torch.uint8)


class UnlabelledFolder(Dataset[tuple[Tensor, int]]):
    """All images below a folder, in the order of their paths, each with the label −1."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return (pixels, −1)."""
        return read_image(str(self.paths[index])), UNKNOWN


def pixels_of(images: Dataset[Any], index: int) -> tuple[Tensor, int]:
    """Return (pixels [3, H, W] uint8, label) of an image of a data set, whose images are tensors or Pillow's.

    Raises:
        UnreadableImage: with its path.
    """
    try:
        image, label = images[index]
        return as_rgb(image), label
    except Exception as error:  # on damaged files decoders raise whatever befalls them, MemoryError too
        raise UnreadableImage(path_of(images, index), _in_one_line(error)) from error


def path_of(images: Dataset[Any], index: int) -> str:
    """Return the file of an image, as far as the data set tells."""
    if isinstance(images, Subset):
        return path_of(images.dataset, images.indices[index])
    for name in ("paths", "samples", "_samples", "_image_files", "_images"):
        if hasattr(images, name):
            found = getattr(images, name)[index]
            return str(found[0] if isinstance(found, tuple) else found)
    return f"{index} of {type(images).__name__}"


def _in_one_line(error: Exception) -> str:
    """Say why something could not be read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if text and type(error) is OSError else f"{type(error).__name__}: {text}".removesuffix(": ")


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
            hint = "; its idx files are read with --dataset fashion-mnist" if list(root.glob("*-ubyte*")) else ""
            raise ValueError(f"no images ({', '.join(IMG_EXTENSIONS)}) below {train_root}{hint}")
        return unlabelled, None, False
    train = datasets.ImageFolder(str(train_root), loader=read_image, allow_empty=True)
    if not _class_folders(root / "val"):
        return train, None, True
    val = datasets.ImageFolder(str(root / "val"), loader=read_image, allow_empty=True)
    if strangers := sorted(set(val.classes) - set(train.classes)):
        raise ValueError(f"{root / 'val'} has classes that {train_root} lacks: {', '.join(strangers[:5])}")
    # Labels are places in the list of classes: those of the training set hold for both.
    places = {val.class_to_idx[name]: train.class_to_idx[name] for name in val.classes}
    val.target_transform = places.__getitem__
    return train, val, True


def _class_folders(root: Path) -> list[Path]:
    """Return the folders directly below that hold images."""
    if not root.is_dir():
        return []
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    return [folder for folder in folders if any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))]
