"""Image files: their pixels as uint8 RGB, of any color mode and format. Which files there are is in `trees`."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # torchvision 0.29 calls its decoders deprecated; Pillow reads the same pixels, more slowly
    decode_image = None


class UnreadableImage(OSError):
    """An image file that is not one, or cannot be read; the message names it."""


def read_image(path: str) -> Tensor:
    """Return the pixels [3, H, W] uint8 of an image file, as RGB.

    Grayscale, palettes and CMYK are converted, an alpha channel is dropped, and 16 bits are scaled to 8. JPEG, PNG,
    WebP and GIF are decoded by torchvision, everything else, and what it refuses, by Pillow. Images are not turned as
    their EXIF data say, except for TIFF, which Pillow turns: torchvision's ImageFolder does the same.

    Raises:
        OSError: it cannot be read, or has pixels (floats, 32-bit integers) whose range is not known.
    """
    if decode_image is None:
        return _read_by_pillow(path)
    data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    try:
        image = decode_image(data, mode=ImageReadMode.RGB)
    except RuntimeError:
        return _read_by_pillow(path)
    image = image[0] if image.ndim == 4 else image  # the first picture of an animation
    return _eight_bits(image) if image.dtype == torch.uint16 else image


def _read_by_pillow(path: str) -> Tensor:
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except (SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # Pillow's, of broken files
        raise OSError(f"{type(error).__name__}: {error}") from error


def as_rgb(image: Image.Image | Tensor) -> Tensor:
    """Return [3, H, W] uint8 of a Pillow image; a tensor is one already.

    Raises:
        OSError: its pixels are floats or 32-bit integers.
    """
    if isinstance(image, Tensor):
        return image
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen:  # "I" holds 32 bits, which only these formats do not have
        raise OSError(f"pixels of mode {image.mode} have no known range: save it with 8 or 16 bits a channel")
    if sixteen:
        return _eight_bits(torch.from_numpy(np.array(image).astype(np.float64)))[None].expand(3, -1, -1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _eight_bits(values: Tensor) -> Tensor:
    return values.double().div(257).round().to(torch.uint8)


def pixels_of(images: Dataset[Any], index: int) -> tuple[Tensor, int]:
    """Return (pixels [3, H, W] uint8, label) of an image of a data set, whose images are tensors or Pillow's.

    Raises:
        UnreadableImage: with its path.
    """
    try:
        image, label = images[index]
        return as_rgb(image), label
    except OSError as error:
        where = getattr(images, "samples", getattr(images, "paths", None))
        raise UnreadableImage(f"cannot read image {where[index] if where else index}: {error}") from error


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
