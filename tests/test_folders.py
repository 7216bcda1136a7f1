"""Image files of every color mode and format: read as RGB, with 16 bits scaled, or refused by name."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import default_loader

from pipeline.data import pixels
from pipeline.data.pixels import UnreadableImage, pixels_of, read_image
from pipeline.data.trees import open_folder

RGB = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
GRAY16 = np.random.default_rng(1).integers(0, 65536, (23, 31), dtype=np.uint16)


def as_pillow(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def with_transparency(image: Image.Image, value: int) -> Image.Image:
    image.info["transparency"] = value
    return image


MODES = {
    "rgb.jpg": Image.fromarray(RGB),
    "gray.jpg": Image.fromarray(RGB[..., 0]),
    "cmyk.jpg": Image.fromarray(RGB).convert("CMYK"),
    "rgb.png": Image.fromarray(RGB),
    "gray.png": Image.fromarray(RGB[..., 0]),
    "gray-alpha.png": Image.fromarray(RGB[..., :2].copy(), mode="LA"),
    "alpha.png": Image.fromarray(np.dstack([RGB, RGB[..., 0]])),
    "bits.png": Image.fromarray(RGB[..., 0] > 128),
    "palette.png": Image.fromarray(RGB).quantize(16),
    "palette-transparent.png": with_transparency(Image.fromarray(RGB).quantize(16), 3),
    "lossless.webp": Image.fromarray(RGB),
    "alpha.webp": Image.fromarray(np.dstack([RGB, RGB[..., 0]])),
    "rgb.bmp": Image.fromarray(RGB),
    "rgb.ppm": Image.fromarray(RGB),
    "gray.pgm": Image.fromarray(RGB[..., 0]),
    "rgb.tiff": Image.fromarray(RGB),
    "cmyk.tif": Image.fromarray(RGB).convert("CMYK"),
    "bits.tif": Image.fromarray(RGB[..., 0] > 128),
    "gray-alpha.tif": Image.fromarray(RGB[..., :2].copy(), mode="LA"),
    "palette-alpha.tif": Image.fromarray(RGB).quantize(16).convert("PA"),
    "moving.png": Image.fromarray(RGB),
    "moving.webp": Image.fromarray(RGB),
    "moving-alpha.webp": Image.fromarray(np.dstack([RGB, RGB[..., 0]])),
}


@pytest.fixture(params=["torchvision", "Pillow alone"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Pillow alone":
        monkeypatch.setattr(pixels, "decode_image", None)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.usefixtures("decoder")
def test_every_color_mode_is_read_as_pillow_converts_it(tmp_path: Path, name: str) -> None:
    path, image = tmp_path / name, MODES[name]
    options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    if name.startswith("moving"):
        options |= {"save_all": True, "append_images": [image.rotate(180)]}
    image.save(path, **options)
    found = read_image(str(path))
    assert (found.dtype, found.shape) == (torch.uint8, (3, 23, 31))
    assert torch.equal(found, as_pillow(path))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.usefixtures("decoder")
def test_an_image_that_a_camera_has_turned_is_read_as_torchvisions_image_folder_reads_it(
    tmp_path: Path, ending: str
) -> None:
    exif = Image.Exif()
    exif[274] = 6  # orientation: to be rotated by 90 degrees
    Image.fromarray(RGB).save(
        tmp_path / f"turned.{ending}", exif=exif, **({"lossless": True} if ending == "webp" else {})
    )
    found = read_image(str(tmp_path / f"turned.{ending}")).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.array(default_loader(str(tmp_path / f"turned.{ending}"))))
    assert found.shape == ((31, 23, 3) if ending == "tif" else RGB.shape), "Pillow rotates only TIFF"


def rgb16(path: Path) -> np.ndarray:
    """Write a PNG with 16 bits per channel, which Pillow cannot write; return its pixels."""
    pixels = np.random.default_rng(2).integers(0, 65536, (23, 31, 3), dtype=np.uint16)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 31, 23, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return pixels


@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "big-endian.tif", "gray.pgm", "rgb.png"])
def test_sixteen_bits_are_scaled_or_of_color_cut_off(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "rgb.png":
        expected = (rgb16(path) >> 8).astype(np.uint8)
    else:
        mode, order = ("I;16B", ">u2") if name.startswith("big") else ("I;16", "<u2")
        Image.frombytes(mode, (31, 23), GRAY16.astype(order).tobytes()).save(path)
        expected = np.rint(np.repeat(GRAY16[..., None], 3, axis=2) / 257).astype(np.uint8)
    assert np.array_equal(read_image(str(path)).permute(1, 2, 0).numpy(), expected)


def test_a_file_is_what_its_bytes_say_and_an_animation_its_first_picture(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "called.jpg")
    pictures = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:])
    (tmp_path / "moving.gif").rename(tmp_path / "moving.png")
    for name in ("called.jpg", "moving.png"):
        assert torch.equal(read_image(str(tmp_path / name)), as_pillow(tmp_path / name))


@pytest.mark.parametrize("values", [np.float32(0.5), np.int32(70_000), np.int32(-1), np.int32(200)])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, values: np.generic) -> None:
    Image.fromarray(np.full((4, 4), values)).save(tmp_path / "odd.tiff")
    with pytest.raises(UnreadableImage, match=r"odd\.tiff: pixels of mode . have no known range: save it with 8 or"):
        pixels_of(open_folder(tmp_path)[0], 0)
