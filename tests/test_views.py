"""Views: distributed like torchvision's, equal to its operations in float, and determined by the row alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from pipeline.data.photos import _Centred
from pipeline.views.crops import (
    BLUR,
    BRIGHTNESS,
    FLIP,
    GRAY,
    JITTER,
    PER_VIEW,
    SIGMA,
    STRONG,
    WEAK,
    View,
    crop_boxes,
    draws,
    resized_crop,
    resized_crops,
    views_of,
)
from pipeline.views.rendering import _SLOTS, _TURN, Parameters, Rendering, blur_width

CPU = torch.device("cpu")
MANY = 12_000
LEAST = 1e-3  # p-value; the seeds are fixed
PLAIN = View(jitter=0.0, gray=0.0, blur=0.0, flip=0.0)
JITTERS = (
    transforms.adjust_brightness,
    transforms.adjust_contrast,
    transforms.adjust_saturation,
    transforms.adjust_hue,
)


def rows(count: int, seed: int = 0, epoch: int = 0) -> Tensor:
    return draws(seed, epoch, 0, count)[:, :PER_VIEW]


def rendering(view: View, size: int) -> Rendering:
    """Without normalization, so that pixels stay in [0, 1]."""
    return Rendering(view, size, (0.0,) * 3, (1.0,) * 3, CPU)


def noise(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def orders_of(blends: Tensor) -> list[tuple[int, ...]]:
    """The order of brightness 0, contrast 1, saturation 2 and hue 3 of images that are all jittered."""
    found = []
    for image in blends:
        kinds = [3 if slot == _TURN else 1 if m else 2 if g else 0 for slot, (_, g, m) in enumerate(image.tolist())]
        used = [slot for slot in range(_SLOTS - 1) if slot == _TURN or image[slot, 0] != 1]
        found.append(tuple(kinds[slot] for slot in used))
    return found


# How they are drawn


def test_an_image_has_its_row_whatever_others_are_drawn() -> None:
    whole = draws(7, 3, 0, 50)
    assert torch.equal(whole[20:23], draws(7, 3, 20, 3))
    assert whole.unique().numel() > 0.99 * whole.numel()
    for other in (draws(8, 3, 0, 50), draws(7, 4, 0, 50), draws(7, 3, 0, 50, stream=1)):
        assert not (other == whole).all(dim=1).any()


def test_draws_are_uniform_and_independent() -> None:
    drawn = draws(0, 0, 0, MANY).double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T[::7]:
        assert stats.kstest(column.numpy(), "uniform").pvalue > LEAST
    correlation = torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1])
    assert correlation.abs().max() < 5 / MANY**0.5


@pytest.mark.parametrize(("height", "width"), [(375, 500), (90, 250), (32, 32)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    boxes = crop_boxes(rows(MANY), height, width, STRONG.area)
    torch.manual_seed(1)
    image = torch.zeros(3, height, width)
    peer = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    drawn = [peer.make_params([image]) for _ in range(4000)]
    theirs = np.array([[one[name] for name in ("top", "left", "height", "width")] for one in drawn])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / np.maximum(1, height - b[:, 2]),
    ):
        assert stats.ks_2samp(measure(boxes), measure(theirs)).pvalue > LEAST
    down, across = boxes[:, 0] / np.maximum(1, height - boxes[:, 2]), boxes[:, 1] / np.maximum(1, width - boxes[:, 3])
    assert abs(np.corrcoef(down, across)[0, 1]) < 0.1, "drawn independently"


@pytest.mark.parametrize(("height", "width"), [(10, 300), (300, 10), (1, 1), (1, 9)])
def test_a_crop_that_never_fits_is_torchvisions_center(height: int, width: int) -> None:
    peer = v2.RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([torch.zeros(3, height, width)])
    boxes = crop_boxes(rows(20), height, width, (0.9, 1.0))
    assert (boxes == [peer["top"], peer["left"], peer["height"], peer["width"]]).all()


def test_parameters_are_distributed_as_the_authors() -> None:
    drawn = Parameters.of(rows(MANY), STRONG)
    jittered = drawn.hue != 0
    gray = drawn.blends[:, -1, 0] == 0
    for happened, probability in ((jittered, 0.8), (gray, 0.2), (drawn.blurred, 0.5), (drawn.flip, 0.5)):
        assert stats.binomtest(int(happened.sum()), MANY, probability).pvalue > LEAST
    assert torch.equal(jittered, (drawn.blends[:, :-1, 0] != 1).any(dim=1)), "all of it or nothing"
    assert stats.kstest(drawn.hue[jittered].numpy(), stats.uniform(-0.1, 0.2).cdf).pvalue > LEAST
    assert stats.kstest(drawn.sigma.numpy(), stats.uniform(0.1, 1.9).cdf).pvalue > LEAST
    share, with_gray, with_mean = drawn.blends[jittered][:, :-1].unbind(2)
    for kind in ((with_gray == 0) & (with_mean == 0) & (share != 1), with_mean != 0, with_gray != 0):
        assert (kind.sum(dim=1) == 1).all()
        assert stats.kstest(share[kind].numpy(), stats.uniform(0.6, 0.8).cdf).pvalue > LEAST
    orders = orders_of(drawn.blends[jittered])
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > LEAST


def test_a_weak_view_is_crop_and_flip_and_the_two_views_of_an_image_are_drawn_apart() -> None:
    drawn = Parameters.of(rows(MANY), WEAK)
    assert not drawn.blurred.any()
    assert drawn.slots(slice(None)) == ()
    assert 0.45 < drawn.flip.double().mean() < 0.55
    both = draws(0, 0, 0, MANY)
    assert abs(torch.corrcoef(torch.stack([both[:, FLIP], both[:, PER_VIEW + FLIP]]))[0, 1]) < 0.05
    assert views_of("w/s", blur=0.0) == (WEAK, replace(STRONG, blur=0.0))


# What is made of them


@pytest.mark.parametrize("kind", range(4))
def test_each_jitter_is_torchvisions(kind: int) -> None:
    strength = (0.4, 0.4, 0.4, 0.1)[kind]
    view = replace(PLAIN, jitter=1.0, strengths=tuple(strength if place == kind else 0.0 for place in range(4)))
    crops, drawn = noise(12, 33), rows(12)
    crops[0], crops[1, 1:] = 77, 0  # gray, and red alone
    found = rendering(view, 33)(crops, drawn)
    for crop, row, ours in zip(crops.float() / 255, drawn.double(), found, strict=True):
        change = float(strength * (2 * row[BRIGHTNESS + kind] - 1))
        expected = JITTERS[kind](crop, change if kind == 3 else 1 + change)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [28, 33, 224])
def test_blur_grayscale_and_flip_are_torchvisions(size: int) -> None:
    crops, drawn = noise(6, size), rows(6)
    images = crops.float() / 255
    torch.testing.assert_close(rendering(replace(PLAIN, flip=1.0), size)(crops, drawn), images.flip(3))
    gray = rendering(replace(PLAIN, gray=1.0), size)(crops, drawn)
    torch.testing.assert_close(gray, transforms.rgb_to_grayscale(images, 3), rtol=0, atol=1e-5)
    soft = rendering(replace(PLAIN, blur=1.0), size)(crops, drawn)
    width = max(3, size // 10 // 2 * 2 + 1)
    assert width == blur_width(size)
    for image, row, ours in zip(images, drawn.double(), soft, strict=True):
        sigma = float(0.1 + 1.9 * row[SIGMA])
        torch.testing.assert_close(ours, transforms.gaussian_blur(image, [width] * 2, [sigma] * 2), rtol=0, atol=1e-5)


def by_torchvision(crop: Tensor, row: Tensor, size: int) -> Tensor:
    """A strong view [3, H, W], one operation after another, in the order that the row says."""
    image = crop.float() / 255
    if row[FLIP] < 0.5:
        image = image.flip(2)
    parameters = Parameters.of(row[None].float(), replace(STRONG, jitter=1.0))
    if row[JITTER] < 0.8:
        for kind in orders_of(parameters.blends)[0]:
            change = float((0.4, 0.4, 0.4, 0.1)[kind] * (2 * row[BRIGHTNESS + kind] - 1))
            image = JITTERS[kind](image, change if kind == 3 else 1 + change)
    if row[GRAY] < 0.2:
        image = transforms.rgb_to_grayscale(image, 3)
    if row[BLUR] < 0.5:
        image = transforms.gaussian_blur(image, [blur_width(size)] * 2, [float(0.1 + 1.9 * row[SIGMA])] * 2)
    return image


def test_a_whole_strong_view_is_torchvisions_for_every_order() -> None:
    crops, drawn = noise(150, 32), rows(150, seed=5)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    found = Rendering(STRONG, 32, mean, std, CPU)(crops, drawn)
    expected = torch.stack([by_torchvision(crop, row, 32) for crop, row in zip(crops, drawn.double(), strict=True)])
    torch.testing.assert_close(found, transforms.normalize(expected, list(mean), list(std)), rtol=0, atol=5e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@given(
    size=st.sampled_from([16, 28, 33]),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**63 - 1),
    strong=st.booleans(),
)
@settings(max_examples=25)
def test_a_view_is_the_same_to_the_last_bit_in_any_batch(size: int, parts: list[int], seed: int, strong: bool) -> None:
    count = sum(parts)
    crops, drawn = noise(count, size, seed % 1000), rows(count, seed=seed)
    render = rendering(STRONG if strong else WEAK, size)
    boxes = crop_boxes(drawn, size, size, STRONG.area)
    whole, whole_crops = render(crops, drawn), resized_crops(crops, boxes, 24)
    for part in torch.arange(count).split(parts):
        assert torch.equal(render(crops[part], drawn[part]), whole[part])
        assert torch.equal(resized_crops(crops[part], boxes[part.numpy()], 24), whole_crops[part])


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 48),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_batched_crops_are_an_antialiased_interpolation_of_each(
    height: int, width: int, size: int, channels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, channels, height, width), generator=generator).byte()
    boxes = crop_boxes(rows(3, seed=seed), height, width, (0.08, 1.0))
    found = resized_crops(images, boxes, size)
    for image, (top, left, h, w), ours in zip(images.float() / 255, boxes.tolist(), found, strict=True):
        crop = image[None, :, top : top + h, left : left + w]
        expected = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_crop_of_a_photograph_is_pillows_within_two_levels() -> None:
    image = smooth(120, 160)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for box in crop_boxes(rows(20), 120, 160, STRONG.area):
        top, left, height, width = box.tolist()
        expected = image.crop((left, top, left + width, top + height)).resize((64, 64), Image.Resampling.BILINEAR)
        found = resized_crop(pixels, box, 64).permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - np.array(expected).astype(int)).max() <= 2


def test_the_evaluation_view_is_pillows_within_two_levels() -> None:
    image = smooth(90, 120)
    found, label = _Centred([(image, 7)], 56)[0]
    whole = image.resize((85, 64), Image.Resampling.BILINEAR)  # the shorter side to 256/224 of 56
    expected = np.array(transforms.center_crop(whole, [56])).astype(int)
    assert (found.shape, found.dtype, label) == ((3, 56, 56), torch.uint8, 7)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [224, 32])  # from a shorter side of 256 and 37 pixels: even and odd
@pytest.mark.parametrize(
    ("height", "width"), [(90, 120), (300, 200), (20, 339), (64, 2_500), (1, 50), (1_025, 8), (40, 901), (1_037, 13)]
)
def test_a_long_image_is_seen_as_if_it_were_resized_as_a_whole(height: int, width: int, size: int) -> None:
    short, long = sorted((height, width))
    coarse = noise(1, 8 * long // short)[:, :, :5].float()  # about 8 x 8 patches in a square
    image = F.interpolate(coarse, (short, long), mode="bilinear")[0].byte()
    image = image.transpose(1, 2) if height > width else image
    found, _ = _Centred([(image, 7)], size)[0]
    side = round(size * 256 / 224)
    whole = transforms.resize(image, [side], antialias=True)
    apart = (found.int() - transforms.center_crop(whole, [size]).int()).abs().max()
    rounded = long // short >= 20 and long * side % short  # the exact size of the resized image is not a whole number
    assert found.float().std() > 20
    assert apart <= (6 if rounded else 0)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 1_000), (2_000, 100)])
def test_no_image_takes_much_more_memory_than_its_views(shape: tuple[int, int]) -> None:
    """An image of 1 x 5,000 pixels once took more than a gigabyte."""
    image = noise(1, 1)[0].expand(3, *shape)
    with Largest() as seen:
        assert _Centred([(image, 0)], 224)[0][0].shape == (3, 224, 224)
    assert seen.bytes <= max(3 * 256 * 256 * 20, image.numel())
    with Largest() as seen:
        for _, box in zip(range(5), crop_boxes(rows(5), *shape, STRONG.area), strict=True):
            assert resized_crop(image, box, 224).shape == (3, 224, 224)
    assert seen.bytes <= max(3 * 224 * 224, image.numel())


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, *(part.nbytes for part in tree_leaves(result) if isinstance(part, Tensor)))
        return result


def smooth(height: int, width: int) -> Image.Image:
    """Something like a photograph: blobs of several sizes, and a little noise."""
    generator = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        small = generator.normal(size=(height // side + 2, width // side + 2, 3)).astype(np.float32)
        planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(plane) for plane in planes], axis=2) * side**0.5
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255 + generator.normal(size=pixels.shape) * 6
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_the_blur_is_near_the_authors_which_is_pillows() -> None:
    """They pass sigma to Pillow, which approximates the blur with box blurs, as its radius."""
    image = smooth(224, 224)
    crop = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    row = rows(1)
    apart = []
    for sigma in np.linspace(0.1, 2.0, 8).tolist():
        row[0, SIGMA] = (sigma - 0.1) / 1.9
        ours = rendering(replace(PLAIN, blur=1.0), 224)(crop, row)[0].permute(1, 2, 0).numpy() * 255
        theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(radius=sigma))).astype(float)
        apart.append(np.abs(ours - theirs).mean())
    assert max(apart) < 1, apart  # mean difference in levels of 255, including their rounding
