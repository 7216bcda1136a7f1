"""The trial of a backend before "auto" relies on it: a broken one is detected once, and torch answers instead."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msf_core import available_backends
from msf_core.rows import packed, unit_rows
from msf_core.search import Queries, Rows, auto, load_backend, trial
from msf_core.search.torch_backend import TorchSearch
from msf_core.search.trial import TriedSearch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
Found = tuple[Tensor, Tensor]
Broken = Callable[[Queries, Rows, int], Found]


def torch_search(queries: Queries, rows: Rows, k: int) -> Found:
    return TorchSearch().general_topk(queries, rows, k)


class Backend:
    """A backend that does what it is told to, and counts its searches."""

    def __init__(self, search: Broken = torch_search) -> None:
        self.search, self.searches = search, 0

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> Found:
        raise NotImplementedError

    def general_topk(self, queries: Queries, rows: Rows, k: int) -> Found:
        self.searches += 1
        return self.search(queries, rows, k)


def a_search(dtype: torch.dtype = torch.float32, limited: bool = False, dim: int = 33) -> tuple[Queries, Rows]:
    made = unit_rows(torch.randn(70, dim, generator=torch.Generator().manual_seed(3)))
    values, scale = packed(made[:60], dtype)
    queries = made[60:].to(torch.float32 if dtype == torch.int8 else dtype)
    numbers = torch.arange(60)
    if not limited:
        return Queries(queries), Rows(values, scale)
    return Queries(queries, numbers[:10] % 3, numbers[:10]), Rows(values, scale, numbers % 3, numbers)


def assert_same(found: Found, queries: Queries, rows: Rows, k: int) -> None:
    for mine, right in zip(found, torch_search(queries, rows, k), strict=True):
        assert torch.equal(mine, right)


def fail_at_launch(*_: object) -> Found:
    raise RuntimeError("no kernel image is available " + "for this device " * 100)


def off_by_one(queries: Queries, rows: Rows, k: int) -> Found:
    similarity, index = torch_search(queries, rows, k)
    return similarity, torch.where(index >= 0, (index + 1) % rows.values.shape[0], index)


def far_index(queries: Queries, rows: Rows, k: int) -> Found:
    similarity, index = torch_search(queries, rows, k)
    return similarity, torch.where(index >= 0, index + 2**31, index)


def slightly_wrong(queries: Queries, rows: Rows, k: int) -> Found:
    similarity, index = torch_search(queries, rows, k)
    return similarity + 1e-3, index


def row_twice(queries: Queries, rows: Rows, k: int) -> Found:
    similarity, index = torch_search(queries, rows, k)
    index[0, 1] = index[0, 0]
    similarity[0, 1] = similarity[0, 0]
    return similarity, index


def nan_as_zero(queries: Queries, rows: Rows, k: int) -> Found:
    scale = None if rows.scale is None else rows.scale.nan_to_num()
    return torch_search(queries, rows._replace(values=rows.values.nan_to_num(), scale=scale), k)


def nan_query_finds(queries: Queries, rows: Rows, k: int) -> Found:
    return torch_search(queries._replace(values=queries.values.nan_to_num()), rows, k)


def reads_beyond(queries: Queries, rows: Rows, k: int) -> Found:
    values = rows.values.as_strided((rows.values.shape[0] + 3, rows.values.shape[1]), rows.values.stride())
    scale = None if rows.scale is None else rows.scale.as_strided((len(rows.scale) + 3,), (1,))
    similarity, index = torch_search(queries, Rows(values, scale), k)
    return similarity, index.clamp(max=rows.values.shape[0] - 1)


def low_precision(queries: Queries, rows: Rows, k: int) -> Found:
    similarity, index = torch_search(Queries(queries.values.bfloat16()), Rows(rows.values.bfloat16()), k)
    return similarity, index


def no_labels(queries: Queries, rows: Rows, k: int) -> Found:
    return torch_search(queries._replace(labels=None), rows, k)


def no_ids(queries: Queries, rows: Rows, k: int) -> Found:
    return torch_search(queries._replace(ids=None), rows, k)


def own_row_too(queries: Queries, rows: Rows, k: int) -> Found:
    return torch_search(queries._replace(own=None), rows, k)


def other_view_too(queries: Queries, rows: Rows, k: int) -> Found:
    return torch_search(queries._replace(own=queries.own[:, :1]), rows, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (fail_at_launch, "RuntimeError: no kernel image is available"),
        (off_by_one, "rows that are not the nearest"),
        (far_index, "beyond the rows"),
        (slightly_wrong, "similarities are wrong"),
        (row_twice, "a row twice"),
        (nan_as_zero, "rows that are not the nearest"),
        (nan_query_finds, "finds excluded rows, or too few"),
        (reads_beyond, "similarities are wrong"),
        (low_precision, "similarities are wrong"),
        (no_labels, "finds excluded rows, or too few"),
        (no_ids, "rows that are not the nearest"),
        (own_row_too, "rows that are not the nearest"),
        (other_view_too, "rows that are not the nearest"),
    ],
)
def test_what_is_broken_is_found_out_with_one_warning_and_torch_answers(
    broken: Broken, reason: str, dtype: torch.dtype
) -> None:
    if dtype == torch.int8 and broken in (low_precision, nan_as_zero):
        dtype = torch.float16 if broken is nan_as_zero else torch.float32
    backend = Backend(broken)
    tried = TriedSearch(backend, TorchSearch())
    queries, rows = a_search(dtype, limited=broken in (no_labels, no_ids))
    if broken in (own_row_too, other_view_too):
        views = 1 if broken is own_row_too else 2
        queries = queries._replace(own=torch.arange(10 * views).view(10, views))
    with pytest.warns(RuntimeWarning, match=f"(?s)Backend does not work for rows of {dtype} on cpu.*{reason}") as told:
        found = tried.general_topk(queries, rows, 3)
    assert len(told) == 1
    assert len(str(told[0].message)) < 800
    assert_same(found, queries, rows, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in (3, 4):  # nor is it tried again for another kernel
            assert_same(tried.general_topk(queries, rows, k), queries, rows, k)
    assert backend.searches == 1
    backend.search = torch_search  # another dtype has its own trial
    tried.topk(*(part.values.double().to(torch.bfloat16) for part in (queries, rows)), 3)
    assert backend.searches == 3


@pytest.mark.parametrize("limited", [False, True], ids=["all rows", "by label and id"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 12])
def test_what_works_is_tried_once_for_each_kernel_and_used(dtype: torch.dtype, limited: bool, k: int) -> None:
    backend, fallback = Backend(), Backend(fail_at_launch)
    tried = TriedSearch(backend, fallback)
    queries, rows = a_search(dtype, limited)
    random = torch.get_rng_state()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            warnings.simplefilter("error")
            assert_same(tried.general_topk(queries, rows, k), queries, rows, k)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(torch.get_rng_state(), random)
    tried.general_topk(queries.at(slice(4)), rows.part(0, 50), k)  # another size is the same kernel
    assert (backend.searches, fallback.searches) == (3, 0)
    tried.general_topk(queries, rows, k + 1)
    assert backend.searches == 5
    tried.general_topk(*a_search(dtype, limited, dim=8), k)
    assert backend.searches == 7
    tried.general_topk(*a_search(dtype, not limited), k)
    assert backend.searches == 9


def test_default_dtype_and_device_do_not_reach_into_a_trial() -> None:
    queries, rows = a_search()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert trial.try_out(TorchSearch(), queries, rows, 3) is None
    finally:
        torch.set_default_dtype(before)


def test_a_search_that_fails_after_its_trial_is_answered_by_torch() -> None:
    def fails_on_the_bank(queries: Queries, rows: Rows, k: int) -> Found:
        return (fail_at_launch if len(rows.values) == 60 else torch_search)(queries, rows, k)

    backend = Backend(fails_on_the_bank)
    tried, (queries, rows) = TriedSearch(backend, TorchSearch()), a_search()
    with pytest.warns(RuntimeWarning, match="no kernel image") as told:
        assert_same(tried.general_topk(queries, rows, 3), queries, rows, 3)
    assert len(told) == 1
    assert_same(tried.general_topk(queries, rows, 3), queries, rows, 3)
    assert backend.searches == 2


def test_no_memory_and_a_broken_device_are_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Found:
        raise torch.OutOfMemoryError("no memory")

    def broken_device(_: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    queries, rows = a_search()
    tried = TriedSearch(Backend(no_memory), TorchSearch())
    with pytest.raises(torch.OutOfMemoryError):
        tried.general_topk(queries, rows, 3)
    tried.backend = Backend()  # it can still pass the trial
    tried.general_topk(queries, rows, 3)
    tried.backend = Backend(no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        tried.general_topk(queries, rows, 3)
    monkeypatch.setattr(trial, "_synchronize", broken_device)
    for search, error in ((fail_at_launch, "no kernel image"), (torch_search, "illegal memory access")):
        with pytest.raises(RuntimeError, match=error):
            TriedSearch(Backend(search), TorchSearch()).general_topk(queries, rows, 3)


def test_while_a_graph_is_captured_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = a_search()
    backend = Backend()
    tried = TriedSearch(backend, TorchSearch())
    monkeypatch.setattr(trial, "_is_capturing", lambda device: True)
    with pytest.warns(RuntimeWarning, match="Search once before the capture"):
        assert_same(tried.general_topk(queries, rows, 3), queries, rows, 3)
    assert backend.searches == 0
    monkeypatch.setattr(trial, "_is_capturing", lambda device: False)
    tried.general_topk(queries, rows, 3)
    monkeypatch.setattr(trial, "_is_capturing", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried.general_topk(queries, rows, 3)
        assert backend.searches == 3
        backend.search = fail_at_launch
        with pytest.raises(RuntimeError, match="no kernel image"):
            tried.general_topk(queries, rows, 3)


# Triton itself, in its interpreter

triton = pytest.mark.skipif(available_backends("cpu")["triton"] is not None, reason="Triton's interpreter is needed")


@triton
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_tritons_kernels_pass(dtype: torch.dtype) -> None:
    queries, rows = a_search(dtype, limited=dtype == torch.int8)
    queries = queries._replace(own=torch.arange(10)[:, None])
    assert trial.try_out(load_backend("triton"), queries, rows, 3) is None


@triton
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_auto_uses_torch_where_tritons_kernels_do_not_start_and_triton_itself_stays_strict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("msf_core.search.triton_backend._launch", fail_at_launch)
    queries, rows = a_search()
    auto.tried_triton.cache_clear()
    tried = auto.tried_triton()
    with pytest.warns(RuntimeWarning, match="TritonSearch does not work .*TorchSearch searches them instead"):
        assert_same(tried.general_topk(queries, rows, 3), queries, rows, 3)
    assert auto.tried_triton() is tried
    auto.tried_triton.cache_clear()
    with pytest.raises(RuntimeError, match="no kernel image"):
        load_backend("triton").topk(queries.values, rows.values, 3)
