"""The Triton backend in Triton's interpreter: exact for every shape and for adversarial rows."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msf_core import MeanShiftLoss, MemoryBank, available_backends, reference
from msf_core.rows import packed
from msf_core.search import Queries, Rows

triton_backend = pytest.importorskip("msf_core.search.triton_backend", reason="Triton is not installed")
from msf_core.search import triton_plan  # noqa: E402

InterpreterBuilder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
INPUT_PRECISION = pytest.importorskip("triton._C.libtriton").ir.INPUT_PRECISION
reason = available_backends("cpu")["triton"]
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=f"triton: {reason}"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # of NumPy, in the interpreter
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON = triton_backend.TritonSearch()
PLAN_FOR = triton_plan.plan_for


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    """Plans are made anew, with the constants that a test sets."""
    PLAN_FOR.cache_clear()


@contextmanager
def constants(**values: object) -> Iterator[None]:
    """Set constants of the backend and of its plans."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(triton_backend if hasattr(triton_backend, name) else triton_plan, name, value)
        PLAN_FOR.cache_clear()
        yield
    PLAN_FOR.cache_clear()


LANES = (
    {},
    {"LANES": 4, "MEMBERS": 2, "BATCH_ROWS": 32},  # groups go around the lanes several times, two per batch
    {"LANES": 4, "MEMBERS": 2, "LEAST_GROUPS": 0, "PRECISE_COST": 0},  # the precise pass comes after k groups
)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Form TF32 products as tensor cores do: the lowest 13 bits of float32 values are cut off."""
    dot = InterpreterBuilder.create_dot

    def cut(handle):
        if handle.data.dtype == "float32":
            handle.data = (handle.data.view("uint32") & 0xFFFFE000).view("float32")

    def tf32_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision == INPUT_PRECISION.TF32:
            cut(a)
            cut(b)
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", tf32_dot)


def unit_rows(count: int, dim: int, dtype: torch.dtype, seed: int, cone: float = 0.0) -> Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    if cone:  # all of them about one direction
        rows = torch.ones(dim) / dim**0.5 + cone * rows / dim**0.5
    return F.normalize(rows, dim=1).to(dtype)


def assert_exact(judge: Callable[..., None], queries: Queries, rows: Rows, k: int) -> Tensor:
    """Search, check every query against the rows that it may find, and return the index."""
    similarity, index = TRITON.general_topk(queries, rows, k)
    values, slots = rows.values if rows.scale is None else rows.floats(), torch.arange(rows.values.shape[0])
    forbidden = queries.forbidden(rows.labels, rows.ids)
    for i, query in enumerate(queries.values):
        hidden = torch.zeros(len(slots), dtype=torch.bool) if forbidden is None else forbidden[i]
        if queries.own is not None:
            hidden = hidden | torch.isin(slots, queries.own[i])
        judge(similarity[i : i + 1], index[i : i + 1], query[None], values.masked_fill(hidden[:, None], torch.nan), k)
    return index


@settings(max_examples=25)
@given(
    data=st.data(),
    dtype=st.sampled_from((*DTYPES, torch.int8)),
    lanes=st.sampled_from(LANES),
    count=st.integers(1, 3),
    n=st.integers(1, 700),
    dim=st.sampled_from([1, 3, 16, 33, 64, 144]),
    limits=st.sets(st.sampled_from(["labels", "ids", "own"])),
    views=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_the_k_nearest_are_found(
    assert_k_nearest: Callable[..., None],
    data: st.DataObject,
    dtype,
    lanes,
    count: int,
    n: int,
    dim,
    limits,
    views,
    seed,
) -> None:
    k = data.draw(st.one_of(st.integers(1, min(n, 20)), st.just(min(n, 60))), label="k")
    without = data.draw(st.sampled_from([0, 0, 1, n // 2, n]), label="rows of NaN")
    exact = torch.float32 if dtype == torch.int8 else dtype
    values, q = unit_rows(n, dim, exact, seed), unit_rows(count, dim, exact, seed + 1)
    values[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:without]] = torch.nan
    beside = torch.arange(n) % 3
    rows = Rows(*(packed(values, dtype) if dtype == torch.int8 else (values, None)), beside, beside)
    given = {name: torch.tensor([0, -1, n // 2])[:count] for name in limits - {"own"}}
    nearest = (q.float() @ values.float().T).nan_to_num(-2.0).topk(min(views, n), dim=1).indices
    own = nearest.flip(1).index_fill(0, torch.tensor([min(1, count - 1)]), -1)
    queries = Queries(q, **given, own=own if "own" in limits else None)
    before = rows.values.clone()
    with constants(**lanes):
        assert_exact(assert_k_nearest, queries, rows, k)
    torch.testing.assert_close(rows.values, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_a_query_does_not_find_its_own_rows(
    assert_k_nearest: Callable[..., None], dtype: torch.dtype, views: int
) -> None:
    """Half precision looks at k + V groups, because V of the best may hold only the query's own rows."""
    exact = torch.float32 if dtype == torch.int8 else dtype
    values = unit_rows(60, 8, exact, seed=0)
    values[20], values[40] = values[0], values[0]  # twins of the first row, in groups of their own
    rows = Rows(*(packed(values, dtype) if dtype == torch.int8 else (values, None)))
    q = values[:1].expand(4, -1)
    queries = Queries(q, own=torch.tensor([[0, 20], [-1, -1], [59, 58], [60, 61]])[:, :views])
    with constants(choose_group=lambda *_: 16, BATCH_ROWS=16):
        for k in (1, 21):
            index = assert_exact(assert_k_nearest, queries, rows, k)
            assert index[:, 0].tolist() == [20 * views, 0, 0, 0]
        assert assert_exact(assert_k_nearest, queries, Rows(*(p if p is None else p[:2] for p in rows)), 1)[0] == 1
        assert_exact(assert_k_nearest, queries, Rows(*(p if p is None else p[:1] for p in rows)), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["all equal", "all zero", "duplicates", "opposite", "all NaN", "NaN query"])
def test_degenerate_rows_and_queries(assert_k_nearest: Callable[..., None], kind: str, dtype: torch.dtype) -> None:
    n = 101
    rows, queries = unit_rows(n, 8, dtype, seed=0), unit_rows(3, 8, dtype, seed=1)
    if kind == "all equal":
        rows[:] = rows[0].clone()
    elif kind == "all zero":
        rows.zero_()
    elif kind == "duplicates":
        rows = rows[torch.arange(n) % 7]
    elif kind == "opposite":
        rows = F.normalize(-queries[:1].float() - 0.01 * rows.float(), dim=1).to(dtype)
    elif kind == "all NaN":
        rows[:] = torch.nan
    elif kind == "NaN query":
        queries[2, 0] = torch.nan
    for lanes, k in zip(LANES, (5, n, 1), strict=True):
        with constants(**lanes):
            assert_k_nearest(*TRITON.topk(queries, rows, k), queries, rows, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("copies", [1, 8])
def test_where_rows_are_all_alike_a_precise_pass_bounds_the_groups_that_are_looked_at(
    assert_k_nearest: Callable[..., None], tf32: None, dtype: torch.dtype, copies: int
) -> None:
    cone, q_cone = (1e-3, 0.0) if dtype == torch.float32 else (0.05, 0.05)  # nearer ones would be the same int8 rows
    values = unit_rows(600 // copies, 64, torch.float32, seed=0, cone=cone).repeat(copies, 1)
    rows = Rows(*(packed(values, dtype) if dtype == torch.int8 else (values, None)))
    queries = Queries(
        unit_rows(4, 64, torch.float32, seed=1, cone=q_cone), own=torch.tensor([[-1, 7], [3, 5], [599, 0], [-1, -1]])
    )
    bound = {"choose_group": lambda *_: 16, "LEAST_GROUPS": 0, "PRECISE_COST": 0, "BATCH_ROWS": 32}
    with constants(**LANES[1] | bound):
        assert_exact(assert_k_nearest, queries, rows, 3)
    if copies == 1:  # without that pass, rows are missed, so this test can fail
        unprecise = {"plan_for": lambda *sizes: PLAN_FOR(*sizes)._replace(precise=None)}
        with constants(**LANES[1] | bound | unprecise), pytest.raises(AssertionError):
            assert_exact(assert_k_nearest, queries, rows, 3)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("place", [0, 1, 4])
def test_one_group_may_hold_all_neighbors(
    assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch, group: int, place: int
) -> None:
    monkeypatch.setattr(triton_plan, "choose_group", lambda *_: group)
    rows, queries = unit_rows(4 * group + 20, 32, torch.bfloat16, seed=0), unit_rows(1, 32, torch.bfloat16, seed=1)
    here = slice(place * group, place * group + 16)
    rows[here] = F.normalize(queries.float() + 0.05 * rows[here].float(), dim=1).to(torch.bfloat16)
    similarity, index = TRITON.topk(queries, rows, 12)
    assert_k_nearest(similarity, index, queries, rows, 12)
    assert (index // group == place).all()


@pytest.mark.parametrize(("n", "k"), [(257, 256), (17, 17)])
def test_k_may_be_larger_than_the_number_of_groups(assert_k_nearest: Callable[..., None], n: int, k: int) -> None:
    rows, queries = unit_rows(n, 16, torch.float32, seed=0), unit_rows(2, 16, torch.float32, seed=1)
    assert_k_nearest(*TRITON.topk(queries, rows, k), queries, rows, k)


@pytest.mark.parametrize("dim", [16, 512, 520, 2050])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dimension_is_searched(assert_k_nearest: Callable[..., None], dim: int, dtype: torch.dtype) -> None:
    rows, queries = unit_rows(50, dim, dtype, seed=0), unit_rows(2, dim, dtype, seed=1)
    assert_k_nearest(*TRITON.topk(queries, rows, 3), queries, rows, 3)


def test_queries_are_searched_in_parts_where_their_maxima_would_take_too_much(
    assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = unit_rows(1000, 16, torch.float32, seed=0), unit_rows(9, 16, torch.float32, seed=1)
    whole = TRITON.topk(queries, rows, 3)
    PLAN_FOR.cache_clear()
    launches, launch = [], triton_backend._launch
    monkeypatch.setattr(triton_backend, "_launch", lambda *a: launches.append(a[0].values.shape[0]) or launch(*a))
    monkeypatch.setattr(triton_plan, "MAXIMA_BYTES", 4 * 63 * 4)
    monkeypatch.setattr(triton_plan, "choose_group", lambda *_: 16)
    parts = TRITON.topk(queries, rows, 3)
    assert launches == [4, 4, 1]
    assert_k_nearest(*parts, queries, rows, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("count", [1, 17, 130])
def test_every_number_of_queries_is_searched(assert_k_nearest: Callable[..., None], count: int) -> None:
    rows, queries = unit_rows(50, 16, torch.float16, seed=0), unit_rows(count, 16, torch.float16, seed=1)
    assert_k_nearest(*TRITON.topk(queries, rows, 1), queries, rows, 1)


def test_float32_rows_are_exact_although_the_first_pass_is_tf32(
    assert_k_nearest: Callable[..., None], tf32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_plan, "choose_group", lambda *_: 16)
    rows = unit_rows(800, 64, torch.float32, seed=0, cone=0.05)
    queries = unit_rows(3, 64, torch.float32, seed=1, cone=0.05)
    monkeypatch.setattr(triton_plan, "BATCH_ROWS", 16)
    monkeypatch.setattr(triton_plan, "LEAST_GROUPS", 100)  # no precise pass
    assert_k_nearest(*TRITON.topk(queries, rows, 5), queries, rows, 5)
    monkeypatch.setattr(triton_backend, "TF32_ERROR", 1e-12)
    with pytest.raises(AssertionError):  # without the bound, groups are missed, so this test can fail
        assert_k_nearest(*TRITON.topk(queries, rows, 5), queries, rows, 5)


def test_int8_rows_are_exact_although_the_first_pass_rounds_the_queries(
    assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_plan, "choose_group", lambda *_: 16)
    values, scale = packed(unit_rows(800, 64, torch.float32, seed=0, cone=0.05), torch.int8)
    monkeypatch.setattr(triton_plan, "BATCH_ROWS", 16)
    monkeypatch.setattr(triton_plan, "LEAST_GROUPS", 100)  # no precise pass
    rows, queries = Rows(values, scale), Queries(unit_rows(8, 64, torch.float32, seed=1, cone=0.05))
    assert_k_nearest(*TRITON.general_topk(queries, rows, 5), queries.values, rows.floats(), 5)
    monkeypatch.setattr("msf_core.search.base.INT8_ERROR", 0.0)
    with pytest.raises(AssertionError):  # without the bound, groups are missed, so this test can fail
        assert_k_nearest(*TRITON.general_topk(queries, rows, 5), queries.values, rows.floats(), 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("by", ["labels", "ids"])
def test_groups_are_taken_by_the_rows_that_may_be_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by: str
) -> None:
    """For half-precision rows, only k groups are looked at; a forbidden row must not make its group one of them."""
    monkeypatch.setattr(triton_plan, "choose_group", lambda *_: 16)
    monkeypatch.setattr(triton_plan, "MAXIMA_BYTES", 4 * 10 * 3)  # three queries at once
    query = F.normalize(torch.ones(7, 4), dim=1)
    values = torch.zeros(160, 4)
    values[:, 0] = 1.0
    values[::32] = query[0]  # the nearest, in every second group
    labels, ids = torch.zeros(160, dtype=torch.int64), torch.full((160,), 9)
    labels[::32], ids[::32] = 3, 0
    values[20] = F.normalize(torch.tensor([1.0, 1.0, 0.9, 0.8]), dim=0)
    rows, scale = (values.to(dtype), None) if dtype != torch.int8 else packed(values, dtype)
    queries = Queries(query if dtype == torch.int8 else query.to(dtype))
    limit = torch.tensor([0, -1, 3, 0, 0, 3, 0]) if by == "labels" else torch.tensor([0, -1, 9, 0, 0, 9, 0])
    queries = queries._replace(**{by: limit})
    index = TRITON.general_topk(queries, Rows(rows, scale, labels, ids), 1)[1][:, 0]
    assert ((index == 20) == (limit == 0)).all()
    assert (index[limit != 0] % 32 == 0).all()


@pytest.mark.parametrize("dim", [1, 33, 512])
def test_the_error_bound_of_int8_queries_holds(dim: int) -> None:
    queries = unit_rows(50, dim, torch.float32, seed=dim)
    rows = Rows(*packed(unit_rows(400, dim, torch.float32, seed=dim + 1), torch.int8))
    rounded, step, error = triton_backend.rounded_to_int8(queries)
    screened = (rounded.double() * step.double()[:, None]) @ rows.floats().double().T
    off = (screened - queries.double() @ rows.floats().double().T).abs()
    assert (off <= error[:, None] + 1e-6).all()
    assert (rounded.abs() <= 127).all()
    empty, bad = torch.zeros(1, dim), torch.full((1, dim), torch.nan)
    assert triton_backend.rounded_to_int8(empty)[0].tolist() == [[0] * dim]
    assert triton_backend.rounded_to_int8(bad)[1].isnan().all()


def test_the_maxima_of_int8_rows_are_within_the_error_bound() -> None:
    rows = Rows(*packed(unit_rows(200, 33, torch.float32, seed=0), torch.int8))
    queries = unit_rows(5, 33, torch.float32, seed=1)
    plan = triton_plan.plan_for(5, 200, 33, 3, torch.int8, False, 0, 1, 16)
    maxima, similarity, index = torch.empty(5, plan.stride), torch.empty(5, 3), torch.empty(5, 3, dtype=torch.int64)
    triton_backend._launch(Queries(queries), rows, maxima, similarity, index, plan)
    products = F.pad(queries @ rows.floats().T, (0, 8), value=-torch.inf)
    off = (maxima[:, :13] - products.view(5, 13, 16).amax(dim=2)).abs().amax(dim=1)
    assert (off > 1e-6).all()
    assert (off <= triton_backend.rounded_to_int8(queries)[2]).all()


@pytest.mark.parametrize("dim", [16, 64, 1024])
def test_the_error_bound_of_tf32_holds_for_the_worst_cut(dim: int) -> None:
    worst = torch.full((dim,), dim**-0.5 * (1 + 0.999 * 2.0**-10))
    worst[: dim // 16] = 0
    cut = torch.from_numpy((worst.numpy().view("uint32") & 0xFFFFE000).view("float32"))
    off = (worst.double() @ worst.double() - cut.double() @ cut.double()).item()
    assert 1.8 * 2.0**-10 < off < triton_backend.TF32_ERROR * worst.norm() ** 2


def test_equal_similarities_come_by_index_and_the_same_bits_come_again() -> None:
    rows = unit_rows(400, 16, torch.float32, seed=0)[torch.arange(400) % 50]
    queries = unit_rows(3, 16, torch.float32, seed=1)
    similarity, index = TRITON.topk(queries, rows, 24)
    assert (index[:, :8] == index[:, :1] + 50 * torch.arange(8)).all()  # the eight copies of the nearest row
    again = TRITON.topk(queries, rows, 24)
    assert torch.equal(similarity, again[0])
    assert torch.equal(index, again[1])


def test_the_groups_of_a_size_cost_least_and_their_maxima_stay_in_bounds() -> None:
    choose = triton_plan.choose_group
    assert choose(256, 1_024_000, 512, 5, 2) == 32  # √(8·N / (k·D·2)) = 40
    assert choose(256, 128_000, 512, 5, 2) == 16
    assert choose(256, 1_024_000, 512, 50, 2) == 32  # 16 would take 66 MB for the maxima
    assert choose(256, 10_000_000, 128, 1, 2) == 128
    for n in (1, 1000, 128_000, 1_024_000):
        for k in (1, 5, 50, 256):
            assert 4 * 256 * n / choose(256, n, 512, k, 2) <= triton_plan.MAXIMA_BYTES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_that_of_the_paper(dtype: torch.dtype) -> None:
    bank = MemoryBank(size=60, dim=16, dtype=dtype, backend="triton")
    plain = MemoryBank(size=60, dim=16, dtype=dtype, backend="torch")
    criterion, other = MeanShiftLoss(bank, k=4), MeanShiftLoss(plain, k=4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        v, u = torch.randn(2, 14, 16, generator=generator)
        loss, found = criterion(v, u, return_neighbors=True)
        _, expected = other(v, u, return_neighbors=True)
        assert torch.equal(found.index, expected.index)
        if dtype == torch.float32:
            rows = bank.rows[: len(bank)]
            assert loss.item() == pytest.approx(reference.mean_shift_loss(v, u, rows, 4).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("message", "queries", "rows", "k"),
    [
        ("at most 256 .*k=257", torch.ones(2, 4), torch.ones(300, 4), 257),
        ("k .*rows, 5.* 6", torch.ones(2, 4), torch.ones(5, 4), 6),
        ("CUDA tensors, got meta", torch.ones(2, 4, device="meta"), torch.ones(5, 4, device="meta"), 1),
    ],
)
def test_what_it_cannot_search_is_named(message: str, queries: Tensor, rows: Tensor, k: int) -> None:
    with pytest.raises(ValueError, match=message):
        TRITON.topk(queries, rows, k)
    assert TRITON.topk(torch.ones(0, 4), torch.ones(5, 4), 2)[0].shape == (0, 2)


def test_outside_the_interpreter_it_says_that_it_searches_cuda_tensors() -> None:
    code = "from msf_core import available_backends; print(available_backends('cpu')['triton'])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package = Path(triton_backend.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=package, env=environment, timeout=300
    )
    assert done.stdout.startswith("Triton searches CUDA tensors"), done.stderr
