"""Groups that the screen leaves out: for limited queries, at the edge of its bounds, with NaN rows and queries."""

from typing import Any

import pytest
import torch
from torch import Tensor

from msf_core.rows import packed, unit_rows
from msf_core.search import Queries, Rows, screen
from msf_core.search.base import rounded_to_int8
from msf_core.search.screen import GROUP, screened_search
from msf_core.search.torch_backend import float32_search

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def rows_of(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", ["labels", "ids"])
@pytest.mark.parametrize("k", [1, 4])
def test_the_screen_of_limited_queries_leaves_out_no_neighbor(
    dtype: torch.dtype, limit: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "CHUNK_ROWS", 2 * GROUP)
    monkeypatch.setattr(screen, "LEAST_BLOCK_ROWS", 16 * GROUP)
    monkeypatch.setattr(screen, "MOST_BLOCK_ROWS", 16 * GROUP)
    monkeypatch.setattr(screen, "AGAIN", 0.0)
    monkeypatch.setattr(screen, "MOST_QUERIES", 7)
    values, scale = packed(unit_rows(rows_of(40 * GROUP, 64, 0)), dtype)
    queries = unit_rows(rows_of(20, 64, 1)).to(torch.float32 if dtype == torch.int8 else dtype)
    beside, of_queries = torch.arange(40 * GROUP) % 3 - 1, torch.arange(20) % 3 - 1
    if limit == "labels":
        asked, rows = Queries(queries, of_queries), Rows(values, scale, beside)
        forbidden = (of_queries[:, None] >= 0) & (of_queries[:, None] != beside)
    else:
        asked, rows = Queries(queries, None, of_queries), Rows(values, scale, None, beside)
        forbidden = (of_queries[:, None] >= 0) & (of_queries[:, None] == beside)
    truth = (queries.double() @ rows.floats().double().T).masked_fill(forbidden, -torch.inf)
    expected = truth.topk(k).values
    left_out = []
    again = screen._Screen._again
    monkeypatch.setattr(screen._Screen, "_again", lambda *a: left_out.append(a[2].shape[0] < 20 * 16) or again(*a))
    _, index = screened_search(asked, rows, k, float32_search)
    torch.testing.assert_close(truth.gather(1, index), expected, rtol=0, atol=1e-6)
    assert left_out
    assert all(left_out), "no group was left out: the test tests nothing"


@pytest.mark.parametrize("dim", [16, 33, 64, 512])
def test_the_error_bound_of_int8_queries_holds_for_the_worst_row(dim: int) -> None:
    queries = unit_rows(rows_of(20, dim, dim))
    whole, step, error = rounded_to_int8(queries)
    off = queries.double() - whole.double() * step.double()[:, None]
    worst = Rows(*packed(unit_rows(off), torch.int8)).floats().double()  # parallel to the rounding error
    products = ((whole.double() * step.double()[:, None] - queries.double()) * worst).sum(1).abs()
    assert (products <= error).all()
    made = screen._Screen(Queries(queries), Rows(*packed(queries, torch.int8)), screen.RunningTopk(queries, 1))
    assert (products + 2e-7 <= made.error).all()
    assert (products > 0.97 * error).all()  # and it is not larger than necessary


def test_an_int8_query_of_nan_does_not_spoil_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    values, scale = packed(unit_rows(rows_of(16 * 400, 256, 0)), torch.int8)
    queries = unit_rows(rows_of(9, 256, 1))
    queries[3] = torch.nan
    given: list[int] = []

    def otherwise(*search: Any) -> Any:
        given.append(1)
        return float32_search(*search)

    screened_search(Queries(queries), Rows(values, scale), 2, otherwise)
    assert given == []


def test_an_int8_row_of_nan_is_no_neighbor_of_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "AGAIN", 0.0)
    queries = unit_rows(1 + 0.1 * rows_of(9, 64, 0))
    rows = unit_rows(-1 + rows_of(16 * 400, 64, 1))
    rows[::16] = torch.nan  # one in each group
    rows[16 * 200 :: 16] = rows[16 * 200 + 1 :: 16]
    values, scale = packed(rows, torch.int8)
    truth = (queries.double() @ Rows(values, scale).floats().double().T).nan_to_num(nan=-torch.inf)
    found = screened_search(Queries(queries), Rows(values, scale), 3, float32_search)[1]
    torch.testing.assert_close(truth.gather(1, found), truth.topk(3).values, rtol=0, atol=1e-6)


def test_groups_without_a_row_that_may_be_found_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    again = screen._Screen._again
    monkeypatch.setattr(screen._Screen, "_again", lambda *a: pairs.append(a[2].shape[0]) or again(*a))
    rows = Rows(unit_rows(rows_of(16 * 400, 32, 0)), None, (torch.arange(16 * 400) < 16).long())
    queries = Queries(unit_rows(rows_of(9, 32, 1)), torch.ones(9, dtype=torch.int64))
    screened_search(queries, rows, 20, float32_search)
    assert pairs == [9]


@pytest.mark.parametrize("error", [0.01, 0.003])
def test_a_maximum_that_was_rounded_up_hides_no_neighbor(error: float) -> None:
    nearest = torch.linspace(0.55, 0.95, 1001)  # one query each
    truth = torch.stack([nearest, nearest - 1e-6])
    maxima = (truth + torch.tensor([[-error], [error]])).bfloat16()
    made = object.__new__(screen._Screen)
    made.error = torch.full((1001,), error)
    made.best = screen.RunningTopk(torch.zeros(1001, 2), 1)
    assert (maxima[0] >= made._least(maxima, made.best.k)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_counts_the_sums_too(dtype: torch.dtype) -> None:
    queries = torch.eye(64).to(torch.float32 if dtype == torch.int8 else dtype)  # rounded without loss
    made = screen._Screen(Queries(queries), Rows(*packed(torch.eye(64), dtype)), screen.RunningTopk(queries, 1))
    assert (made.error >= 64 * 2.0**-22).all()
