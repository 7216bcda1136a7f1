"""Checkpoints that are written whole or not at all, and that say what is wrong with them."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state to a temporary file beside ``path``, and rename it: a crash leaves the earlier one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, needed: set[str]) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote, on the CPU: a dict with the keys ``needed``. Runs no code from the file.

    Raises:
        ValueError: no such file, a damaged one, or one that is no checkpoint of this script.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint {path} is damaged or not one of ours: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= needed:
        raise ValueError(f"{path} is not a checkpoint of this script")
    return state
