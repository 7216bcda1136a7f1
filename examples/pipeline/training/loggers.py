"""Loggers that record a run's numbers besides its CSV files: TensorBoard, Weights & Biases, or none.

metrics.csv and losses.csv are always written. The libraries are imported only if they are used.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

LOGGERS = ("tensorboard", "wandb", "csv", "none")
Numbers = dict[str, float]


class Logger:
    """Writes nothing: what ``--logger csv`` and ``--logger none`` are, and the interface of the others.

    A logger gets the numbers in the order of their steps, each once. After a resume the run computes again what came
    after its checkpoint; what a logger got of that before, it drops or keeps instead.

    Attributes:
        new: whether it has nothing yet of the run, which may have been resumed with another logger.
        last_step: up to which it has the numbers of the steps.
    """

    new = False
    last_step = 0

    def steps(self, losses: list[float], rates: list[float]) -> None:
        """Log the loss and the learning rate of the steps after `last_step`."""

    def epoch(self, step: int, row: Numbers) -> None:
        """Log the averages of an epoch that has ended with this step."""

    def result(self, step: int, row: Numbers, final: Numbers, settings: dict[str, Any], pictures: list[Path]) -> None:
        """Log the result of the run.

        Args:
            step: the last.
            row: what the evaluation after the last epoch adds to the epoch's averages.
            final: the results.
            settings: of the run.
            pictures: PNG files.
        """

    def flush(self) -> None:
        """Write what has been logged, so that nothing recorded in the next checkpoint can be lost."""

    def close(self) -> None:
        """Write everything."""


class TensorBoard(Logger):
    """Event files below a folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.new = not any(folder.glob("events.out.*"))
        self.last_step = 0 if self.new else step
        self._writer = SummaryWriter(str(folder), purge_step=self.last_step + 1)

    def steps(self, losses: list[float], rates: list[float]) -> None:
        """See `Logger`."""
        for loss, rate in zip(losses, rates, strict=True):
            self.last_step += 1
            self._add(self.last_step, {"step/loss": loss, "step/lr": rate})

    def epoch(self, step: int, row: Numbers) -> None:
        """See `Logger`."""
        self._add(step, {f"epoch/{name}": value for name, value in row.items()})

    def result(self, step: int, row: Numbers, final: Numbers, settings: dict[str, Any], pictures: list[Path]) -> None:
        """See `Logger`. `SummaryWriter.add_hparams` would begin another run; these belong to this one."""
        from matplotlib.image import imread
        from torch.utils.tensorboard.summary import hparams

        self.epoch(step, row)
        final = {f"final/{name}": value for name, value in final.items() if math.isfinite(value)}
        for summary in hparams(settings, final):
            self._writer._get_file_writer().add_summary(summary)
        self._add(step, final)
        for path in pictures:
            self._writer.add_image(path.stem, imread(path), step, dataformats="HWC")

    def flush(self) -> None:
        """See `Logger`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()

    def _add(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)


class WandB(Logger):
    """A run of Weights & Biases, which goes on under the same id after a resume.

    Its steps only ever rise: of the steps that a resumed run repeats, it keeps what it has.
    """

    def __init__(self, folder: Path, step: int, settings: dict[str, Any], notes: dict[str, Any]) -> None:
        import wandb

        self.new = "wandb_id" not in notes
        self.last_step = 0 if self.new else step
        try:
            self._run = wandb.init(
                id=notes.get("wandb_id"),
                resume=None if self.new else "allow",
                project=os.environ.get("WANDB_PROJECT", "msf_core"),
                name=folder.name,
                dir=folder,
                config=settings,
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise RuntimeError(f"--logger wandb: {error}") from error
        notes["wandb_id"] = self._run.id

    def steps(self, losses: list[float], rates: list[float]) -> None:
        """See `Logger`."""
        for loss, rate in zip(losses, rates, strict=True):
            self.last_step += 1
            self._run.log({"step/loss": loss, "step/lr": rate}, step=self.last_step)

    def epoch(self, step: int, row: Numbers) -> None:
        """See `Logger`."""
        self._run.log({f"epoch/{name}": value for name, value in row.items() if math.isfinite(value)}, step=step)

    def result(self, step: int, row: Numbers, final: Numbers, settings: dict[str, Any], pictures: list[Path]) -> None:
        """See `Logger`."""
        import wandb

        self.epoch(step, row)
        self._run.summary.update({f"final/{name}": value for name, value in final.items() if math.isfinite(value)})
        self._run.log({path.stem: wandb.Image(str(path)) for path in pictures}, step=step)

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


def check_logger(name: str) -> None:
    """Check that a logger can be used, before the run begins.

    Raises:
        ImportError: its library is missing.
        ValueError: Weights & Biases does not know whose run it is.
    """
    if name == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise ImportError("--logger tensorboard needs TensorBoard: pip install tensorboard") from error
    elif name == "wandb":
        try:
            from wandb import init, login, setup  # noqa: F401  # a folder of its runs called wandb/ has no such names
        except ImportError as error:
            raise ImportError("--logger wandb needs Weights & Biases: pip install wandb") from error
        if setup().settings.mode == "online" and not login(prompt=sys.stdin.isatty()):
            raise ValueError("--logger wandb needs a login: run wandb login, or set WANDB_MODE=offline")


def open_logger(folder: Path, step: int, settings: dict[str, Any], notes: dict[str, Any]) -> Logger:
    """Return the logger that ``settings["logger"]`` names.

    Args:
        folder: of the run.
        step: at which it begins, or goes on.
        settings: of the run.
        notes: kept in its checkpoint; Weights & Biases adds the id of its run.

    Raises:
        RuntimeError: Weights & Biases cannot be reached.
    """
    if settings["logger"] == "tensorboard":
        return TensorBoard(folder / "tensorboard", step)
    if settings["logger"] == "wandb":
        return WandB(folder, step, settings, notes)
    return Logger()
