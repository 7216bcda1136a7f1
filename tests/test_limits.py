"""Searches and losses limited by id or label, against slow loops over a deque."""

from collections import deque
from collections.abc import Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msf_core import MeanShiftLoss, MemoryBank, available_backends
from msf_core.reference import byol_loss
from msf_core.search.torch_backend import TorchSearch

CPU_BACKENDS = [name for name, reason in available_backends("cpu").items() if reason is None]
BACKENDS = ["auto", *(name for name in CPU_BACKENDS if name != "triton")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
Row = tuple[Tensor, int, int, int]  # unit row in float64, label, id, slot


def batch_of(count: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels and ids; −1 occurs among labels and ids."""
    generator = torch.Generator().manual_seed(seed)
    labels, ids = (torch.randint(-1, classes, (count,), generator=generator) for _ in range(2))
    return torch.randn(count, dim, generator=generator), labels, ids


def pushed_beside(bank: MemoryBank, batches: list[int], classes: int, seed: int) -> deque[Row]:
    """Push batches into a bank, and into the deque that it has to equal."""
    model: deque[Row] = deque(maxlen=bank.size)
    for step, count in enumerate(batches):
        rows, labels, ids = batch_of(count, bank.dim, classes, seed + step)
        slots = bank.push(rows, labels, ids)
        for row in zip(rows, labels.tolist(), ids.tolist(), slots.tolist(), strict=True):
            model.append(row)
    return deque(((stored(bank, slot), *rest, slot) for _, *rest, slot in model), maxlen=bank.size)


def stored(bank: MemoryBank, slot: int) -> Tensor:
    scale = 1.0 if bank.scale is None else bank.scale[slot].double()
    return bank.rows[slot].double() * scale


def nearest(
    model: deque[Row], query: Tensor, label: int, own: int, skip: Collection[int] = ()
) -> list[tuple[float, int]]:
    """(similarity, slot) of all rows that may serve, nearest first."""
    allowed = [
        (float(query @ row), slot)
        for row, its_label, its_id, slot in model
        if (label < 0 or its_label == label) and (own < 0 or its_id != own) and slot not in skip
    ]
    return sorted(allowed, reverse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(3, 40),
    batches=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    classes=st.sampled_from([1, 3, 30]),
    by_label=st.booleans(),
    by_id=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_search_finds_the_nearest_of_the_rows_that_a_query_may_find(
    backend: str,
    dtype: torch.dtype,
    size: int,
    batches: list[int],
    classes: int,
    by_label: bool,
    by_id: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    bank = MemoryBank(size, dim=9, dtype=dtype, backend=backend)
    model = pushed_beside(bank, batches, classes, seed)
    k = data.draw(st.integers(1, min(6, len(bank))), label="k")
    queries, labels, ids = batch_of(5, bank.dim, classes, seed + 100)
    found = bank.search(queries, k, labels=labels if by_label else None, exclude_ids=ids if by_id else None)
    kept = torch.float32 if dtype == torch.int8 else dtype
    unit = F.normalize(queries, dim=1).to(kept).double()
    slot_labels = {slot: label for _, label, _, slot in model}
    for i in range(len(queries)):
        expected = nearest(model, unit[i], int(labels[i]) if by_label else -1, int(ids[i]) if by_id else -1)[:k]
        count = len(expected)
        similarity, index = found.similarity[i], found.index[i].tolist()
        torch.testing.assert_close(
            similarity[:count].double(),
            torch.tensor([s for s, _ in expected], dtype=torch.float64).clamp(max=1.0),
            rtol=0,
            atol=1e-5,
        )
        assert len(set(index[:count])) == count
        for slot, told in zip(index[:count], similarity.tolist(), strict=False):
            assert abs(min(float(unit[i] @ stored(bank, slot)), 1.0) - told) < 1e-5
            assert not by_label or labels[i] < 0 or slot_labels[slot] == labels[i]
        assert found.label[i, :count].tolist() == [slot_labels[slot] for slot in index[:count]]
        assert index[count:] == found.label[i, count:].tolist() == [-1] * (k - count)
        assert (similarity[count:] == -torch.inf).all()
        assert (found.embedding[i, count:] == 0).all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(4, 30),
    batches=st.lists(st.integers(0, 25), max_size=3),
    classes=st.sampled_from([1, 2, 20]),
    same_label=st.booleans(),
    exclude_same_id=st.booleans(),
    count=st.integers(1, 9),
    k=st.integers(1, 4),
    views=st.sampled_from([(0, 0), (0, 0), (2, 2), (4, 2), (3, 3), (1, 2), (3, 0), (0, 3)]),
    seed=st.integers(0, 2**31),
)
def test_the_loss_pulls_towards_u_and_the_nearest_rows_that_may_serve(
    training: bool,
    backend: str,
    dtype: torch.dtype,
    size: int,
    batches: list[int],
    classes: int,
    same_label: bool,
    exclude_same_id: bool,
    count: int,
    k: int,
    views: tuple[int, int],
    seed: int,
) -> None:
    """Value and gradient against the paper's formula in float64; 0 views stand for a tensor instead of a list."""
    bank = MemoryBank(size, dim=9, dtype=dtype, backend=backend)
    criterion = MeanShiftLoss(bank, k=k, same_label=same_label, exclude_same_id=exclude_same_id).train(training)
    of_v, of_u = (max(1, number) for number in views)
    targets = [batch_of(count, bank.dim, classes, seed + 50 + j)[0] for j in range(of_u)]
    _, labels, ids = batch_of(count, bank.dim, classes, seed + 50)
    predictions = list(torch.randn(of_v, count, 9, generator=torch.Generator().manual_seed(seed)))
    for prediction in predictions:
        prediction.requires_grad_()
    slots = torch.full((of_u, count), -1)
    if training:
        twin = MemoryBank(size, dim=9, dtype=dtype)
        model = pushed_beside(twin, batches, classes, seed)
        slots = twin.push(torch.cat(targets), labels.repeat(of_u), ids.repeat(of_u)).view(of_u, count)
        for slot, label, own in zip(
            slots.flatten().tolist(), labels.repeat(of_u).tolist(), ids.repeat(of_u).tolist(), strict=True
        ):
            if slot >= 0:
                while any(slot == there for *_, there in model):
                    model.popleft()
                model.append((stored(twin, slot), label, own, slot))
        pushed_beside(bank, batches, classes, seed)
    else:
        model = pushed_beside(bank, batches, classes, seed)
    before = criterion.steps
    loss, neighbors = criterion(
        predictions if views[0] else predictions[0],
        tuple(targets) if views[1] else targets[0],
        labels,
        ids=ids,
        return_neighbors=True,
    )
    if not views[1]:
        neighbors = [neighbors]
    assert criterion.steps == before + training
    assert len(neighbors) == of_u

    kept = torch.float32 if dtype == torch.int8 else dtype
    exact = [prediction.detach().double().requires_grad_() for prediction in predictions]
    there = max(0, min(k - 1, len(bank) - of_u)) if training else min(k - 1, len(bank))
    losses = []
    for j, target in enumerate(targets):
        u = F.normalize(target, dim=1)
        for i in range(count):
            label, own = int(labels[i]) if same_label else -1, int(ids[i]) if exclude_same_id else -1
            others = nearest(model, u[i].to(kept).double(), label, own, skip=slots[:, i].tolist())[:there]
            chosen = [u[i].double()] * (1 + there - len(others))
            z = torch.stack(chosen + [F.normalize(stored(bank, slot), dim=0) for _, slot in others])
            for number, prediction in enumerate(exact):
                if not (all(views) and number == j):
                    losses.append((F.normalize(prediction[i], dim=0) - z).square().sum(dim=1).mean())
            if same_label and labels[i] >= 0:
                there_is = neighbors[j].index[i, 1:] >= 0
                assert (neighbors[j].label[i, 1:][there_is] == labels[i]).all()
        assert torch.equal(neighbors[j].embedding[:, 0], u)
        assert torch.equal(neighbors[j].index[:, 0], slots[j])
    expected = torch.stack(losses).mean()
    assert abs(loss.item() - expected.item()) < 1e-4
    gradients = torch.autograd.grad(loss, predictions, allow_unused=True, materialize_grads=True)
    for ours, paper in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), paper, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_k_1_with_several_views_is_the_mean_of_byols_losses(training: bool) -> None:
    z1, z2, *p = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    for bank in (None, MemoryBank(64, 4)):
        criterion = MeanShiftLoss(bank, k=1).train(training)
        assert criterion(p[:2], [z1, z2]) == torch.stack([byol_loss(p[0], z2), byol_loss(p[1], z1)]).mean()
        pairs = [(p[0], z2), (p[1], z1), (p[2], z1), (p[2], z2)]
        assert criterion(p, [z1, z2]) == torch.stack([byol_loss(v, u) for v, u in pairs]).mean()
        assert criterion(p, z1) == torch.stack([byol_loss(v, z1) for v in p]).mean()
        assert criterion([p[0]], z1) == criterion(p[0], z1) == byol_loss(p[0], z1)
        if bank is not None:
            assert len(bank) == 6 * training * (2 + 2 + 1 + 1 + 1)


def test_the_views_of_an_image_are_not_each_others_neighbors() -> None:
    """In two calls they are, because they are nearly equal."""
    generator = torch.Generator().manual_seed(0)
    images, ids = torch.randn(8, 16, generator=generator), torch.arange(8)
    z1, z2 = (images + 0.01 * torch.randn(8, 16, generator=generator) for _ in range(2))
    in_two_calls = MeanShiftLoss(MemoryBank(64, 16), k=2)
    in_two_calls(z2, z1, ids)
    assert torch.equal(in_two_calls(z1, z2, ids, return_neighbors=True)[1].label[:, 1], ids)
    for of_view in MeanShiftLoss(MemoryBank(64, 16), k=2)([z1, z2], [z1, z2], ids, return_neighbors=True)[1]:
        assert (of_view.label[:, 0] == ids).all()
        assert (of_view.label[:, 1] != ids).all()


Z = torch.ones(2, 3)
NO_VIEWS = {
    "no prediction": (([], Z), ValueError, "prediction .* empty list"),
    "no target": ((Z, []), ValueError, "target .* empty list"),
    "nothing to pair": (([Z], [Z]), ValueError, "leave no pair"),
    "another batch": (([Z, Z[:1]], [Z, Z]), ValueError, r"prediction\[1\] must be \[2, 3\] .* got \[1, 3\]"),
    "another dim": (([Z, Z], [Z, Z[:, :2]]), ValueError, r"target\[1\] must be \[2, 3\] .* got \[2, 2\]"),
    "a whole view": (([Z, Z], [Z, Z.long()]), TypeError, r"target\[1\] must be floating"),
    "elsewhere": (([Z, Z.to("meta")], Z), ValueError, r"prediction\[1\] must be on .* cpu, got meta"),
    "no tensor": (([Z, 1.0], Z), TypeError, r"prediction\[1\] must be a tensor, got float"),
    "text": (("ab", Z), TypeError, "prediction must be a tensor or a list of tensors, got str"),
    "labels of all views": (([Z, Z], [Z, Z], torch.arange(4)), ValueError, r"labels must be \[2\]"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), NO_VIEWS.values(), ids=NO_VIEWS.keys())
def test_views_that_do_not_fit_are_refused_and_change_nothing(
    arguments: tuple, error: type[Exception], message: str
) -> None:
    criterion = MeanShiftLoss(MemoryBank(8, 3), 2)
    criterion(Z, Z)
    before = {name: part.clone() for name, part in criterion.state_dict().items()}
    with pytest.raises(error, match=message):
        criterion(*arguments)
    after = criterion.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


class Plain:
    """A user's backend that has only topk."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return TorchSearch().topk(queries, rows, k)


def test_a_users_backend_is_limited_too() -> None:
    bank = MemoryBank(64, 4, backend=Plain())
    rows, labels, ids = batch_of(64, 4, 5, seed=0)
    bank.push(rows, labels, ids)
    found = bank.search(rows, 3, labels=labels, exclude_ids=ids)
    expected = MemoryBank(64, 4, backend="torch")
    expected.push(rows, labels, ids)
    assert torch.equal(found.index, expected.search(rows, 3, labels=labels, exclude_ids=ids).index)


def test_ids_are_kept_from_the_first_ones_on_and_unknown_before() -> None:
    bank = MemoryBank(6, 3)
    rows = torch.randn(4, 3)
    bank.push(rows)
    assert bank.ids is None
    without = bank.nbytes
    assert "ids" not in bank.state_dict()
    bank.push(rows[:1], ids=torch.tensor([7], dtype=torch.int32))
    assert bank.ids is not None
    assert bank.ids.tolist() == [-1, -1, -1, -1, 7, -1]
    assert bank.nbytes == without + 6 * 8
    bank.push(rows[:2])
    assert bank.ids.tolist() == [-1, -1, -1, -1, 7, -1]
    bank.clear()
    assert bank.ids.tolist() == [-1] * 6


def test_older_views_of_an_image_do_not_serve() -> None:
    """Every image comes many times, always close to itself: without ids it is its own neighbor."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(10, 16, generator=generator), dim=1)
    ids = torch.arange(10)
    purity = {}
    for exclude in (False, True):
        criterion = MeanShiftLoss(MemoryBank(200, 16), k=5, exclude_same_id=exclude)
        for _ in range(8):
            u = images + 0.01 * torch.randn(10, 16, generator=generator)
            _, neighbors = criterion(u, u, ids, ids=ids, return_neighbors=True)
        purity[exclude] = float((neighbors.label[:, 1:] == ids[:, None]).float().mean())
    assert purity == {False: 1.0, True: 0.0}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("kept_before", [True, False])
def test_states_with_and_without_ids_load_into_banks_that_keep_them_or_not(keeps: bool, kept_before: bool) -> None:
    saved = MemoryBank(5, 3)
    rows, labels, ids = batch_of(8, 3, 100, seed=1)
    saved.push(rows, labels, ids if kept_before else None)
    bank = MemoryBank(5, 3)
    bank.push(rows.flip(0), ids=ids.flip(0) if keeps else None)
    bank.load_state_dict(saved.state_dict())
    if kept_before:
        assert torch.equal(bank.ids, saved.ids)
        assert sorted(bank.ids.tolist()) == sorted(ids[3:].tolist())
    elif keeps:
        assert bank.ids.tolist() == [-1] * 5
    else:
        assert bank.ids is None
    smaller = MemoryBank(3, 3)
    smaller.load_state_dict(saved.state_dict())
    assert (smaller.ids is not None) == kept_before
    if kept_before:
        assert smaller.ids.tolist() == ids[5:].tolist()


def filled() -> MemoryBank:
    bank = MemoryBank(8, 3)
    rows, labels, ids = batch_of(6, 3, 4, seed=2)
    bank.push(rows, labels, ids)
    return bank


class OfAnotherKind(Plain):
    """A user's backend in a class whose ``search`` means something else, as that of a FAISS index does."""

    def search(self, queries: Tensor, k: int) -> None:
        raise AssertionError("this must not be called")


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, pytest.param(OfAnotherKind(), id="of another kind")])
def test_labels_and_ids_may_be_columns_of_one_table(backend: Any) -> None:
    rows, labels, ids = batch_of(40, 5, 6, seed=3)
    table = torch.stack([labels, ids], dim=1)
    bank = MemoryBank(40, 5, backend=backend)
    bank.push(rows, table[:, 0], table[:, 1])
    expected = MemoryBank(40, 5, backend="torch")
    expected.push(rows, labels, ids)
    found = bank.search(rows[:9], 3, labels=table[:9, 0], exclude_ids=table[:9, 1])
    assert torch.equal(found.index, expected.search(rows[:9], 3, labels=labels[:9], exclude_ids=ids[:9]).index)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_labels_and_ids_may_be_of_any_integer_dtype(backend: str, dtype: torch.dtype) -> None:
    rows, labels, ids = batch_of(40, 5, 6, seed=3)
    labels, ids = labels.abs(), ids.abs()
    bank, expected = (MemoryBank(40, 5, backend=name) for name in (backend, "torch"))
    bank.push(rows, labels.to(dtype), ids.to(dtype))
    expected.push(rows, labels, ids)
    found = bank.search(rows[:9], 3, labels=labels[:9].to(dtype), exclude_ids=ids[:9].to(dtype))
    assert torch.equal(found.index, expected.search(rows[:9], 3, labels=labels[:9], exclude_ids=ids[:9]).index)


def test_the_loss_keeps_ids_whether_or_not_it_excludes_by_them() -> None:
    assert MeanShiftLoss(MemoryBank(8, 3), 2).bank.ids is None
    assert MeanShiftLoss(MemoryBank(8, 3), 2, exclude_same_id=True).bank.ids.tolist() == [-1] * 8
    for k in (1, 2):
        criterion = MeanShiftLoss(MemoryBank(8, 3), k)
        criterion(Q + 1, Q + 1, ids=IDS + 4)
        assert criterion.bank.ids.tolist() == [4, 4, *[-1] * 6]


def test_a_row_pushed_without_id_has_none_of_the_row_before() -> None:
    bank = MemoryBank(2, 3)
    bank.push(Q + 1, ids=torch.tensor([5, 6]))
    bank.push(Q[:1] + 1)
    assert bank.ids.tolist() == [-1, 6]


def test_ids_of_a_wrong_push_are_not_kept_from_then_on() -> None:
    bank = MemoryBank(8, 3)
    with pytest.raises(ValueError, match="ids must be"):
        bank.push(Q, ids=IDS[:1])
    assert bank.ids is None


def test_all_that_is_kept_moves_with_the_bank() -> None:
    bank = MemoryBank(8, 3, dtype=torch.int8)
    bank.push(Q + 1, ids=IDS)
    bank.to("meta")
    kept = (bank.rows, bank.scale, bank.labels, bank.ids, bank.pushed, bank.nonfinite)
    assert [part.device.type for part in kept] == ["meta"] * 6


def test_any_negative_label_or_id_is_unknown() -> None:
    bank = MemoryBank(4, 4)
    bank.push(torch.eye(4), labels=torch.tensor([-2, 3, 3, 4]), ids=torch.tensor([-5, 6, 7, 8]))
    assert bank.search(torch.eye(4)[:1], 1, exclude_ids=torch.tensor([-5])).index.tolist() == [[0]]
    assert bank.search(torch.eye(4)[3:], 1, labels=torch.tensor([-2])).index.tolist() == [[3]]
    assert bank.search(torch.eye(4)[:1], 4, labels=torch.tensor([3])).index[0, 2:].tolist() == [-1, -1]


def test_ids_kept_from_within_inference_mode_on_take_what_comes_after_it() -> None:
    rows, labels, ids = batch_of(5, 3, 4, seed=4)
    saved = filled().state_dict()
    for first in (lambda bank: bank.push(rows, labels, ids), lambda bank: bank.load_state_dict(saved)):
        bank = MemoryBank(8, 3)
        with torch.inference_mode():
            first(bank)
        slots = bank.push(rows, labels, ids)
        assert torch.equal(bank.ids[slots], ids)


Q, IDS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"ids must be \[2\]", lambda bank: bank.push(Q, ids=IDS[:1])),
        (TypeError, "ids must be integers", lambda bank: bank.push(Q, ids=IDS.float())),
        (TypeError, "ids must be a tensor", lambda bank: bank.push(Q, ids=[1, 2])),
        (ValueError, r"labels must be \[2\]", lambda bank: bank.search(Q, 1, labels=IDS[:1])),
        (TypeError, "exclude_ids must be integers", lambda bank: bank.search(Q, 1, exclude_ids=IDS.bool())),
        (ValueError, "needs the ids", lambda bank: MeanShiftLoss(bank, 2, exclude_same_id=True)(Q, Q)),
        (ValueError, "needs the labels", lambda bank: MeanShiftLoss(bank, 2, same_label=True)(Q, Q)),
        (ValueError, r"ids must be \[2\]", lambda bank: MeanShiftLoss(bank, 2)(Q, Q, ids=IDS[:1])),
        (ValueError, "need a bank", lambda bank: MeanShiftLoss(None, 1, same_label=True)),
        (ValueError, "need a bank", lambda bank: MeanShiftLoss(None, 1, exclude_same_id=True)),
    ],
)
def test_a_wrong_call_names_the_argument_and_changes_nothing(error: type[Exception], message: str, call: Any) -> None:
    bank = filled()
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    with pytest.raises(error, match=message):
        call(bank)
    after = bank.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_excluding_ids_of_a_bank_that_has_none_is_an_error() -> None:
    bank = MemoryBank(8, 3)
    bank.push(Q)
    with pytest.raises(ValueError, match="no ids were pushed"):
        bank.search(Q, 1, exclude_ids=IDS)


def test_the_repr_tells_what_restricts_the_neighbors() -> None:
    assert "k=3, exclude_same_id=True, same_label=True" in repr(
        MeanShiftLoss(MemoryBank(8, 3), 3, exclude_same_id=True, same_label=True)
    )
