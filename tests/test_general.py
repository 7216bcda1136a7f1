"""Searches with limited queries and with int8 rows: every backend against a float64 brute-force search.

Triton is tested in test_triton.py, because its interpreter is slow.
"""

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msf_core.rows import packed, unit_rows
from msf_core.search import Queries, Rows, available_backends, load_backend, screen, search_by
from msf_core.search.auto import AutoSearch
from msf_core.search.screen import GROUP, screened_search
from msf_core.search.torch_backend import float32_search

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class Plain:
    """A user's backend, which has nothing but topk."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return load_backend("torch").topk(queries, rows, k)


def search_of(name: str) -> Any:
    """Return a function like `GeneralSearch.general_topk`."""
    if name == "screen":
        return lambda queries, rows, k: screened_search(queries, rows, k, float32_search)
    backend = {"plain": Plain, "auto": AutoSearch}.get(name, lambda: load_backend(name))()
    return lambda queries, rows, k: search_by(backend, queries, rows, k)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Several chunks and blocks even for few rows; the screen never gives up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "CHUNK_ROWS", 2 * GROUP)
        patch.setattr(screen, "MOST_QUERIES", 4)
        patch.setattr(screen, "LEAST_BLOCK_ROWS", 4 * GROUP)
        patch.setattr(screen, "MOST_BLOCK_ROWS", 4 * GROUP)
        patch.setattr(screen, "MORE", torch.inf)
        patch.setattr("msf_core.search.general.CHUNK_ROWS", 37)
        yield


def rows_of(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def made(count: int, n: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unit queries and rows, some of them NaN, and the rows' scale."""
    generator = torch.Generator().manual_seed(seed)
    queries = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    rows = torch.randn(n, dim, generator=generator)
    rows[::3] = rows[::3].sign()  # int8 rows of very different scales
    rows[1::3] *= F.one_hot(torch.randint(dim, (len(rows[1::3]),), generator=generator), dim)
    rows = F.normalize(rows, dim=1)
    rows[torch.rand(n, generator=generator) < 0.1] = torch.nan
    if dtype != torch.int8:
        return queries.to(dtype), rows.to(dtype), None
    scale = rows.abs().amax(dim=1) / 127
    return queries, (rows / scale[:, None]).nan_to_num().round().to(torch.int8), scale


@pytest.mark.parametrize("name", ["torch", "faiss", "screen", "auto", "plain"])
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 9),
    n=st.integers(1, 300),
    dim=st.sampled_from([1, 3, 33, 64]),
    data=st.data(),
    classes=st.sampled_from([1, 2, 7, 400]),
    by_label=st.booleans(),
    by_id=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_nearest_of_those_that_may_be_found_are(
    name: str,
    dtype: torch.dtype,
    count: int,
    n: int,
    dim: int,
    data: st.DataObject,
    classes: int,
    by_label: bool,
    by_id: bool,
    seed: int,
) -> None:
    if (reason := available_backends("cpu").get(name)) is not None:
        pytest.skip(reason)
    k = data.draw(st.integers(1, min(n, 12)), label="k")
    values, row_values, scale = made(count, n, dim, dtype, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    row_labels, labels = (torch.randint(-1, classes, (size,), generator=draw) for size in (n, count))
    row_ids, ids = (torch.randint(-1, classes, (size,), generator=draw) for size in (n, count))
    rows = Rows(row_values, scale, row_labels if by_label else None, row_ids if by_id else None)
    queries = Queries(values, labels if by_label else None, ids if by_id else None)
    similarity, index = search_of(name)(queries, rows, k)

    truth = values.double() @ row_values.double().T
    if scale is not None:
        truth = truth * scale.double()
    for q in range(count):
        for r in range(n):
            if by_label and labels[q] >= 0 and labels[q] != row_labels[r]:
                truth[q, r] = -torch.inf
            if by_id and ids[q] >= 0 and ids[q] == row_ids[r]:
                truth[q, r] = -torch.inf
    truth = truth.masked_fill(truth.isnan(), -torch.inf)
    expected = truth.topk(k, dim=1).values
    absent = expected == -torch.inf
    assert torch.equal(index == -1, absent)
    assert torch.equal(similarity == -torch.inf, absent)
    torch.testing.assert_close(similarity.double(), expected, rtol=0, atol=1e-5)
    found = truth.gather(1, index.clamp(min=0)).masked_fill(absent, -torch.inf)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    slots = index.sort(dim=1).values
    assert not ((slots[:, 1:] == slots[:, :-1]) & (slots[:, 1:] >= 0)).any(), "a neighbor occurs twice"


class Few(Plain):
    """A user's backend that finds few neighbors."""

    most_neighbors: ClassVar = {"cpu": 4}

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        assert k <= 4
        return super().topk(queries, rows, k)


def test_a_backend_is_not_asked_for_more_neighbors_than_it_finds() -> None:
    values, rows, _ = made(6, 90, 8, torch.float32, seed=0)
    labels = torch.arange(90) % 2
    queries = Queries(values, labels=torch.arange(6) % 2)
    similarity, index = search_by(Few(), queries, Rows(rows, labels=labels), 3)
    expected, _ = search_by(load_backend("torch"), queries, Rows(rows, labels=labels), 3)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-6)
    assert (labels[index] == queries.labels[:, None]).all()


def test_queries_that_have_seen_all_rows_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msf_core.search.general.load_backend", lambda name: pytest.fail("searched again"))

    rows = unit_rows(rows_of(40, 4, 0))
    rows[5:] = torch.nan
    labels = torch.arange(40) % 2
    found = search_by(Plain(), Queries(rows[:3], torch.tensor([0, 1, 7])), Rows(rows, None, labels), 4)
    assert (found[1] >= 0).sum(1).tolist() == [3, 2, 0]
    search_by(Plain(), Queries(rows[:3], torch.tensor([0, 1, 7])), Rows(rows[:6], None, labels[:6]), 4)


def test_auto_leaves_limited_queries_and_int8_rows_to_torch() -> None:
    queries = torch.zeros(256, 512)
    labels = torch.zeros(256, dtype=torch.int64)
    values, scale = packed(torch.eye(512), torch.int8)
    torch_backend = load_backend("torch")
    rows = Rows(torch.eye(512), None, torch.zeros(512, dtype=torch.int64))
    assert AutoSearch().choose(Queries(queries, labels), rows, 5) is torch_backend
    assert AutoSearch().choose(Queries(queries), Rows(values, scale), 5) is torch_backend
