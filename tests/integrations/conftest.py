"""A fixture that records what an example does with the library: losses, forwards of the target, and updates."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msf_core import EMATarget, MeanShiftLoss


@dataclass
class Watch:
    """What was called, in the order of the calls."""

    losses: list[tuple[MeanShiftLoss, Tensor, Tensor]] = field(default_factory=list)
    """(criterion, prediction, target) of every loss."""
    targets: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(images, u) of every forward of a target."""
    updates: list[tuple[EMATarget, nn.Module]] = field(default_factory=list)
    steps: int = 0
    """Steps of the optimizer."""
    trained: set[Tensor] = field(default_factory=set)
    """Parameters that the optimizer was given."""

    def is_mean_shift(self, *, k: int, momentum: float, steps: int, updates: int | None = None) -> None:
        """Assert that each step has one loss, of a predictor's v and the target's u, and that updates follow losses."""
        assert len(self.losses) == len(self.targets) == steps
        assert len(self.updates) == self.steps == (steps if updates is None else updates)
        for (criterion, v, u), (_, given) in zip(self.losses, self.targets, strict=True):
            assert criterion.k == k
            assert u is given
            assert v.requires_grad
            assert not u.requires_grad
        for target, online in self.updates:
            assert target.momentum == momentum
            assert set(online.parameters()) < self.trained  # those of the predictor are there too


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    seen = Watch()
    loss, forward, update = MeanShiftLoss.forward, EMATarget.forward, EMATarget.update
    step, prepared = torch.optim.SGD.step, torch.optim.SGD.add_param_group

    def watched_loss(criterion: MeanShiftLoss, prediction: Tensor, target: Tensor, *more: Any, **options: Any) -> Any:
        seen.losses.append((criterion, prediction, target))
        return loss(criterion, prediction, target, *more, **options)

    def watched_forward(target: EMATarget, images: Tensor) -> Tensor:
        seen.targets.append((images, forward(target, images)))
        return seen.targets[-1][1]

    def watched_update(target: EMATarget, online: nn.Module) -> None:
        assert len(seen.updates) <= len(seen.losses)
        before = [parameter.clone() for parameter in target.module.parameters()]
        update(target, online)
        m = target.momentum
        for f, g, old in zip(target.module.parameters(), online.parameters(), before, strict=True):
            torch.testing.assert_close(f, m * old + (1 - m) * g)
        seen.updates.append((target, online))

    def watched_step(optimizer: torch.optim.SGD, *closure: Any) -> Any:
        seen.steps += 1
        return step(optimizer, *closure)

    def watched_group(optimizer: torch.optim.SGD, group: dict[str, Any]) -> None:
        prepared(optimizer, group)
        seen.trained.update(optimizer.param_groups[-1]["params"])

    monkeypatch.setattr(MeanShiftLoss, "forward", watched_loss)
    monkeypatch.setattr(EMATarget, "forward", watched_forward)
    monkeypatch.setattr(EMATarget, "update", watched_update)
    monkeypatch.setattr(torch.optim.SGD, "step", watched_step)
    monkeypatch.setattr(torch.optim.SGD, "add_param_group", watched_group)
    return seen
