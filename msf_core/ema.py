"""The target encoder f: an exponential moving average of the online encoder g (paper section 2)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msf_core.checks import check_not_recomputed
from msf_core.distributed import is_shard, placement
from msf_core.masters import Masters, average_in_float32, local, needs_master
from msf_core.schedules import Schedule
from msf_core.wrapped import (
    bare_copy,
    check_kept,
    gather_again,
    listed,
    named_tensors,
    to_shards,
    without_wrappers,
)

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
        self.module = bare_copy(online)
        """The target encoder f itself."""
        self.masters = Masters()
        """Float32 values of its tensors of half precision."""
        self.momentum = momentum
        self.buffers_policy = buffers
        with torch.inference_mode(False):
            self._updates = torch.zeros((), dtype=torch.int64, device="cpu")  # an int would be compiled in
        self._unset = {name: 0 for name, f in self._tensors().items() if f.is_meta}

    @property
    def updates(self) -> int:
        """How many updates there were so far."""
        return int(self._updates)

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates.fill_(count)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the target on the arguments of ``online``, without gradient.

        Raises:
            RuntimeError: the target came from the meta device and has no values yet.
        """
        self._check_set()
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Move one step towards ``online``, with a number of kernel launches that hardly grows with its tensors.

        ``online`` may have another dtype than the target: the average is computed in the target's, or in float32
        where that is less precise.

        Raises:
            ValueError: tensors are missing on one side, or differ in shape, device or sharding; the message names
                them, and nothing has moved.
            TypeError: an ``online`` that is no module, or a schedule that gives no number.
            RuntimeError: activation checkpointing runs this a second time, or it runs in a replica of DataParallel,
                or the target came from the meta device and has no values yet.
        """
        if callable(self.momentum) and torch.compiler.is_compiling():
            torch.compiler.disable(self._update)(online)  # traced, a schedule's momentum would be compiled in
        else:
            self._update(online)

    def _update(self, online: nn.Module) -> None:
        check_not_recomputed("EMATarget.update")
        _check_module(online)
        check_kept(self, online)
        self._check_set()
        momentum = self.momentum(self.updates) if callable(self.momentum) else self.momentum
        _check_momentum(momentum)
        gathered = to_shards(self.module, online)
        try:
            pairs = self._pair_up(online, self.buffers_policy != "keep")
            self._move(pairs, momentum)
        finally:
            gather_again(gathered)
        self._updates.add_(1)

    @torch.no_grad()
    def reset(self, online: nn.Module) -> None:
        """Start again as a copy of ``online``: its parameters and all its buffers, after no update.

        This also gives values to a target that came from the meta device by ``to_empty``.

        Raises:
            ValueError: as `update`; nothing has changed.
            TypeError: an ``online`` that is no module.
            RuntimeError: this runs in a replica of DataParallel.
        """
        _check_module(online)
        check_kept(self, online)
        gathered = to_shards(self.module, online)
        try:
            for pair in self._pair_up(online, True):
                pair.f.copy_(pair.g)
        finally:
            gather_again(gathered)
        self.masters.keep([])
        self._unset = {}
        self.updates = 0

    def _move(self, pairs: list["_Pair"], momentum: float) -> None:
        """Move paired tensors by one step."""
        averaged = [pair for pair in pairs if pair.averages]
        copied = [pair for pair in pairs if not pair.averages]
        halves = [pair for pair in averaged if needs_master(pair.f)]
        if self.masters._buffers:
            self.masters.keep([pair.name for pair in halves])
        if momentum == 1:  # exactly f: an Inf on the other side must not make a NaN
            halves = averaged = []
        masters = [local(self.masters.of(pair.name, pair.whole)) for pair in halves]
        if momentum == 0:  # exactly g
            copied += averaged
            for master, pair in zip(masters, halves, strict=True):
                master.copy_(pair.g)
        else:
            for dtype in {pair.f.dtype for pair in averaged} - {pair.f.dtype for pair in halves}:
                f = [pair.f for pair in averaged if pair.f.dtype == dtype]
                g = [
                    pair.g if pair.g.dtype == dtype else pair.g.to(dtype) for pair in averaged if pair.f.dtype == dtype
                ]
                torch._foreach_lerp_(f, g, 1 - momentum)  # f + (1 − m)(g − f) = m·f + (1 − m)·g
            average_in_float32([pair.f for pair in halves], masters, [pair.g for pair in halves], 1 - momentum)
        for pair in copied:
            pair.f.copy_(pair.g)

    def _pair_up(self, online: nn.Module, with_buffers: bool) -> list["_Pair"]:
        """Pair target and online tensors by name."""
        theirs = {name: tensor for name, tensor, _ in named_tensors(online, with_buffers)}
        ours = list(named_tensors(self.module, with_buffers))
        _check_same_names([name for name, _, _ in ours], theirs)
        copies_buffers = self.buffers_policy == "copy"
        pairs: list[_Pair] = []
        for name, whole, is_buffer in _untied(ours):
            f, g = _checked(name, whole, theirs[name])
            averages = (f.is_floating_point() or f.is_complex()) and not (is_buffer and copies_buffers)
            pairs.append(_Pair(name, whole, f, g, averages))
        return pairs

    def _check_set(self) -> None:
        """Raise RuntimeError where memory of ``to_empty`` would be taken for values."""
        if not self._unset:
            return
        self._unset = self._still_unset()
        tensors = self._tensors()
        if empty := [name for name in self._unset if not tensors[name].is_meta]:
            raise RuntimeError(
                f"the target has no values in {len(empty)} tensors that to_empty has made: {listed(empty)}; "
                "call target.reset(online), and load a state dict after that, if there is one"
            )

    def _still_unset(self) -> dict[str, int]:
        """Return those tensors without values into which nothing was written since."""
        tensors = self._tensors()
        return {
            name: version
            for name, version in self._unset.items()
            if name in tensors and (tensors[name].is_meta or _version(tensors[name]) == version)
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor, _ in named_tensors(self.module, True)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EMATarget":
        to_empty = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        unset = (self._tensors() if to_empty else self._still_unset()).keys()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._unset = {name: _version(f) for name, f in self._tensors().items() if name in unset or f.is_meta}
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._unset:
            for key in state_dict:
                self._unset.pop(without_wrappers(key.removeprefix(f"{prefix}module.")), None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Here, and not in the first update alone, so that a new target has a place for what a checkpoint holds.
        to_shards(self.module)
        for name, f, _ in _untied(named_tensors(self.module, self.buffers_policy == "ema")):
            if needs_master(f):
                self.masters.of(name, f)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def get_extra_state(self) -> Tensor:
        """Return the number of updates so far, for the ``state_dict``."""
        return self._updates.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Take the saved number of updates over."""
        self.updates = int(state)

    def extra_repr(self) -> str:
        """Describe momentum and buffers."""
        return f"momentum={self.momentum}, buffers={self.buffers_policy!r}, updates={self.updates}"


class _Pair(NamedTuple):
    """Tensors of one name."""

    name: str
    whole: Tensor
    """The target's, a DTensor where it is sharded."""
    f: Tensor
    """What this rank has of it."""
    g: Tensor
    """What this rank has of online's."""
    averages: bool


def _untied(tensors: Iterable[tuple[str, Tensor, bool]]) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield each tensor under the first of its names, since one that is tied moves once.

    ``load_state_dict(assign=True)`` makes several tensors of it, over the same memory.
    """
    seen: set[int] = set()
    has_addresses = not torch.compiler.is_compiling()
    for name, tensor, is_buffer in tensors:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if has_addresses and type(tensor) in (nn.Parameter, Tensor) and (address := tensor.data_ptr()):
            if address in seen:
                continue
            seen.add(address)
        yield name, tensor, is_buffer


def _version(tensor: Tensor) -> int:
    """Return how often something was written into a tensor, nought while it is on the meta device."""
    return 0 if tensor.is_meta or tensor.is_inference() else tensor._version


def _checked(name: str, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return what this rank has of both, or raise ValueError unless they go together."""
    if f.shape != g.shape:
        raise ValueError(f"{name!r} is {list(f.shape)} in the target and {list(g.shape)} in online")
    if is_shard(f) or is_shard(g):
        if placement(f) != placement(g):
            raise ValueError(f"{name!r} is not sharded alike in the target and in online")
        f, g = local(f), local(g)
    if f.device != g.device:
        raise ValueError(f"{name!r} is on {f.device} in the target and on {g.device} in online")
    # Neither meta tensors nor those that are traced have an address.
    if not torch.compiler.is_compiling() and f.data_ptr() == g.data_ptr() and f.numel() and not f.is_meta:
        raise ValueError(f"{name!r} is the same memory in the target and in online")
    return f, g


def _check_same_names(ours: Any, theirs: Any) -> None:
    for side, others, names in (("online", set(theirs), ours), ("the target", set(ours), theirs)):
        if missing := [name for name in names if name not in others]:
            raise ValueError(f"{len(missing)} tensors are missing in {side}: {listed(missing)}")


def _check_module(online: Any) -> None:
    if not isinstance(online, nn.Module):
        raise TypeError(f"online must be a torch.nn.Module, got {type(online).__name__}")


def _check_momentum(momentum: float) -> None:
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number or a schedule of the update, got {momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
