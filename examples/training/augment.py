"""Weak and strong views: the paper's for photographs (section 3.1), and a set for digits.

An augmentation is named as in the paper: "w/s" is a weak view for the target encoder and a strong one for the
online encoder; "s/s" and "w/w" are both strong and both weak.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

AUGMENTATIONS = ("s/s", "w/s", "w/w")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo_view(strength: str, size: int) -> v2.Compose:
    """Return the view of a PIL image as a normalized tensor [3, size, size].

    "s" is MoCo v2's: crop, colour jitter, greyscale, blur, flip; "w" is crop and flip.
    """
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True)
    colours = [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(_blur_width(size), sigma=(0.1, 2.0))], p=0.5),
    ]
    return v2.Compose([v2.RGB(), crop, *(colours if strength == "s" else []), v2.RandomHorizontalFlip(), *_to_tensor()])


def photo_supervised(size: int) -> v2.Compose:
    """Return the view in which ImageNet's classifiers are trained: crop of 8 % or more of the area, and flip."""
    crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)
    return v2.Compose([v2.RGB(), crop, v2.RandomHorizontalFlip(), *_to_tensor()])


def photo_centre(size: int) -> v2.Compose:
    """Return the evaluation view (section 3.2: resize to 256, centre crop of 224, or in that proportion)."""
    return v2.Compose([v2.RGB(), v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *_to_tensor()])


def _to_tensor() -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def _blur_width(size: int) -> int:
    """Return the odd kernel width nearest to a tenth of the image, as SimCLR has it."""
    return max(3, size // 10 // 2 * 2 + 1)


@dataclass(frozen=True)
class DigitsView:
    """Random views of a batch of grey images in [0, 1], drawn on their device. No flips: they are digits."""

    area: tuple[float, float]  # of the crop
    aspect: float  # of the crop, up to this or its inverse
    degrees: float  # of rotation, to either side
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
        """Return [B, 2, 3]: where in the image each point of the view comes from."""
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
