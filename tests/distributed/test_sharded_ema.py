"""EMATarget with FSDP2 applied to various modules, and updated inside the forward or after the step.

Everything is compared with one process without FSDP2.
"""

import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import Processes, Workers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from msf_core import EMATarget
from msf_core.schedules import cosine

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"FSDP2 of PyTorch {torch.__version__} does not run on CPUs"
)

STEPS = 3
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 4e-2, "atol": 2e-2}}


@pytest.fixture(scope="session", params=[1, 2], ids=["1 rank", "2 ranks"])
def one_or_two(request: pytest.FixtureRequest, workers: Workers) -> Processes:
    return Processes(request.param, workers)


class Model(nn.Module):
    """Encoder and target in one module, as in MoCo and the authors' code; ``when`` says when the target is updated."""

    def __init__(self, when: str, dtype: torch.dtype = torch.float32, momentum: Any = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.when = when
        self.encoder = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5)))
        self.encoder.append(nn.Linear(5, 5))
        if when == "tied":
            self.encoder.append(nn.Linear(5, 5, bias=False))
            self.encoder[4].weight = self.encoder[3].weight
        self.encoder.to(dtype)
        self.target = EMATarget(self.encoder, cosine(0.5, 0.9, steps=4) if momentum is None else momentum)
        if when == "backward":
            self.encoder[2].register_full_backward_hook(lambda *_: self.target.update(self.encoder))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.when == "first":
            self.target.update(self.encoder)
        v = self.encoder(x)
        if self.when == "between":
            self.target.update(self.encoder)
        u = self.target(x)
        if self.when == "last":
            self.target.update(self.encoder)
        return (v - u).pow(2).add(v).float().mean(), u.detach()


def not_at_all(model: Model, **options: Any) -> None:
    pass


def the_root(model: Model, **options: Any) -> None:
    fully_shard(model, **options)


def a_root_that_frees(model: Model, **options: Any) -> None:
    fully_shard(model, reshard_after_forward=True, **options)


def the_target(model: Model, **options: Any) -> None:
    fully_shard(model.encoder, **options)
    fully_shard(model.target, **options)


def its_module(model: Model, **options: Any) -> None:
    fully_shard(model.encoder, **options)
    fully_shard(model.target.module, **options)


def everything(model: Model, **options: Any) -> None:
    for encoder in (model.encoder, model.target.module):
        fully_shard(encoder[2], **options)
        fully_shard(encoder, **options)
    fully_shard(model.target, **options)
    fully_shard(model, **options)


def the_encoder_and_the_root(model: Model, **options: Any) -> None:
    fully_shard(model.encoder, **options)
    fully_shard(model, **options)


Shard = Callable[..., None]
SHARDS: list[Shard] = [the_root, a_root_that_frees, the_target, its_module, everything, the_encoder_and_the_root]


def sharded(model: Model, shard: Shard, **options: Any) -> Model:
    shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    return model


def steps_of(model: Model, first: int = 0, steps: int = STEPS) -> list[Tensor]:
    """Return, for each step, the mean loss over all ranks and the outputs of the target."""
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    found = []
    apart = any(hasattr(parameter, "placements") for parameter in model.parameters())
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if apart else (1, 0)
    for step in range(first, first + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(model.encoder[0].weight.dtype)
        loss, u = model(x.chunk(ranks)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.when in ("after", "tied"):
            model.target.update(model.encoder)
        losses = [loss.detach().clone() for _ in range(ranks)]
        parts = [u.clone() for _ in range(ranks)]
        if apart:
            dist.all_gather(losses, loss.detach())
            dist.all_gather(parts, u.contiguous())
        found += [torch.stack(losses).mean(), torch.cat(parts)]
    return found


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: (f.full_tensor() if hasattr(f, "full_tensor") else f).clone() for name, f in state.items()}


def equals_unsharded(rank: int, shard: Shard, when: str, dtype: torch.dtype) -> None:
    plain, model = Model(when, dtype), sharded(Model(when, dtype), shard)
    start = whole(plain.target.module)
    for value, expected in zip(steps_of(model), steps_of(plain), strict=True):
        torch.testing.assert_close(value, expected, **TOLERANCE[dtype])
    assert model.target.updates == STEPS
    ours, theirs = whole(model), whole(plain)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        if dist.get_world_size() == 1:  # the same sums in the same order
            assert torch.equal(ours[name], expected), name
        torch.testing.assert_close(ours[name], expected, **TOLERANCE[dtype])
    assert not torch.allclose(whole(model.target.module)["3.bias"], start["3.bias"], atol=1e-2)


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: shard.__name__)
def test_sharded_anywhere_the_target_moves_as_unsharded(one_or_two: Processes, shard: Shard) -> None:
    one_or_two.run(all_equal_unsharded, shard)


def all_equal_unsharded(rank: int, shard: Shard) -> None:
    for when in ("first", "between", "last", "backward", "after"):
        equals_unsharded(rank, shard, when, torch.float32)
    equals_unsharded(rank, shard, "between", torch.bfloat16)
    if shard is the_root:
        equals_unsharded(rank, shard, "tied", torch.float32)


def shards_are_averaged_and_not_their_copies(rank: int) -> None:
    """With mixed precision, the gathered copies are in bfloat16 and the shards in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    models = [sharded(Model(when, momentum=0.999), the_root, mp_policy=policy) for when in ("last", "never")]
    start = whole(models[0])
    for model in models:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.mul_(1.01)
        model(x)[0].backward()
    models[1].target.update(models[1].encoder)
    for name, value in whole(models[0]).items():
        assert torch.equal(value, whole(models[1])[name])
        if name.startswith("target.module."):
            online = start[name.removeprefix("target.module.").join(["encoder.", ""])] * 1.01
            torch.testing.assert_close(value, 0.999 * start[name] + 0.001 * online, rtol=1e-6, atol=1e-7)


def errors_leave_the_forward_as_it_was(rank: int) -> None:
    model = sharded(Model("never"), the_root)
    other = nn.Linear(6, 7)
    caught: list[str] = []

    def hook(module: nn.Module, arguments: Any) -> None:
        try:
            model.target.update(other)
        except ValueError as error:
            caught.append(str(error))

    model.encoder[3].register_forward_pre_hook(hook)
    found, expected = steps_of(model), steps_of(Model("never"))
    for value, other_value in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other_value)
    assert len(caught) == STEPS
    assert "tensors are missing in online" in caught[0]


def reset_inside_a_forward(rank: int) -> None:
    model, plain = sharded(Model("never"), the_root), Model("never")
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *plain.encoder.parameters()):
            parameter.mul_(1.5)
    model.encoder[3].register_forward_pre_hook(lambda *_: model.target.reset(model.encoder))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    _, u = model(x)
    torch.testing.assert_close(u, plain.encoder(x).detach())
    for name, value in whole(model.encoder).items():
        assert torch.equal(whole(model.target.module)[name], value)


def what_is_gathered_ahead_is_gathered_again(rank: int) -> None:
    model, plain = sharded(Model("never"), its_module), Model("never")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        for one in (model, plain):
            with torch.no_grad():
                for parameter in one.encoder.parameters():
                    parameter.mul_(1.5)
            if one is model:
                model.target.module.unshard(async_op=True)
            one.target.update(one.encoder)
        torch.testing.assert_close(model.target(x), plain.target(x))


def fsdp1_is_refused(rank: int) -> None:
    online = nn.Sequential(nn.Linear(3, 3))
    target = EMATarget(online)
    wrapped = FullyShardedDataParallel(online, device_id=torch.device("cpu"))
    for call in (target.update, target.reset, EMATarget):
        with pytest.raises(ValueError, match=r"FSDP2 \(fully_shard\), but not with FullyShardedDataParallel"):
            call(wrapped)


def came_from_meta(rank: int) -> None:
    with torch.device("meta"):
        model = Model("last")
    sharded(model, the_root)
    model.to_empty(device="cpu")
    values = whole(Model("last").encoder)
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            parameter.copy_(torch.distributed.tensor.distribute_tensor(values[name], parameter.device_mesh))
    with pytest.raises(RuntimeError, match=r"no values in 8 tensors .*call target\.reset"):
        model(torch.ones(2, 6))
    for part in model.modules():
        if isinstance(part, torch.distributed.fsdp.FSDPModule):
            part.reset_iter_state()
    model.target.reset(model.encoder)
    for value, expected in zip(steps_of(model), steps_of(Model("last")), strict=True):
        torch.testing.assert_close(value, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "function",
    [
        shards_are_averaged_and_not_their_copies,
        errors_leave_the_forward_as_it_was,
        reset_inside_a_forward,
        what_is_gathered_ahead_is_gathered_again,
        fsdp1_is_refused,
        came_from_meta,
    ],
    ids=lambda function: function.__name__,
)
def test_on_two_ranks(two_ranks: Processes, function: Callable[[int], None]) -> None:
    two_ranks.run(function)


# Saving half-precision shards.


def resumes_bit_for_bit(rank: int, folder: str) -> None:
    model = sharded(Model("last", torch.bfloat16), the_target)
    steps_of(model)
    state = model.state_dict()
    masters = {name: value for name, value in state.items() if "masters." in name}
    assert len(masters) == 8
    for name, master in masters.items():
        f = state[name.replace("masters.", "module.").replace("/", ".")]
        assert (master.placements, master.device_mesh, master.dtype) == (f.placements, f.device_mesh, torch.float32)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    full = {name: value.clone() for name, value in whole(model).items()}
    expected = steps_of(model, STEPS)

    new = sharded(Model("last", torch.bfloat16), the_target)
    loaded = get_model_state_dict(new)
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(new, loaded)
    from_full = sharded(Model("last", torch.bfloat16), the_target)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(from_full, {name: value.clone() for name, value in full.items()}, options=options)
    before = Model("last", torch.bfloat16)
    before.load_state_dict(full)
    for resumed in (new, from_full, sharded(before, the_root)):
        assert resumed.target.updates == STEPS
        for value, other in zip(steps_of(resumed, STEPS), expected, strict=True):
            assert torch.equal(value, other)
        ours, theirs = whole(resumed), whole(model)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_shards_of_half_precision_are_saved_with_their_float32_values(two_ranks: Processes) -> None:
    folder = tempfile.mkdtemp()
    try:
        two_ranks.run(resumes_bit_for_bit, folder)
    finally:
        shutil.rmtree(folder)
