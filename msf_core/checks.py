"""Checks of what users pass in, each naming the argument, what came and what was expected."""

import operator
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CHECKPOINT = os.path.join("torch", "utils", "checkpoint.py")
_BACKWARD = os.path.join("torch", "autograd", "graph.py")


def gives_memory_alone(fn: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a function that `torch.nn.Module._apply` gets is that of ``to_empty``, which loses the values."""
    return getattr(fn, "__qualname__", "").startswith("Module.to_empty.")


def whole_number(name: str, value: Any, what: str = "an int") -> int:
    """Return an int for anything that is one, such as NumPy's, or raise TypeError; a bool is none."""
    if type(value) is int:
        return value
    if not isinstance(value, (bool, np.bool_)) and hasattr(value, "__index__"):
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be {what}, got {value!r}")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_labels(labels: Tensor | None, embeddings: Tensor, name: str = "labels") -> None:
    """Raise ValueError or TypeError unless labels, or ids, are None or one integer for each embedding, beside them."""
    if labels is None:
        return
    check_tensor(name, labels)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{name} must be [{embeddings.shape[0]}], one a row, got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.device != embeddings.device:
        raise ValueError(f"{name} must be on the device of the embeddings, {embeddings.device}, got {labels.device}")


def check_not_replica(*modules: nn.Module) -> None:
    """Raise RuntimeError in the copies of a module that nn.DataParallel runs: what they change is lost or raced for."""
    for module in modules:
        if "_is_replica" in module.__dict__:
            raise RuntimeError(
                f"this {type(module).__name__} is a copy that nn.DataParallel makes for one forward and throws away: "
                "call it outside of that forward, on what DataParallel gathers, or use DistributedDataParallel"
            )


def check_not_recomputed(what: str) -> None:
    """Raise RuntimeError where activation checkpointing runs a forward once more, in backward, to recompute it.

    What changes state in a forward would change it twice.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # no backward is running
        return
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        # Checkpointing may itself run a backward: what that calls, a hook, say, is no recomputed forward.
        if frame.f_code.co_filename.endswith(_BACKWARD):
            return
        if frame.f_code.co_filename.endswith(_CHECKPOINT):
            raise RuntimeError(
                f"{what} ran twice for one batch: activation checkpointing computes its forward again. "
                "Keep it outside of torch.utils.checkpoint, and checkpoint the encoder alone"
            )
