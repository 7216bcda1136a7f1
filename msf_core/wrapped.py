"""Access to encoders without their wrappers and hooks, and to their shards under FSDP2."""

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from msf_core.distributed import is_shard

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# The attributes in which torch.compile, and activation checkpointing and offloading, store the wrapped module. The
# wrappers' classes are in modules that are slow to import.
_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers of DDP, DataParallel, torch.compile and activation checkpointing."""
    while True:
        children = module._modules
        if _COMPILED in children:
            inside = children[_COMPILED]
        elif _CHECKPOINTED in children:
            inside = children[_CHECKPOINTED]
        elif isinstance(module, _WRAPPERS):
            inside = module.module
        else:
            return module
        assert inside is not None
        module = inside


def named_tensors(module: nn.Module, with_buffers: bool, prefix: str = "") -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name without wrappers, tensor, whether it is a buffer); a tied tensor once for each of its names."""
    module = unwrap(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, False
    for name, buffer in module._buffers.items():
        if with_buffers and buffer is not None:
            yield prefix + name, buffer, True
    for name, child in module._modules.items():
        if child is not None:
            yield from named_tensors(child, with_buffers, f"{prefix}{name}.")


def without_wrappers(key: str) -> str:
    """Convert a key of a ``state_dict`` to a name of `named_tensors`; wrappers of DDP and DataParallel stay in it."""
    return ".".join(part for part in key.split(".") if part not in (_COMPILED, _CHECKPOINTED))


def listed(names: Any) -> str:
    """Return the first five names in alphabetical order, for an error message."""
    shown = ", ".join(repr(name) for name in sorted(names)[:5])
    return f"{shown}{', …' if len(names) > 5 else ''}"


def bare_copy(online: nn.Module) -> nn.Module:
    """Return a copy of ``online`` without wrappers, gradients and hooks.

    The only hooks that are kept are those with which ``torch.nn.utils`` computes a weight before a forward
    (``weight_norm``, ``spectral_norm``, pruning), because they are part of the encoder.

    Raises:
        ValueError: if parameters are sharded or uninitialized, or a module is wrapped by FSDP1.
        TypeError: if a module cannot be copied.
    """
    bare = unwrap(online)
    tensors = {name: tensor for name, tensor, _ in named_tensors(bare, True)}
    if any(is_shard(tensor) for tensor in tensors.values()):
        raise ValueError(
            "online is already sharded: create the EMATarget first, then call fully_shard on online and target.module"
        )
    if lazy := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        raise ValueError(
            f"online has {len(lazy)} uninitialized tensors: {listed(lazy)}; "
            "run a batch through its lazy modules first, then create the EMATarget"
        )
    memo: dict[int, Any] = {}
    for module in bare.modules():
        _check_not_fsdp1(module)
        memo.update(_instead(module))
    try:
        with torch.inference_mode(False):  # tensors created in inference mode cannot be updated outside of it
            target: nn.Module = copy.deepcopy(bare, memo)
    except Exception as error:
        raise TypeError(
            f"online must be a module that copy.deepcopy can copy, but {type(bare).__name__} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    target.requires_grad_(False)
    for parent in list(target.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = None if child is None else unwrap(child)
    return target


def _instead(module: nn.Module) -> dict[int, Any]:
    """Return a memo, by object id, with which copy.deepcopy replaces some attributes of a module."""
    attributes = vars(module)
    hooks = attributes.get("_forward_pre_hooks", {})
    needed = {key for key, hook in hooks.items() if _computes_a_weight(hook)}
    memo: dict[int, Any] = {}
    for name in _HOOKS:
        if name in attributes:
            memo[id(attributes[name])] = OrderedDict((k, v) for k, v in attributes[name].items() if k in needed)
    for value in attributes.values():
        # A weight computed by such a hook; copy.deepcopy rejects tensors with a grad_fn.
        if isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    return memo


def _computes_a_weight(hook: Any) -> bool:
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def to_shards(*modules: nn.Module) -> list[Any]:
    """Replace gathered parameters with FSDP2's shards, and return the groups for `gather_again`.

    Gathered parameters are copies that FSDP2 later discards, with all changes. Parameters are gathered during the
    forward of the module that FSDP2 was applied to, which may contain the encoder at any depth. If that module is the
    root, they stay gathered after this forward. FSDP2's group of parameters is found through the hook that it registers
    on the modules that own the parameters.

    Raises:
        RuntimeError: if a parameter is gathered, and its group cannot be found in this version of PyTorch.
        ValueError: if a module is wrapped by FSDP1, which has no shards of single parameters.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    again = []
    for module in modules:
        for part in module.modules():
            if part._state_dict_pre_hooks:
                for hook in part._state_dict_pre_hooks.values():
                    if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp."):
                        again += _shard(part, hook)
    return again


def _shard(part: nn.Module, hook: Any) -> list[Any]:
    """Reshard the group of parameters that registered this hook; return it if it must be gathered again."""
    _check_not_fsdp1(part)
    try:
        group = hook.__closure__[hook.__code__.co_freevars.index("self")].cell_contents
        state, idle = group._training_state, type(group._training_state).IDLE
        # In the idle state, no parameter stays gathered for a forward, and copies run on the current stream.
        with group.use_training_state(idle):
            group.wait_for_unshard()  # a prefetched unshard would restore the old values
            gathered = group.is_unsharded
            group.reshard()
    except (AttributeError, TypeError, ValueError) as error:
        if all(is_shard(parameter) for parameter in part.parameters(recurse=False)):
            return []
        raise RuntimeError(
            f"EMATarget cannot reach the shards of gathered parameters with PyTorch {torch.__version__}: call update "
            "outside of the forward of the sharded module, or shard both alike, with fully_shard(online) and "
            "fully_shard(target.module)"
        ) from error
    return [group] if gathered and state.name in ("FORWARD", "PRE_BACKWARD") else []


def _check_not_fsdp1(module: nn.Module) -> None:
    if type(module).__name__ == "FullyShardedDataParallel":  # it has no shards of single parameters
        raise ValueError("EMATarget works with FSDP2 (fully_shard), but not with FullyShardedDataParallel")


def gather_again(groups: list[Any]) -> None:
    """Gather the parameters that `to_shards` replaced with shards again, so that the forward or backward continues."""
    for group in groups:
        with group.use_training_state(type(group._training_state).IDLE):
            group.unshard()
            group.wait_for_unshard()
