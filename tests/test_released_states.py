"""States that older releases saved still load, and the run goes on as it would have with that release.

Run ``python tests/test_released_states.py`` once at each release: it writes tests/states/VERSION.pt.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msf_core
from msf_core import EMATarget, MeanShiftLoss, MemoryBank
from msf_core.schedules import cosine, linear

STATES = Path(__file__).parent / "states"
SIZE, DIM, BATCH, STEPS = 13, 6, 5, 4  # the bank wraps around
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.int8},
}


class Training:
    """A few steps of everything that has a state."""

    def __init__(self, options: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = torch.randn(STEPS + 1, 2, BATCH, DIM, generator=generator)
        self.labels = torch.randint(3, (STEPS + 1, BATCH), generator=generator)
        self.online = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM))
        for parameter in self.online.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.target = EMATarget(self.online, cosine(0.9, 1.0, 10), buffers="ema")
        self.criterion = MeanShiftLoss(MemoryBank(SIZE, DIM, **options), k=linear(2, 4, STEPS))

    def step(self, number: int) -> dict[str, Tensor]:
        """Do one step, with a fixed change of the parameters, and return its results."""
        weak, strong = self.data[number]
        limits = {"ids": self.labels[number] * 10} if self.criterion.bank.dtype == torch.int8 else {}
        v, u = self.online(strong), self.target(weak)
        loss, neighbors = self.criterion(v, u, self.labels[number], return_neighbors=True, **limits)
        with torch.no_grad():
            for parameter in self.online.parameters():
                parameter.mul_(0.9)
        self.target.update(self.online)
        return {"loss": loss.detach(), "index": neighbors.index, "label": neighbors.label, "u": u}

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("online", "target", "criterion")}


def written(options: dict[str, Any]) -> dict[str, Any]:
    training = Training(options)
    for number in range(STEPS):
        training.step(number)
    # A copy: the next step moves what the state shares with the modules.
    state = {name: {key: value.clone() for key, value in part.items()} for name, part in training.state().items()}
    return {"state": state, "next": training.step(STEPS)}


def cases() -> list[tuple[Path, str]]:
    files = sorted(STATES.glob("*.pt"))
    return [(file, name) for file in files for name in torch.load(file, weights_only=True)]


@pytest.mark.parametrize(("file", "name"), cases(), ids=lambda value: getattr(value, "stem", value))
def test_a_state_of_that_release_loads_and_goes_on(file: Path, name: str) -> None:
    saved = torch.load(file, weights_only=True)[name]
    training = Training(OPTIONS[name])
    before = training.step(0)
    training.online.load_state_dict(saved["state"]["online"])
    training.target.load_state_dict(saved["state"]["target"])
    training.criterion.load_state_dict(saved["state"]["criterion"])
    bank = training.criterion.bank
    assert (len(bank), int(bank.pushed), training.criterion.steps) == (SIZE, STEPS * BATCH, STEPS)

    found = training.step(STEPS)
    assert not torch.allclose(before["u"], found["u"]), "loading the state changed nothing"
    assert found.keys() == saved["next"].keys()
    for part, expected in saved["next"].items():  # other processors round sums differently
        torch.testing.assert_close(found[part], expected, rtol=1e-5, atol=1e-6, msg=f"{part} differs")


def test_every_release_has_its_states() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = [line.split()[1] for line in changelog.splitlines() if line.startswith("## ")]
    assert releases
    assert {release for release in releases if release != "Unreleased"} <= {file.stem for file in STATES.glob("*.pt")}


if __name__ == "__main__":
    STATES.mkdir(exist_ok=True)
    kept = {}
    for name, options in OPTIONS.items():
        with suppress(TypeError):  # rows of a dtype that only a later release has
            kept[name] = written(options)
    torch.save(kept, STATES / f"{msf_core.__version__}.pt")
