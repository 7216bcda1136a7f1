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
    """A frozen copy of ``online`` that averages its weights: each `update` computes f ← m·f + (1 − m)·g.

    Here f are the weights of the target, g those of ``online``, and m is the momentum. The copy never shares memory
    with ``online``.

    - **Wrappers.** ``online`` and its parts may be wrapped (DDP, DataParallel, ``torch.compile``, activation
      checkpointing). The wrapped modules are copied without the wrappers.
    - **Hooks** are not copied, except those by which ``torch.nn.utils`` computes a weight (``weight_norm``,
      ``spectral_norm``, pruning). If the target needs other hooks, register them on ``target.module``.
    - **Half precision.** bfloat16 and float16 cannot represent small updates. The average of such tensors is kept in
      float32, in ``masters``, and ``module`` has the rounded values. This takes 4 bytes per value from the first
      `update` or ``state_dict`` on; float32 models cost nothing extra. If you change values in ``module``, they replace
      the masters. The ``state_dict`` has the masters under ``masters.``; one without them loads too. If you cast the
      target, or load a state of another dtype, the average continues from the rounded values.
    - **FSDP2.** Create the target first. Then call ``fully_shard`` on both ``online`` and ``target.module`` (or the
      target), or on a module that contains both. Each rank averages its own shards without communication. Only an
      `update` inside the forward of a sharded module gathers that module a second time.

    Args:
        online: the encoder, with its projection head.
        momentum: m, a float in [0, 1], or a schedule, which is called with the number of updates so far. The
            ``state_dict`` has this number, so a resumed schedule continues. The paper uses 0.99 (section 3.1).
        buffers: what `update` does with buffers such as BatchNorm's statistics. "keep" keeps the target's own, which it
            collects in train mode, as in the paper; "copy" copies those of ``online``; "ema" averages floating-point
            buffers and copies the others.

    Raises:
        ValueError: if the momentum is outside [0, 1], the buffer policy is unknown, or ``online`` is already sharded or
            has uninitialized parameters (lazy modules).
        TypeError: if ``online`` is not a module or ``copy.deepcopy`` cannot copy it, or if the momentum is neither a
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
        """The target encoder f."""
        self.masters = Masters()
        """Float32 values of the tensors in half precision."""
        self.momentum = momentum
        self.buffers_policy = buffers
        with torch.inference_mode(False):
            self._updates = torch.zeros((), dtype=torch.int64, device="cpu")  # a tensor, as `Ring.pushed_on_host`
        self._unset = {name: 0 for name, f in self._tensors().items() if f.is_meta}

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return int(self._updates)

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates.fill_(count)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the target with the given arguments, without gradient.

        Raises:
            RuntimeError: if the target got its memory from ``to_empty`` and has no values yet. Call `reset`, or load a
                state.
        """
        self._check_set()
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Average the weights with those of ``online``: f ← m·f + (1 − m)·g.

        Tensors are averaged together, so the number of kernel launches hardly depends on the number of tensors.
        ``online`` may have another dtype: the average is computed in the dtype of the target, but at least in float32.
        Under ``torch.compile``, a constant momentum is traced; a schedule breaks the graph, so compile without
        ``fullgraph``.

        If an error is raised, nothing has changed.

        Raises:
            ValueError: if tensors are missing on one side, or differ in shape, device or sharding. The message names
                them.
            TypeError: if ``online`` is not a module, or a schedule does not return a number.
            RuntimeError: if activation checkpointing runs this a second time, if it runs in a replica of DataParallel,
                or if the target has no values (see `forward`).
        """
        if callable(self.momentum) and torch.compiler.is_compiling():
            torch.compiler.disable(self._update)(online)  # tracing would freeze the schedule's momentum
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
        """Start again as a copy of ``online``: copy its parameters and all buffers, and set the update count to 0.

        This also initializes a target from the meta device after ``to_empty``. The dtypes of the target do not change.

        Raises:
            ValueError: as in `update`; nothing has changed.
            TypeError: if ``online`` is not a module.
            RuntimeError: if this runs in a replica of DataParallel.
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
        """Average or copy paired tensors."""
        averaged = [pair for pair in pairs if pair.averages]
        copied = [pair for pair in pairs if not pair.averages]
        dtypes = {pair.f.dtype for pair in averaged}
        rounded = {dtype for dtype in dtypes if needs_master(dtype)}
        halves = [pair for pair in averaged if pair.f.dtype in rounded] if rounded else []
        if self.masters:
            self.masters.keep([pair.name for pair in halves])
        if momentum == 1:  # exactly f; with an Inf in g, the formula would give NaN
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
        """Raise RuntimeError if a tensor has memory from ``to_empty`` but no values."""
        if not self._unset:
            return
        self._unset = self._still_unset()
        tensors = self._tensors()
        if empty := [name for name in self._unset if not tensors[name].is_meta]:
            raise RuntimeError(
                f"the target has no values in {len(empty)} tensors after to_empty: {listed(empty)}; "
                "call target.reset(online), then load the state dict, if you have one"
            )

    def _still_unset(self) -> dict[str, int]:
        """Return the tensors without values that have still not been written to."""
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
        # Also create the masters here, not only in the first update, so that a new target can load them from a
        # checkpoint.
        to_shards(self.module)
        for name, f, _ in untied(named_tensors(self.module, self.buffers_policy == "ema")):
            if needs_master(f.dtype):
                self.masters.of(name, f)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def get_extra_state(self) -> Tensor:
        """Return the number of updates so far, for the ``state_dict``."""
        return self._updates.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the saved number of updates."""
        self.updates = int(state)

    def extra_repr(self) -> str:
        """Describe the momentum, the buffer policy and the number of updates."""
        return f"momentum={self.momentum}, buffers={self.buffers_policy!r}, updates={self.updates}"


def _copy(pairs: list[Pair]) -> None:
    for pair in pairs:
        pair.f.copy_(pair.g)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 for meta tensors and inference tensors."""
    return 0 if tensor.is_meta or tensor.is_inference() else tensor._version


def _check_module(online: Any) -> None:
    if not isinstance(online, nn.Module):
        raise TypeError(f"online must be a torch.nn.Module, got {type(online).__name__}")


def _check_momentum(momentum: float) -> None:
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number or a schedule that returns one, got {momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
