"""EMATarget: the average at every step, what it pairs, and what it never touches."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from msf_core import EMATarget
from msf_core.schedules import constant, cosine, linear

POLICIES = ("keep", "copy", "ema")
# For a few updates, compared with the formula in float64, by dtype of the target.
TOLERANCE = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 4e-2, "atol": 2e-2},
}


class Encoder(nn.Module):
    """Nested modules, BatchNorm, a frozen and a tied parameter, None as parameter, buffer and child."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.ModuleDict({"in": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
        self.head["out"].weight = self.head["in"].weight  # tied
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.scalar = nn.Parameter(torch.randn(()))
        self.register_buffer("mask", torch.tensor([True, True, False, True]))
        self.register_parameter("no_parameter", None)
        self.register_buffer("no_buffer", None)
        self.register_module("no_module", None)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.head["out"](self.head["in"](self.backbone(x)))
        return scale * self.scalar * (x + self.frozen) * self.mask


def made(seed: int = 0, kind: Callable[[], nn.Module] = Encoder) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


@torch.no_grad()
def train(online: nn.Module, seed: int) -> None:
    """Stand in for an optimizer step and a forward in train mode: every tensor changes, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*online.parameters(), *online.buffers()):
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            if tensor.ndim == 1:
                tensor.abs_()  # a running variance is never negative
        elif tensor.dtype == torch.int64:
            tensor.add_(1 + seed)
        else:
            tensor.logical_not_()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert after.keys() == before.keys()
    for name in before:
        assert torch.equal(after[name], before[name]), name


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters(remove_duplicate=False)}


def storages(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()}


# The average.


@given(
    momentum=st.one_of(
        st.floats(0, 1),
        st.builds(constant, st.floats(0, 1)),
        st.builds(linear, st.floats(0, 1), st.floats(0, 1), st.integers(1, 6)),
        st.builds(cosine, st.floats(0, 1), st.floats(0, 1), st.integers(1, 6)),
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_every_update_is_m_times_f_plus_1_minus_m_times_g(momentum: Any, dtype: torch.dtype, seed: int) -> None:
    online = made(seed).to(dtype)
    target = EMATarget(online, momentum)
    expected = {name: f.double() for name, f in parameters_of(online).items()}
    for step in range(4):
        train(online, seed + step)
        target.update(online)
        m = momentum(step) if callable(momentum) else momentum
        for name, g in parameters_of(online).items():
            expected[name] = m * expected[name] + (1 - m) * g.double()
        moved = parameters_of(target.module)
        assert moved.keys() == expected.keys()
        for name, f in moved.items():
            assert f.dtype == dtype
            torch.testing.assert_close(f.double(), expected[name], **TOLERANCE[dtype])
        assert target.updates == step + 1


def test_the_average_by_hand() -> None:
    online = nn.Linear(1, 1, bias=False)
    nn.init.constant_(online.weight, 1.0)
    target = EMATarget(online, momentum=0.75)
    nn.init.constant_(online.weight, 5.0)
    for expected in (2.0, 2.75, 3.3125):
        target.update(online)
        assert target.module.weight.item() == expected


def test_the_paper_momentum_is_the_default() -> None:
    online = made()
    target = EMATarget(online)
    before = parameters_of(target.module)
    train(online, 1)
    target.update(online)
    for name, f in parameters_of(target.module).items():
        torch.testing.assert_close(f, 0.99 * before[name] + 0.01 * parameters_of(online)[name])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("momentum", [0, 0.0, constant(0.0), linear(0.0, 1.0, steps=9)])
def test_momentum_0_equals_online_bit_for_bit(dtype: torch.dtype, momentum: Any) -> None:
    online = made().to(dtype)
    target = EMATarget(online, momentum)
    train(online, 1)
    target.update(online)
    assert_same(parameters_of(target.module), parameters_of(online))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("momentum", [1, 1.0, constant(1.0), linear(1.0, 0.0, steps=9)])
def test_momentum_1_never_moves(dtype: torch.dtype, momentum: Any) -> None:
    online = made().to(dtype)
    target = EMATarget(online, momentum)
    before = parameters_of(target.module)
    train(online, 1)
    target.update(online)
    assert_same(parameters_of(target.module), before)
    assert target.updates == 1


@given(st.floats(0, 1), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**16))
@settings(max_examples=20)
def test_equal_tensors_stay_bit_equal(momentum: float, dtype: torch.dtype, seed: int) -> None:
    online = made(seed).to(dtype)
    target = EMATarget(online, momentum, buffers="ema")
    for _ in range(3):
        target.update(online)
    assert_same(state_of(target.module), state_of(online))


def test_a_schedule_is_asked_for_the_updates_so_far() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.5

    online = made()
    target = EMATarget(online, schedule)
    for _ in range(3):
        target.update(online)
    assert asked == [0, 1, 2]


def test_a_float32_target_averages_a_bfloat16_online_in_float32() -> None:
    online = made()
    target = EMATarget(online, momentum=0.999)
    before = parameters_of(target.module)
    online.bfloat16()
    train(online, 1)
    target.update(online)
    for name, f in parameters_of(target.module).items():
        assert f.dtype == torch.float32
        expected = 0.999 * before[name].double() + 0.001 * parameters_of(online)[name].double()
        torch.testing.assert_close(f.double(), expected, **TOLERANCE[torch.float32])


def test_dtypes_mix_within_one_model() -> None:
    online = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    target = EMATarget(online, momentum=0.5)
    before = parameters_of(target.module)
    train(online, 1)
    target.update(online)
    for name, f in parameters_of(target.module).items():
        expected = (before[name].double() + parameters_of(online)[name].double()) / 2
        assert f.dtype == before[name].dtype
        torch.testing.assert_close(f.double(), expected, **TOLERANCE[f.dtype])


def test_complex_parameters_are_averaged_too() -> None:
    online = nn.ParameterList([torch.tensor([1 + 1j, 2j])])
    target = EMATarget(online, momentum=0.75)
    with torch.no_grad():
        online[0].zero_()
    target.update(online)
    torch.testing.assert_close(target.module[0].detach(), torch.tensor([0.75 + 0.75j, 1.5j]))


def test_momentum_1_never_moves_even_where_online_is_not_finite() -> None:
    online = nn.Linear(2, 2)
    target = EMATarget(online, momentum=1.0)
    before = state_of(target)
    nn.init.constant_(online.weight, torch.inf)
    target.update(online)
    assert_same({"weight": target.module.weight}, {"weight": before["module.weight"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_momentum_0_takes_online_even_where_the_target_is_not_finite(dtype: torch.dtype) -> None:
    online = nn.Linear(2, 2).to(dtype)
    target = EMATarget(online, momentum=linear(0.0, 0.5, steps=1))
    nn.init.constant_(target.module.weight, torch.inf)
    for _ in range(2):
        target.update(online)
        assert_same({"weight": target.module.weight}, {"weight": online.weight})


# What moves: every parameter once, buffers by their policy.


def test_tied_parameters_move_once_and_stay_tied() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)
    head = target.module.head
    assert head["in"].weight is head["out"].weight
    before = head["in"].weight.clone()
    train(online, 1)
    target.update(online)
    assert head["in"].weight is head["out"].weight
    torch.testing.assert_close(head["in"].weight, (before + online.head["in"].weight.detach()) / 2)


def test_a_parametrized_weight_follows_by_its_parts() -> None:
    online = weight_norm(nn.Linear(3, 4))
    target = EMATarget(online, momentum=0.5)
    before = parameters_of(target.module)
    assert len(before) == 3
    train(online, 1)
    target.update(online)
    for name, f in parameters_of(target.module).items():
        torch.testing.assert_close(f, (before[name] + parameters_of(online)[name]) / 2)
    assert not torch.equal(target(torch.ones(1, 3)), online(torch.ones(1, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_buffers_follow_their_policy(policy: str, training: bool) -> None:
    online = made()
    target = EMATarget(online, momentum=0.75, buffers=policy).train(training)
    before = {name: buffer.clone() for name, buffer in target.module.named_buffers()}
    train(online, 1)
    target.update(online)
    after, theirs = dict(target.module.named_buffers()), dict(online.named_buffers())
    assert after.keys() == before.keys() == theirs.keys()
    assert len(after) == 4
    for name, buffer in after.items():
        assert not torch.equal(before[name], theirs[name])
        if policy == "keep":
            expected = before[name]
        elif policy == "ema" and buffer.is_floating_point():
            expected = 0.75 * before[name] + 0.25 * theirs[name]
        else:  # num_batches_tracked and the mask cannot be averaged
            expected = theirs[name]
        assert buffer.dtype == before[name].dtype
        torch.testing.assert_close(buffer, expected)
        if policy != "ema" or not buffer.is_floating_point():
            assert torch.equal(buffer, expected)


def test_kept_statistics_are_the_targets_own_from_its_own_forwards() -> None:
    online = made()
    target = EMATarget(online, momentum=0.0)
    norm = target.module.backbone[1]
    x = torch.randn(8, 3)
    target.train()
    target(x)
    assert norm.num_batches_tracked == 1
    assert online.backbone[1].num_batches_tracked == 0
    inputs = target.module.backbone[0](x)
    torch.testing.assert_close(norm.running_mean, 0.1 * inputs.mean(dim=0))
    gathered = {name: buffer.clone() for name, buffer in target.module.named_buffers()}
    target.update(online)
    target.eval()
    target(x)
    assert_same(dict(target.module.named_buffers()), gathered)


@pytest.mark.parametrize("policy", POLICIES)
def test_parameters_follow_under_every_buffer_policy(policy: str) -> None:
    online = made()
    target = EMATarget(online, momentum=0.0, buffers=policy)
    train(online, 1)
    target.update(online)
    assert_same(parameters_of(target.module), parameters_of(online))


# Wrappers of online, at any time and depth.


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        # Up to PyTorch 2.6, destroying a group while its threads still release tensors can block forever.
        time.sleep(0.02)
        dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def compiled_inside(module: nn.Module) -> nn.Module:
    module.backbone = compiled(module.backbone)
    module.head["in"] = compiled(module.head["in"])
    return module


def ddp_inside(module: nn.Module) -> nn.Module:
    module.backbone = DistributedDataParallel(module.backbone)
    return module


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "compile inside": compiled_inside,
    "DDP": DistributedDataParallel,
    "DDP inside": ddp_inside,
    "DataParallel": nn.DataParallel,
    "DDP of compile": lambda module: DistributedDataParallel(compiled(module)),
    "compile of DDP": lambda module: compiled(DistributedDataParallel(module)),
    "DDP of compile inside": lambda module: DistributedDataParallel(compiled_inside(module)),
    "compile of DDP of compile": lambda module: compiled(DistributedDataParallel(compiled(module))),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_of_online_change_nothing(wrap: Callable[[nn.Module], nn.Module], when: str, policy: str) -> None:
    plain, online = made(), made()
    expected = EMATarget(plain, momentum=0.75, buffers=policy)
    bare = online
    if when == "after":
        target = EMATarget(online, momentum=0.75, buffers=policy)
        online = wrap(online)
    else:
        online = wrap(online)
        target = EMATarget(online, momentum=0.75, buffers=policy)
        if when == "before":
            online = made()  # another model with the same names, without the wrapper
            online.load_state_dict(made().state_dict())
            bare = online
    for step in range(2):
        train(plain, step)
        train(bare, step)
        expected.update(plain)
        target.update(online)
    ours, theirs = list(state_of(target).values()), list(state_of(expected).values())
    assert len(ours) == len(theirs)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    x = torch.randn(8, 3)
    torch.testing.assert_close(target.eval()(x), expected.eval()(x))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["compile", "DDP", "DataParallel", "DDP of compile", "compile of DDP"])
def test_the_target_of_a_wrapped_online_is_bare_and_loads_into_that_of_a_plain_one(name: str) -> None:
    target = EMATarget(WRAPPERS[name](made()))
    assert type(target.module) is Encoder
    plain = EMATarget(made(1))
    plain.load_state_dict(target.state_dict(), strict=True)
    assert_same(state_of(plain), state_of(target))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["compile inside", "DDP inside", "DDP of compile inside"])
def test_the_target_of_an_online_that_is_wrapped_inside_is_bare_too(name: str) -> None:
    target = EMATarget(WRAPPERS[name](made()))
    assert target.state_dict().keys() == EMATarget(made()).state_dict().keys()
    assert not any(isinstance(module, DistributedDataParallel) for module in target.modules())


# Apart from online: no storage, no gradient.


def test_nothing_is_shared_with_online_before_or_after_updates() -> None:
    online = made()
    for policy in POLICIES:
        target = EMATarget(online, buffers=policy)
        assert not storages(target) & storages(online)
        target.update(online)
        assert not storages(target) & storages(online)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_changes_in_place_stay_on_their_side(policy: str, momentum: float) -> None:
    online = made()
    target = EMATarget(online, momentum, buffers=policy)
    target.update(online)
    before = state_of(target)
    train(online, 1)
    assert_same(state_of(target), before)
    before = state_of(online)
    train(target.module, 2)
    assert_same(state_of(online), before)


def test_update_changes_neither_online_nor_its_gradients() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5, buffers="ema")
    train(online, 1)
    online(torch.randn(8, 3)).sum().backward()
    before = state_of(online)
    gradients = {name: p.grad.clone() for name, p in online.named_parameters() if p.grad is not None}
    target.update(online)
    assert_same(state_of(online), before)
    assert len(gradients) == 7
    assert_same({name: p.grad for name, p in online.named_parameters() if p.grad is not None}, gradients)


def test_the_copy_requires_no_gradient_and_carries_none_along() -> None:
    online = made()
    online(torch.randn(8, 3)).sum().backward()
    target = EMATarget(online)
    assert len(list(target.parameters())) == len(list(online.parameters()))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in target.parameters())
    assert online.scalar.requires_grad
    assert online.scalar.grad is not None


def test_an_optimizer_step_between_updates_is_followed() -> None:
    online = made()
    target = EMATarget(online, momentum=0.9)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    before = parameters_of(target.module)
    for _ in range(3):
        optimizer.zero_grad()
        (online(torch.randn(8, 3)) - target(torch.randn(8, 3))).pow(2).mean().backward()
        optimizer.step()
        target.update(online)
        for name, g in parameters_of(online).items():
            before[name] = 0.9 * before[name] + 0.1 * g
            torch.testing.assert_close(parameters_of(target.module)[name], before[name])


def test_forward_runs_without_gradient_and_passes_every_argument() -> None:
    online = made()
    target = EMATarget(online).eval()
    x = torch.randn(8, 3, requires_grad=True)
    out = target(x, scale=3.0)
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(out, online.eval()(x, 3.0))
    assert torch.equal(target(x), online(x))


def test_train_and_eval_reach_the_copy_and_start_as_online() -> None:
    for training in (True, False):
        target = EMATarget(made().train(training))
        assert target.module.training is training
        assert target.train().module.backbone[1].training
        assert not target.eval().module.backbone[1].training


def test_a_deep_copy_of_the_target_is_apart_from_it() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)
    target.update(online)
    twin = copy.deepcopy(target)
    before = state_of(twin)
    train(online, 1)
    target.update(online)
    assert_same(state_of(twin), before)
    twin.update(online)
    assert_same(state_of(twin), state_of(target))


# Saving.


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_in_the_middle_and_loaded_it_goes_on_bit_equal(tmp_path: Any, policy: str) -> None:
    online = made()
    momentum = cosine(0.5, 1.0, steps=8)
    target = EMATarget(online, momentum, buffers=policy)
    for step in range(3):
        train(online, step)
        target.update(online)
    torch.save(target.state_dict(), tmp_path / "target.pt")
    resumed = EMATarget(made(9), momentum, buffers=policy)
    resumed.load_state_dict(torch.load(tmp_path / "target.pt", weights_only=True), strict=True)
    assert resumed.updates == 3
    for step in range(3, 6):
        train(online, step)
        for one in (target, resumed):
            one.update(online)
        assert_same(state_of(resumed), state_of(target))
    assert resumed.updates == 6


def test_repr_tells_momentum_policy_and_updates() -> None:
    online = made()
    target = EMATarget(online, linear(0.9, 1.0, steps=5), buffers="copy")
    target.update(online)
    assert "momentum=linear(start=0.9, end=1.0, steps=5), buffers='copy', updates=1" in repr(target)


# Starting again, and the meta device.


@pytest.mark.parametrize("policy", POLICIES)
def test_reset_starts_again_as_a_copy_of_online(policy: str) -> None:
    online = made()
    online.register_buffer("unsaved", torch.zeros(2), persistent=False)
    momentum = linear(0.5, 0.9, steps=4)
    target = EMATarget(online, momentum, buffers=policy)
    target.train()(torch.randn(8, 3))  # a forward, which changes BatchNorm's statistics
    for step in range(3):
        train(online, step)
        target.update(online)
    target.reset(online)
    new = EMATarget(online, momentum, buffers=policy)
    assert_same(state_of(target), state_of(new))
    assert torch.equal(target.module.unsaved, online.unsaved)
    assert target.updates == 0
    assert target.module.head["in"].weight is target.module.head["out"].weight
    assert not storages(target) & storages(online)
    train(online, 3)
    target.update(online)
    new.update(online)
    assert_same(state_of(target), state_of(new))


RESETS = {
    "parameter": (False, (3,), r"'zlast.tensor' is \[2\] in the target and \[3\] in online"),
    "buffer": (True, (3,), r"'zlast.tensor' is \[2\] in the target and \[3\] in online"),
    "missing": (True, None, "1 tensors are missing in online: 'zlast.tensor'"),
}


@pytest.mark.parametrize(("buffer", "shape", "message"), RESETS.values(), ids=RESETS.keys())
def test_a_reset_that_does_not_fit_changes_nothing(buffer: bool, shape: Any, message: str) -> None:
    target = EMATarget(with_last((2,), buffer=buffer), momentum=0.5)
    target.update(with_last((2,), buffer=buffer, seed=1))
    before = state_of(target)
    with pytest.raises(ValueError, match=message):
        target.reset(with_last(shape, buffer=buffer, seed=2))
    with pytest.raises(ValueError, match="is the same memory"):
        target.reset(target.module)
    with pytest.raises(TypeError, match=r"online must be a torch\.nn\.Module, got dict"):
        target.reset({})
    assert_same(state_of(target), before)


def on_meta() -> tuple[nn.Module, EMATarget]:
    with torch.device("meta"):
        online = made()
        online.register_buffer("unsaved", torch.zeros(2), persistent=False)
        return online, EMATarget(online, momentum=0.5, buffers="ema")


def here(seed: int = 0) -> nn.Module:
    online = made(seed)
    online.register_buffer("unsaved", torch.ones(2), persistent=False)
    return online


def test_on_the_meta_device_it_runs_as_any_module() -> None:
    online, target = on_meta()
    target.update(online)
    assert target.updates == 1
    assert target(torch.ones(8, 3, device="meta")).shape == (8, 4)
    with pytest.raises(ValueError, match="is on meta in the target and on cpu in online"):
        target.update(here())


TO_EMPTY: dict[str, Callable[[EMATarget], Any]] = {
    "target": lambda target: target.to_empty(device="cpu"),
    "root": lambda target: nn.Sequential(target).to_empty(device="cpu"),
    "module": lambda target: target.module.to_empty(device="cpu"),
    "and a cast": lambda target: target.to_empty(device="cpu").half().float(),
}


@pytest.mark.parametrize("to_empty", TO_EMPTY.values(), ids=TO_EMPTY.keys())
def test_memory_without_values_is_never_served(to_empty: Callable[[EMATarget], Any]) -> None:
    _, target = on_meta()
    to_empty(target)
    message = r"no values in 14 tensors after to_empty: ('[\w.]+', ){5}…; call target\.reset\(online\), then load"
    for call in (lambda: target(torch.ones(8, 3)), lambda: target.update(here())):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert target.updates == 0
    online = here()
    target.reset(online)
    assert torch.equal(target.eval()(torch.ones(8, 3)), online.eval()(torch.ones(8, 3)))
    train(online, 1)
    target.update(online)
    assert target.updates == 1


@pytest.mark.parametrize("over_meta", [False, True])
def test_values_given_up_by_to_empty_are_gone_too(over_meta: bool) -> None:
    target = EMATarget(here(), buffers="ema")
    target.update(here(1))
    if over_meta:
        target.to("meta").module.to_empty(device="cpu")
    else:
        target.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"no values in 14 tensors"):
        target(torch.ones(8, 3))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_gives_values_to_what_came_from_meta(assign: bool) -> None:
    trained = EMATarget(here(), momentum=0.5, buffers="ema")
    for seed in (1, 2):
        trained.update(here(seed))
    _, target = on_meta()
    if not assign:
        target.to_empty(device="cpu")
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    target.load_state_dict(state, assign=assign)
    if not assign:
        with pytest.raises(RuntimeError, match=r"no values in 1 tensors after to_empty: 'unsaved'"):
            target(torch.ones(8, 3))
        target.reset(here())
        target.load_state_dict(trained.state_dict())
    else:
        target.module.unsaved = torch.ones(2).clone().fill_(1)
    assert target.updates == 2
    assert torch.equal(target.eval()(torch.ones(8, 3)), trained.eval()(torch.ones(8, 3)))
    for one in (target, trained):
        one.update(here(3))
    assert_same(state_of(target), state_of(trained))


def test_values_may_be_written_without_a_state() -> None:
    _, target = on_meta()
    target.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*target.module.parameters(), *target.module.buffers()):
            tensor.fill_(1)
    assert target.eval()(torch.ones(8, 3)).isfinite().all()


# Forwards that run again, or are compiled.


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_update_that_activation_checkpointing_runs_again_is_refused(reentrant: bool) -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)

    def step(x: Tensor) -> Tensor:
        target.update(online)
        return online(x)

    x = torch.randn(8, 3, requires_grad=True)
    train(online, 1)
    loss = checkpoint(step, x, use_reentrant=reentrant).sum()
    before = state_of(target)
    with pytest.raises(
        RuntimeError, match=r"EMATarget\.update ran twice for one batch.*outside of torch\.utils\.check"
    ):
        loss.backward()
    assert_same(state_of(target), before)
    assert target.updates == 1


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_updates_beside_checkpointing_and_in_hooks_of_a_backward_are_welcome(reentrant: bool | None) -> None:
    online = made()
    target, in_hook = EMATarget(online, momentum=0.5), EMATarget(online, momentum=0.5)
    online.scalar.register_post_accumulate_grad_hook(lambda _: in_hook.update(online))
    for step in range(3):
        train(online, step)
        x = torch.randn(8, 3, requires_grad=True)
        out = online(x) if reentrant is None else checkpoint(online, x, use_reentrant=reentrant)
        target.update(online)
        out.sum().backward()
    assert target.updates == in_hook.updates == 3
    assert_same(parameters_of(target.module), parameters_of(in_hook.module))


class InForward(nn.Module):
    """An encoder and its target, updated in the forward as MoCo does."""

    def __init__(self, dtype: torch.dtype, momentum: Any, policy: str) -> None:
        super().__init__()
        self.online = made().to(dtype)
        self.target = EMATarget(self.online, momentum, buffers=policy)

    def forward(self, x: Tensor) -> Tensor:
        self.target.update(self.online)
        return (self.online(x) - self.target(x)).float().pow(2).mean()


def losses_of(model: InForward, forward: Callable[[Tensor], Tensor], steps: int = 12) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.online.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        losses.append(forward(x.to(model.online.scalar.dtype)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    ("dtype", "policy", "graphs"),
    [(torch.float32, "keep", 1), (torch.float32, "copy", 1), (torch.bfloat16, "ema", 2)],
    ids=str,
)
def test_a_forward_with_an_update_compiles_whole_and_stays_so(dtype: torch.dtype, policy: str, graphs: int) -> None:
    torch._dynamo.reset()
    plain, traced = InForward(dtype, 0.9, policy), InForward(dtype, 0.9, policy)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    for ours, theirs in zip(losses_of(traced, compiled), losses_of(plain, plain), strict=True):
        assert torch.equal(ours, theirs)
    assert counter.frame_count == graphs  # in half precision, the first step creates the float32 values
    assert traced.target.updates == 12
    assert_same(state_of(traced), state_of(plain))


def test_a_schedule_breaks_the_graph_and_is_compiled_once() -> None:
    torch._dynamo.reset()
    plain, traced = (InForward(torch.float32, cosine(0.5, 1.0, steps=8), "ema") for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, backend=counter)
    for ours, theirs in zip(losses_of(traced, compiled), losses_of(plain, plain), strict=True):
        assert torch.equal(ours, theirs)
    assert 1 <= counter.frame_count <= 2
    assert traced.target.updates == 12
    assert_same(state_of(traced), state_of(plain))


def test_updates_can_be_set() -> None:
    target = EMATarget(made(), linear(0.0, 1.0, steps=10))
    target.updates = 10
    assert target.updates == 10
    assert type(target.updates) is int
    before = parameters_of(target.module)
    target.update(made(1))
    assert_same(parameters_of(target.module), before)
    state = target.state_dict()
    target.update(made(1))
    assert state["_extra_state"] == 11


def test_tied_parameters_that_a_state_has_assigned_move_once() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)
    target.load_state_dict(copy.deepcopy(target.state_dict()), assign=True)
    before = target.module.head["in"].weight.detach().clone()
    train(online, 1)
    target.update(online)
    for name in ("in", "out"):
        expected = (before + online.head[name].weight.detach()) / 2
        torch.testing.assert_close(target.module.head[name].weight.detach(), expected)


# Errors name what is wrong, and nothing moves.


def with_last(
    shape: tuple[int, ...] | None = (2,), device: str = "cpu", *, buffer: bool = False, seed: int = 0
) -> nn.Module:
    """An encoder with one more tensor, after all the others."""
    online = made(seed)
    online.zlast = nn.Module()
    tensor = None if shape is None else torch.zeros(shape, device=device)
    if buffer:
        online.zlast.register_buffer("tensor", tensor)
    else:
        online.zlast.register_parameter("tensor", None if tensor is None else nn.Parameter(tensor))
    return online


MISMATCHES = {
    "missing in online": ((2,), {"shape": None}, "1 tensors are missing in online: 'zlast.tensor'"),
    "missing in the target": (None, {}, "1 tensors are missing in the target: 'zlast.tensor'"),
    "shape": ((2,), {"shape": (3,)}, r"'zlast.tensor' is \[2\] in the target and \[3\] in online"),
    "shape that broadcasts": ((2,), {"shape": (1,)}, r"'zlast.tensor' is \[2\] .* \[1\]"),
    "scalar": ((1,), {"shape": ()}, r"'zlast.tensor' is \[1\] .* \[\]"),
    "device": ((2,), {"device": "meta"}, "'zlast.tensor' is on cpu in the target and on meta in online"),
}


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize(("ours", "theirs", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_a_mismatch_in_the_last_tensor_names_it_and_moves_nothing(
    ours: Any, theirs: dict[str, Any], message: str, buffer: bool
) -> None:
    target = EMATarget(with_last(ours, buffer=buffer), momentum=0.5, buffers="ema")
    before = state_of(target)
    online = with_last(**theirs, buffer=buffer, seed=1)
    with pytest.raises(ValueError, match=message):
        target.update(online)
    assert_same(state_of(target), before)
    assert target.updates == 0


def test_kept_buffers_are_not_compared() -> None:
    target = EMATarget(with_last((2,), buffer=True), momentum=0.5)
    target.update(with_last((3,), buffer=True))
    assert target.updates == 1


def test_many_missing_tensors_are_counted_and_five_of_them_named() -> None:
    target = EMATarget(made())
    with pytest.raises(ValueError, match=r"9 tensors are missing in online: ('[\w.]+', ){4}'[\w.]+', …"):
        target.update(nn.Identity())


def test_an_online_that_is_the_targets_own_module_is_refused() -> None:
    target = EMATarget(made(), momentum=0.5)
    before = state_of(target)
    with pytest.raises(ValueError, match=r"'\w[\w.]*' is the same memory in the target and in online"):
        target.update(target.module)
    assert_same(state_of(target), before)


def test_one_shared_tensor_is_refused_by_its_name() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)
    before = state_of(target)
    online.head["out"].bias = target.module.head["out"].bias
    train(online.backbone, 1)
    with pytest.raises(ValueError, match=r"'head\.out\.bias' is the same memory"):
        target.update(online)
    assert_same(state_of(target), before)


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan")])
def test_a_schedule_out_of_range_is_refused_before_anything_moves(bad: float) -> None:
    online = made()
    target = EMATarget(online, lambda step: bad if step else 0.5)
    target.update(online)
    train(online, 1)
    before = state_of(target)
    with pytest.raises(ValueError, match=f"momentum must be between 0 and 1, got {bad}"):
        target.update(online)
    assert_same(state_of(target), before)
    assert target.updates == 1


CONSTRUCTION = {
    "momentum above 1": ({"momentum": 1.01}, ValueError, "momentum must be between 0 and 1, got 1.01"),
    "momentum below 0": ({"momentum": -1}, ValueError, "momentum must be between 0 and 1, got -1"),
    "momentum nan": ({"momentum": float("nan")}, ValueError, "momentum must be between 0 and 1, got nan"),
    "momentum text": ({"momentum": "0.9"}, TypeError, "momentum must be .* got '0.9'"),
    "momentum None": ({"momentum": None}, TypeError, "momentum must be .* got None"),
    "momentum bool": ({"momentum": True}, TypeError, "momentum must be .* got True"),
    "policy": ({"buffers": "mean"}, ValueError, "buffers must be one of keep, copy, ema, got 'mean'"),
    "policy None": ({"buffers": None}, ValueError, "buffers must be one of .* got None"),
    "online": ({"online": {"weight": 1}}, TypeError, "online must be a torch.nn.Module, got dict"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION.keys())
def test_a_target_that_makes_no_sense_is_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EMATarget(**{"online": nn.Linear(2, 2), **arguments})


@pytest.mark.parametrize("value", [None, "fast", True])
def test_a_schedule_that_gives_no_number_is_a_type_error_and_nothing_moves(value: object) -> None:
    target = EMATarget(nn.Linear(2, 2), momentum=lambda step: value)
    before = state_of(target)
    with pytest.raises(TypeError, match="momentum must be a number or a schedule"):
        target.update(nn.Linear(2, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(target).items())
    assert target.updates == 0
