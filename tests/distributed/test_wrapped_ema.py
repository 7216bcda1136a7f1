"""EMATarget with an online encoder in DDP, torch.compile, both, or FSDP2, compared with an unwrapped one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from msf_core import EMATarget
from msf_core.schedules import cosine


def encoder() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5)), nn.Linear(5, 3))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def ddp_of_compiled(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(compiled(module))


def compiled_ddp(module: nn.Module) -> nn.Module:
    return compiled(DistributedDataParallel(module))


def sharded(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in list(module)[:-1]:  # the last part's parameters stay gathered after a forward of the whole module
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def train(wrap: Callable[[nn.Module], nn.Module], fsdp: bool, wrapped_first: bool) -> list[torch.Tensor]:
    """Train on this rank's images; return the target's output after each step, then its parameters."""
    torch._dynamo.reset()
    online = encoder()
    target = EMATarget(wrap(online) if wrapped_first else online, cosine(0.5, 0.9, steps=4))
    if fsdp:
        sharded(target.module)
        target.module(torch.zeros(2, 6))  # which leaves gathered parameters behind
    wrapped = wrap(online)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3)
    outputs = []
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        share = x if wrap in (plain, compiled) else x.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        (wrapped(share) - target(share)).pow(2).add(wrapped(share)).mean().backward()
        optimizer.step()
        target.update(wrapped)
        outputs.append(target(x))
    state = [f.full_tensor() if hasattr(f, "full_tensor") else f for f in target.module.parameters()]
    assert target.updates == 4
    return [*outputs, *state]


def plain(module: nn.Module) -> nn.Module:
    return module


def equals_unwrapped(rank: int, wrap: Callable[[nn.Module], nn.Module], fsdp: bool, wrapped_first: bool) -> None:
    expected = train(plain, False, False)
    for value, other in zip(train(wrap, fsdp, wrapped_first), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    start = [parameter.clone() for parameter in encoder().parameters()]
    assert not torch.allclose(expected[4], start[0], atol=1e-3)


@pytest.mark.parametrize("wrapped_first", [False, True], ids=["made before", "made after"])
@pytest.mark.parametrize(
    "wrap", [DistributedDataParallel, compiled, ddp_of_compiled, compiled_ddp], ids=lambda wrap: wrap.__name__
)
def test_a_wrapped_online_encoder_gives_the_target_of_a_bare_one(
    two_ranks: Any, wrap: Callable[[nn.Module], nn.Module], wrapped_first: bool
) -> None:
    two_ranks.run(equals_unwrapped, wrap, False, wrapped_first)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"FSDP2 of PyTorch {torch.__version__} does not run on CPUs"
)
def test_fsdp2_on_both_sides_gives_the_target_of_a_bare_one(two_ranks: Any) -> None:
    two_ranks.run(equals_unwrapped, sharded, True, False)


def sharded_wrongly(rank: int) -> None:
    online = encoder()
    target = EMATarget(online)
    before = [parameter.clone() for parameter in target.parameters()]
    sharded(online)
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded differently"):
        target.update(online)
    assert all(torch.equal(one, other) for one, other in zip(before, target.parameters(), strict=True))
    assert target.updates == 0
    with pytest.raises(ValueError, match="create the EMATarget first"):
        EMATarget(online)


def test_what_is_sharded_on_one_side_alone_is_refused(two_ranks: Any) -> None:
    two_ranks.run(sharded_wrongly)
