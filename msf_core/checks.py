"""Checks of what users pass in, each naming the argument, what came and what was expected."""

import torch
from torch import Tensor


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
