"""Turns crops into views on the training device, in batches: jitter, grayscale, blur, flip, normalization.

Each image has its own factors and its own order of jitter, from its row of `crops.draws`. They have the same
distribution as in torchvision's ColorJitter, RandomGrayscale, GaussianBlur and RandomHorizontalFlip, and each operation
equals torchvision's in float, up to rounding errors. Nothing is rounded to 8 bits in between.
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.views.crops import BLUR, BRIGHTNESS, FLIP, GRAY, HUE, JITTER, ORDER, SIGMA, View

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's grayscale
_ORDERS = list(itertools.permutations(range(4)))  # operations: brightness 0, contrast 1, saturation 2, hue 3
_SLOTS, _TURN = 8, 3  # slots: three blends, the rotation of the hue (at _TURN), three blends, and the grayscale
# Pixels at a time on a CPU, so that intermediate results stay in its cache.
_CPU_PIXELS = 1 << 16


@dataclass
class Parameters:
    """The parameters of one view for each of n images, computed on the CPU from their draws."""

    flip: Tensor  # [n] bool
    blends: Tensor  # [n, _SLOTS, 3]: weights of image, grayscale and its mean; (1, 0, 0) for _TURN
    hue: Tensor  # [n], in full rotations
    blurred: Tensor  # [n] bool
    sigma: Tensor  # [n] float64

    @classmethod
    def of(cls, rows: Tensor, view: View) -> "Parameters":
        """Return the parameters of the views with these draws [n, PER_VIEW]."""
        drawn = rows.double()
        jittered = drawn[:, JITTER] < view.jitter
        factors = 1 + (2 * drawn[:, BRIGHTNESS:HUE] - 1) * torch.tensor(view.strengths[:3], dtype=torch.float64)
        hue = (2 * drawn[:, HUE] - 1) * view.strengths[3]
        codes = _ORDER_CODES[(drawn[:, ORDER] * len(_ORDERS)).long()]  # [n, _SLOTS - 1]
        factor = torch.cat([factors, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1).gather(1, codes)
        factor = torch.where(jittered[:, None], factor, 1.0)
        gray = torch.where(drawn[:, GRAY] < view.gray, 0.0, 1.0)
        factor = torch.cat([factor, gray[:, None]], dim=1)  # [n, _SLOTS]
        with_gray = torch.cat([codes == 2, torch.ones(len(rows), 1, dtype=torch.bool)], dim=1)
        with_mean = torch.cat([codes == 1, torch.zeros(len(rows), 1, dtype=torch.bool)], dim=1)
        blends = torch.stack([factor, (1 - factor) * with_gray, (1 - factor) * with_mean], dim=2)
        low, high = view.sigma
        return cls(
            flip=drawn[:, FLIP] < view.flip,
            blends=blends.float(),
            hue=torch.where(jittered, hue, 0.0).float(),
            blurred=drawn[:, BLUR] < view.blur,
            sigma=low + (high - low) * drawn[:, SIGMA],
        )

    def slots(self, part: slice) -> tuple[int, ...]:
        """Return the slots that change at least one of these images; the others leave all of them as they are."""
        used = (self.blends[part] != torch.tensor([1.0, 0.0, 0.0])).flatten(2).any(dim=2).any(dim=0)
        used[_TURN] = self.hue[part].any()
        return tuple(used.nonzero().flatten().tolist())


def _order_codes() -> Tensor:
    """Return, for each of the 24 orders, the blends in the slots before the grayscale, [24, _SLOTS - 1]; 3 is none."""
    table = []
    for order in _ORDERS:
        at = order.index(3)
        before, after = order[:at], order[at + 1 :]
        table.append([*before, *[3] * (3 - len(before)), 3, *after, *[3] * (3 - len(after))])
    return torch.tensor(table)


_ORDER_CODES = _order_codes()


class Normalization:
    """Normalizes each of three channels to mean 0 and standard deviation 1; `undone` reverses it for display.

    Args:
        mean: mean of each channel.
        std: standard deviation of each channel.
        device: device of the images.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self._mean, self._std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalized images [B, 3, H, W] float32, channels last, of images [B, C, H, W] in 0 to 255."""
        return ((images.float() / 255 - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def undone(self, images: Tensor) -> Tensor:
        """Return normalized images [B, 3, H, W] as [B, H, W, 3] in [0, 1], on the CPU."""
        return (images.cpu() * self._std.cpu() + self._mean.cpu()).clamp(0, 1).permute(0, 2, 3, 1)


class Rendering:
    """Turns crops into normalized views on a device: ``Rendering(STRONG, 224, mean, std, device)(crops, rows)``.

    Args:
        view: how the views are drawn.
        size: side of the crops.
        mean: mean of each channel, which becomes 0.
        std: standard deviation of each channel, which becomes 1.
        device: device to render on. On a GPU, jitter and grayscale are compiled into a few kernels.
    """

    def __init__(
        self, view: View, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self.view, self.size, self.device = view, size, device
        self._mean, self._std = (torch.tensor(values, device=device).view(1, 1, 3, 1) for values in (mean, std))
        self._reflected = _reflected(size, blur_width(size) // 2).to(device)
        self._recolor: Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor] = recolored
        if device.type == "cuda":
            self._recolor = _Compiled(recolored)

    def __call__(self, crops: Tensor, rows: Tensor) -> Tensor:
        """Return views [B, 3, size, size] float32, channels last.

        Args:
            crops: [B, C, size, size] on the device, uint8, or float32 in [0, 1]; one channel is expanded to three.
            rows: draws [B, PER_VIEW] on the CPU.
        """
        parameters = Parameters.of(rows, self.view)
        shape = (len(crops), 3, self.size, self.size)
        views = torch.empty(shape, device=self.device, memory_format=torch.channels_last)
        chunk = len(crops) if self.device.type == "cuda" else max(1, _CPU_PIXELS // self.size**2)
        for first in range(0, len(crops), chunk):
            part = slice(first, first + chunk)
            views[part] = self._render(crops[part], parameters, part)
        return views

    def _render(self, crops: Tensor, parameters: Parameters, part: slice) -> Tensor:
        """Return the views of a part of the batch."""
        flip, blends, hue = (
            values[part].to(self.device, non_blocking=True)
            for values in (parameters.flip, parameters.blends, parameters.hue)
        )
        crops = torch.where(flip[:, None, None, None], crops.flip(3), crops)
        images = crops.permute(0, 2, 1, 3)  # [B, H, C, W], so that rows and columns each take one batched product
        images = images.float().div_(255) if crops.dtype == torch.uint8 else images.contiguous()
        images = images.expand(-1, -1, 3, -1)
        slots = parameters.slots(part)
        if slots:
            images = self._recolor(images, blends, hue, tuple(range(_SLOTS)) if self.device.type == "cuda" else slots)
        blurred = parameters.blurred[part].nonzero().flatten()
        if len(blurred):
            kernels = blur_kernels(parameters.sigma[part][blurred], blur_width(self.size))
            blurred = blurred.to(self.device, non_blocking=True)
            soft = self._blur(images[blurred], kernels.to(self.device, non_blocking=True))
            images = images.contiguous().index_copy(0, blurred, soft)
        return ((images - self._mean) / self._std).permute(0, 2, 1, 3)

    def _blur(self, images: Tensor, kernels: Tensor) -> Tensor:
        """Return images [b, H, 3, W] blurred by kernels [b, taps], as two batched products."""
        batch, size = len(images), self.size
        matrix = torch.zeros(batch, size, size, device=images.device)
        matrix.scatter_add_(2, self._reflected.expand(batch, -1, -1), kernels[:, None, :].expand(-1, size, -1))
        rows = torch.bmm(matrix, images.reshape(batch, size, 3 * size)).view(batch, size * 3, size)
        soft: Tensor = torch.bmm(rows, matrix.transpose(1, 2))
        return soft.view(batch, size, 3, size)


def recolored(images: Tensor, blends: Tensor, hue: Tensor, slots: tuple[int, ...]) -> Tensor:
    """Apply these slots of `Parameters` to images [B, H, 3, W] in [0, 1], in the given order."""
    for slot in slots:
        if slot == _TURN:
            images = turned(images, hue)
            continue
        share, of_gray, of_mean = blends[:, slot].view(-1, 3, 1, 1, 1).unbind(1)
        gray = _grayscale(images)
        mean = gray.mean(dim=3, keepdim=True).mean(dim=1, keepdim=True)  # in two steps: the same for any batch
        images = (images * share + (gray * of_gray + mean * of_mean)).clamp(0, 1)
    return images


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Return images [B, H, 3, W] with their hue rotated by ``turns`` [B]: to HSV and back, in one formula.

    For a hue h in sixths of a turn, each channel is v − (v − min) · clamp(min(k, 4 − k), 0, 1) with k = (n + h) mod 6.
    Here n is 5, 3, 1 for red, green, blue, and v and min are the largest and the smallest channel.
    """
    red, green, blue = images.unbind(2)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    spread = high - low
    divisor = torch.where(spread == 0, 1.0, spread)
    hue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(high == red, (green - blue) / divisor, hue) + 6 * turns[:, None, None]
    places = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 1, 3, 1)
    k = torch.remainder(hue[:, :, None] + places, 6)
    moved = high[:, :, None] - spread[:, :, None] * torch.minimum(k, 4 - k).clamp(0, 1)
    return torch.where(turns[:, None, None, None] == 0, images, moved)


def _grayscale(images: Tensor) -> Tensor:
    """Return the luma [B, H, 1, W] of images [B, H, 3, W]."""
    red, green, blue = images.split(1, dim=2)
    luma: Tensor = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    return luma


def blur_width(size: int) -> int:
    """Return the odd kernel width nearest to a tenth of the image, as in SimCLR."""
    return max(3, size // 10 // 2 * 2 + 1)


def blur_kernels(sigma: Tensor, width: int) -> Tensor:
    """Return Gaussian kernels [n, width] float32 with standard deviations ``sigma`` [n] in pixels, each with sum 1."""
    taps = torch.arange(width, dtype=torch.float64) - width // 2
    weights = torch.exp(-0.5 * (taps / sigma.double()[:, None]) ** 2)
    weights = torch.where(weights < 1e-12, 0.0, weights)  # denormal numbers are slow
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def _reflected(size: int, radius: int) -> Tensor:
    """Return the positions in a row of the taps of each pixel's kernel, [size, 2 · radius + 1], with reflection."""
    period = max(1, 2 * (size - 1))
    places = (torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)) % period
    return torch.minimum(places, period - places).clamp(max=size - 1)


class _Compiled:
    """A function compiled by `torch.compile`; if that fails, it warns and calls the plain function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._plain, self._fast = function, torch.compile(function, dynamic=False)

    def __call__(self, *arguments: object) -> Tensor:
        """Return the result of the function."""
        try:
            done: Tensor = self._fast(*arguments)
            return done
        except Exception as error:  # of many kinds; an error of the function itself is raised again below
            if self._fast is not self._plain:
                warnings.warn(f"views are drawn without torch.compile, which failed: {error}", stacklevel=2)
            self._fast = self._plain
            return self._plain(*arguments)
