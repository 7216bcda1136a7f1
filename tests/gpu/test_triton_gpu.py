"""The Triton backend compiled for the GPU at hand: exact at every size, with real tensor cores and TF32."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msf_core import available_backends
from msf_core.rows import packed
from msf_core.search import Queries, Rows, load_backend
from msf_core.search.auto import AutoSearch, tried_triton

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def triton():
    reason = available_backends("cuda")["triton"]
    if reason is not None:
        pytest.skip(reason)
    return load_backend("triton", torch.device("cuda"))


def unit_rows(count: int, dim: int, dtype: torch.dtype, seed: int, cone: float = 0.0) -> Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    if cone:
        rows = 1 / dim**0.5 + cone * rows / dim**0.5
    return F.normalize(rows, dim=1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "n", "dim", "k"),
    [
        (1, 1, 16, 1),
        (3, 257, 16, 256),
        (17, 5000, 48, 7),
        (64, 20_001, 128, 20),
        (256, 131_072, 512, 5),
        (256, 131_071, 512, 50),
        (255, 70_000, 520, 5),
        (100, 9000, 1024, 256),
        (33, 3000, 2048, 10),
        (33, 3000, 1000, 10),
        (7, 700, 33, 5),
        (1024, 40_000, 256, 5),
        (8192, 4096, 64, 3),
    ],
)
def test_the_k_nearest_are_found(
    triton, assert_k_nearest: Callable[..., None], dtype: torch.dtype, count: int, n: int, dim: int, k: int
) -> None:
    rows, queries = unit_rows(n, dim, dtype, seed=0), unit_rows(count, dim, dtype, seed=1)
    rows[torch.randperm(n, device="cuda")[: n // 50]] = torch.nan
    found = triton.topk(queries, rows, k)
    for start in range(0, count, 256):  # the check multiplies in float64
        part = slice(start, start + 256)
        assert_k_nearest(found[0][part], found[1][part], queries[part], rows, k)
    again = triton.topk(queries, rows, k)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


@pytest.mark.parametrize("limited", [False, True], ids=["all rows", "by label and id"])
@pytest.mark.parametrize(("count", "n", "dim", "k"), [(256, 131_072, 512, 5), (33, 10_007, 72, 50), (1, 17, 8, 3)])
def test_int8_rows_and_limited_queries(triton, count: int, n: int, dim: int, k: int, limited: bool) -> None:
    rows, queries = unit_rows(n, dim, torch.float32, seed=0), unit_rows(count, dim, torch.float32, seed=1)
    rows[:: n // 3] = torch.nan
    labels, ids = torch.arange(n, device="cuda") % 7 - 1, torch.arange(n, device="cuda") % 5 - 1
    for values, scale in (packed(rows, torch.int8), (rows, None)):
        beside = Rows(values, scale, labels, ids) if limited else Rows(values, scale)
        asked = Queries(queries, labels[:count], ids[:count]) if limited else Queries(queries)
        similarity, index = triton.general_topk(asked, beside, k)
        expected = load_backend("torch").general_topk(asked, beside, k)[0]
        torch.testing.assert_close(similarity, expected, rtol=0, atol=5e-6)
        assert torch.equal(index < 0, expected == -torch.inf)
        if limited:
            found = index.clamp(min=0)
            wrong = asked.forbidden(labels[found], ids[found])
            assert not (wrong & (index >= 0)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all equal", "all zero", "duplicates", "all NaN", "NaN query", "one group"])
def test_degenerate_rows_and_queries(triton, assert_k_nearest: Callable[..., None], kind: str, dtype) -> None:
    rows, queries = unit_rows(3001, 64, dtype, seed=0), unit_rows(40, 64, dtype, seed=1)
    if kind == "all equal":
        rows[:] = rows[0].clone()
    elif kind == "all zero":
        rows.zero_()
    elif kind == "duplicates":
        rows = rows[torch.arange(3001, device="cuda") % 7]
    elif kind == "all NaN":
        rows[:] = torch.nan
    elif kind == "NaN query":
        queries[2, 0] = torch.nan
    elif kind == "one group":
        rows[64:72] = F.normalize(queries[:1].float() + 0.05 * rows[64:72].float(), dim=1).to(dtype)
    for k in (1, 5, 200):
        assert_k_nearest(*triton.topk(queries, rows, k), queries, rows, k)


@pytest.mark.parametrize("cone", [0.3, 0.05, 0.01])
def test_float32_stays_exact_where_tf32_cannot_tell_rows_apart(
    triton, assert_k_nearest: Callable[..., None], cone: float
) -> None:
    rows = unit_rows(20_000, 512, torch.float32, seed=0, cone=cone)
    queries = unit_rows(64, 512, torch.float32, seed=1, cone=cone)
    assert_k_nearest(*triton.topk(queries, rows, 5), queries, rows, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_collapsed_encoder_is_searched_by_the_precise_pass(
    triton, assert_k_nearest: Callable[..., None], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Once with the default bound on the number of groups, and once with a bound of k groups."""
    from msf_core.search import triton_plan

    values = unit_rows(20_000, 512, torch.float32, seed=0, cone=0.01)
    rows = Rows(*(packed(values, dtype) if dtype == torch.int8 else (values, None)))
    queries = unit_rows(70, 512, torch.float32, seed=1, cone=0.01)
    for bound in ("as it is", "k"):
        if bound == "k":
            monkeypatch.setattr(triton_plan, "LEAST_GROUPS", 0)
            monkeypatch.setattr(triton_plan, "PRECISE_COST", 0)
            triton_plan.plan_for.cache_clear()
        assert_k_nearest(*triton.general_topk(Queries(queries), rows, 5), queries, rows.floats(), 5)
    monkeypatch.undo()
    triton_plan.plan_for.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_does_not_find_its_own_row(triton, dtype: torch.dtype) -> None:
    rows = unit_rows(20_000, 512, dtype, seed=0)
    own = torch.arange(0, 20_000, 200, device="cuda")
    similarity, index = triton.general_topk(Queries(rows[own], own=own[:, None]), Rows(rows), 5)
    with_own = triton.topk(rows[own], rows, 6)
    assert torch.equal(with_own[1][:, 0], own)
    assert not (index == own[:, None]).any()
    torch.testing.assert_close(similarity, with_own[0][:, 1:], rtol=0, atol=2e-6)


def test_the_error_of_tf32_stays_within_its_bound(triton) -> None:
    """Run the first pass alone, and compare the maximum of each group with the exact one."""
    from msf_core.search import triton_backend
    from msf_core.search.triton_plan import plan_for

    rows, queries = unit_rows(4096, 512, torch.float32, seed=0), unit_rows(128, 512, torch.float32, seed=1)
    rows[:100] = queries[:100]  # similarities near 1 as well
    maxima = torch.empty(128, 256, device="cuda")
    out = torch.empty(128, 5, device="cuda"), torch.empty(128, 5, dtype=torch.int64, device="cuda")
    limits = triton_backend.device_limits("cuda", rows.device.index)
    plan = plan_for(128, 4096, 512, 5, rows.dtype, False, *limits, 16)._replace(precise=None)
    triton_backend._launch(Queries(queries), Rows(rows), maxima, *out, plan)
    truth = (queries.double() @ rows.double().T).view(128, 256, 16).amax(dim=2)
    off = (maxima.double() - truth).abs().max().item()
    assert 1e-6 < off < triton_backend.TF32_ERROR  # it is TF32, and within the bound


def test_auto_tries_triton_and_takes_torch_for_more_neighbors_than_it_finds(triton) -> None:
    auto = AutoSearch()
    queries = torch.empty(256, 512, device="cuda")
    assert auto.choose(Queries(queries), Rows(queries), 5) is tried_triton()
    assert auto.choose(Queries(queries), Rows(queries), 257) is load_backend("torch")
