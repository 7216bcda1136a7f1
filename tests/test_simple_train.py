"""The one-file example: an epoch on the digits, and a folder with too few images."""

import re
from pathlib import Path

import pytest
from PIL import Image

import simple_train


def test_an_epoch_on_the_digits_gives_neighbors_of_the_same_digit(capsys: pytest.CaptureFixture[str]) -> None:
    simple_train.main(["--epochs", "1"])
    epoch, accuracy = capsys.readouterr().out.splitlines()
    loss, purity, spread = (float(number) for number in re.findall(r"\d+\.\d+", epoch))
    assert loss < 1.5
    assert purity > 0.5
    assert spread > 0.5
    assert float(accuracy.rpartition(" ")[2]) > 0.9


def test_a_folder_with_fewer_images_than_a_batch_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(SystemExit, match="2"):
        simple_train.main(["--data", str(tmp_path)])
    assert capsys.readouterr().err.endswith(f"error: {tmp_path} has 2 images, but a batch needs 256\n")
