"""Argument checks. Their errors name the argument, its value and the expected value."""

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
    """Return whether ``fn``, the argument of `torch.nn.Module._apply`, is that of ``to_empty``, which loses values."""
    return getattr(fn, "__qualname__", "").startswith("Module.to_empty.")


def whole_number(name: str, value: Any, what: str = "an int") -> int:
    """Convert an integer, such as a NumPy integer, to an int, or raise TypeError; a bool is not accepted."""
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
    """Raise ValueError or TypeError unless labels (or ids) are None, or one integer per embedding on its device."""
    if labels is None:
        return
    check_tensor(name, labels)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{name} must be [{embeddings.shape[0]}], one per row, got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.device != embeddings.device:
        raise ValueError(f"{name} must be on the device of the embeddings, {embeddings.device}, got {labels.device}")


def check_not_replica(*modules: nn.Module) -> None:
    """Raise RuntimeError in a replica of nn.DataParallel, whose changes are lost or cause races."""
    for module in modules:
        if "_is_replica" in module.__dict__:
            raise RuntimeError(
                f"this {type(module).__name__} is a copy that nn.DataParallel makes for one forward and discards: "
                "call it outside of that forward, on the gathered outputs, or use DistributedDataParallel"
            )


def check_not_recomputed(what: str) -> None:
    """Raise RuntimeError if activation checkpointing recomputes a forward in the backward pass.

    A forward that changes state would change it twice.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # no backward is running
        return
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        # Checkpointing may itself run a backward. Calls from it, for example by a hook, are not a recomputed forward.
        if frame.f_code.co_filename.endswith(_BACKWARD):
            return
        if frame.f_code.co_filename.endswith(_CHECKPOINT):
            raise RuntimeError(
                f"{what} ran twice for one batch: activation checkpointing computes its forward again. "
                "Keep it outside of torch.utils.checkpoint, and checkpoint only the encoder"
            )
