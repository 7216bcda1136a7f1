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
    """Writes nothing: the logger of ``--logger csv`` and ``--logger none``, and the interface of the others.

    A logger gets the numbers in the order of their steps, each once. A resumed run repeats the steps after its
    checkpoint. If a logger already has their numbers, it either replaces them or keeps them and ignores the new ones.

    Attributes:
        new: whether it has no numbers of the run yet, for example because the run had another logger before.
        last_step: the last step whose numbers it has.
    """

    new = False
    last_step = 0

    def steps(self, losses: list[float], rates: list[float]) -> None:
        """Log the loss and the learning rate of the steps after `last_step`."""

    def epoch(self, step: int, row: Numbers) -> None:
        """Log the averages of an epoch that ended with this step."""

    def result(self, step: int, row: Numbers, final: Numbers, settings: dict[str, Any], pictures: list[Path]) -> None:
        """Log the result of the run.

        Args:
            step: the last step.
            row: the metrics that the evaluation after the last epoch adds to the epoch's averages.
            final: the final metrics of the run.
            settings: the settings of the run.
            pictures: the paths of PNG files.
        """

    def flush(self) -> None:
        """Write what has been logged, so that nothing recorded in the next checkpoint can be lost."""

    def close(self) -> None:
        """Write what has been logged, and close the logger."""


class TensorBoard(Logger):
    """Writes TensorBoard's event files into a folder."""

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
        """See `Logger`. `SummaryWriter.add_hparams` would create a second run, so this writes the summaries itself."""
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
    """A Weights & Biases run, which continues under the same id after a resume.

    Its steps can only increase, so it keeps the earlier numbers of steps that a resumed run repeats.
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
        ValueError: Weights & Biases is not logged in.
    """
    if name == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise ImportError("--logger tensorboard needs TensorBoard: pip install tensorboard") from error
    elif name == "wandb":
        try:
            from wandb import init, login, setup  # noqa: F401  # a local folder wandb/ has no such names
        except ImportError as error:
            raise ImportError("--logger wandb needs Weights & Biases: pip install wandb") from error
        if setup().settings.mode == "online" and not login(prompt=sys.stdin.isatty()):
            raise ValueError("--logger wandb needs a login: run wandb login, or set WANDB_MODE=offline")


def open_logger(folder: Path, step: int, settings: dict[str, Any], notes: dict[str, Any]) -> Logger:
    """Return the logger that ``settings["logger"]`` names.

    Args:
        folder: the folder of the run.
        step: the step at which the run starts or resumes.
        settings: the settings of the run.
        notes: values kept in the checkpoint; Weights & Biases adds the id of its run.

    Raises:
        RuntimeError: Weights & Biases cannot be reached.
    """
    if settings["logger"] == "tensorboard":
        return TensorBoard(folder / "tensorboard", step)
    if settings["logger"] == "wandb":
        return WandB(folder, step, settings, notes)
    return Logger()
