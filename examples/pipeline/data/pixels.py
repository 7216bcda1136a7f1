"""Read image files of any format and color mode as uint8 RGB. `trees` finds the files."""

import contextlib
import io
import os
import stat
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset

from pipeline.data.scanning import printable

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # torchvision 0.29 calls its decoders deprecated; Pillow reads the same pixels, more slowly
    decode_image = None


# What torchvision decodes; MPO is a JPEG followed by more pictures. The PNG decoder of torchvision 0.29 crashes the
# process on a damaged file, and its GIF decoder takes memory for all pictures of an animation.
FAST = {"JPEG", "MPO", "WEBP"}
# Pillow warns about images above its size limit. At twice the limit it raises an error, which is enough.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(OSError):
    """An image file that cannot be read; the message names it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read image {printable(path)}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> Any:
        return UnreadableImage, (self.path, self.reason)


def read_image(path: str) -> Tensor:
    """Return the pixels [3, H, W] uint8 of an image file as RGB; for an animation, those of the first picture.

    Grayscale, palettes and CMYK are converted, and an alpha channel is dropped. 16-bit gray is scaled to 8 bits; of
    16-bit color, the low bits are dropped. torchvision decodes JPEG and WebP; Pillow decodes everything else, and what
    torchvision refuses. EXIF orientation is ignored except in TIFF files, as in torchvision's ImageFolder.

    Raises:
        OSError: not a regular file, not an image, or pixels (floats, 32-bit integers) without a known range.
        Exception: whatever a decoder raises on a damaged file; `pixels_of` turns all of these into UnreadableImage.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for someone to write
        raise OSError("not a regular file")
    data = np.fromfile(path, dtype=np.uint8)
    try:
        image = Image.open(io.BytesIO(data.data))  # reads the header; refuses far too many pixels
    except UnidentifiedImageError as error:
        start = data[:16].tobytes()
        what = f"not an image, or too little of one: it begins with {start!r}" if start else "the file is empty"
        raise OSError(what) from error
    with image:
        if decode_image is not None and image.format in FAST:
            with contextlib.suppress(RuntimeError):  # Pillow can read some of these, or explains the error
                pixels: Tensor = decode_image(torch.from_numpy(data), mode=ImageReadMode.RGB)
                return pixels
        return as_rgb(image)


def as_rgb(image: Image.Image | Tensor) -> Tensor:
    """Return a Pillow image as [3, H, W] uint8; a tensor is returned as it is.

    Raises:
        OSError: its pixels are floats or 32-bit integers.
    """
    if isinstance(image, Tensor):
        return image
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen:  # "I" means 32 bits, except for these formats
        raise OSError(f"pixels of mode {image.mode} have no known range: save it with 8 or 16 bits a channel")
    if sixteen:
        return _eight_bits(torch.from_numpy(np.array(image).astype(np.float64)))[None].expand(3, -1, -1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _eight_bits(values: Tensor) -> Tensor:
    return values.double().div(257).round().to(torch.uint8)


def pixels_of(images: Dataset[Any], index: int) -> tuple[Tensor, int]:
    """Return (pixels [3, H, W] uint8, label) of an image of a data set that has tensors or Pillow images.

    Raises:
        UnreadableImage: it cannot be read; the error has its path.
    """
    try:
        image, label = images[index]
        return as_rgb(image), label
    except Exception as error:  # on damaged files, decoders raise anything, even MemoryError
        raise UnreadableImage(path_of(images, index), _in_one_line(error)) from error


def path_of(images: Dataset[Any], index: int) -> str:
    """Return the path of an image, or its index if the data set does not know the path."""
    if isinstance(images, Subset):
        return path_of(images.dataset, images.indices[index])
    for name in ("paths", "samples", "_samples", "_image_files", "_images"):
        if hasattr(images, name):
            found = getattr(images, name)[index]
            return str(found[0] if isinstance(found, tuple) else found)
    return f"{index} of {type(images).__name__}"


def _in_one_line(error: Exception) -> str:
    """Return the reason why something could not be read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if text and type(error) is OSError else f"{type(error).__name__}: {text}".removesuffix(": ")


def labels_of(images: Dataset[Any]) -> Tensor:
    """Return the labels [n] of a torchvision data set, or of a part of one, without reading an image."""
    if isinstance(images, Subset):
        return labels_of(images.dataset)[list(images.indices)]
    for name in ("targets", "labels", "_labels", "y"):
        if hasattr(images, name):
            labels = torch.as_tensor(getattr(images, name))
            break
    else:
        if not hasattr(images, "_samples"):
            raise ValueError(f"{type(images).__name__} does not provide its labels")
        labels = torch.tensor([label for _, label in images._samples])
    places = getattr(images, "target_transform", None)
    return labels if places is None else torch.tensor([places(int(label)) for label in labels])
