"""The one-file example: an epoch on the digits."""

import re

import pytest

import simple_train


def test_an_epoch_on_the_digits_gives_neighbors_of_the_same_digit(capsys: pytest.CaptureFixture[str]) -> None:
    simple_train.main(["--epochs", "1"])
    epoch, accuracy = capsys.readouterr().out.splitlines()
    loss, purity, spread = (float(number) for number in re.findall(r"\d+\.\d+", epoch))
    assert loss < 1.5
    assert purity > 0.5
    assert spread > 0.5
    assert float(accuracy.rpartition(" ")[2]) > 0.9
