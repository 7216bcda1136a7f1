"""Every search backend against a float64 brute-force search; the registry, and what a backend leaves alone."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msf_core import MemoryBank, available_backends
from msf_core.search import Queries, Rows, SearchBackend, find_backend, load_backend, torch_backend
from msf_core.search import base as search_base
from msf_core.search.auto import AutoSearch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def backend(backend_name: str) -> SearchBackend:
    return load_backend(backend_name)


@pytest.fixture(scope="session", params=[False, True], ids=["whole", "chunks"])
def chunked(request: pytest.FixtureRequest, backend_name: str) -> Iterator[int]:
    """Number of rows that a test searches; with chunks, they make several chunks, the last one short."""
    if not request.param:
        yield 200
        return
    with pytest.MonkeyPatch.context() as patch:
        if backend_name == "torch":  # its chunks have 1,024 rows or more
            patch.setattr("msf_core.search.torch_backend.CPU_CHUNK_BYTES", 4096)
            yield 2500
        else:
            patch.setattr("msf_core.search.faiss_backend.CPU_CHUNK_ROWS", 17)
            yield 200


def unit_rows(count: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1).to(dtype)


@given(data=st.data(), dtype=st.sampled_from(DTYPES), count=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_a_search_finds_the_k_nearest(
    backend: SearchBackend,
    chunked: int,
    assert_k_nearest: Callable[..., None],
    data: st.DataObject,
    dtype: torch.dtype,
    count: int,
    seed: int,
) -> None:
    n = data.draw(st.integers(max(1, chunked - 199), chunked), label="n")
    dim = data.draw(st.sampled_from([1, 3, 33, 64]), label="D")
    k = data.draw(st.one_of(st.integers(1, min(n, 20)), st.just(n)), label="k")
    rows, queries = unit_rows(n, dim, dtype, seed), unit_rows(count, dim, dtype, seed + 1)
    without = data.draw(st.sampled_from([0, 0, 1, n // 2, n]), label="rows of NaN")
    rows[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:without]] = torch.nan
    given_rows, given_queries = rows.clone(), queries.clone()

    similarity, index = backend.topk(queries, rows, k)

    assert_k_nearest(similarity, index, queries, rows, k)
    assert torch.equal(queries, given_queries)
    torch.testing.assert_close(rows, given_rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all equal", "all zero", "duplicates", "opposite", "one NaN", "all NaN", "NaN query"])
def test_degenerate_rows_and_queries_are_searched_exactly(
    backend: SearchBackend, chunked: int, assert_k_nearest: Callable[..., None], kind: str, dtype: torch.dtype
) -> None:
    n = chunked - 3
    rows, queries = unit_rows(n, 8, dtype, seed=0), unit_rows(5, 8, dtype, seed=1)
    if kind == "all equal":
        rows[:] = rows[0].clone()
    elif kind == "all zero":
        rows.zero_()
    elif kind == "duplicates":
        rows = rows[torch.arange(n) % 7]
    elif kind == "opposite":  # every similarity is negative
        queries, rows = queries[:1], -queries[:1] - 0.01 * rows
    elif kind == "one NaN":
        rows[n - 1, 3] = torch.nan
    elif kind == "all NaN":
        rows[:] = torch.nan
    elif kind == "NaN query":
        queries[2, 0] = torch.nan
    for k in (1, 5, n):
        assert_k_nearest(*backend.topk(queries, rows, k), queries, rows, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_nearest_row_is_found_in_every_place(backend: SearchBackend, chunked: int, dtype: torch.dtype) -> None:
    rows = unit_rows(chunked, 64, dtype, seed=3)
    similarity, index = backend.topk(rows, rows, 1)
    assert torch.equal(index[:, 0], torch.arange(chunked))
    torch.testing.assert_close(similarity, torch.ones(chunked, 1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_need_not_be_contiguous_nor_free_of_a_gradient(
    backend: SearchBackend, assert_k_nearest: Callable[..., None], dtype: torch.dtype
) -> None:
    rows = unit_rows(50, 6, dtype, seed=0)
    wide = unit_rows(9, 12, dtype, seed=1)
    for queries in (
        wide[:, ::2],
        wide[:6, :9].T[:, :6],
        wide[:1, :6].expand(4, 6),
        wide[:, :6].clone().requires_grad_(),
    ):
        similarity, index = backend.topk(queries, rows, 7)
        assert_k_nearest(similarity, index, queries.detach(), rows, 7)
        assert not similarity.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_queries_find_nothing(backend: SearchBackend, dtype: torch.dtype) -> None:
    similarity, index = backend.topk(torch.zeros(0, 4, dtype=dtype), unit_rows(5, 4, dtype, seed=0), 2)
    assert (similarity.shape, index.shape) == ((0, 2), (0, 2))
    assert (similarity.dtype, index.dtype) == (torch.float32, torch.int64)


# Memory


def peak_bytes(call: Callable[[], object], folder: Path) -> int:
    """Return the peak of PyTorch's CPU memory during the call, in addition to what was held before, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def test_the_measure_of_memory_sees_a_copy(tmp_path: Path) -> None:
    rows = torch.zeros(1000, 64)
    assert peak_bytes(lambda: [rows.clone(), rows.clone()], tmp_path) >= rows.nbytes  # one after the other, or both
    assert peak_bytes(lambda: rows.T, tmp_path) < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 256])
def test_a_search_holds_chunks_and_never_a_copy_of_the_bank(
    backend: SearchBackend, dtype: torch.dtype, count: int, tmp_path: Path
) -> None:
    rows, queries = unit_rows(200_000, 64, dtype, seed=0), unit_rows(count, 64, dtype, seed=1)
    backend.topk(queries, rows[:1000], 5)
    bound = 200_000 * 64 * 4 // 4  # a quarter of the float32 bank
    assert peak_bytes(lambda: backend.topk(queries, rows, 5), tmp_path) < bound


def test_faiss_is_handed_the_memory_of_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss", reason=f"faiss: {available_backends('cpu')['faiss']}")
    bank, seen, knn = MemoryBank(size=20, dim=4, backend="faiss"), [], faiss.knn
    bank.push(torch.randn(13, 4))

    def spy(queries, rows, *args, **options):
        seen.append((rows.__array_interface__["data"][0], rows.shape, rows.flags.c_contiguous, rows.dtype))
        return knn(queries, rows, *args, **options)

    monkeypatch.setattr(faiss, "knn", spy)
    bank.search(torch.randn(2, 4), k=3)
    assert seen == [(bank.rows.data_ptr(), (13, 4), True, "float32")]


# Float32 stays float32, and the user's settings are kept


def precision_settings() -> dict[str, object]:
    settings = {"matmul": torch.get_float32_matmul_precision(), "autocast": torch.is_autocast_enabled("cpu")}
    for name, module in (("cuda", torch.backends.cuda), ("mkldnn", torch.backends.mkldnn)):
        for setting in ("fp32_precision", "allow_tf32"):
            if hasattr(module, "matmul") and hasattr(module.matmul, setting):
                settings[f"{name}.{setting}"] = getattr(module.matmul, setting)
    return settings


@pytest.fixture
def user_wants_speed() -> Iterator[dict[str, object]]:
    """Set everything that lowers the precision of float32 products."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            yield precision_settings()
    finally:
        torch.set_float32_matmul_precision(before)


def test_float32_search_stays_exact_under_autocast_and_low_matmul_precision(
    backend: SearchBackend, assert_k_nearest: Callable[..., None], user_wants_speed: dict[str, object]
) -> None:
    rows, queries = unit_rows(500, 64, torch.float32, seed=0), unit_rows(32, 64, torch.float32, seed=1)
    assert (queries @ rows.T).dtype == torch.bfloat16  # what this is about
    assert_k_nearest(*backend.topk(queries, rows, 9), queries, rows, 9)
    assert precision_settings() == user_wants_speed


def test_a_bank_gives_the_same_bits_under_autocast(backend_name: str, user_wants_speed: dict[str, object]) -> None:
    bank = MemoryBank(size=100, dim=33, backend=backend_name)
    rows, queries = torch.randn(100, 33), torch.randn(8, 33)
    bank.push(rows)
    found = bank.search(queries, k=5)
    with torch.autocast("cpu", enabled=False):
        plain = MemoryBank(size=100, dim=33, backend=backend_name)
        plain.push(rows)
        expected = plain.search(queries, k=5)
    assert torch.equal(bank.rows, plain.rows)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)


class SettingsAtProducts(TorchDispatchMode):
    """Notes the settings under which each matrix product runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            self.seen.append(precision_settings_now())
        return func(*args, **(kwargs or {}))


def precision_settings_now() -> dict[str, object]:
    """Return the settings of products only; the general getter raises while they differ from it."""
    names = {"cuda": torch.backends.cuda, "mkldnn": torch.backends.mkldnn}
    new = {
        n: m.matmul.fp32_precision for n, m in names.items() if hasattr(getattr(m, "matmul", None), "fp32_precision")
    }
    return new or {"cuda": torch.backends.cuda.matmul.allow_tf32}


def test_products_of_the_torch_backend_run_without_tf32_and_bfloat16(user_wants_speed: dict[str, object]) -> None:
    rows = unit_rows(5000, 8, torch.float32, seed=0)
    assert "ieee" not in precision_settings_now().values()
    with SettingsAtProducts() as products:
        load_backend("torch").topk(rows[:2000], rows, 3)
    assert len(products.seen) >= 5
    assert all(settings.get("mkldnn", settings["cuda"]) in ("ieee", False) for settings in products.seen)


def test_the_users_settings_come_back_when_a_search_fails(
    monkeypatch: pytest.MonkeyPatch, user_wants_speed: dict[str, object]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("msf_core.search.torch_backend._products", fail)
    with pytest.raises(MemoryError, match="no room"):
        load_backend("torch").topk(torch.ones(1, 2), torch.ones(3, 2), 1)
    assert precision_settings() == user_wants_speed


# Arguments


@pytest.mark.parametrize(
    ("error", "message", "queries", "rows", "k"),
    [
        (ValueError, r"queries and rows .*\[2, 3\] and \[5, 4\]", torch.ones(2, 3), torch.ones(5, 4), 1),
        (ValueError, r"queries and rows .*\[4\] and \[5, 4\]", torch.ones(4), torch.ones(5, 4), 1),
        (ValueError, r"queries and rows .*\[2, 4\] and \[4\]", torch.ones(2, 4), torch.ones(4), 1),
        (TypeError, r"rows .*torch\.float64", torch.ones(2, 4).double(), torch.ones(5, 4).double(), 1),
        (TypeError, r"rows .*torch\.int64", torch.ones(2, 4).long(), torch.ones(5, 4).long(), 1),
        (TypeError, r"queries .*torch\.float16.*torch\.float32", torch.ones(2, 4), torch.ones(5, 4).half(), 1),
        (ValueError, "queries .*cpu.*meta", torch.ones(2, 4, device="meta"), torch.ones(5, 4), 1),
        (ValueError, "k .*rows, 5.* 6", torch.ones(2, 4), torch.ones(5, 4), 6),
        (ValueError, "k .*rows, 5.* 0", torch.ones(2, 4), torch.ones(5, 4), 0),
        (ValueError, "k .*rows, 0.* 1", torch.ones(2, 4), torch.ones(0, 4), 1),
    ],
)
def test_a_wrong_argument_of_topk_is_named(
    backend: SearchBackend, error: type[Exception], message: str, queries: Tensor, rows: Tensor, k: int
) -> None:
    with pytest.raises(error, match=message):
        backend.topk(queries, rows, k)


def test_merged_candidates_keep_the_best_and_where_they_came_from() -> None:
    best = search_base.RunningTopk(torch.zeros(1, 2), k=3)
    best.merge(torch.tensor([[5.0, 1.0]]), torch.tensor([[10, 11]]))
    best.merge(torch.tensor([[7.0, -torch.inf, 3.0]]), torch.tensor([[20, 21, 22]]))
    similarity, index = best.result()
    assert similarity.tolist() == [[7.0, 5.0, 3.0]]
    assert index.tolist() == [[20, 10, 22]]


# Backends by name


def test_an_unknown_backend_lists_the_valid_names() -> None:
    with pytest.raises(ValueError, match=r"'nearest'.*'auto', 'torch', 'faiss'"):
        load_backend("nearest")


def test_a_bank_takes_any_object_with_topk_and_uses_its_answer() -> None:
    class Furthest:
        def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
            self.arguments = queries, rows, k
            similarity, index = load_backend("torch").topk(-queries, rows, k)
            return -similarity, index

    furthest = Furthest()
    bank = MemoryBank(size=9, dim=2, dtype=torch.bfloat16, backend=furthest)
    bank.push(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([4, 5, 6]))
    found = bank.search(torch.tensor([[2.0, 0.0]]), k=1)
    assert found.label.tolist() == [[5]]
    assert found.similarity.tolist() == [[-1.0]]
    queries, rows, k = furthest.arguments
    assert torch.equal(queries, torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16))
    assert rows.data_ptr() == bank.rows.data_ptr()
    assert (rows.shape, k) == ((3, 2), 1)


def test_for_many_neighbors_a_cpu_searches_more_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, products, seen = unit_rows(8192, 512, torch.float32, seed=0), torch_backend._products, []

    def counted(queries: Queries, part: Rows) -> Tensor:
        seen.append(part.values.shape[0])
        return products(queries, part)

    monkeypatch.setattr(torch_backend, "_products", counted)
    for k in (12, 20, 60):
        torch_backend.float32_search(Queries(rows[:2]), Rows(rows), k)
    assert seen == [2048] * 4 + [3200, 3200, 1792] + [8192]


def test_backends_by_name_are_the_ones_that_serve(backend_name: str) -> None:
    served = load_backend(backend_name, torch.device("cpu"))
    assert (
        type(served).__name__
        == {"torch": "TorchSearch", "faiss": "FaissSearch", "triton": "TritonSearch"}[backend_name]
    )
    assert find_backend(backend_name, torch.device("cpu")) is served


def test_auto_on_the_cpu_is_faiss_for_large_searches_where_it_is_fast_and_torch_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("msf_core.search.auto.is_intel", lambda: False)
    works = available_backends("cpu")["faiss"] is None
    auto = AutoSearch()
    faiss, rows = load_backend("faiss" if works else "torch"), torch.empty(9999, 512)
    assert auto.choose(Queries(torch.empty(256, 512)), Rows(rows), 5) is faiss
    assert auto.choose(Queries(torch.empty(255, 512)), Rows(rows), 5) is load_backend("torch")
    assert auto.choose(Queries(torch.empty(256, 512, device="meta")), Rows(rows.to("meta")), 5) is load_backend("torch")
    few, many = torch.empty(19_999, 256), torch.empty(20_000, 256)  # rows for 50 neighbors
    assert auto.choose(Queries(torch.empty(64, 256)), Rows(few), 50) is faiss
    assert auto.choose(Queries(torch.empty(64, 256)), Rows(many), 50) is load_backend("torch")
    assert auto.choose(Queries(torch.empty(64, 256)), Rows(few[:19_000]), 49) is load_backend("torch")
    assert auto.choose(Queries(torch.empty(64, 257)), Rows(torch.empty(19_999, 257)), 50) is load_backend("torch")
    assert isinstance(load_backend(MemoryBank(2, 2).backend), AutoSearch)
    monkeypatch.setattr("msf_core.search.auto.is_intel", lambda: True)
    assert auto.choose(Queries(torch.empty(256, 512)), Rows(rows), 5) is load_backend("torch")
    assert auto.choose(Queries(torch.empty(64, 256)), Rows(few), 50) is load_backend("torch")


@pytest.mark.parametrize("count", [3, 300], ids=["torch", "faiss"])
def test_auto_finds_the_nearest_whatever_it_chooses(count: int, assert_k_nearest: Callable) -> None:
    rows, queries = unit_rows(700, 512, torch.float32, seed=0), unit_rows(count, 512, torch.float32, seed=1)
    assert_k_nearest(*AutoSearch().topk(queries, rows, 7), queries, rows, 7)


def test_faiss_says_that_it_does_not_search_other_devices() -> None:
    if available_backends("cpu")["faiss"] is not None:
        pytest.skip(available_backends("cpu")["faiss"])
    assert available_backends("meta")["faiss"] == "FAISS does not search meta tensors"
    with pytest.raises(ImportError, match=r"'faiss'.*meta"):
        load_backend("faiss", torch.device("meta"))


def run_python(code: str, path: Path | None = None) -> str:
    """Run the code in a fresh interpreter that imports from ``path`` first."""
    package = Path(search_base.__file__).parents[2]
    setup = f"import sys; sys.path[:0] = {[str(p) for p in (path, package) if p]}\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_takes_neither_faiss_nor_triton_and_a_search_no_compiler() -> None:
    """Importing them takes seconds, and a search on the CPU does not need the compiler."""
    code = """
import torch
from msf_core import MeanShiftLoss, MemoryBank
print(sorted({"faiss", "torch._dynamo", "triton"} & set(sys.modules)))
criterion = MeanShiftLoss(MemoryBank(64, 8), k=3)
criterion(torch.randn(5, 8), torch.randn(5, 8))
print(sorted({"torch._dynamo", "triton"} & set(sys.modules)))
"""
    assert run_python(code).split() == ["[]", "[]"]


WITHOUT_FAISS = """
import torch
from msf_core import MemoryBank, available_backends
from msf_core.search import load_backend
print(available_backends("cpu")["torch"])
print(available_backends("cpu")["faiss"])
try:
    MemoryBank(4, 2, backend="faiss")
except ImportError as error:
    print(error)
bank = MemoryBank(4, 2)
bank.push(torch.eye(2))
from msf_core.search import Queries, Rows
chosen = load_backend("auto").choose(Queries(torch.empty(256, 512)), Rows(bank.rows), 1)
print(type(chosen).__name__, bank.search(torch.eye(2), 1).index.tolist())
"""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "ModuleNotFoundError"),
        ("raise RuntimeError('no such CPU')", "RuntimeError: no such CPU"),
    ],
)
def test_without_a_working_faiss_auto_is_torch_and_asking_for_faiss_tells_how_to_install_it(
    module: str | None, reason: str, tmp_path: Path
) -> None:
    code = WITHOUT_FAISS
    if module is None:
        code = "sys.modules['faiss'] = None" + code
    else:
        (tmp_path / "faiss.py").write_text(module)
    torch_reason, faiss_reason, error, found = run_python(code, tmp_path).splitlines()
    assert torch_reason == "None"
    for text in (faiss_reason, error):
        assert reason in text
        assert "pip install 'msf_core[faiss-gpu]'" in text
        assert "faiss-cpu" in text
    assert error.startswith("search backend 'faiss' does not work here")
    assert found == "TorchSearch [[0], [1]]"


def test_without_a_gpu_no_backend_serves_cuda_tensors() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert set(available_backends("cuda").values()) == {"PyTorch sees no GPU here"}


def test_a_device_that_pytorch_does_not_know_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="got 'nonsense'"):
        available_backends("nonsense")
