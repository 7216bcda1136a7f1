"""The names of augmentations, and the weak and strong views of the digits.

An augmentation is named as in the paper: "w/s" is a weak view for the target encoder and a strong one for the
online encoder; "s/s" and "w/w" are both strong and both weak. Views of photographs are in `pipeline.views.crops`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("s/s", "w/s", "w/w")


@dataclass(frozen=True)
class DigitsView:
    """Random views of a batch of grayscale images in [0, 1], drawn on their device. No flips: they are digits."""

    area: tuple[float, float]  # share of the image that the crop covers
    aspect: float  # the crop's aspect ratio is between 1 / aspect and aspect
    degrees: float  # largest rotation to either side
    shear: float
    contrast: tuple[float, float]
    brightness: float
    blur: float  # probability
    noise: float  # largest standard deviation

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return one view of each of the images [B, 1, H, W]."""
        grid = F.affine_grid(self._affine(images, generator), list(images.shape), align_corners=False)
        views = F.grid_sample(images, grid, align_corners=False)
        mean = views.mean(dim=(1, 2, 3), keepdim=True)
        contrast = _uniform(images, generator, *self.contrast)[:, None, None, None]
        brightness = _uniform(images, generator, -self.brightness, self.brightness)[:, None, None, None]
        views = (views - mean) * contrast + mean + brightness
        if self.blur:
            kernel = torch.tensor([1.0, 2.0, 1.0], device=images.device) / 4
            blurred = F.conv2d(F.pad(views, (1, 1, 1, 1), "replicate"), torch.outer(kernel, kernel)[None, None])
            chosen = _uniform(images, generator, 0, 1) < self.blur
            views = torch.where(chosen[:, None, None, None], blurred, views)
        if self.noise:
            deviation = _uniform(images, generator, 0, self.noise)[:, None, None, None]
            views = views + deviation * torch.randn(views.shape, generator=generator, device=views.device)
        return views

    def _affine(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the affine matrices [B, 2, 3] that map points of the view to points of the image."""
        area = _uniform(images, generator, *self.area)
        aspect = self.aspect ** _uniform(images, generator, -1, 1)
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        angle = torch.deg2rad(_uniform(images, generator, -self.degrees, self.degrees))
        shear = _uniform(images, generator, -self.shear, self.shear)
        cos, sin = angle.cos(), angle.sin()
        right = _uniform(images, generator, -1, 1) * (1 - width)
        down = _uniform(images, generator, -1, 1) * (1 - height)
        rows = [
            torch.stack([cos * width, (cos * shear - sin) * height, right], dim=1),
            torch.stack([sin * width, (sin * shear + cos) * height, down], dim=1),
        ]
        return torch.stack(rows, dim=1)


def _uniform(images: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(images.shape[0], generator=generator, device=images.device)


DIGITS_VIEWS = {
    "s": DigitsView((0.5, 1.0), 1.2, 15, 0.15, (0.6, 1.4), 0.2, blur=0.3, noise=0.1),
    "w": DigitsView((0.8, 1.0), 1.0, 5, 0.0, (0.8, 1.2), 0.1, blur=0.0, noise=0.0),
}
