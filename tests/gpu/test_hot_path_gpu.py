"""The hot path on CUDA: nothing waits for the device, and a step can be compiled and captured in a CUDA graph."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msf_core import MeanShiftLoss, MemoryBank, available_backends

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZE, DIM, BATCH = 300, 32, 16


@pytest.fixture(params=["auto", "torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Our own backends; FAISS may wait for the device during a search."""
    reason = available_backends("cuda").get(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def criterion_of(backend: str, dtype: torch.dtype = torch.float32, k: int = 5, full: bool = False) -> MeanShiftLoss:
    bank = MemoryBank(SIZE, DIM, dtype=dtype, backend=backend).cuda()
    if full:
        bank.push(torch.randn(SIZE + 3, DIM, generator=torch.Generator("cuda").manual_seed(5), device="cuda"))
    return MeanShiftLoss(bank, k)


def batches(count: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(count, 2, BATCH, DIM, generator=generator, device="cuda")


def test_what_these_tests_call_waiting_is_seen(waiting_is_an_error: Callable) -> None:
    value = torch.ones((), device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_steps_never_wait_while_the_bank_fills_and_wraps(
    backend: str, dtype: torch.dtype, k: int, waiting_is_an_error: Callable
) -> None:
    criterion, labels = criterion_of(backend, dtype, k), torch.arange(BATCH, device="cuda")
    v, u = batches(1)[0]
    v.requires_grad_()
    criterion(v, u, labels).backward()  # loads libraries and compiles kernels
    with waiting_is_an_error():
        for _ in range(SIZE // BATCH + 3):
            loss, _ = criterion(v, u, labels, return_neighbors=True)
            loss.backward()
    assert 0 <= loss.item() <= 4
    assert criterion.bank.full


def test_pushes_and_searches_of_every_size_never_wait(backend: str, waiting_is_an_error: Callable) -> None:
    bank = MemoryBank(size=100, dim=DIM, backend=backend).cuda()
    parts = [torch.randn(size, DIM, device="cuda") for size in (40, 0, 90, 250)]
    labels = torch.arange(250, device="cuda")
    for count in (40, 100):  # both forms of the kernels are compiled
        bank.push(parts[0])
        bank.search(parts[0], k=min(5, count))
    bank.push(parts[3])
    bank.search(parts[0], k=5)
    with waiting_is_an_error():
        for part in parts:
            bank.push(part)
            bank.push(part, labels[: part.shape[0]])
            bank.search(parts[0], k=5)
    assert len(bank) == 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_captured_in_a_cuda_graph_once_the_bank_is_full(backend: str, dtype: torch.dtype) -> None:
    plain, captured = criterion_of(backend, dtype, full=True), criterion_of(backend, dtype, full=True)
    pairs = batches(8)
    v, u = torch.zeros_like(pairs[0, 0]).requires_grad_(), torch.zeros_like(pairs[0, 1])

    def step() -> Tensor:
        v.grad = None
        loss = captured(v, u)
        loss.backward()
        return loss

    saved = {name: value.clone() for name, value in captured.state_dict().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(saved)  # as it was before the warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured.load_state_dict(saved)
    for pair in pairs:
        with torch.no_grad():
            v.copy_(pair[0])
            u.copy_(pair[1])
        graph.replay()
        theirs = pair[0].clone().requires_grad_()
        expected = plain(theirs, pair[1])
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(v.grad, theirs.grad)
    assert torch.equal(plain.bank.rows, captured.bank.rows)
    assert torch.equal(plain.bank.pushed, captured.bank.pushed)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ for the counters, which are on the CPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_gives_the_same_and_compiles_once(backend: str, mode: str) -> None:
    torch._dynamo.reset()
    plain, traced = criterion_of(backend), criterion_of(backend)
    compiled = torch.compile(traced, fullgraph=True, mode=mode)
    pairs = batches(SIZE // BATCH + 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for v, u in pairs:
            ours, theirs = v.clone().requires_grad_(), v.clone().requires_grad_()
            loss, expected = compiled(ours, u), plain(theirs, u)
            loss.backward()
            expected.backward()
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(traced.bank) == SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "k"), [(256, 5), (256, 50), (8192, 5)])
def test_a_search_at_a_million_rows_takes_less_than_64_mib_more(
    backend: str, dtype: torch.dtype, count: int, k: int
) -> None:
    if count > 256 and backend == "torch":
        pytest.skip("the torch backend's chunks grow with so many queries")
    bank = MemoryBank(1_024_000, 512, dtype=dtype, backend=backend).cuda()
    chunk = torch.randn(16_000, 512, device="cuda")
    for number in range(64):
        bank.push(chunk.roll(number, dims=1))
    queries = torch.randn(count, 512, device="cuda")
    bank.search(queries, k)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bank._nearest(queries, k)  # without the k·Q·D values of the rows that a search returns
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
