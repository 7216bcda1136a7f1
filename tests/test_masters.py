"""The average of a half-precision encoder: kept in float32, saved, and dropped where someone changes weights."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from msf_core import EMATarget, masters
from msf_core.schedules import cosine

HALVES = (torch.bfloat16, torch.float16)
POLICIES = ("keep", "copy", "ema")
VIEWS = ("detach", "permute", "view", "split_with_sizes", "alias")


def made(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """Layouts of all kinds, BatchNorm, a scalar, an empty and a tied tensor."""
    torch.manual_seed(seed)
    online = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    online.scalar, online.empty = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(0, 3))
    online.turned = nn.Parameter(torch.randn(5, 3).T)
    online[3].weight = online[2].weight
    online[1].running_mean.normal_()
    return online.to(dtype).to(memory_format=torch.channels_last)


@torch.no_grad()
def train(online: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*online.parameters(), *online.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
        else:
            tensor.add_(1)


def state_of(target: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in target.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def masters_of(target: EMATarget) -> dict[str, Tensor]:
    return {name.replace("/", "."): master for name, master in target.masters.values.items()}


def values(target: EMATarget) -> dict[str, Tensor]:
    return {name: f.detach() for name, f in (*target.module.named_parameters(), *target.module.named_buffers())}


# The average reaches the online values.


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn, torch.complex32], ids=str)
@pytest.mark.parametrize("online_too", [True, False], ids=["online too", "online in float32"])
def test_the_average_arrives(dtype: torch.dtype, online_too: bool) -> None:
    wide = torch.complex64 if dtype.is_complex else torch.float32
    end = torch.full((3, 2), 1 + 2j if dtype.is_complex else 1.0, dtype=wide)
    target = EMATarget(nn.ParameterList([torch.zeros(3, 2, dtype=wide).to(dtype)]), momentum=0.99)
    online = nn.ParameterList([end.to(dtype) if online_too else end])
    for _ in range(100):
        target.update(online)
    torch.testing.assert_close(masters_of(target)["0"], end * (1 - 0.99**100), rtol=1e-5, atol=1e-6)
    assert torch.equal(target.module[0].to(wide), masters_of(target)["0"].to(dtype).to(wide))
    for _ in range(1900):
        target.update(online)
    assert torch.equal(target.module[0].to(wide), end)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_step_is_the_formula_in_float32(dtype: torch.dtype, policy: str) -> None:
    online = made(dtype)
    momentum = cosine(0.5, 1.0, steps=4)
    target = EMATarget(online, momentum, buffers=policy)
    expected = {name: f.double() for name, f in values(target).items()}
    parameters = {name for name, _ in online.named_parameters()}
    averaged = parameters | ({"1.running_mean", "1.running_var"} if policy == "ema" else set())
    for step in range(6):
        train(online, step)
        target.update(online)
        m = momentum(step)
        theirs = dict((*online.named_parameters(), *online.named_buffers()))
        for name in averaged:
            expected[name] = m * expected[name] + (1 - m) * theirs[name].detach().double()
        found = masters_of(target)
        assert found.keys() == averaged
        for name, master in found.items():
            assert master.dtype == torch.float32
            torch.testing.assert_close(master.double(), expected[name], rtol=1e-5, atol=1e-6)
            assert values(target)[name].dtype == dtype
            assert torch.equal(values(target)[name], master.to(dtype)), name
    assert target.module[3].weight is target.module[2].weight
    assert target.module[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_is_averaged_together_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    online = nn.Sequential(made(torch.bfloat16), made(torch.float16), made(torch.float32))
    targets = []
    for most in (1 << 20, 20, 1):
        monkeypatch.setattr(masters, "CHUNK", {"else": most})
        targets.append(EMATarget(online, momentum=0.9))
    for step in range(3):
        train(online, step)
        for target, most in zip(targets, (1 << 20, 20, 1), strict=True):
            monkeypatch.setattr(masters, "CHUNK", {"else": most})
            target.update(online)
    for target in targets[1:]:
        for name, value in state_of(target).items():
            torch.testing.assert_close(value, targets[0].state_dict()[name], rtol=1e-6, atol=1e-7)


def test_online_may_be_laid_out_otherwise() -> None:
    one, other = made(), made().to(memory_format=torch.contiguous_format)
    assert one[0].weight.stride() != other[0].weight.stride()
    targets = [EMATarget(one, momentum=0.9), EMATarget(one, momentum=0.9)]
    for online, target in zip((one, other), targets, strict=True):
        train(online, 1)
        target.update(online)
    assert_same(state_of(targets[0]), state_of(targets[1]))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_momentum_0_and_1_are_exact(dtype: torch.dtype) -> None:
    online = made(dtype)
    still = EMATarget(online, momentum=1.0)
    before = {name: f.clone() for name, f in values(still).items()}
    train(online, 1)
    still.update(online)
    assert_same(values(still), before)
    assert not masters_of(still)
    copied = EMATarget(made(dtype), momentum=0.0, buffers="ema")
    wide = copy.deepcopy(online).float()
    train(wide, 2)
    copied.update(wide)
    theirs = dict((*wide.named_parameters(), *wide.named_buffers()))
    assert_same(values(copied), {name: theirs[name].to(f.dtype) for name, f in values(copied).items()})
    for name, master in masters_of(copied).items():
        assert torch.equal(master, theirs[name]), name


# Other dtypes pay nothing, and the host starts few kernels.


class Started(TorchDispatchMode):
    """Records the operations that read or write values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def started(dtype: torch.dtype, layers: int) -> list[str]:
    online = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 3)) for _ in range(layers))).to(dtype)
    target = EMATarget(online.to(memory_format=torch.channels_last), momentum=0.9)
    target.update(online)
    with Started() as seen:
        target.update(online)
    return seen.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_float32_model_has_no_masters_and_takes_one_call_as_ever(dtype: torch.dtype) -> None:
    assert started(dtype, 9) == ["_foreach_lerp_", "add_"]
    online = made(dtype)
    target = EMATarget(online, momentum=0.9, buffers="ema")
    target.update(online)
    assert not target.masters
    expected = {"_extra_state", *(f"module.{name}" for name in online.state_dict())}
    assert target.state_dict().keys() == expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_more_tensors_of_half_precision_take_no_more_calls(dtype: torch.dtype) -> None:
    assert started(dtype, 40) == started(dtype, 2)
    assert len(started(dtype, 2)) < 16


# Weights that someone else has changed.


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "data", "assign", "new tensor"])
def test_weights_that_somebody_loads_win(dtype: torch.dtype, how: str) -> None:
    online = made(dtype)
    target = EMATarget(online, momentum=0.75)
    for step in range(3):
        train(online, step)
        target.update(online)
    new = made(dtype, seed=9)
    if how in ("load_state_dict", "assign"):
        target.module.load_state_dict(new.state_dict(), assign=how == "assign")
    for f, value in zip(target.module.parameters(), new.parameters(), strict=how != "assign"):
        if how == "copy_":
            f.copy_(value.detach())
        elif how == "data":
            f.data.copy_(value.data)
        elif how == "new tensor":
            f.data = value.data.clone()
    new = copy.deepcopy(new)  # the target may use its memory now
    train(online, 4)
    target.update(online)
    for name, value in new.named_parameters():
        expected = value.detach().float().lerp(dict(online.named_parameters())[name].detach().float(), 0.25)
        torch.testing.assert_close(masters_of(target)[name], expected, rtol=1e-6, atol=1e-7)


def test_only_the_values_that_changed_start_again() -> None:
    online = nn.ParameterList([torch.zeros(4).bfloat16()])
    target = EMATarget(online, momentum=0.99)
    with torch.no_grad():
        online[0].fill_(1.0)
    for _ in range(3):
        target.update(online)
    target.module[0][1] = 7.0
    target.update(online)
    found = masters_of(target)["0"]
    torch.testing.assert_close(found[[0, 2, 3]], torch.full((3,), 1 - 0.99**4))
    torch.testing.assert_close(found[1], torch.tensor(0.99 * 7 + 0.01))


def test_an_overflow_of_float16_passes_and_a_nan_can_be_mended() -> None:
    target = EMATarget(nn.ParameterList([torch.tensor([60_000.0, 1.0, 1.0, 1.0]).half()]), momentum=0.5)
    online = nn.ParameterList([torch.tensor([90_000.0, 1.0, torch.nan, torch.inf])])
    target.update(online)
    target.update(online)
    assert target.module[0].isfinite().tolist() == [False, True, False, False]
    assert masters_of(target)["0"][0] == 82_500
    assert target.module[0][2].isnan()
    target.module[0][2:] = 1.0
    with torch.no_grad():
        online[0].copy_(torch.tensor([2_500.0, 1.0, 1.0, 1.0]))
    target.update(online)
    assert target.module[0].tolist() == [42_500 // 32 * 32, 1.0, 1.0, 1.0]  # float16 has steps of 32 there


# The state.


def saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_saved_in_the_middle_and_loaded_it_goes_on_bit_equal(dtype: torch.dtype, policy: str, assign: bool) -> None:
    online = made(dtype)
    target = EMATarget(online, 0.99, buffers=policy)
    for step in range(3):
        train(online, step)
        target.update(online)
    state = saved(target.state_dict())
    resumed = EMATarget(made(dtype, seed=9), 0.99, buffers=policy)
    resumed.update(made(dtype, seed=8))  # it has masters of its own
    resumed.load_state_dict(state, strict=True, assign=assign)
    for step in range(3, 6):
        train(online, step)
        target.update(online)
        resumed.update(online)
        assert_same(state_of(resumed), state_of(target))
    assert not {f.data_ptr() for f in masters_of(resumed).values() if f.numel()} & {
        f.data_ptr() for f in masters_of(target).values()
    }


def test_a_state_loaded_from_another_target_shares_no_memory() -> None:
    targets = [EMATarget(made(), momentum=0.9), EMATarget(made(seed=1), momentum=0.9)]
    targets[0].update(made(seed=2))
    targets[1].load_state_dict(targets[0].state_dict())
    before = state_of(targets[1])
    targets[0].update(made(seed=3))
    assert_same(state_of(targets[1]), before)


def test_a_target_has_a_place_for_masters_in_its_state_from_the_start() -> None:
    target = EMATarget(made(), buffers="ema")
    names = {name for name, f in values(target).items() if f.is_floating_point()}
    assert masters_of(target).keys() == set()
    found = {name.removeprefix("masters.") for name in target.state_dict() if name.startswith("masters.")}
    assert found == {name.replace(".", "/") for name in names}


def without_masters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("masters.")}


@pytest.mark.parametrize("nested", [False, True])
def test_states_with_and_without_masters_load_strictly_into_any_target(nested: bool) -> None:
    def wrapped(target: EMATarget) -> nn.Module:
        return nn.ModuleDict({"target": target}) if nested else target

    half, whole = EMATarget(made(), momentum=0.9), EMATarget(made(torch.float32), momentum=0.9)
    for target in (half, whole):
        target.update(made(seed=3))
    old = {name: value for name, value in wrapped(half).state_dict().items() if "masters." not in name}
    for state in (wrapped(half).state_dict(), wrapped(whole).state_dict(), old):
        for dtype in (torch.bfloat16, torch.float32):
            target = EMATarget(made(dtype, seed=5), momentum=0.9)
            target.update(made(seed=6))
            wrapped(target).load_state_dict(copy.deepcopy(state), strict=True)
            assert target.updates == 1
            start = {name: f.float().clone() for name, f in target.module.named_parameters()}
            if dtype == torch.bfloat16 and any("masters." in name for name in state):
                start = {name: f.clone() for name, f in masters_of(target).items()}
                assert start.keys() == masters_of(half).keys()
            online = made(seed=7)
            target.update(online)
            found = dict(target.module.named_parameters()) if dtype == torch.float32 else masters_of(target)
            for name, value in found.items():
                expected = start[name].lerp(dict(online.named_parameters())[name].detach().float(), 0.1)
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            assert bool(masters_of(target)) is (dtype == torch.bfloat16)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda module: module.to("cpu", torch.float16),
    "root": lambda module: nn.Sequential(module).half()[0],
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_masters_are_never_cast(cast: Callable[[nn.Module], nn.Module]) -> None:
    target = EMATarget(made(), momentum=0.99)
    train(online := made(), 1)
    target.update(online)
    before = {name: master.clone() for name, master in masters_of(target).items()}
    target = cast(target)
    assert_same(masters_of(target), before)
    target.update(online)
    for name, master in masters_of(target).items():  # a cast from bfloat16 to float16 may have rounded
        expected = before[name].lerp(dict(online.named_parameters())[name].detach().float(), 0.01)
        torch.testing.assert_close(master, expected, rtol=1e-2, atol=1e-3)
    assert bool(masters_of(target)) is (target.module.scalar.dtype != torch.float64)


def test_masters_follow_to_other_devices() -> None:
    target = EMATarget(made(), momentum=0.99)
    target.update(made(seed=1))
    count = len(masters_of(target))
    target.to("meta")
    assert all(master.is_meta for master in masters_of(target).values())
    assert len(masters_of(target)) == count > 0
    target.to_empty(device="cpu")
    assert all(master.device.type == "cpu" for master in masters_of(target).values())


def test_reset_forgets_the_masters() -> None:
    target = EMATarget(made(), momentum=0.99)
    target.update(made(seed=1))
    target.reset(made(seed=2))
    assert not masters_of(target)
    assert_same(values(target), values(EMATarget(made(seed=2))))
