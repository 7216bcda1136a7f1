"""Checkpoints that are written completely or not at all, with errors that say what is wrong.

Rank 0 writes ``checkpoint.pt``. If the bank is sharded, each rank writes its part as safetensors into a folder beside
it (torch.distributed.checkpoint), whose name is in ``checkpoint.pt``. Both become valid when ``checkpoint.pt`` is
renamed from its temporary name.
"""

import os
import pickle
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msf_core.distributed import Ranks, is_shard

FORMAT = 2
_PREFIX = "bank-shards-"


def save_checkpoint(path: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Write the state to a temporary file and rename it to ``path``, so that a crash keeps the earlier checkpoint.

    Raises:
        OSError: on all ranks, if it could not be written; the earlier checkpoint is still there.
    """
    state = {"format": FORMAT, **state, "criterion": dict(state["criterion"])}
    shards = {name: tensor for name, tensor in state["criterion"].items() if is_shard(tensor)}
    for name in shards:
        del state["criterion"][name]
    if shards:
        state["shards"] = _save_shards(path, shards, ranks)
    problem = None
    if ranks.rank == 0:
        try:
            _write(path, state)
            _remove_older(path, state)
        except (OSError, RuntimeError) as error:  # torch.save turns some of these into RuntimeError
            problem = OSError(f"{path} could not be written: {error}")
    if ranks.size > 1:
        ranks.agree("save", same={}, problem=problem)
    elif problem is not None:
        raise problem


def load_checkpoint(path: Path, needed: set[str], ranks: Ranks) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote, on the CPU: a dict with the keys ``needed``. Runs no code from the file.

    The files of a sharded bank are only verified, each by one of the ranks; `load_shards` reads them.

    Raises:
        ValueError: the file does not exist, is damaged, or is not a checkpoint of this script.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint of this script: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= needed:
        raise ValueError(f"{path} is not a checkpoint of this script, or was written by another version of it")
    files = sorted(state.get("shards", {}).get("files", {}).items())
    for name, checksum in files[ranks.rank :: ranks.size]:
        file = path.parent / name
        if not file.is_file():
            raise ValueError(f"{file}, which belongs to {path}, is missing")
        if _checksum(file) != checksum:
            raise ValueError(f"{file}, which belongs to {path}, is damaged: wrong checksum")
    return state


def load_shards(path: Path, state: dict[str, Any], room: dict[str, Tensor]) -> None:
    """Put the parts of a sharded bank that ``state`` names into its "criterion".

    Args:
        path: path of the checkpoint.
        state: the result of `load_checkpoint`.
        room: the "criterion" of the run that loads. Its tensors may be sharded over a different number of ranks than
            the saved ones, or not at all.
    """
    if "shards" not in state:
        return
    import torch.distributed.checkpoint as dcp

    parts = {name: torch.empty_like(room[name]) for name in state["shards"]["names"]}
    single = not (dist.is_available() and dist.is_initialized())
    folder = _folder(path, state)
    try:
        dcp.load(parts, storage_reader=_storage().HuggingFaceStorageReader(str(folder)), no_dist=single)
    except dcp.api.CheckpointException as error:
        raise ValueError(f"{folder}, which belongs to {path}, cannot be loaded: {error}") from error
    state["criterion"] |= parts


def _write(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _save_shards(path: Path, shards: dict[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Write every rank's part, and return the description that `load_checkpoint` and `load_shards` need."""
    import torch.distributed.checkpoint as dcp

    made, problem = [""], None
    if ranks.rank == 0:
        try:
            made = [tempfile.mkdtemp(prefix=_PREFIX, dir=path.parent)]
        except OSError as error:
            problem = error
    ranks.agree("save", same={}, problem=problem)
    dist.broadcast_object_list(made, group=ranks.group)
    folder = Path(made[0])
    files: dict[str, int] = {}
    try:
        dcp.save(shards, storage_writer=_storage().HuggingFaceStorageWriter(str(folder), save_distributed=True))
        if ranks.rank == 0:  # the rank that writes checkpoint.pt
            files = {f"{folder.name}/{file.name}": _checksum(file) for file in sorted(folder.iterdir())}
    except (OSError, dcp.api.CheckpointException) as error:
        problem = OSError(f"{folder} could not be written: {error}")
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    ranks.agree("save", same={}, problem=problem)
    return {"names": list(shards), "files": files}


def check_sharded_checkpoints() -> None:
    """Raise ImportError if checkpoints of a sharded bank cannot be written here."""
    _storage()
    import safetensors  # noqa: F401


def _storage() -> Any:
    try:
        from torch.distributed.checkpoint import hf_storage
    except ImportError as error:
        raise ImportError("checkpoints of a sharded bank need safetensors and a newer PyTorch than this one") from error
    return hf_storage


def _folder(path: Path, state: dict[str, Any]) -> Path:
    return path.parent / Path(next(iter(state["shards"]["files"]))).parent


def _remove_older(path: Path, state: dict[str, Any]) -> None:
    """Remove the shards of earlier checkpoints, and of those that were never finished."""
    kept = {Path(name).parent.name for name in state.get("shards", {}).get("files", {})}
    for folder in path.parent.glob(_PREFIX + "*"):
        ours = all(file.suffix == ".safetensors" for file in folder.iterdir())
        if ours and folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum
