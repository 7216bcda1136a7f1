"""Passes a run's numbers to its logger: each step and epoch once, also after a resume with another logger."""

from pathlib import Path

from pipeline.training.loggers import Logger
from pipeline.training.report import Row, read_losses
from pipeline.training.trainer import Trainer


def log(logger: Logger, trainer: Trainer) -> None:
    """Log the loss and the learning rate of every step since the last call. All ranks must call it."""
    losses = trainer.average_losses()
    if trainer.leads:
        log_losses(logger, trainer, losses, trainer.step)


def log_losses(logger: Logger, trainer: Trainer, losses: list[float], last_step: int) -> None:
    """Log the losses that have not been logged yet; the last of ``losses`` is that of ``last_step``."""
    steps = range(max(logger.last_step, last_step - len(losses)), last_step)
    if steps:
        logger.last_step = steps.start
        logger.steps(losses[-len(steps) :], [trainer.lr(step) for step in steps])


def catch_up(logger: Logger, trainer: Trainer, folder: Path) -> None:
    """Log the whole run so far, if it is resumed with a logger that it did not use before."""
    if logger.new and trainer.step:
        losses = read_losses(folder / "losses.csv")
        first = trainer.step - len(losses)
        for row in trainer.history:
            log_losses(logger, trainer, losses[: max(0, row["step"] - first)], row["step"])
            logger.epoch(row["step"], numbers_of(row))
        log_losses(logger, trainer, losses, trainer.step)


def numbers_of(row: Row) -> dict[str, float]:
    """Return an epoch's metrics without its number, its last step, and the learning rate, which each step logs."""
    return {name: value for name, value in row.items() if name not in ("epoch", "step", "lr")}
