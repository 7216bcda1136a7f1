"""The trial of the Triton backend on the GPU at hand: "auto" uses Triton, and torch where Triton is broken."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msf_core import available_backends
from msf_core.rows import packed, unit_rows
from msf_core.search import Queries, Rows, load_backend
from msf_core.search.auto import AutoSearch, tried_triton
from msf_core.search.trial import TriedSearch

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@pytest.fixture(autouse=True)
def _triton() -> None:
    reason = available_backends("cuda")["triton"]
    if reason is not None:
        pytest.skip(reason)
    tried_triton.cache_clear()


def a_search(dtype: torch.dtype, limited: bool = False) -> tuple[Queries, Rows]:
    made = unit_rows(torch.randn(5064, 96, generator=torch.Generator("cuda").manual_seed(3), device="cuda"))
    values, scale = packed(made[64:], dtype)
    queries, numbers = made[:64].to(torch.float32 if dtype == torch.int8 else dtype), torch.arange(5000, device="cuda")
    if not limited:
        return Queries(queries), Rows(values, scale)
    return Queries(queries, numbers[:64] % 3, numbers[:64]), Rows(values, scale, numbers % 3, numbers)


def assert_right(found: tuple[Tensor, Tensor], queries: Queries, rows: Rows, k: int) -> None:
    expected = load_backend("torch").general_topk(queries, rows, k)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("limited", [False, True], ids=["all rows", "by label and id"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_uses_triton_without_a_warning(dtype: torch.dtype, limited: bool, waiting_is_an_error: Callable) -> None:
    queries, rows = a_search(dtype, limited)
    random = torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with waiting_is_an_error():  # except in the trial
            found = AutoSearch().general_topk(queries, rows, 5)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    triton = load_backend("triton").general_topk(queries, rows, 5)
    assert torch.equal(found[0], triton[0])
    assert torch.equal(found[1], triton[1])
    assert_right(found, queries, rows, 5)


def test_auto_uses_torch_where_a_kernel_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from msf_core.search import triton_backend

    too_large = triton_backend.Tiles(128, 256, 512, warps=8, stages=8)  # more shared memory than any GPU has
    monkeypatch.setattr(triton_backend, "choose_tiles", lambda *_: too_large)
    queries, rows = a_search(torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="TritonSearch does not work"):
        assert_right(AutoSearch().general_topk(queries, rows, 5), queries, rows, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(AutoSearch().general_topk(queries, rows, 5), queries, rows, 5)


def test_a_graph_captured_before_the_trial_holds_the_search_by_torch() -> None:
    queries, rows = a_search(torch.float32)
    tried = TriedSearch(load_backend("triton"), load_backend("torch"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        load_backend("torch").general_topk(queries, rows, 5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(RuntimeWarning, match="Search once before the capture"), torch.cuda.graph(graph):
        found = tried.general_topk(queries, rows, 5)
    graph.replay()
    assert_right(found, queries, rows, 5)
