"""The output of a run during training: one line per epoch, and a progress bar in a terminal."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from msf_core.distributed import Ranks

SHOWN = {"loss": "loss", "purity": "purity", "nn20": "20-NN"}
SILENCE = 600.0  # seconds between lines without a bar, because epochs may take hours


class Progress:
    """Prints one line per epoch to stdout, and shows a progress bar if stderr is a terminal.

    Otherwise, as in a batch job's log, it also prints lines within epochs that take longer than `SILENCE`.

    Args:
        step: the step at which the run starts or resumes.
        total_steps: number of steps of the run.
        total_epochs: number of epochs of the run.
        batch_size: number of images per step.
        speaks: whether this process reports; others print nothing.
    """

    def __init__(self, step: int, total_steps: int, total_epochs: int, batch_size: int, speaks: bool) -> None:
        self._first, self._total, self._epochs = step, total_steps, total_epochs
        self._batch_size, self._speaks = batch_size, speaks
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2,
            disable=not (speaks and sys.stderr.isatty()),
        )
        self._started = self._said = time.monotonic()
        self._said_step = step

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def after_step(self, step: int, epoch: int, means: Callable[[], dict[str, float]]) -> None:
        """Move the bar, or print a line after a long silence.

        Args:
            step: number of steps so far.
            epoch: the current epoch, counted from 1.
            means: returns the averages over the epoch so far.
        """
        if not self._speaks:
            return
        self._bar.update()
        if step % 10:
            return
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join([f"epoch {epoch}", *_measures(means())]), refresh=False)
        elif (seconds := time.monotonic() - self._said) > SILENCE:
            self._say(step, epoch, means(), (step - self._said_step) * self._batch_size / seconds)

    def after_epoch(self, row: dict[str, Any]) -> None:
        """Print the line of an epoch, given its metrics."""
        if self._speaks:
            self._say(row["step"], row["epoch"], row, row["images_per_second"])

    def _say(self, step: int, epoch: int, measured: dict[str, Any], images_per_second: float) -> None:
        self._said, self._said_step = time.monotonic(), step
        parts = [*_measures(measured), f"{images_per_second:,.0f} images/s"]
        if step < self._total and step > self._first:
            seconds = (self._said - self._started) / (step - self._first) * (self._total - step)
            parts.append(f"{duration(seconds)} left")
        line = f"epoch {epoch:,} of {self._epochs:,}, step {step:,} of {self._total:,}: {', '.join(parts)}"
        tqdm.write(line, file=sys.stdout)  # above the bar
        sys.stdout.flush()  # otherwise a file would get it minutes later


def duration(seconds: float) -> str:
    """Return a time in words, in at most two units.

    >>> [duration(seconds) for seconds in (12.3, 90, 9_000, 200_000)]
    ['12 s', '1 min 30 s', '2 h 30 min', '2 d 8 h']
    """
    units = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))
    for size, name, part, part_name in units:
        if round(seconds) >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {name} {rest} {part_name}"
    return f"{seconds:.0f} s"


def _measures(measured: dict[str, Any]) -> list[str]:
    """Return the averages to show, as text."""
    found = {name: measured.get(key, math.nan) for key, name in SHOWN.items()}
    return [f"{name} {value:.3f}" for name, value in found.items() if not math.isnan(value)]


def progress_bar(what: str, unit: str, total: int, ranks: Ranks) -> "tqdm[None]":
    """Return a progress bar that only rank 0 shows; in a log file, it prints a line every ten seconds at most."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(desc=what, unit=unit, total=total, disable=ranks.rank > 0, mininterval=interval)
