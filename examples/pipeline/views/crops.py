"""Random views of photographs and small images: the random numbers of each image, and the crops.

`draws` gives each image of an epoch a row of random numbers, from which its views are computed: the crops here, and
everything else in `pipeline.views.rendering`. So a view is a pure function of (seed, epoch, index), independent of the
batch, the workers and the ranks. Crops have the same distribution as those of torchvision's RandomResizedCrop.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ATTEMPTS = 10  # attempts to draw a crop that fits into the image, as in torchvision
# Columns of the draws [n, PER_VIEW] of one view, each uniform in [0, 1).
AREA, RATIO = slice(0, ATTEMPTS), slice(ATTEMPTS, 2 * ATTEMPTS)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, BLUR, SIGMA = range(20, 32)
PER_VIEW, PER_IMAGE = 32, 64  # an image has two views
_RATIOS = math.log(3 / 4), math.log(4 / 3)


@dataclass(frozen=True)
class View:
    """How a view is drawn: probabilities, and ranges of uniformly distributed values."""

    area: tuple[float, float] = (0.2, 1.0)  # area of the crop, as a share of the image
    jitter: float = 0.8
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5


STRONG = View()  # MoCo v2's, which the authors use (section 3.1)
WEAK = View(jitter=0.0, gray=0.0, blur=0.0)  # crop and flip
SUPERVISED = View(area=(0.08, 1.0), jitter=0.0, gray=0.0, blur=0.0)  # the usual views for ImageNet classifiers


PAPERS = WEAK, STRONG  # views of the target and of the online encoder


def views_of(augmentation: str, blur: float = STRONG.blur, views: tuple[View, View] = PAPERS) -> tuple[View, View]:
    """Return the views for the target and for the online encoder, given their names as in "w/s".

    Args:
        augmentation: two names joined by "/"; w is the weak one of ``views``, s the strong one.
        blur: probability of blur in a strong view.
        views: the (weak, strong) views of the data set.
    """
    weak, strong = views[0], replace(views[1], blur=blur)
    target, online = ({"w": weak, "s": strong}[strength] for strength in augmentation.split("/"))
    return target, online


def draws(seed: int, epoch: int, first: int, count: int, stream: int = 0) -> Tensor:
    """Return rows [count, PER_IMAGE] float32, uniform in [0, 1), for ``count`` images starting at index ``first``.

    The rows of an epoch are one sequence of a counter-based generator, so each can be computed without the others.

    Args:
        seed: seed of the run, at most 64 bits.
        epoch: the epoch of the views.
        first: index of the first image in its data set.
        count: number of images.
        stream: each stream gives different rows, for a different purpose.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[0, 0, 0, stream])
    generator.advance(first * PER_IMAGE // 4)  # the counter counts blocks of four
    numbers = generator.random_raw(count * PER_IMAGE) >> np.uint64(40)  # 24 bits, which float32 holds exactly
    return torch.from_numpy(numbers.astype(np.float32).reshape(count, PER_IMAGE) * np.float32(2**-24))


def crop_boxes(rows: Tensor, height: int, width: int, area: tuple[float, float]) -> np.ndarray:
    """Return the crops [n, 4], (top, left, height, width) in pixels, of images of one size, from draws of one view.

    An area and an aspect ratio are drawn up to ten times, until they fit into the image. If none of them fit, the crop
    is the largest one in the center of the image with a ratio between 3/4 and 4/3.
    """
    drawn = rows.numpy().astype(np.float64)
    areas = height * width * (area[0] + (area[1] - area[0]) * drawn[:, AREA])  # [n, ATTEMPTS]
    ratios = np.exp(_RATIOS[0] + (_RATIOS[1] - _RATIOS[0]) * drawn[:, RATIO])
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    chosen = np.arange(len(drawn)), fits.argmax(axis=1)
    w, h = widths[chosen], heights[chosen]
    top, left = np.floor(drawn[:, TOP] * (height - h + 1)), np.floor(drawn[:, LEFT] * (width - w + 1))
    if not fits.any(axis=1).all():
        none = ~fits.any(axis=1)
        w[none] = min(width, max(1, round(height * 4 / 3)))
        h[none] = min(height, max(1, round(width / (3 / 4))))
        top[none], left[none] = (height - h[none]) // 2, (width - w[none]) // 2
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def resized_crop(image: Tensor, box: np.ndarray, size: int) -> Tensor:
    """Return the crop [3, size, size] of an image [3, H, W] uint8: bilinear and antialiased, on the CPU."""
    top, left, height, width = box.tolist()
    crop = image[None, :, top : top + height, left : left + width]
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def resized_crops(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Return the crops [B, C, size, size] float32 in [0, 1] of images [B, C, H, W] uint8 of one size.

    Two batched matrix products, with separate weights for each image, equal an antialiased bilinear `interpolate`.
    """
    batch, channels, height, width = images.shape
    tops, lefts, heights, widths = torch.from_numpy(boxes.astype(np.float32)).to(images.device).T
    down = _resampling(tops, heights, height, size)  # [B, size, H]
    across = _resampling(lefts, widths, width, size)  # [B, size, W]
    rows = images.permute(0, 2, 1, 3).float().div_(255).reshape(batch, height, channels * width)
    rows = torch.bmm(down, rows).view(batch, size * channels, width)
    crops = torch.bmm(rows, across.transpose(1, 2)).view(batch, size, channels, size)
    return crops.permute(0, 2, 1, 3).clamp(0, 1)


def _resampling(begins: Tensor, lengths: Tensor, inputs: int, outputs: int) -> Tensor:
    """Return weights [B, outputs, inputs] that resample ``lengths`` pixels, starting at ``begins``."""
    scale = (lengths / outputs)[:, None, None]
    support = scale.clamp(min=1)
    places = torch.arange(inputs, device=begins.device, dtype=torch.float32) + 0.5
    places = places[None, None, :] - begins[:, None, None]  # [B, 1, inputs], within the crop
    centers = (torch.arange(outputs, device=begins.device, dtype=torch.float32) + 0.5)[None, :, None] * scale
    weights = (1 - (places - centers).abs() / support).clamp(min=0)
    weights = weights * ((places > 0) & (places < lengths[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)
