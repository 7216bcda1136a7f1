"""What EMATarget copies from an encoder and what it leaves out: wrappers, hooks, computed weights, replicas."""

import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # some libraries import it even for plain models
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import OffloadWrapper, checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

from msf_core import EMATarget

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def made(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@torch.no_grad()
def train(online: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in online.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))


# Wrappers of activation checkpointing and offloading.


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrap_parts(module: nn.Module) -> nn.Module:
        module[1][0], module[1] = wrap(module[1][0]), wrap(module[1])
        return module

    return wrap_parts


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint": checkpoint_wrapper,
    "offload": OffloadWrapper,
    "checkpoint inside": inside(checkpoint_wrapper),
    "offload of checkpoint inside": inside(lambda module: OffloadWrapper(checkpoint_wrapper(module))),
    "compile of checkpoint": lambda module: compiled(checkpoint_wrapper(module)),
    "checkpoint of compile": lambda module: checkpoint_wrapper(compiled(module)),
    "DataParallel of checkpoint inside": lambda module: nn.DataParallel(inside(checkpoint_wrapper)(module)),
}


@pytest.mark.parametrize("when", ["before", "after", "both", "the target's"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_of_activation_checkpointing_change_nothing(wrap: Callable[[nn.Module], nn.Module], when: str) -> None:
    plain, online = made(), made()
    expected = EMATarget(plain, momentum=0.75, buffers="ema")
    bare, wrapped = online, online
    if when in ("before", "both"):
        wrapped = wrap(online)
    target = EMATarget(wrapped, momentum=0.75, buffers="ema")
    assert state_of(target).keys() == state_of(expected).keys()
    assert [type(part) for part in target.modules()] == [type(part) for part in expected.modules()]
    if when == "before":
        wrapped = bare = made()
    elif when == "after":
        wrapped = wrap(online)
    elif when == "the target's":
        target.module = wrap(target.module)
    for step in range(2):
        train(plain, step)
        train(bare, step)
        expected.update(plain)
        target.update(wrapped)
    for ours, theirs in zip(target.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(target(X), expected(X))


# Replicas of DataParallel.


def test_an_update_in_a_replica_of_data_parallel_is_refused() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)
    model = nn.ModuleDict({"online": online, "target": target})
    before = state_of(model)
    for ours, theirs in (
        (target._replicate_for_data_parallel(), online),
        (target, online._replicate_for_data_parallel()),
    ):
        for call in (ours.update, ours.reset):
            with pytest.raises(RuntimeError, match=r"copy that nn.DataParallel makes .*outside"):
                call(theirs)
    assert_same(state_of(model), before)
    assert target.updates == 0


def test_a_target_inside_data_parallel_is_updated_outside() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)
    parallel = nn.DataParallel(target)
    train(online, 1)
    parallel.module.update(nn.DataParallel(online))
    expected = EMATarget(made(), momentum=0.5)
    expected.update(online)
    assert_same(state_of(target), state_of(expected))
    assert torch.equal(parallel(X), expected(X))


# What cannot be copied.


def test_lazy_modules_are_named_and_served_once_they_have_run() -> None:
    online = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"online has 6 uninitialized tensors: '1\.bias', .*run a batch through"):
        EMATarget(online)
    target = EMATarget(made())
    with pytest.raises(ValueError, match="tensors are missing in online"):
        target.update(online)
    online(X)
    target = EMATarget(online, momentum=0.0)
    train(online, 1)
    target.update(online)
    assert torch.equal(target(X), online(X))


class Locked(nn.Linear):
    """A module with a lock, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.lock = threading.Lock()


def test_a_module_that_cannot_be_copied_is_named() -> None:
    with pytest.raises(TypeError, match=r"online must be a module that copy\.deepcopy can copy, but Sequential raised"):
        EMATarget(nn.Sequential(Locked()))


def test_compiled_in_place_the_target_is_a_plain_copy() -> None:
    online = made()
    online.compile(backend="eager")
    online(X)
    assert torch.equal(EMATarget(online).eval()(X), online.eval()(X))


def test_tensors_made_in_inference_mode_do_not_stay_so() -> None:
    with torch.inference_mode():
        online = made()
        target = EMATarget(online, momentum=0.5)
        target.update(made(1).bfloat16())
    ordinary = made(2)
    target.update(ordinary)
    target.train()(X)
    assert target.updates == 2
    torch.testing.assert_close(
        target.module[0].bias,
        made()[0].bias.detach() / 4 + made(1)[0].bias.bfloat16().detach() / 4 + ordinary[0].bias.detach() / 2,
    )


def test_a_state_loaded_in_inference_mode_can_be_updated_afterwards() -> None:
    online = nn.Linear(3, 2).bfloat16()
    saved = EMATarget(online)
    saved.update(online)
    for assign in (False, True):
        target = EMATarget(online)
        with torch.inference_mode():
            state = {name: part.clone() for name, part in saved.state_dict().items() if "masters" in name or not assign}
            target.load_state_dict(state, strict=False, assign=assign)
        target.update(online)
        assert target.updates == 2 - assign


def test_a_target_of_half_precision_leaves_inference_mode_too() -> None:
    online = made().bfloat16()
    with torch.inference_mode():
        target = EMATarget(online, momentum=0.5, buffers="ema")
        target.update(online)
    train(online, 1)
    target.update(online)
    (online(X.bfloat16()) - target(X.bfloat16())).pow(2).mean().backward()
    assert target.updates == 2


# Hooks.


def test_hooks_of_online_do_not_fire_for_the_target() -> None:
    online = made()
    fired: list[str] = []
    online.register_forward_hook(lambda *_: fired.append("forward"))
    online[1].register_forward_hook(lambda *_, **__: fired.append("kwargs"), with_kwargs=True)
    online[1].register_forward_hook(lambda *_: fired.append("always"), always_call=True)
    online[0].register_forward_pre_hook(lambda *_: fired.append("pre"))
    online[0].register_forward_pre_hook(lambda *_, **__: fired.append("pre kwargs"), with_kwargs=True)
    online[2].register_full_backward_hook(lambda *_: fired.append("backward"))
    online[2].register_full_backward_pre_hook(lambda *_: fired.append("pre backward"))
    online[2].weight.register_post_accumulate_grad_hook(lambda *_: fired.append("gradient"))
    target = EMATarget(online, momentum=0.5)
    target(X)
    target.module.requires_grad_(True)(X).sum().backward()
    target.update(online)
    assert fired == []
    online(X).sum().backward()
    assert sorted(set(fired)) == sorted(
        ["forward", "kwargs", "always", "pre", "pre kwargs", "backward", "pre backward", "gradient"]
    )


def test_what_a_hook_holds_is_not_copied() -> None:
    class Trainer:
        lock = None

        def hook(self, *_: Any) -> None:
            pass

    trainer = Trainer()
    trainer.lock = threading.Lock()  # type: ignore[assignment]
    online = made()
    online[1].register_forward_hook(trainer.hook)
    assert torch.equal(EMATarget(online)(X), made()(X))


def pruned(module: nn.Linear) -> nn.Linear:
    prune.l1_unstructured(module, "weight", amount=4)
    return module


COMPUTED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm by a hook": torch.nn.utils.weight_norm,
    "spectral_norm by a hook": torch.nn.utils.spectral_norm,
    "pruning": pruned,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a step"])
@pytest.mark.parametrize("kind", COMPUTED.values(), ids=COMPUTED.keys())
def test_computed_weights_follow_by_their_parts(kind: Callable[[nn.Linear], nn.Module], ran: bool) -> None:
    torch.manual_seed(0)
    online = nn.Sequential(kind(nn.Linear(3, 3)))
    if ran:
        online(X).sum().backward()
    target = EMATarget(online, momentum=0.0, buffers="copy").eval()
    start = target(X)
    assert torch.equal(start, online.eval()(X))
    train(online, 1)
    assert torch.equal(target(X), start)
    target.update(online)
    assert torch.equal(target(X), online(X))
    assert not torch.allclose(target(X), start)


# FSDP, as far as one process can test it.


def test_shards_that_cannot_be_reached_are_an_error_and_plain_models_are_none() -> None:
    class Group:
        """Stands in for a PyTorch with other private names."""

        def register(self, module: nn.Module) -> None:
            def to_sharded_hook(*_: Any) -> None:
                self.to_sharded()  # type: ignore[attr-defined]

            hook = types.FunctionType(
                to_sharded_hook.__code__,
                {"__name__": "torch.distributed.fsdp.new"},
                closure=to_sharded_hook.__closure__,
            )
            module._state_dict_pre_hooks[0] = hook

    online = made()
    target = EMATarget(online, momentum=0.5)
    target.update(online)
    Group().register(target.module[0])
    before = {name: f.clone() for name, f in target.module.named_parameters()}
    train(online, 1)
    with pytest.raises(RuntimeError, match=r"call update outside of the forward.*, with fully_shard\(online\)"):
        target.update(online)
    assert_same(dict(target.module.named_parameters()), before)
    assert target.updates == 1
