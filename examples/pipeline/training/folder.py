"""The folder of a run, which no other run may use, and the checkpoint that it resumes from."""

import itertools
from pathlib import Path
from typing import Any

from pipeline.running.ranks import may_restart, restarted
from pipeline.training.lock import FolderLock


def checkpoint_of(given: dict[str, Any]) -> Path | None:
    """Return the checkpoint to resume from: the file or folder given by --resume, or the one in --out.

    Raises:
        ValueError: there is no such checkpoint, or a run that torchrun may restart has no --out to look for it in.
    """
    resume = given.get("resume", "auto" if restarted() else "")
    if may_restart() and not given.get("out") and resume in ("", "auto"):
        raise ValueError("torchrun --max-restarts needs --out DIR: a restarted run looks for its checkpoint there")
    if resume == "auto":
        if not given.get("out"):
            raise ValueError("--resume auto needs --out DIR")
        path = Path(given["out"]) / "checkpoint.pt"
        return path if path.exists() else None
    if not resume:
        return None
    path = Path(resume) / "checkpoint.pt" if Path(resume).is_dir() else Path(resume)
    if not path.is_file():
        raise ValueError(f"--resume {resume}: no checkpoint at {path}")
    return path


def folder_of(given: dict[str, Any], checkpoint: Path | None) -> Path | None:
    """Return the folder of the run; None means a new folder below runs/."""
    if given.get("out"):
        return Path(given["out"])
    return None if checkpoint is None else checkpoint.parent


def new_run_folder(dataset: str) -> Path:
    """Create a new folder below runs/, named after the data set, and return it.

    Raises:
        ValueError: nothing can be written there.
    """
    for number in itertools.count(1):
        folder = Path("runs") / (dataset if number == 1 else f"{dataset}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"no folder can be created below runs/: {error.strerror}; choose one with --out") from None
    raise AssertionError("unreachable")


def occupy(folder: Path, checkpoint: Path | None, lock: FolderLock | None) -> None:
    """Create the folder of the run if it does not exist, and lock it.

    Args:
        folder: the folder of the run.
        checkpoint: the checkpoint that the run resumes from.
        lock: the lock to take.

    Raises:
        ValueError: another run uses the folder or has left a checkpoint in it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.take(folder)
    except OSError as error:
        raise ValueError(f"--out: nothing can be written to {folder}: {error.strerror or error}") from None
    other = checkpoint is None or checkpoint.parent.resolve() != folder.resolve()
    if other and has_checkpoint(folder):
        raise ValueError(f"{folder} holds a run: continue it with --resume {folder}, or choose another --out")


def has_checkpoint(folder: Path) -> bool:
    """Return whether there is a checkpoint to resume from."""
    return (folder / "checkpoint.pt").exists()
