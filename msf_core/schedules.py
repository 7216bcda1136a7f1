"""Schedules for the target's momentum and for k, which change over training.

A schedule is any callable ``step -> float`` with ``step = 0, 1, 2, …``. The schedules here are frozen dataclasses,
which can be printed, compared and pickled. They have no state: `EMATarget` and `MeanShiftLoss` save the step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]
"""Any function of a step (0, 1, 2, …) that returns a number."""


@dataclass(frozen=True)
class constant:
    """The same ``value`` at every step.

    >>> constant(0.99)(1000)
    0.99
    """

    value: float

    def __call__(self, step: int) -> float:
        """Return ``value``."""
        return self.value


@dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def _progress(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)


class linear(_Ramp):
    """A straight line from ``start`` at step 0 to ``end`` at step ``steps``, then ``end``.

    For example, ``k=linear(1, 10, steps=50_000)`` raises k during training, which the paper mentions as future work
    (section 3.4).

    Raises:
        ValueError: if ``steps`` is below 1.

    >>> rising = linear(1, 5, steps=100)
    >>> [rising(step) for step in (0, 50, 100, 200)]
    [1.0, 3.0, 5.0, 5.0]
    """

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        t = self._progress(step)
        return (1 - t) * self.start + t * self.end


class cosine(_Ramp):
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``steps``, then ``end``.

    BYOL's momentum is ``cosine(0.996, 1.0, steps=total_steps)``.

    Raises:
        ValueError: if ``steps`` is below 1.

    >>> rising = cosine(0.0, 1.0, steps=100)
    >>> [round(rising(step), 3) for step in (0, 25, 50, 100, 200)]
    [0.0, 0.146, 0.5, 1.0, 1.0]
    """

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        t = (1 - math.cos(math.pi * self._progress(step))) / 2
        return (1 - t) * self.start + t * self.end
