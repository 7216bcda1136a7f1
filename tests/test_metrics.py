"""Purity, spread and nearest-neighbor classification against plain loops."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from msf_core import (
    MeanShiftLoss,
    MemoryBank,
    available_backends,
    effective_rank,
    embedding_spread,
    knn_classify,
    neighbor_purity,
)
from msf_core.search.torch_backend import TorchSearch

BACKENDS = tuple(name for name, reason in available_backends("cpu").items() if reason is None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Purity.


def purity_in_a_loop(neighbor_labels: list[list[int]], labels: list[int]) -> float:
    shares = []
    for row, label in zip(neighbor_labels, labels, strict=True):
        known = [other for other in row[1:] if other != -1]
        if label != -1 and known:
            shares.append(sum(other == label for other in known) / len(known))
    return sum(shares) / len(shares) if shares else math.nan


@given(st.integers(1, 20), st.integers(1, 12), st.data())
@settings(max_examples=100)
def test_purity_is_the_share_of_neighbors_2_to_k_with_the_label(batch: int, k: int, data: st.DataObject) -> None:
    label = st.integers(-1, 3)
    labels = data.draw(st.lists(label, min_size=batch, max_size=batch))
    neighbor_labels = data.draw(
        st.lists(st.lists(label, min_size=k, max_size=k), min_size=batch, max_size=batch),
    )
    purity = neighbor_purity(torch.tensor(neighbor_labels), torch.tensor(labels))
    assert purity.dtype == torch.float32
    assert purity.shape == ()
    assert purity.item() == pytest.approx(purity_in_a_loop(neighbor_labels, labels), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("first", [0, 1, -1])
def test_purity_leaves_the_query_itself_out(first: int) -> None:
    assert neighbor_purity(torch.tensor([[first, 1, 0, 1]]), torch.tensor([1])).item() == pytest.approx(2 / 3)


def test_purity_leaves_unknown_neighbors_and_queries_out() -> None:
    neighbor_labels = torch.tensor([[3, 3, -1, 4], [5, -1, -1, -1], [-1, -1, 7, 7], [7, 7, 7, 7]])
    assert neighbor_purity(neighbor_labels, torch.tensor([3, 5, -1, 7])).item() == 0.75


@pytest.mark.parametrize(
    ("neighbor_labels", "labels"),
    [
        ([[1], [2]], [1, 2]),  # k = 1: only the query itself
        ([[1, -1], [2, -1]], [1, 2]),
        ([[-1, 1], [-1, -1]], [-1, -1]),
    ],
)
def test_purity_is_nan_where_no_query_counts(neighbor_labels: list, labels: list) -> None:
    assert neighbor_purity(torch.tensor(neighbor_labels), torch.tensor(labels)).isnan()


def test_purity_of_no_queries_is_nan() -> None:
    assert neighbor_purity(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).isnan()


def test_purity_takes_the_labels_of_the_neighbors_that_the_loss_returns() -> None:
    centres = 10 * torch.eye(3, 33)
    labels = torch.arange(12) % 3
    criterion = MeanShiftLoss(MemoryBank(13, 33), k=4)
    target = centres[labels] + random(12, 33)
    _, found = criterion(random(12, 33, seed=1), target, labels, return_neighbors=True)
    assert neighbor_purity(found.label, labels).item() == 1.0  # four rows of each class, far from the others
    assert neighbor_purity(found.label, labels.roll(1)).item() == 0.0


@pytest.mark.parametrize(
    ("neighbor_labels", "labels"), [((4,), (4,)), ((4, 3), (3,)), ((4, 3), (4, 1)), ((2, 2, 2), (2,)), ((4, 3), ())]
)
def test_purity_refuses_shapes_that_do_not_fit(neighbor_labels: tuple, labels: tuple) -> None:
    with pytest.raises(ValueError, match="neighbor_labels and labels must be") as raised:
        neighbor_purity(torch.ones(neighbor_labels, dtype=torch.int64), torch.ones(labels, dtype=torch.int64))
    assert str(list(neighbor_labels)) in str(raised.value)
    assert str(list(labels)) in str(raised.value)


# Spread.


@given(st.integers(2, 20), st.integers(1, 65), st.integers(0, 2**31), st.floats(-3, 3))
@settings(max_examples=60)
@example(7, 33, 0, 0.0)
def test_spread_is_the_formula(batch: int, dim: int, seed: int, shift: float) -> None:
    x = random(batch, dim, seed=seed) + shift
    rows = x.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = rows.std(axis=0, ddof=1).mean() * math.sqrt(dim)
    spread = embedding_spread(x)
    assert spread.dtype == torch.float32
    assert spread.shape == ()
    assert spread.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.integers(2, 20), st.integers(1, 65), st.integers(0, 2**31))
@settings(max_examples=30)
def test_spread_is_0_at_collapse_whatever_the_lengths(batch: int, dim: int, seed: int) -> None:
    lengths = 1 + torch.arange(batch)[:, None]
    assert embedding_spread(random(1, dim, seed=seed) * lengths).item() == pytest.approx(0, abs=2e-6)


@pytest.mark.parametrize("dim", [2, 33, 256])
def test_spread_is_near_1_for_gaussian_noise(dim: int) -> None:
    assert embedding_spread(random(4000, dim)).item() == pytest.approx(1, abs=0.02)


def test_spread_tells_partial_collapse() -> None:
    x = random(500, 32)
    x[:, 2:] = 0  # two dimensions of 32 are left
    assert 0 < embedding_spread(x).item() < 0.5


def test_spread_does_not_depend_on_the_scale_of_any_row() -> None:
    x = random(13, 33)
    assert torch.equal(embedding_spread(x), embedding_spread(x * 2.0 ** torch.arange(-6, 7)[:, None]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_spread_is_computed_in_float32_for_every_dtype(dtype: torch.dtype) -> None:
    x = random(13, 33).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding_spread(x), embedding_spread(x.float()))


def test_spread_carries_no_gradient() -> None:
    assert not embedding_spread(random(4, 3).requires_grad_()).requires_grad


@pytest.mark.parametrize("shape", [(4,), (1, 4), (0, 4), (2, 3, 4)])
def test_spread_refuses_other_shapes(shape: tuple) -> None:
    with pytest.raises(ValueError, match="embeddings must be") as raised:
        embedding_spread(torch.ones(shape))
    assert str(list(shape)) in str(raised.value)


def test_purity_and_spread_read_no_value_back() -> None:
    with FakeTensorMode():
        purity = neighbor_purity(torch.zeros(7, 5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
        spread = embedding_spread(torch.ones(7, 33))
        assert purity.shape == spread.shape == ()
        for value in (purity, spread):
            with pytest.raises(DataDependentOutputException):  # reading a value is detected
                value.item()


# Classification.


def classify_in_a_loop(queries: Tensor, features: Tensor, labels: list[int], k: int) -> tuple[list[int], float]:
    """Return majority votes, with ties going to the larger sum of similarities, and the margin of the closest one."""
    similarity = (F.normalize(queries.double(), dim=1) @ F.normalize(features.double(), dim=1).T).numpy()
    predicted, margin = [], math.inf
    for row in similarity:
        order = np.argsort(-row, kind="stable")
        if k < len(row):
            margin = min(margin, row[order[k - 1]] - row[order[k]])
        score: dict[int, tuple[int, float]] = {}
        for index in order[:k]:
            count, total = score.get(labels[index], (0, 0.0))
            score[labels[index]] = (count + 1, total + row[index])
        (first, *rest) = sorted(score.items(), key=lambda item: item[1], reverse=True)
        if rest and rest[0][1][0] == first[1][0]:
            margin = min(margin, first[1][1] - rest[0][1][1])
        predicted.append(first[0])
    return predicted, float(margin)


@given(
    queries=st.integers(1, 7),
    n=st.integers(1, 50),
    dim=st.integers(2, 33),
    classes=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 7, 1024]),
    backend=st.sampled_from((*BACKENDS, "auto")),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=40)
def test_the_label_is_a_majority_vote_with_ties_to_the_larger_sum(
    queries: int, n: int, dim: int, classes: int, chunk: int, backend: str, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(n, 20)))
    q, features = random(queries, dim, seed=seed), random(n, dim, seed=seed + 1)
    labels = torch.randint(3, 3 + classes, (n,), generator=torch.Generator().manual_seed(seed))
    expected, margin = classify_in_a_loop(q, features, labels.tolist(), k)
    assume(margin > 1e-4)
    predicted = knn_classify(3 * q, 0.5 * features, labels, k, backend=backend, chunk=chunk)
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_1_nn_finds_every_feature_itself(backend: str, dtype: torch.dtype) -> None:
    features = random(50, 33).to(dtype)
    assert torch.equal(knn_classify(features, features, torch.arange(50), k=1, backend=backend), torch.arange(50))


def test_20_nn_tells_classes_apart_that_are_far_apart() -> None:
    labels = torch.arange(120) % 4
    features = 5 * torch.eye(4, 33)[labels] + random(120, 33)
    queries = 5 * torch.eye(4, 33) + random(4, 33, seed=1)
    assert knn_classify(queries, features, labels).tolist() == [0, 1, 2, 3]  # k = 20 by default


@pytest.mark.parametrize("swapped", [False, True])
def test_a_tie_goes_to_the_larger_sum_of_similarities_not_to_a_smaller_label(swapped: bool) -> None:
    angles = torch.tensor([0.1, 0.4, 0.2, 0.25, 2.0])  # cosines: 0.995 + 0.921 < 0.980 + 0.969
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    near_first, near_together = (8, 2) if swapped else (2, 8)
    labels = torch.tensor([near_first, near_first, near_together, near_together, 5])
    assert knn_classify(torch.tensor([[1.0, 0.0]]), features, labels, k=4).tolist() == [near_together]


def test_a_tie_of_many_votes_is_told_by_small_differences_too() -> None:
    # 500 votes each; those of label 1 are nearer by 1e-6 each, 5e-4 in all.
    angle = torch.cat([torch.full((500,), 0.5), torch.full((500,), 0.5 - 2e-6)])
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.arange(1000) // 500
    assert (features[500:, 0] > features[:500, 0]).all()
    for order in (labels, 1 - labels):
        assert knn_classify(torch.tensor([[1.0, 0.0]]), features, order, k=1000).tolist() == [int(order[-1])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_feature_that_is_not_finite_has_no_vote(backend: str) -> None:
    features = torch.eye(3)
    features[0] = torch.nan
    predicted = knn_classify(torch.tensor([[0.0, 0.5, 1.0]]), features, torch.tensor([0, 1, 1]), k=3, backend=backend)
    assert predicted.tolist() == [1]


def test_more_votes_win_over_any_similarity() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.01], [-1.0, 0.02], [-1.0, 0.03]])
    assert knn_classify(torch.tensor([[1.0, 0.0]]), features, torch.tensor([0, 0, 1, 1, 1]), k=5).tolist() == [1]


class Recording(TorchSearch):
    """Records how many queries come at a time, and with which rows."""

    def __init__(self) -> None:
        self.queries: list[int] = []
        self.rows: set[int] = set()

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.queries.append(queries.shape[0])
        self.rows.add(rows.data_ptr())
        return super().topk(queries, rows, k)


@pytest.mark.parametrize("chunk", [1, 5, 13, 33, 34, 1000])
def test_queries_go_a_chunk_at_a_time_and_every_chunk_size_gives_the_same(chunk: int) -> None:
    queries, features, labels = random(33, 13), random(50, 13, seed=1), torch.arange(50) % 4
    backend = Recording()
    predicted = knn_classify(queries, features, labels, k=7, backend=backend, chunk=chunk)
    assert max(backend.queries) <= chunk
    assert sum(backend.queries) == 33
    assert len(backend.rows) == 1  # the features are normalized once, not for every chunk
    assert torch.equal(predicted, knn_classify(queries, features, labels, k=7, backend=TorchSearch()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_give_no_labels(backend: str) -> None:
    predicted = knn_classify(torch.zeros(0, 3), random(5, 3), torch.arange(5), k=2, backend=backend)
    assert predicted.shape == (0,)
    assert predicted.dtype == torch.int64


def test_labels_of_every_integer_dtype_serve_and_no_gradient_flows() -> None:
    queries, features = random(7, 3).requires_grad_(), random(9, 3, seed=1).requires_grad_()
    expected = knn_classify(queries, features, torch.arange(9), k=3)
    assert not expected.requires_grad
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(knn_classify(queries, features, torch.arange(9).to(dtype), k=3), expected)


Q, ROWS, LABELS = torch.ones(2, 3), torch.eye(3), torch.arange(3)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "queries 1d": (lambda: knn_classify(Q[0], ROWS, LABELS, 1), ValueError, r"queries and features .* got \[3\]"),
    "features 1d": (lambda: knn_classify(Q, ROWS[0], LABELS, 1), ValueError, r"features .* \[2, 3\] and \[3\]"),
    "dimensions": (lambda: knn_classify(Q[:, :2], ROWS, LABELS, 1), ValueError, r"\[2, 2\] and \[3, 3\]"),
    "labels' length": (lambda: knn_classify(Q, ROWS, LABELS[:2], 1), ValueError, r"labels must be \[3\].* got \[2\]"),
    "labels 2d": (lambda: knn_classify(Q, ROWS, LABELS[:, None], 1), ValueError, r"labels must .* got \[3, 1\]"),
    "k 0": (lambda: knn_classify(Q, ROWS, LABELS, 0), ValueError, "k must be between 1 and 3 .* got k=0"),
    "k above n": (lambda: knn_classify(Q, ROWS, LABELS, 4), ValueError, "k must be between 1 and 3 .* got k=4"),
    "the default k above n": (lambda: knn_classify(Q, ROWS, LABELS), ValueError, "got k=20"),
    "no features": (lambda: knn_classify(Q, ROWS[:0], LABELS[:0], 1), ValueError, "k must .* got k=1"),
    "chunk 0": (lambda: knn_classify(Q, ROWS, LABELS, 1, chunk=0), ValueError, "chunk at least 1, .* chunk=0"),
    "unknown label": (lambda: knn_classify(Q, ROWS, LABELS - 1, 1), ValueError, "labels must be 0 or above.* got -1"),
    "backend": (lambda: knn_classify(Q, ROWS, LABELS, 1, backend="nosuch"), ValueError, "'nosuch'"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_classified_is_refused(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_query_that_is_not_finite_has_no_label() -> None:
    queries = torch.tensor([[torch.nan, 1.0], [1.0, 0.0], [torch.inf, 0.0]])
    assert knn_classify(queries, torch.eye(2), torch.tensor([5, 9]), k=1).tolist() == [-1, 5, -1]


def test_metrics_name_what_is_no_tensor() -> None:
    labels = torch.tensor([0])
    with pytest.raises(TypeError, match="neighbor_labels must be a tensor"):
        neighbor_purity([[1]], labels)
    with pytest.raises(TypeError, match="embeddings must be a tensor"):
        embedding_spread([[1.0], [2.0]])
    with pytest.raises(TypeError, match="labels must be a tensor"):
        knn_classify(torch.ones(1, 1), torch.ones(1, 1), None, k=1)


# Effective rank


@given(rows=st.integers(2, 40), dim=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_effective_rank_is_that_of_the_eigenvalues(rows: int, dim: int, seed: int) -> None:
    x = random(rows, dim, seed=seed)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(torch.nn.functional.normalize(x.double(), dim=1).T).view(dim, dim))
    expected = eigenvalues.sum() ** 2 / eigenvalues.square().sum() if eigenvalues.sum() > 1e-9 else torch.zeros(())
    found = effective_rank(x * 7)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(float(expected), rel=1e-4)
    assert 0 <= found.item() <= min(rows - 1, dim) + 1e-4


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_the_effective_rank_counts_directions(directions: int) -> None:
    axes = torch.eye(16)[:directions].repeat_interleave(2, dim=0)
    axes[1::2] *= -1  # each axis both ways: equal variance, no mean
    assert effective_rank(axes).item() == pytest.approx(directions)


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_the_effective_rank_of_embeddings_that_are_nearly_alike_is_not_that_of_their_rounding(scale: float) -> None:
    x = torch.nn.functional.normalize(random(1, 64) + scale * random(40, 64, seed=1), dim=1)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(torch.nn.functional.normalize(x, dim=1).double().T))
    with torch.autocast("cpu", torch.bfloat16):
        found = effective_rank(x)
    assert found.item() == pytest.approx(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()), rel=1e-3)


def test_the_effective_rank_of_one_point_is_0_of_nan_it_is_nan_and_one_row_is_refused() -> None:
    assert effective_rank(random(1, 5).expand(9, 5)).item() == 0
    for bad in (torch.nan, torch.inf):
        assert effective_rank(random(9, 5).index_fill(0, torch.tensor([0, 4]), bad)).isnan()
        assert effective_rank(random(9, 5).index_fill(0, torch.tensor([8]), bad)).isnan()
    with pytest.raises(ValueError, match=r"at least two rows, got \[1, 5\]"):
        effective_rank(torch.ones(1, 5))
