"""Pairs of the target's and the online encoder's tensors with the same name, after checks that they match."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msf_core.distributed import is_shard, placement
from msf_core.masters import local
from msf_core.wrapped import listed, named_tensors

BUFFER_POLICIES = ("keep", "copy", "ema")


class Pair(NamedTuple):
    """A tensor of the target and the tensor of the online encoder with the same name."""

    name: str
    whole: Tensor
    """The target's tensor; a DTensor if it is sharded."""
    f: Tensor
    """This rank's part of the target's tensor."""
    g: Tensor
    """This rank's part of the online encoder's tensor."""
    averages: bool
    """Whether the pair is averaged; otherwise it is copied."""


def pair_up(target: nn.Module, online: nn.Module, buffers: str) -> list[Pair]:
    """Return the pairs that an update changes under a buffer policy, or raise ValueError if a tensor has no partner."""
    with_buffers = buffers != "keep"
    theirs = {name: tensor for name, tensor, _ in named_tensors(online, with_buffers)}
    ours = list(named_tensors(target, with_buffers))
    _check_same_names([name for name, _, _ in ours], theirs)
    pairs: list[Pair] = []
    for name, whole, is_buffer in untied(ours):
        f, g = _checked(name, whole, theirs[name])
        averages = (f.is_floating_point() or f.is_complex()) and not (is_buffer and buffers == "copy")
        pairs.append(Pair(name, whole, f, g, averages))
    return pairs


def untied(tensors: Iterable[tuple[str, Tensor, bool]]) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield each tensor only under its first name, so that a tied tensor is updated once.

    After ``load_state_dict(assign=True)``, a tied tensor consists of several tensors that share memory.
    """
    seen: set[int] = set()
    has_addresses = not torch.compiler.is_compiling()
    for name, tensor, is_buffer in tensors:
        key = id(tensor)
        if has_addresses and type(tensor) in (nn.Parameter, Tensor):
            key = tensor.data_ptr() or key
        if key not in seen:
            seen.add(key)
            yield name, tensor, is_buffer


def _checked(name: str, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's parts of both tensors, or raise ValueError if they do not match."""
    if f.shape != g.shape:
        raise ValueError(f"{name!r} is {list(f.shape)} in the target and {list(g.shape)} in online")
    if is_shard(f) or is_shard(g):
        if placement(f) != placement(g):
            raise ValueError(f"{name!r} is sharded differently in the target and in online")
        f, g = local(f), local(g)
    if f.device != g.device:
        raise ValueError(f"{name!r} is on {f.device} in the target and on {g.device} in online")
    # Meta tensors and traced tensors have no address.
    if not torch.compiler.is_compiling() and f.data_ptr() == g.data_ptr() and f.numel() and not f.is_meta:
        raise ValueError(f"{name!r} is the same memory in the target and in online")
    return f, g


def _check_same_names(ours: Any, theirs: Any) -> None:
    for side, others, names in (("online", set(theirs), ours), ("the target", set(ours), theirs)):
        if missing := [name for name in names if name not in others]:
            raise ValueError(f"{len(missing)} tensors are missing in {side}: {listed(missing)}")
