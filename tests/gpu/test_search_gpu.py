"""What differs on a CUDA device: exactness despite TF32 and autocast, streams, memory, NaN in FAISS's kernels."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msf_core import MemoryBank, available_backends
from msf_core.search import SearchBackend, load_backend

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def backend(backend_name: str) -> SearchBackend:
    return load_backend(backend_name, torch.device("cuda"))


@pytest.fixture
def user_wants_speed() -> Iterator[None]:
    """TF32 and autocast, as most training scripts have them."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cuda", torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def unit_rows(count: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Create rows on the CPU, so that they are the same on every device."""
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "n", "dim", "k"), [(1, 1, 1, 1), (1, 13, 33, 5), (7, 200, 64, 200), (256, 70_000, 512, 5)]
)
def test_a_search_on_cuda_finds_the_k_nearest(
    backend: SearchBackend,
    assert_k_nearest: Callable[..., None],
    dtype: torch.dtype,
    count: int,
    n: int,
    dim: int,
    k: int,
) -> None:
    rows, queries = unit_rows(n, dim, dtype, seed=0), unit_rows(count, dim, dtype, seed=1)
    similarity, index = backend.topk(queries, rows, k)
    assert similarity.device == index.device == rows.device
    assert_k_nearest(similarity, index, queries, rows, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_search_stays_exact_under_tf32_and_autocast(
    backend: SearchBackend, assert_k_nearest: Callable[..., None], dtype: torch.dtype, user_wants_speed: None
) -> None:
    rows, queries = unit_rows(2000, 128, dtype, seed=0), unit_rows(64, 128, dtype, seed=1)
    similarity, index = backend.topk(queries, rows, 10)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", enabled=False):
        assert_k_nearest(similarity, index, queries, rows, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nan_rows", [1, 97, 100])
def test_rows_of_nan_are_never_found_on_cuda(
    backend: SearchBackend, assert_k_nearest: Callable[..., None], dtype: torch.dtype, nan_rows: int
) -> None:
    rows, queries = unit_rows(100, 32, dtype, seed=0), unit_rows(9, 32, dtype, seed=1)
    rows[torch.randperm(100, generator=torch.Generator().manual_seed(2))[:nan_rows].cuda()] = torch.nan
    for k in (1, 5, 100):
        assert_k_nearest(*backend.topk(queries, rows, k), queries, rows, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_of_nan_finds_nothing_on_cuda(
    backend: SearchBackend, assert_k_nearest: Callable[..., None], dtype: torch.dtype
) -> None:
    rows, queries = unit_rows(100, 32, dtype, seed=0), unit_rows(9, 32, dtype, seed=1)
    queries[4, 0] = torch.nan
    assert_k_nearest(*backend.topk(queries, rows, 5), queries, rows, 5)


def test_queries_need_not_be_contiguous_on_cuda(backend: SearchBackend, assert_k_nearest: Callable[..., None]) -> None:
    rows, queries = unit_rows(100, 32, torch.float32, seed=0), unit_rows(9, 64, torch.float32, seed=1)[:, ::2]
    assert_k_nearest(*backend.topk(queries, rows, 5), queries, rows, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_search_on_another_stream_waits_for_what_is_queued_there(
    backend: SearchBackend, assert_k_nearest: Callable[..., None], dtype: torch.dtype
) -> None:
    fresh, queries = unit_rows(5000, 64, dtype, seed=0), unit_rows(16, 64, dtype, seed=1)
    rows = unit_rows(5000, 64, dtype, seed=2)
    backend.topk(queries, rows, 5)  # do all one-time setup now
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s during which the rows are the old ones
        rows.copy_(fresh)
        similarity, index = backend.topk(queries, rows, 5)
        rows.fill_(torch.nan)  # later work on the stream must not affect the search either
    stream.synchronize()
    assert_k_nearest(similarity, index, queries, fresh, 5)


def test_a_search_of_a_large_bank_takes_less_than_64_mib_more(backend: SearchBackend) -> None:
    rows = F.normalize(torch.randn(262_144, 512, device="cuda", dtype=torch.bfloat16), dim=1)
    for count in (1, 256):
        queries = rows[:count].clone()
        backend.topk(queries, rows, 5)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = backend.topk(queries, rows, 5)
        assert found[1].shape == (count, 5)
        assert torch.cuda.max_memory_allocated() - before < 64 << 20


def test_queries_on_the_cpu_are_refused_for_rows_on_cuda(backend: SearchBackend) -> None:
    with pytest.raises(ValueError, match=r"queries .*cuda:0.*cpu"):
        backend.topk(torch.ones(1, 4), torch.ones(5, 4, device="cuda"), 1)


def test_faiss_says_how_many_neighbors_it_finds_at_most() -> None:
    if available_backends("cuda")["faiss"] is not None:
        pytest.skip(available_backends("cuda")["faiss"])
    rows = unit_rows(3000, 4, torch.float32, seed=0)
    with pytest.raises(ValueError, match=r"at most 2048 .*k=2049"):
        load_backend("faiss").topk(rows[:1], rows, 2049)
    assert load_backend("faiss").topk(rows[:1], rows, 2048)[1].shape == (1, 2048)


def test_a_second_cuda_device_is_searched_there(backend: SearchBackend, assert_k_nearest: Callable[..., None]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, there are {torch.cuda.device_count()}")
    rows, queries = (unit_rows(n, 64, torch.float32, seed=n).to("cuda:1") for n in (3000, 16))
    similarity, index = backend.topk(queries, rows, 5)
    assert torch.cuda.current_device() == 0
    assert similarity.device == index.device == torch.device("cuda:1")
    assert_k_nearest(similarity, index, queries, rows, 5)


def test_auto_serves_on_cuda() -> None:
    bank = MemoryBank(size=8, dim=4).cuda()
    bank.push(torch.eye(4, device="cuda"))
    assert bank.search(torch.eye(4, device="cuda"), k=1).index[:, 0].tolist() == [0, 1, 2, 3]
