"""EMATarget on CUDA: the formula, no waiting for the device, and errors when devices are mixed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from msf_core import EMATarget
from msf_core.schedules import cosine

pytestmark = pytest.mark.gpu

POLICIES = ("keep", "copy", "ema")
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 4e-2, "atol": 2e-2},
}


def made(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    online = nn.Sequential(nn.Linear(3, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 33), nn.Linear(33, 33))
    online[4].weight = online[3].weight  # tied
    return online


@torch.no_grad()
def train(online: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for tensor in (*online.parameters(), *online.buffers()):
        tensor.add_(torch.randn_like(tensor).abs() if tensor.is_floating_point() else 1)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_update_is_the_formula(dtype: torch.dtype, policy: str) -> None:
    online = made().to("cuda", dtype)
    momentum = cosine(0.5, 1.0, steps=4)
    target = EMATarget(online, momentum, buffers=policy)
    expected = {name: tensor.double() for name, tensor in state_of(online).items()}
    buffers = {name for name, _ in online.named_buffers()}
    for step in range(5):
        train(online, step)
        target.update(online)
        m = momentum(step)
        for name, g in state_of(online).items():
            if name not in buffers or (policy == "ema" and g.is_floating_point()):
                expected[name] = m * expected[name] + (1 - m) * g.double()
            elif policy != "keep":
                expected[name] = g.double()
        for name, f in state_of(target.module).items():
            assert f.is_cuda
            torch.testing.assert_close(f.double(), expected[name], **TOLERANCE[dtype])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_are_exact(momentum: float) -> None:
    online = made().cuda()
    target = EMATarget(online, momentum, buffers="ema")
    before = state_of(target.module)
    train(online, 1)
    target.update(online)
    expected = before if momentum == 1 else online.state_dict()
    for name, f in target.module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(f, expected[name]), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("half", ["neither", "online", "both"])
def test_update_does_not_wait_for_the_device(policy: str, half: str) -> None:
    online = made().cuda()
    if half == "both":
        online = online.bfloat16()
    target = EMATarget(online, cosine(0.5, 1.0, steps=4), buffers=policy)
    if half == "online":
        online = online.bfloat16()
    target.update(online)  # warm-up
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            target.update(online)
        with pytest.raises(RuntimeError, match="synchroniz"):  # waiting is detected
            next(online.parameters()).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert target.updates == 4


def test_target_and_online_on_different_devices_are_refused_by_name() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5)
    there = copy.deepcopy(online).cuda()
    before = state_of(target)
    train(there, 1)
    with pytest.raises(ValueError, match=r"'0\.weight' is on cpu in the target and on cuda:0 in online"):
        target.update(there)
    with pytest.raises(ValueError, match=r"'0\.weight' is on cuda:0 in the target and on cpu in online"):
        EMATarget(there).update(online)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert target.updates == 0


def test_a_target_moved_after_it_was_made_follows_there() -> None:
    online = made()
    target = EMATarget(online, momentum=0.5).cuda()
    online = online.cuda()
    before = state_of(target.module)
    train(online, 1)
    target.update(online)
    torch.testing.assert_close(target.module[0].weight, (before["0.weight"] + online[0].weight.detach()) / 2)
    assert target.module[3].weight is target.module[4].weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_half_precision_arrives_and_follows_to_the_device(dtype: torch.dtype) -> None:
    online = made().to(dtype)
    target = EMATarget(online, momentum=0.99)
    train(online, 1)
    target.update(online)
    target.cuda()
    online = online.cuda()
    assert all(master.is_cuda and master.dtype == torch.float32 for master in target.masters.buffers())
    for _ in range(2000):
        target.update(online)
    for f, g in zip(target.module.parameters(), online.parameters(), strict=True):
        assert torch.equal(f, g)


def launches(dtype: torch.dtype, layers: int) -> int:
    online = nn.Sequential(*(nn.Conv2d(3, 4, 3) for _ in range(layers))).to("cuda", dtype)
    target = EMATarget(online.to(memory_format=torch.channels_last), momentum=0.9)
    target.update(online)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        target.update(online)
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if event.key.startswith("cudaLaunchKernel"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_times_the_tensors_take_hardly_more_launches(dtype: torch.dtype) -> None:
    assert 0 < launches(dtype, 20) <= launches(dtype, 2) + 8
