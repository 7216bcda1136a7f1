"""The bfloat16 screen of large searches on a CPU: always exact, and given up where it leaves too many rows."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import collapsed
from msf_core import available_backends
from msf_core.rows import packed
from msf_core.search import Queries, Rows, cpu, load_backend, screen
from msf_core.search.auto import AutoSearch
from msf_core.search.screen import GROUP, Search, screened_search
from msf_core.search.torch_backend import float32_search

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Otherwise:
    """Searches in float32, and notes how many rows it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        self.rows.append(rows.values.shape[0])
        return float32_search(queries, rows, k)


def screened_topk(queries: Tensor, rows: Tensor, k: int, otherwise: Search) -> tuple[Tensor, Tensor]:
    return screened_search(Queries(queries), Rows(rows), k, otherwise)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    """Blocks of four groups and chunks of one, so that a few hundred rows make many; none is given up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "CHUNK_ROWS", GROUP)
        patch.setattr(screen, "LEAST_BLOCK_ROWS", 4 * GROUP)
        patch.setattr(screen, "MOST_BLOCK_ROWS", 4 * GROUP)
        patch.setattr(screen, "AGAIN", 0.0)
        patch.setattr(screen, "MOST_QUERIES", 5)
        patch.setattr(screen, "AGAIN_BYTES", 4096)
        yield


def unit(count: int, dim: int, dtype: torch.dtype, seed: int, cone: float = 0.0) -> Tensor:
    """Random unit rows; with ``cone``, they are all close to one direction, at about that distance."""
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    if cone:
        rows = torch.ones(dim) / dim**0.5 + cone * rows / dim**0.5
    return F.normalize(rows, dim=1).to(dtype)


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 12),
    n=st.integers(1, 400),
    dim=st.sampled_from([1, 3, 33, 64]),
    cone=st.sampled_from([0.0, 0.3, 0.01]),
    seed=st.integers(0, 2**31),
)
def test_what_the_screen_leaves_holds_the_k_nearest(
    assert_k_nearest: Callable[..., None], data: st.DataObject, dtype, count: int, n: int, dim: int, cone: float, seed
) -> None:
    k = data.draw(st.one_of(st.integers(1, min(n, 20)), st.just(n)), label="k")
    rows, queries = unit(n, dim, dtype, seed, cone), unit(count, dim, dtype, seed + 1, cone)
    without = data.draw(st.sampled_from([0, 0, 1, n // 20, n // 2, n]), label="rows of NaN")
    rows[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:without]] = torch.nan
    assert_k_nearest(*screened_topk(queries, rows, k, otherwise=float32_search), queries, rows, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_to_bfloat16_never_costs_a_neighbor(assert_k_nearest: Callable[..., None], dtype: torch.dtype) -> None:
    """Rows so near one another that the screen's own order is mostly wrong."""
    rows, queries = unit(4000, 64, dtype, seed=0, cone=0.05), unit(20, 64, dtype, seed=1, cone=0.05)
    products = (queries.bfloat16() @ rows.bfloat16().T).float()
    truth = queries.double() @ rows.double().T
    found, nearest = (x.topk(5).indices.sort().values for x in (products, truth))
    assert (found != nearest).any(dim=1).sum() > 10  # what this is about
    otherwise = Otherwise()
    assert_k_nearest(*screened_topk(queries, rows, 5, otherwise), queries, rows, 5)
    assert otherwise.rows == []


def rounded_the_same_way(dim: int) -> Tensor:
    """A row no longer than 1 whose values lie almost half a step of bfloat16 above a power of two."""
    row = torch.full((1, dim), dim**-0.5 * (1 + 0.99 * 2.0**-8))
    row[:, : dim // 16] = 0
    return row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 256, 1024])
def test_the_error_bound_holds_for_the_worst_rounding(dtype: torch.dtype, dim: int) -> None:
    worst = rounded_the_same_way(dim)
    rows = torch.cat([worst, -worst, unit(50, dim, torch.float32, seed=0)]).to(dtype)
    queries = torch.cat([worst, 3 * worst, unit(50, dim, torch.float32, seed=1)]).to(dtype)
    made = screen._Screen(Queries(queries), Rows(rows), screen.RunningTopk(queries, 1))
    off = (made.rounded.T.double() @ rows.bfloat16().double().T - queries.double() @ rows.double().T).abs()
    assert (off <= made.error.double()[:, None]).all()
    if dtype == torch.float32:
        assert off[0, 0] > 1.8 * 2.0**-8  # this is the worst: both factors lose half a step in each dimension
    assert (made.error < 2.1 * 2.0**-8 * queries.float().norm(dim=1)).all()


@given(
    k=st.integers(1, 9), error=st.sampled_from([0.0, 1e-3, 0.02]), offset=st.floats(-1, 1), seed=st.integers(0, 2**31)
)
def test_products_off_by_the_bound_and_rounded_still_let_the_nearest_through(
    k: int, error: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = offset + 0.03 * torch.randn(64, 1, generator=generator)  # [groups of one row, Q = 1]
    off = error * (2.0 * torch.randint(2, truth.shape, generator=generator) - 1)
    maxima = (truth + off).bfloat16()
    made = object.__new__(screen._Screen)
    made.error = torch.tensor([error])
    made.best = screen.RunningTopk(torch.zeros(1, 2), k)
    nearest = truth.topk(k, dim=0).indices[:, 0]
    assert (maxima[nearest] >= made._least(maxima, made.best.k)).all()
    made.best.merge(truth[nearest].T.contiguous(), nearest[None])  # once the k best are known exactly
    assert (maxima[nearest] >= made._least(maxima, made.best.k)).all()


def test_rounding_queries_to_int8_never_costs_a_neighbor(
    assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(*packed(unit(4000, 64, torch.float32, seed=0, cone=0.05), torch.int8))
    queries = Queries(unit(20, 64, torch.float32, seed=1, cone=0.05))
    found = screen.screened_search(queries, rows, 5, otherwise=float32_search)
    assert_k_nearest(*found, queries.values, rows.floats(), 5)
    # Without the bound and the allowance for rounding, neighbors are missed, so this test can fail.
    monkeypatch.setattr("msf_core.search.base.INT8_ERROR", 0.0)
    monkeypatch.setattr(screen, "ROUNDING", 0.0)
    found = screen.screened_search(queries, rows, 5, otherwise=float32_search)
    with pytest.raises(AssertionError):
        assert_k_nearest(*found, queries.values, rows.floats(), 5)


@pytest.mark.parametrize("kind", ["all equal", "all zero", "opposite", "all NaN", "NaN query", "long", "zero query"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_degenerate_rows_and_queries_are_screened_exactly(
    assert_k_nearest: Callable[..., None], kind: str, dtype: torch.dtype
) -> None:
    rows, queries = unit(165, 8, dtype, seed=0), unit(9, 8, dtype, seed=1)
    if kind == "all equal":
        rows[:] = rows[0].clone()
    elif kind == "all zero":
        rows.zero_()
    elif kind == "opposite":
        rows = F.normalize(-queries[:1].float() - 0.01 * rows.float(), dim=1).to(dtype)
    elif kind == "all NaN":
        rows[:] = torch.nan
    elif kind == "NaN query":
        queries[2, 0] = torch.nan
    elif kind == "long":  # a query's length does not matter
        queries = queries * 8
    elif kind == "zero query":
        queries[3] = 0
    for k in (1, 5, 165):
        assert_k_nearest(*screened_topk(queries, rows, k, otherwise=float32_search), queries / 1, rows, k)


def test_a_query_of_nan_does_not_spoil_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "AGAIN", 35.0)
    monkeypatch.setattr(screen, "CHUNK_ROWS", 2048)
    monkeypatch.setattr(screen, "LEAST_BLOCK_ROWS", 1 << 16)
    monkeypatch.setattr(screen, "MOST_BLOCK_ROWS", 1 << 16)
    rows, queries = unit(16 * 400, 256, torch.float32, seed=0), unit(5, 256, torch.float32, seed=1)
    queries[3, 7] = torch.nan
    otherwise = Otherwise()
    similarity, index = screened_topk(queries, rows, 2, otherwise)
    assert index[3].tolist() == [-1, -1]
    assert similarity[3].tolist() == [-torch.inf] * 2
    assert (index[[0, 1, 2, 4]] >= 0).all()
    queries[:] = torch.nan
    assert screened_topk(queries, rows, 20, otherwise)[1].tolist() == [[-1] * 20] * 5
    assert otherwise.rows == []


def test_default_dtype_and_device_do_not_reach_into_a_search(assert_k_nearest: Callable[..., None]) -> None:
    rows, queries = unit(165, 8, torch.float32, seed=0), unit(9, 8, torch.float32, seed=1)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = screened_topk(queries, rows, 5, otherwise=float32_search)
    finally:
        torch.set_default_dtype(before)
    assert_k_nearest(*found, queries, rows, 5)


def test_where_too_many_rows_are_left_the_search_goes_on_without_the_screen(
    assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "AGAIN", 35.0)
    monkeypatch.setattr(screen, "CHUNK_ROWS", 8 * GROUP)
    block = GROUP * 40
    monkeypatch.setattr(screen, "LEAST_BLOCK_ROWS", block)
    monkeypatch.setattr(screen, "MOST_BLOCK_ROWS", block)
    rows, queries = unit(3 * block + 7, 256, torch.float32, seed=0), unit(5, 256, torch.float32, seed=1)
    otherwise = Otherwise()
    assert_k_nearest(*screened_topk(queries, rows, 1, otherwise), queries, rows, 1)
    assert otherwise.rows == [7]  # the last rows do not fill a group
    rows[block:] = unit(2 * block + 7, 256, torch.float32, seed=2, cone=1e-3)
    queries = unit(5, 256, torch.float32, seed=3, cone=1e-3)
    otherwise = Otherwise()
    assert_k_nearest(*screened_topk(queries, rows, 1, otherwise), queries, rows, 1)
    assert otherwise.rows == [2 * block + 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", collapsed.KINDS)
def test_collapsed_rows_are_searched_exactly_and_given_up_once(
    assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    block = 40 * GROUP
    for name, value in {
        "AGAIN": 35.0,
        "MOST_QUERIES": 512,
        "LEAST_BLOCK_ROWS": block,
        "MOST_BLOCK_ROWS": block,
    }.items():
        monkeypatch.setattr(screen, name, value)
    rows, queries = collapsed.made(kind, 3 * block + 7, 6, 32)
    values, scale = packed(rows, dtype)
    asked, there = Queries(queries.to(torch.float32 if dtype == torch.int8 else dtype)), Rows(values, scale)
    otherwise, products, product = Otherwise(), [], screen._Screen._products
    monkeypatch.setattr(
        screen._Screen, "_products", lambda s, part: products.append(len(part.values)) or product(s, part)
    )
    for k in (1, 5):
        similarity, index = screened_search(asked, there, k, otherwise)
        assert_k_nearest(similarity, index, asked.values, there.floats().to(asked.values.dtype), k)
    assert len(otherwise.rows) == 2  # the rest of each search, in one call
    given_up = [n for n in otherwise.rows if n > 7]
    assert all((n - 7) % block == 0 for n in given_up)
    if kind in ("within 0.001", "duplicates", "half"):
        assert given_up == [3 * block + 7] * 2
        assert products == [GROUP] * 4  # the first and the last chunk of the first block


def test_what_is_multiplied_again_is_bounded_for_the_whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = unit(30 * 4 * GROUP, 32, torch.float32, seed=0), unit(16, 32, torch.float32, seed=1)
    pairs, again = [], screen._Screen._again
    monkeypatch.setattr(screen._Screen, "_again", lambda *a: pairs.append(a[2].shape[0]) or again(*a))
    monkeypatch.setattr(
        screen._Screen, "_wanted", lambda s, maxima, rank: torch.rand_like(maxima, dtype=torch.float32) < 0.4
    )
    monkeypatch.setattr(screen, "AGAIN", 7.0)
    monkeypatch.setattr(screen, "MOST_QUERIES", 16)
    otherwise = Otherwise()
    screened_topk(queries, rows, 1, otherwise)
    cost = GROUP * sum(pairs) / 16 * 7.0 / (1 + screen.AGAIN_QUERIES / 16 + screen.AGAIN_NEIGHBORS / 32)
    done = len(rows) - otherwise.rows[0]
    assert 0 < done < len(rows)
    saved = screen.SAVED * (1 - screen.LEAST_QUERIES / 16)
    assert 0.5 < cost / (saved * done + screen.MORE * len(rows)) <= 1


def test_candidates_that_would_take_too_much_memory_are_left_to_float32(
    assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = unit(4 * GROUP, 64, torch.float32, seed=0), unit(5, 64, torch.float32, seed=1)
    queries[0] = rows[0]
    rows[1:] = F.normalize(rows[:1] + 1e-3 * rows[1:], dim=1)  # one query has all of them as candidates
    for most, expected in ((4, []), (3, [4 * GROUP])):
        monkeypatch.setattr(screen, "CANDIDATE_BYTES", most * 5 * GROUP * 12)
        otherwise = Otherwise()
        assert_k_nearest(*screened_topk(queries, rows, 2, otherwise), queries, rows, 2)
        assert otherwise.rows == expected


def test_only_the_rows_that_may_be_neighbors_are_multiplied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = screen._Screen._again
    pairs = []
    monkeypatch.setattr(screen, "LEAST_BLOCK_ROWS", 1 << 16)
    monkeypatch.setattr(screen, "MOST_BLOCK_ROWS", 1 << 16)
    monkeypatch.setattr(screen._Screen, "_again", lambda *a: pairs.append(a[2].shape[0]) or again(*a))
    rows, queries = unit(16000, 256, torch.float32, seed=0), unit(5, 256, torch.float32, seed=1)
    screened_topk(queries, rows, 3, float32_search)
    assert len(pairs) == 1
    assert 15 <= pairs[0] < 200  # of 5,000


def test_the_backends_use_the_screen_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "multiplies_bfloat16_fast", lambda: True)
    monkeypatch.setattr(screen, "multiplies_int8_fast", lambda: False)
    q, rows = torch.empty(8, 2048), torch.empty(8192, 2048)
    assert screen.screen_pays(q, rows, 10)
    assert not screen.screen_pays(q, rows, 11)  # too few rows for each neighbor
    assert not screen.screen_pays(q[:7], rows, 5)
    assert not screen.screen_pays(q.repeat(9, 1), rows[:-1], 5)  # too few rows
    assert not screen.screen_pays(q[:, :2047], rows[:, :2047], 5)  # too little work
    assert not screen.screen_pays(q.to("meta"), rows.to("meta"), 5)
    assert not screen.screen_pays(q.half().repeat(31, 1), rows.half(), 5)
    assert screen.screen_pays(q.half().repeat(32, 1), rows.half(), 5)
    assert not screen.screen_pays(q, rows.to(torch.int8), 5)
    monkeypatch.setattr(screen, "multiplies_bfloat16_fast", lambda: False)
    monkeypatch.setattr(screen, "multiplies_int8_fast", lambda: True)
    assert not screen.screen_pays(q, rows, 5)
    assert screen.screen_pays(q, rows.to(torch.int8), 5)

    used = []

    def spy(queries: Tensor, rows: Tensor, k: int, otherwise: Callable) -> tuple[Tensor, Tensor]:
        used.append(otherwise)
        return float32_search(queries, rows, k)

    rows, queries = unit(3100, 8, torch.float32, seed=0), unit(9, 8, torch.float32, seed=1)
    for module in ("torch_backend", "auto"):
        monkeypatch.setattr(f"msf_core.search.{module}.screened_search", spy)
        monkeypatch.setattr(f"msf_core.search.{module}.screen_pays", lambda queries, rows, k: k == 2)
    for backend in (load_backend("torch"), AutoSearch()):
        for k in (1, 2):
            backend.topk(queries, rows, k)
    assert used[0] is float32_search
    assert used[1].args == (load_backend("torch"),)
    assert len(used) == 2


@pytest.fixture
def unknown_cpu() -> Iterator[None]:
    """What is known about this CPU is forgotten, before and after."""
    known = (cpu.is_intel, cpu.multiplies_bfloat16_fast, cpu.multiplies_int8_fast)
    for one in known:
        one.cache_clear()
    yield
    for one in known:
        one.cache_clear()


@pytest.mark.parametrize(
    ("bf16", "amx", "maker", "bfloat16_is_fast", "int8_is_fast"),
    [
        (False, False, "AuthenticAMD", False, False),
        (True, False, "AuthenticAMD", True, True),
        (False, False, "GenuineIntel", False, False),
        (True, False, "GenuineIntel", False, True),
        (True, True, "GenuineIntel", True, True),
        (None, None, "GenuineIntel", False, False),  # PyTorch does not say
    ],
)
def test_which_products_are_fast_depends_on_instructions_and_maker(
    bf16: bool | None,
    amx: bool | None,
    maker: str,
    bfloat16_is_fast: bool,
    int8_is_fast: bool,
    unknown_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, supported in (("_is_avx512_bf16_supported", bf16), ("_is_amx_tile_supported", amx)):
        if supported is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported, raising=False)
    monkeypatch.setattr(cpu.Path, "read_text", lambda path, encoding: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    assert cpu.is_intel() == (maker == "GenuineIntel")
    assert (cpu.multiplies_bfloat16_fast(), cpu.multiplies_int8_fast()) == (bfloat16_is_fast, int8_is_fast)


def test_without_proc_cpuinfo_the_maker_is_asked_of_the_platform(
    unknown_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: object, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(cpu.Path, "read_text", missing)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel")
    assert cpu.is_intel()


def test_auto_leaves_a_bank_of_few_rows_for_each_neighbor_to_a_fast_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    if available_backends("cpu")["faiss"] is not None:
        pytest.skip(available_backends("cpu")["faiss"])
    used = []
    monkeypatch.setattr("msf_core.search.auto.is_intel", lambda: False)
    monkeypatch.setattr("msf_core.search.auto.screen_pays", lambda queries, rows, k: True)
    monkeypatch.setattr(
        "msf_core.search.auto.screened_search",
        lambda queries, rows, k, otherwise: (
            used.append((queries.values.shape[0], rows.values.shape[0])) or otherwise(queries, rows, k)
        ),
    )
    rows, queries = unit(2000, 1024, torch.float32, seed=0), unit(128, 1024, torch.float32, seed=1)
    for count, n in ((128, 1999), (128, 2000), (127, 1999)):  # FAISS gets 128 x 1,024 query values
        AutoSearch().topk(queries[:count], rows[:n], 2)
    assert used == [(128, 2000), (127, 1999)]
