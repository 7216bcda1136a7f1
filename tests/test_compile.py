"""The hot path: it compiles whole and once, and outside the search it makes nothing of the bank's size."""

import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from msf_core import MeanShiftLoss, MemoryBank
from msf_core.schedules import linear
from msf_core.search import Queries, Rows, search_bank

SIZE, DIM, BATCH, K = 512, 16, 32, 5


def batches(count: int, batch: int = BATCH) -> Tensor:
    """Pairs of predictions and targets, [count, 2, B, D]."""
    return torch.randn(count, 2, batch, DIM, generator=torch.Generator().manual_seed(0))


def criterion(backend: str = "auto", size: int = SIZE, **options) -> MeanShiftLoss:
    return MeanShiftLoss(MemoryBank(size, DIM, backend=backend, **options), K)


def steps(loss: Callable, pairs: Tensor, labels: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of every step."""
    results = []
    for v, u in pairs:
        v = v.clone().requires_grad_()
        value = loss(v, u, labels)
        value.backward()
        results.append((value.detach(), v.grad))
    return results


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [None, torch.arange(BATCH)], ids=["no labels", "labels"])
def test_the_criterion_compiles_whole_and_once_while_the_bank_fills_and_wraps(
    backend_name: str, dtype: torch.dtype, labels: Tensor | None
) -> None:
    plain, traced = criterion(backend_name, dtype=dtype), criterion(backend_name, dtype=dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    pairs = batches(SIZE // BATCH + 4)
    for (a, a_grad), (b, b_grad) in zip(steps(plain, pairs, labels), steps(compiled, pairs, labels), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a_grad, b_grad)
    assert counter.frame_count == 1
    assert len(traced.bank) == SIZE
    assert traced.steps == len(pairs)
    for value, other in zip(plain.state_dict().values(), traced.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_a_loop_around_the_criterion_compiles_whole_too() -> None:
    plain, traced = criterion(), criterion()
    encoder = torch.nn.Linear(DIM, DIM)

    def step(loss: MeanShiftLoss, x: Tensor, y: Tensor) -> Tensor:
        value, neighbors = loss(encoder(x), y, return_neighbors=True)
        return value + 0 * neighbors.similarity.mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for x, y in batches(4):
        assert torch.equal(step(plain, x, y), compiled(traced, x, y))
    assert counter.frame_count == 1


def test_a_backend_that_does_not_work_is_an_error_before_anything_is_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = criterion("torch")
    loss.bank.backend = "nearest"
    compiled = torch.compile(loss, backend="aot_eager")
    with pytest.raises(Exception, match="unknown search backend 'nearest'"):
        compiled(*batches(1)[0])
    assert len(loss.bank) == loss.steps == int(loss.bank.pushed) == 0


def test_a_schedule_of_k_works_compiled_with_a_break_of_the_graph() -> None:
    plain, traced = (MeanShiftLoss(MemoryBank(SIZE, DIM), linear(2, 4, 3)) for _ in range(2))
    compiled = torch.compile(traced, backend="aot_eager")
    pairs = batches(5)
    for (a, _), (b, _) in zip(steps(plain, pairs), steps(compiled, pairs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ for CPU code")
@pytest.mark.skipif(sys.platform != "linux", reason="inductor's CPU code is only tested on Linux")
def test_inductor_gives_the_same_and_pushes_in_place() -> None:
    plain, traced = criterion(size=100_000), criterion(size=100_000)
    compiled = torch.compile(traced, fullgraph=True)
    pairs = batches(4)
    for (a, a_grad), (b, b_grad) in zip(steps(plain, pairs), steps(compiled, pairs), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a_grad, b_grad)
    v, u = pairs[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compiled(v, u)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < traced.bank.rows.nbytes / 4


class Made(TorchDispatchMode):
    """Notes the bytes of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {t.untyped_storage().data_ptr() for t in [*args, *kwargs.values()] if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes.append(tensor.nbytes)
        return out


def test_a_forward_makes_nothing_larger_than_the_neighbors_outside_the_search() -> None:
    class First:
        """A search that returns the first k rows, and makes no large tensor itself."""

        def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
            index = torch.arange(k).expand(queries.shape[0], k)
            return torch.zeros(queries.shape[0], k), index

    loss = criterion("torch", size=50_000)
    loss.bank.backend = First()
    loss(*batches(1)[0])
    with Made() as made:
        v, u = batches(1)[0]
        loss(v.requires_grad_(), u).backward()
    assert max(made.bytes) <= 4 * 2 * BATCH * K * DIM


# The operator


def test_the_operator_passes_the_checks_of_pytorch(backend_name: str) -> None:
    rows = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    arguments = (rows[:3].clone(), rows, torch.tensor(15), 4, backend_name)
    beside = (None, torch.arange(20) % 2, torch.tensor([0, 1, -1]), None, None)
    torch.library.opcheck(torch.ops.msf_core.search.default, (*arguments, *beside))
    similarity, index = search_bank(Queries(arguments[0]), Rows(rows), *arguments[2:])
    assert (index < 15).all()
    assert index[:, 0].tolist() == [0, 1, 2]
    assert similarity.shape == (3, 4)


@pytest.mark.parametrize(("filled", "k"), [(3, 4), (20, 0)])
def test_the_operator_names_a_k_that_is_out_of_range(filled: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"number of rows, {filled}, got {k}"):
        search_bank(Queries(torch.ones(2, 4)), Rows(torch.ones(20, 4)), torch.tensor(filled), k, "torch")
