"""The target encoder f: an exponential moving average of the online encoder g (paper section 2)."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from msf_core.checks import check_not_recomputed, check_not_replica, gives_memory_alone
from msf_core.masters import Masters, average_in_float32, local, needs_master
from msf_core.pairs import BUFFER_POLICIES, Pair, pair_up, untied
from msf_core.schedules import Schedule
from msf_core.wrapped import (
    bare_copy,
    gather_again,
    listed,
    named_tensors,
    to_shards,
    without_wrappers,
)


class EMATarget(nn.Module):
    """A frozen copy of ``online`` that follows it: f ← m·f + (1 − m)·g at every `update`.

    The copy shares no storage with ``online``. Wrappers of ``online`` or of its parts (DDP, DataParallel,
    ``torch.compile``, activation checkpointing) are looked through: the copy is of what they wrap, and tensors pair by
    the names they have there. Hooks on ``online`` are not copied, except those by which ``torch.nn.utils`` computes a
    weight (``weight_norm``, ``spectral_norm``, pruning); register others on ``target.module`` where it needs them.

    A step of 1 − m is smaller than what bfloat16 and float16 resolve. The average of such tensors is kept in float32,
    in ``masters``, and ``module`` holds it rounded. That takes 4 bytes for each of their values, from the first
    `update` or ``state_dict`` on; models of float32 pay nothing. Values that somebody changes in ``module`` win over
    the masters. The ``state_dict`` has them under ``masters.``; one without them loads too. A cast of the target to
    another dtype, or a state loaded into one, starts again from the rounded values.

    With FSDP2 make the target first, and then call ``fully_shard`` on ``online`` and on ``target.module`` (or the
    target) alike, or on a module that holds both. Each rank averages its shards, and nothing travels, except where
    `update` is called inside the forward of a sharded module: it has to gather that module once more.

    Args:
        online: the encoder, with its projection head.
        momentum: m, a float in [0, 1] or a schedule of the number of updates so far (which the ``state_dict``
            keeps, so a resumed schedule goes on). The paper holds 0.99 (section 3.1).
        buffers: what `update` does with buffers such as BatchNorm's statistics: "keep" leaves the target its own,
            which it gathers in train mode as the paper's does; "copy" takes ``online``'s; "ema" averages the
            floating ones and copies the others.

    Raises:
        ValueError: a momentum outside [0, 1], another policy, an ``online`` that is sharded already or has
            uninitialized parameters (lazy modules).
        TypeError: an ``online`` that is no module or that ``copy.deepcopy`` cannot copy, a momentum that is neither a
            number nor callable.

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
            RuntimeError: ``to_empty`` has made memory for the target, and nothing has given it values: call `reset`,
                or load a state.
        """
        self._check_set()
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Move one step towards ``online``, with a number of kernel launches that hardly grows with its tensors.

        ``online`` may have another dtype than the target: the average is computed in the target's, or in float32
        where that is less precise. Inside ``torch.compile`` a constant momentum is traced whole; a schedule breaks the
        graph here, so compile without ``fullgraph``.

        Raises:
            ValueError: tensors are missing on one side, or differ in shape, device or sharding; the message names
                them, and nothing has moved.
            TypeError: an ``online`` that is no module, or a schedule that gives no number.
            RuntimeError: activation checkpointing runs this a second time, or it runs in a replica of DataParallel,
                or the target has no values, as in `forward`; nothing has moved.
        """
        if callable(self.momentum) and torch.compiler.is_compiling():
            torch.compiler.disable(self._update)(online)  # traced, a schedule's momentum would be compiled in
        else:
            self._update(online)

    def _update(self, online: nn.Module) -> None:
        check_not_recomputed("EMATarget.update")
        _check_module(online)
        check_not_replica(self, online)
        self._check_set()
        momentum = self.momentum(self.updates) if callable(self.momentum) else self.momentum
        _check_momentum(momentum)
        gathered = to_shards(self.module, online)
        try:
            pairs = pair_up(self.module, online, self.buffers_policy)
            self._move(pairs, momentum)
        finally:
            gather_again(gathered)
        self._updates.add_(1)

    @torch.no_grad()
    def reset(self, online: nn.Module) -> None:
        """Start again as a copy of ``online``: its parameters and all its buffers, after no update.

        This also gives values to a target that came from the meta device by ``to_empty``. It leaves each of its
        tensors the dtype it has.

        Raises:
            ValueError: as `update`; nothing has changed.
            TypeError: an ``online`` that is no module.
            RuntimeError: this runs in a replica of DataParallel.
        """
        _check_module(online)
        check_not_replica(self, online)
        gathered = to_shards(self.module, online)
        try:
            _copy(pair_up(self.module, online, "copy"))
        finally:
            gather_again(gathered)
        self.masters.keep([])
        self._unset = {}
        self.updates = 0

    def _move(self, pairs: list[Pair], momentum: float) -> None:
        """Move paired tensors by one step."""
        averaged = [pair for pair in pairs if pair.averages]
        copied = [pair for pair in pairs if not pair.averages]
        dtypes = {pair.f.dtype for pair in averaged}
        rounded = {dtype for dtype in dtypes if needs_master(dtype)}
        halves = [pair for pair in averaged if pair.f.dtype in rounded] if rounded else []
        if self.masters:
            self.masters.keep([pair.name for pair in halves])
        if momentum == 1:  # exactly f: an Inf on the other side must not make a NaN
            return _copy(copied)
        masters = [local(self.masters.of(pair.name, pair.whole)) for pair in halves]
        if momentum == 0:  # exactly g
            copied += averaged
            for master, pair in zip(masters, halves, strict=True):
                master.copy_(pair.g)
        else:
            for dtype in dtypes - rounded:
                f = [pair.f for pair in averaged if pair.f.dtype == dtype]
                g = [
                    pair.g if pair.g.dtype == dtype else pair.g.to(dtype) for pair in averaged if pair.f.dtype == dtype
                ]
                torch._foreach_lerp_(f, g, 1 - momentum)  # f + (1 − m)(g − f) = m·f + (1 − m)·g
            average_in_float32([pair.f for pair in halves], masters, [pair.g for pair in halves], 1 - momentum)
        _copy(copied)

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
        unset = (self._tensors() if gives_memory_alone(fn) else self._still_unset()).keys()
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
        for name, f, _ in untied(named_tensors(self.module, self.buffers_policy == "ema")):
            if needs_master(f.dtype):
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


def _copy(pairs: list[Pair]) -> None:
    for pair in pairs:
        pair.f.copy_(pair.g)


def _version(tensor: Tensor) -> int:
    """Return how often something was written into a tensor, nought while it is on the meta device."""
    return 0 if tensor.is_meta or tensor.is_inference() else tensor._version


def _check_module(online: Any) -> None:
    if not isinstance(online, nn.Module):
        raise TypeError(f"online must be a torch.nn.Module, got {type(online).__name__}")


def _check_momentum(momentum: float) -> None:
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number or a schedule of the update, got {momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
