"""The target encoder f: an exponential moving average of the online encoder g (paper section 2)."""

import copy
import sys
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from msf_core.distributed import is_shard, placement
from msf_core.schedules import Schedule

BUFFER_POLICIES = ("keep", "copy", "ema")


class EMATarget(nn.Module):
    """A frozen copy of ``online`` that follows it: f ← m·f + (1 − m)·g at every `update`.

    The copy shares no storage with ``online``. DDP, DataParallel and ``torch.compile`` wrappers of ``online`` or of
    its parts are looked through: the copy is of what they wrap, and tensors pair by the names they have there.
    With FSDP2 make the target first, and then call ``fully_shard`` on ``online`` and on ``target.module`` alike:
    each rank averages its shards, and nothing travels.

    Args:
        online: the encoder, with its projection head.
        momentum: m, a float in [0, 1] or a schedule of the number of updates so far (which the ``state_dict``
            keeps, so a resumed schedule goes on). The paper holds 0.99 (section 3.1).
        buffers: what `update` does with buffers such as BatchNorm's statistics: "keep" leaves the target its own,
            which it gathers in train mode as the paper's does; "copy" takes ``online``'s; "ema" averages the
            floating ones and copies the others.

    Raises:
        ValueError: a momentum outside [0, 1], another policy, an ``online`` that is sharded already.
        TypeError: an ``online`` that is no module, a momentum that is neither a number nor callable.

    >>> online = nn.Linear(2, 2)
    >>> target = EMATarget(online, momentum=0.9)
    >>> target.update(online)
    >>> target(torch.ones(1, 2)).requires_grad
    False
    """

    def __init__(self, online: nn.Module, momentum: float | Schedule = 0.99, *, buffers: str = "keep") -> None:
        super().__init__()
        _check_module(online)
        if not callable(momentum):
            _check_momentum(momentum)
        if buffers not in BUFFER_POLICIES:
            raise ValueError(f"buffers must be one of {', '.join(BUFFER_POLICIES)}, got {buffers!r}")
        if any(is_shard(parameter) for parameter in online.parameters()):
            raise ValueError("online is sharded already: make the EMATarget first, then fully_shard online and .module")
        self.module = copy.deepcopy(_unwrap(online)).requires_grad_(False)
        """The target encoder f itself."""
        for parent in list(self.module.modules()):
            for name, child in parent._modules.items():
                parent._modules[name] = None if child is None else _unwrap(child)
        self.momentum = momentum
        self.buffers_policy = buffers
        self.updates = 0
        """How many there were so far."""

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the target on the arguments of ``online``, without gradient."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Move one step towards ``online``, with a number of kernel launches that hardly grows with its tensors.

        ``online`` may have another dtype than the target: the average is computed in the target's.

        Raises:
            ValueError: tensors are missing on one side, or differ in shape, device or sharding; the message names
                them, and nothing has moved.
            TypeError: an ``online`` that is no module, or a schedule that gives no number.
        """
        _check_module(online)
        for module in (self.module, online):
            _reshard(module)
        momentum = self.momentum(self.updates) if callable(self.momentum) else self.momentum
        _check_momentum(momentum)
        averaged, copied = self._pair_up(online)
        if momentum in (0, 1):  # exactly g, or exactly f: an Inf on the other side must not make a NaN
            copied += averaged if momentum == 0 else []
            averaged = []
        for dtype in {f.dtype for f, _ in averaged}:
            f = [f for f, _ in averaged if f.dtype == dtype]
            g = [g if g.dtype == dtype else g.to(dtype) for f, g in averaged if f.dtype == dtype]
            torch._foreach_lerp_(f, g, 1 - momentum)  # f + (1 − m)(g − f) = m·f + (1 − m)·g
        for f_tensor, g_tensor in copied:
            f_tensor.copy_(g_tensor)
        self.updates += 1

    def _pair_up(self, online: nn.Module) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Pair target and online tensors by name: those to average, and those to copy."""
        with_buffers = self.buffers_policy != "keep"
        ours = {name: (tensor, is_buffer) for name, tensor, is_buffer in _named_tensors(self.module, with_buffers)}
        theirs = {name: tensor for name, tensor, _ in _named_tensors(online, with_buffers)}
        _check_same_names(ours.keys(), theirs.keys())
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        seen: set[int] = set()
        for name, (f, is_buffer) in ours.items():
            g = theirs[name].detach()
            if id(f) in seen:  # tied: one tensor with two names moves once
                continue
            seen.add(id(f))
            if f.shape != g.shape:
                raise ValueError(f"{name!r} is {list(f.shape)} in the target and {list(g.shape)} in online")
            if is_shard(f) or is_shard(g):
                if placement(f) != placement(g):
                    raise ValueError(f"{name!r} is not sharded alike in the target and in online")
                f, g = f.to_local(), g.to_local()  # type: ignore[attr-defined]
            if f.device != g.device:
                raise ValueError(f"{name!r} is on {f.device} in the target and on {g.device} in online")
            if f.data_ptr() == g.data_ptr() and f.numel():
                raise ValueError(f"{name!r} is the same memory in the target and in online")
            averages = (f.is_floating_point() or f.is_complex()) and not (is_buffer and self.buffers_policy == "copy")
            (averaged if averages else copied).append((f, g))
        return averaged, copied

    def get_extra_state(self) -> Tensor:
        """Return the number of updates so far, for the ``state_dict``."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the saved number of updates over."""
        self.updates = int(state)

    def extra_repr(self) -> str:
        """Describe momentum and buffers."""
        return f"momentum={self.momentum}, buffers={self.buffers_policy!r}, updates={self.updates}"


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def _unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(module, _WRAPPERS):
            module = module.module
        elif type(module).__name__ == "OptimizedModule":  # its class lives in torch._dynamo, slow to import
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return module


def _reshard(module: nn.Module) -> None:
    """Put FSDP2's shards back, where a forward has left the gathered parameters in their place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such module
    sharded = getattr(fsdp, "FSDPModule", None)
    if sharded is not None:
        for part in module.modules():
            if isinstance(part, sharded):
                part.reshard()


def _named_tensors(module: nn.Module, with_buffers: bool, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name without wrappers, tensor, is it a buffer), tied tensors under each of their names."""
    module = _unwrap(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, False
    for name, buffer in module._buffers.items():
        if with_buffers and buffer is not None:
            yield prefix + name, buffer, True
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_tensors(child, with_buffers, f"{prefix}{name}.")


def _check_same_names(ours: Any, theirs: Any) -> None:
    for side, names in (("online", ours - theirs), ("the target", theirs - ours)):
        if names:
            shown = ", ".join(repr(name) for name in sorted(names)[:5])
            raise ValueError(f"{len(names)} tensors are missing in {side}: {shown}{', …' if len(names) > 5 else ''}")


def _check_module(online: Any) -> None:
    if not isinstance(online, nn.Module):
        raise TypeError(f"online must be a torch.nn.Module, got {type(online).__name__}")


def _check_momentum(momentum: float) -> None:
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number or a schedule of the update, got {momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
