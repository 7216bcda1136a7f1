"""mean_shift_loss and MeanShiftLoss against the paper, BYOL and a search in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from msf_core import MeanShiftLoss, MemoryBank, Neighbors, available_backends, mean_shift_loss, reference
from msf_core.loss import _MeanShift
from msf_core.schedules import linear
from msf_core.search.torch_backend import TorchSearch

BACKENDS = tuple(name for name, reason in available_backends("cpu").items() if reason is None)
QUICK_BACKENDS = tuple(name for name in BACKENDS if name != "triton")  # its interpreter is a hundred times slower
ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUT_DTYPES = (*ROW_DTYPES, torch.float64)
# Loss and gradient against float64, by the dtype that rounds last: the arithmetic is float32 for all of them.
VALUE = {"rtol": 1e-5, "atol": 2e-6}
GRADIENT = {
    torch.float64: {"rtol": 1e-4, "atol": 2e-6},
    torch.float32: {"rtol": 1e-4, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A bank with a history, and one batch for it."""

    batch: int = 7
    dim: int = 33
    size: int = 13
    k: int = 5
    filled: int = 40  # rows pushed before: 0 empty, below size partial, size full, above it wrapped
    backend: str = "torch"
    row_dtype: torch.dtype = torch.float32
    input_dtype: torch.dtype = torch.float32
    seed: int = 0

    def bank(self) -> MemoryBank:
        bank = MemoryBank(self.size, self.dim, dtype=self.row_dtype, backend=self.backend)
        bank.push(self._random(self.filled, 1), torch.arange(self.filled))
        return bank

    def batch_of(self) -> tuple[Tensor, Tensor]:
        """Prediction, with gradient, and target."""
        v, u = self._random(self.batch, 2).to(self.input_dtype), self._random(self.batch, 3).to(self.input_dtype)
        return v.requires_grad_(), u

    def _random(self, rows: int, salt: int) -> Tensor:
        return torch.randn(rows, self.dim, generator=torch.Generator().manual_seed(4 * self.seed + salt))


@st.composite
def cases(draw: st.DrawFn, backends: tuple[str, ...] = QUICK_BACKENDS, **fixed: Any) -> Case:
    size = draw(st.integers(1, 50) | st.just(13))
    drawn: dict[str, Any] = {
        "batch": draw(st.integers(1, 20) | st.just(7)),
        "dim": draw(st.integers(2, 65) | st.just(33)),
        "size": size,
        "k": draw(st.integers(1, min(size, 12))),
        "filled": draw(st.sampled_from([0, size // 2, size, 2 * size + 3])),
        "backend": draw(st.sampled_from(backends)),
        "row_dtype": draw(st.sampled_from(ROW_DTYPES)),
        "input_dtype": draw(st.sampled_from(INPUT_DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }
    return Case(**{**drawn, **fixed})


def loss_and_gradient(loss: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, v)[0]


def byol(v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(reference.byol_loss(v.float(), u.float()), v)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach().float(), dim=1)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)


class NoSearch:
    """A backend that must not be called."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("k = 1 needs no search")


# k = 1 is BYOL.


@given(cases(k=1))
@settings(max_examples=60)
@example(Case(k=1))
def test_k_1_is_byol_to_the_last_bit_in_value_and_gradient(case: Case) -> None:
    v, u = case.batch_of()
    value, gradient = byol(v, u)
    for bank in (None, case.bank()):
        loss = MeanShiftLoss(bank, k=1)(v, u)
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        ours, our_gradient = loss_and_gradient(loss, v)
        assert torch.equal(ours, value)
        assert torch.equal(our_gradient, gradient)


def test_k_1_makes_no_search_and_pushes_all_the_same() -> None:
    case = Case(k=1)
    bank = MemoryBank(case.size, case.dim, backend=NoSearch())
    v, u = case.batch_of()
    loss, found = MeanShiftLoss(bank, k=1)(v, u, return_neighbors=True)
    assert torch.equal(loss, byol(v, u)[0])
    assert len(bank) == case.batch
    assert found.index.tolist() == [[slot] for slot in range(case.batch)]


def test_without_a_bank_the_neighbors_are_u_alone_in_no_slot() -> None:
    v, u = Case().batch_of()
    criterion = MeanShiftLoss(None, k=1)
    _, found = criterion(v, u, torch.arange(7, dtype=torch.int32), return_neighbors=True)
    assert torch.equal(found.embedding, unit(u)[:, None])
    assert found.index.tolist() == [[-1]] * 7
    assert found.similarity.tolist() == [[1.0]] * 7
    assert found.label.tolist() == [[label] for label in range(7)]
    assert found.label.dtype == torch.int64
    assert criterion.steps == 1


def test_a_bank_of_one_row_is_byol() -> None:
    v, u = Case(batch=3).batch_of()
    loss, found = MeanShiftLoss(MemoryBank(1, 33), k=1)(v, u, return_neighbors=True)
    assert torch.equal(loss, byol(v, u)[0])
    assert found.index.tolist() == [[-1], [-1], [0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_row_of_an_empty_bank_is_byol_for_every_k(backend: str) -> None:
    v, u = Case(batch=1).batch_of()
    loss, found = MeanShiftLoss(MemoryBank(13, 33, backend=backend), k=5)(v, u, return_neighbors=True)
    assert torch.equal(loss, byol(v, u)[0])
    assert found.index.tolist() == [[0]]


# Every k gives the paper's loss.


def check_neighbors(bank: MemoryBank, u: Tensor, labels: Tensor, k: int, first: int, found: Neighbors) -> None:
    """Expect u, then the nearest other rows of a float64 search; ``first`` rows were pushed before the batch."""
    batch, n = u.shape[0], len(bank)
    position = torch.arange(first, first + batch)
    slots = torch.where(position >= first + batch - bank.size, position % bank.size, -1)
    used = min(k, n)
    assert [tuple(part.shape) for part in found] == [(batch, used)] * 2 + [(batch, used, bank.dim), (batch, used)]
    assert torch.equal(found.index[:, 0], slots)
    assert torch.equal(found.embedding[:, 0], unit(u))
    assert torch.equal(found.label[:, 0], labels)
    assert torch.equal(found.similarity[:, 0], torch.ones(batch))

    others = found.index[:, 1:]
    assert others.numel() == 0 or 0 <= others.min() <= others.max() < n
    assert not (others == slots[:, None]).any()
    assert all(len(set(row)) == used - 1 for row in others.tolist())
    stored = bank.rows[others].float()
    assert torch.equal(found.embedding[:, 1:], stored if bank.dtype == torch.float32 else F.normalize(stored, dim=2))
    assert torch.equal(found.label[:, 1:], bank.labels[others])

    similarity = (unit(u).to(bank.dtype).double() @ bank.rows[:n].double().T).clamp(max=1)  # [B, n]
    close = {"rtol": 0, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(found.similarity[:, 1:], similarity.gather(1, others), **close)
    here = (slots >= 0).nonzero()[:, 0]
    similarity[here, slots[here]] = -torch.inf
    torch.testing.assert_close(found.similarity[:, 1:], similarity.topk(used - 1, dim=1).values, **close)
    assert (found.similarity.diff(dim=1) <= 0).all()


def reference_of(v: Tensor, u: Tensor, neighbors: Tensor) -> Tensor:
    """Return the mean of the reference over the queries, each with only its neighbors as the bank."""
    k = neighbors.shape[1]
    each = [reference.mean_shift_loss(v[i : i + 1], u[i : i + 1], neighbors[i], k) for i in range(v.shape[0])]
    return torch.stack(each).mean()


@given(cases(BACKENDS))
@settings(max_examples=50)
@example(Case())
@example(Case(row_dtype=torch.bfloat16, backend="faiss"))
@example(Case(batch=20, size=13, filled=0))
@example(Case(batch=3, size=50, filled=0, k=10))
def test_the_neighbors_are_u_and_the_nearest_others_and_the_loss_is_the_reference_of_them(case: Case) -> None:
    bank = case.bank()
    criterion = MeanShiftLoss(bank, case.k)
    v, u = case.batch_of()
    labels = torch.arange(100, 100 + case.batch)
    loss, found = criterion(v, u, labels, return_neighbors=True)
    check_neighbors(bank, u, labels, case.k, case.filled, found)

    value, gradient = loss_and_gradient(loss, v)
    expected = reference_of(v, u, torch.cat([unit(u)[:, None], found.embedding[:, 1:]], dim=1))
    expected_value, expected_gradient = loss_and_gradient(expected, v)
    torch.testing.assert_close(value.double(), expected_value, **VALUE)
    torch.testing.assert_close(gradient, expected_gradient, **GRADIENT[case.input_dtype])
    assert gradient.dtype == v.dtype
    assert -1e-5 <= value <= 4 + 1e-5


@given(cases(BACKENDS, row_dtype=torch.float32, input_dtype=torch.float32))
@settings(max_examples=40)
@example(Case())
@example(Case(backend="faiss", filled=3))
def test_float32_rows_give_the_reference_on_the_rows_after_the_push(case: Case) -> None:
    assume(case.batch <= case.size)  # in a larger batch, some u are not among the rows
    bank = case.bank()
    v, u = case.batch_of()
    loss = MeanShiftLoss(bank, case.k)(v, u)
    rows = bank.rows[: len(bank)]
    ranked = (unit(u).double() @ rows.double().T).sort(dim=1, descending=True).values
    k = min(case.k, len(bank))
    assume(k == len(bank) or (ranked[:, k - 1] - ranked[:, k]).min() > 1e-5)  # a tie has no single answer
    value, gradient = loss_and_gradient(loss, v)
    for formula in (reference.mean_shift_loss, reference.mean_shift_loss_two_matrices):
        expected_value, expected_gradient = loss_and_gradient(formula(v, u, rows, k), v)
        torch.testing.assert_close(value.double(), expected_value, **VALUE)
        torch.testing.assert_close(gradient, expected_gradient, **GRADIENT[torch.float32])


def test_neighbors_by_hand() -> None:
    bank = MemoryBank(4, 2, backend="torch")
    bank.push(torch.tensor([[0.0, 5.0], [-1.0, 0.0], [0.6, 0.8]]), torch.tensor([10, 11, 12]))
    loss, found = MeanShiftLoss(bank, k=3)(
        torch.tensor([[0.0, 3.0]]), torch.tensor([[7.0, 0.0]]), torch.tensor([13]), return_neighbors=True
    )
    assert found.label.tolist() == [[13, 12, 10]]
    assert found.index.tolist() == [[3, 2, 0]]
    # ‖v − z‖² is 2 for (1, 0), 0.4 for (0.6, 0.8) and 0 for (0, 1).
    torch.testing.assert_close(loss, torch.tensor(0.8))


@given(cases())
@settings(max_examples=40)
def test_the_gradient_is_that_of_the_distance_to_the_mean_neighbor(case: Case) -> None:
    v, u = case.batch_of()
    loss, found = MeanShiftLoss(case.bank(), case.k)(v, u, return_neighbors=True)
    z_mean = found.embedding.double().mean(dim=1)
    to_mean = (F.normalize(v.double(), dim=1) - z_mean).pow(2).sum(dim=1).mean()
    expected = torch.autograd.grad(to_mean, v)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], expected, **GRADIENT[case.input_dtype])


@given(cases())
@settings(max_examples=40)
def test_mean_shift_loss_is_the_mean_squared_distance_to_given_neighbors(case: Case) -> None:
    v, _ = case.batch_of()
    z = F.normalize(case._random(case.batch * case.k, 5).view(case.batch, case.k, case.dim), dim=2)
    loss = mean_shift_loss(v, z.to(case.row_dtype))
    distances = (F.normalize(v.double(), dim=1)[:, None] - z.to(case.row_dtype).double()).pow(2).sum(dim=2)
    torch.testing.assert_close(loss.double(), distances.mean(), **VALUE)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_loss_ends_at_0_for_v_equal_to_all_neighbors_and_at_4_opposite_to_them(k: int, sign: int) -> None:
    u = Case(batch=1).batch_of()[1].expand(6, -1)
    loss = MeanShiftLoss(MemoryBank(6, 33), k)(sign * 3 * u, u)
    torch.testing.assert_close(loss, torch.tensor(2.0 - 2 * sign), rtol=0, atol=1e-5)


# What the loss must not depend on.


@given(cases(input_dtype=torch.float32), st.integers(-8, 8), st.integers(-8, 8))
@settings(max_examples=40)
def test_powers_of_two_in_v_and_u_change_nothing_at_all(case: Case, for_v: int, for_u: int) -> None:
    v, u = case.batch_of()
    loss, found = MeanShiftLoss(case.bank(), case.k)(v, u, return_neighbors=True)
    scaled, found_scaled = MeanShiftLoss(case.bank(), case.k)(2.0**for_v * v, 2.0**for_u * u, return_neighbors=True)
    assert torch.equal(loss, scaled)
    for ours, theirs in zip(found, found_scaled, strict=True):
        assert torch.equal(ours, theirs)


@given(cases(row_dtype=torch.float32, input_dtype=torch.float32), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=30)
def test_other_scales_change_the_loss_by_rounding_alone(case: Case, for_v: float, for_u: float) -> None:
    v, u = case.batch_of()
    losses = [MeanShiftLoss(case.bank(), case.k)(a * v, b * u) for a, b in ((1, 1), (for_v, for_u))]
    torch.testing.assert_close(losses[0], losses[1], **VALUE)


@given(cases(row_dtype=torch.float32, input_dtype=torch.float32), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_the_batch_changes_the_loss_by_rounding_alone(case: Case, random: Any) -> None:
    assume(case.batch <= case.size)  # in a larger batch the order decides which rows stay
    v, u = case.batch_of()
    order = random.sample(range(case.batch), case.batch)
    loss = MeanShiftLoss(case.bank(), case.k)(v, u)
    torch.testing.assert_close(MeanShiftLoss(case.bank(), case.k)(v[order], u[order]), loss, **VALUE)


@given(cases())
@settings(max_examples=30)
def test_autocast_changes_neither_loss_nor_gradient_nor_bank(case: Case) -> None:
    v, u = case.batch_of()
    plain = MeanShiftLoss(case.bank(), case.k)
    value, gradient = loss_and_gradient(plain(v, u), v)
    cast = MeanShiftLoss(case.bank(), case.k)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cast(v, u)
    assert loss.dtype == torch.float32
    cast_value, cast_gradient = loss_and_gradient(loss, v)
    assert torch.equal(value, cast_value)
    assert torch.equal(gradient, cast_gradient)
    assert_same_state(cast, state_of(plain))


def test_a_backend_is_never_run_under_autocast() -> None:
    seen = []

    class Recording(TorchSearch):
        def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return super().topk(queries, rows, k)

    with torch.autocast("cpu", torch.bfloat16):
        MeanShiftLoss(MemoryBank(13, 33, backend=Recording()), k=5)(*Case().batch_of())
    assert seen == [(False, False)]


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_every_float_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    v, u = Case(input_dtype=dtype).batch_of()
    loss = MeanShiftLoss(Case().bank(), k=5)(v, u)
    assert torch.equal(loss, MeanShiftLoss(Case().bank(), k=5)(v.float(), u.float()))
    assert torch.autograd.grad(loss, v)[0].dtype == dtype


def test_backends_agree_bit_for_bit_on_the_loss_of_the_same_neighbors() -> None:
    v, u = Case().batch_of()
    losses = [MeanShiftLoss(Case(backend=backend).bank(), k=5)(v, u) for backend in BACKENDS]
    assert all(torch.equal(losses[0], loss) for loss in losses[1:])


# u is its own first neighbor by construction.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_u_comes_first_and_once_where_the_bank_is_full_of_its_duplicates(backend: str, dtype: torch.dtype) -> None:
    bank = MemoryBank(13, 33, dtype=dtype, backend=backend)
    v, u = Case(batch=7).batch_of()
    u = u[:1].repeat(7, 1)  # equal rows inside the batch too
    bank.push(u[:1].repeat(13, 1), torch.arange(13))
    criterion = MeanShiftLoss(bank, k=5)
    labels = torch.arange(100, 107)
    _, found = criterion(v, u, labels, return_neighbors=True)
    check_neighbors(bank, u, labels, 5, 13, found)
    assert torch.equal(found.index[:, 0], torch.arange(7))
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.embedding, unit(u)[:, None].expand(7, 5, 33), rtol=0, atol=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_a_batch_above_the_bank_keeps_the_exact_u_of_rows_that_are_out_again(backend: str, dtype: torch.dtype) -> None:
    bank = MemoryBank(5, 33, dtype=dtype, backend=backend)
    v, u = Case(batch=20).batch_of()
    labels = torch.arange(20)
    loss, found = MeanShiftLoss(bank, k=4)(v, u, labels, return_neighbors=True)
    check_neighbors(bank, u, labels, 4, 0, found)
    assert found.index[:15, 0].tolist() == [-1] * 15
    assert set(found.label[:, 1:].flatten().tolist()) <= set(range(15, 20))
    torch.testing.assert_close(loss.double(), reference_of(v, u, found.embedding).detach(), **VALUE)


def test_k_of_the_whole_bank_takes_every_row_once() -> None:
    bank = Case().bank()
    _, found = MeanShiftLoss(bank, k=13)(*Case().batch_of(), return_neighbors=True)
    assert found.index.sort(dim=1).values.tolist() == [list(range(13))] * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_never_replace_the_exact_u(dtype: torch.dtype) -> None:
    case = Case(row_dtype=dtype)
    bank = case.bank()
    v, u = case.batch_of()
    _, found = MeanShiftLoss(bank, k=5)(v, u, return_neighbors=True)
    assert not torch.equal(bank.rows[found.index[:, 0]].float(), unit(u))
    assert torch.equal(found.embedding[:, 0], unit(u))
    torch.testing.assert_close(found.embedding.norm(dim=2), torch.ones(7, 5))  # others at unit length again


@pytest.mark.parametrize("dtype", ROW_DTYPES)  # rounded rows may be longer than 1
def test_the_similarity_descends_from_u_on(dtype: torch.dtype) -> None:
    v, u = Case(batch=16).batch_of()
    u[8:] = u[:8]
    _, found = MeanShiftLoss(MemoryBank(16, 33, dtype=dtype), k=3)(v, u, return_neighbors=True)
    assert (found.similarity.diff(dim=1) <= 0).all()


def test_missing_labels_are_unknown() -> None:
    _, found = MeanShiftLoss(Case(filled=0).bank(), k=5)(*Case().batch_of(), return_neighbors=True)
    assert found.label.unique().tolist() == [-1]


# k over time, and the count of steps.


def test_while_fewer_than_k_rows_are_filled_those_there_serve() -> None:
    bank = MemoryBank(13, 33)
    criterion = MeanShiftLoss(bank, k=5)
    widths = []
    for seed in range(4):
        v, u = Case(batch=2, seed=seed).batch_of()
        loss, found = criterion(v, u, return_neighbors=True)
        widths.append(found.index.shape[1])
        expected = reference.mean_shift_loss(v, u, bank.rows[: len(bank)], widths[-1])
        torch.testing.assert_close(loss.double(), expected, **VALUE)
    assert widths == [2, 4, 5, 5]


def test_a_schedule_of_k_is_rounded_at_every_training_step() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return [1.0, 2.4, 2.6, 4.5, 5.0][step]

    criterion = MeanShiftLoss(Case().bank(), schedule)
    widths = [criterion(*Case().batch_of(), return_neighbors=True)[1].index.shape[1] for _ in range(5)]
    assert widths == [1, 2, 3, 4, 5]
    assert asked == [0, 1, 2, 3, 4]


def test_eval_mode_pushes_nothing_counts_nothing_and_still_puts_u_first() -> None:
    criterion = MeanShiftLoss(Case().bank(), k=linear(4, 1, steps=3)).eval()
    before = state_of(criterion)
    v, u = Case().batch_of()
    loss, found = criterion(v, u, torch.arange(7), return_neighbors=True)
    assert_same_state(criterion, before)
    assert criterion.steps == 0
    assert found.index.shape == (7, 4)
    assert found.index[:, 0].tolist() == [-1] * 7
    assert torch.equal(found.embedding[:, 0], unit(u))
    nearest = (unit(u) @ criterion.bank.rows.T).topk(3).indices
    assert torch.equal(found.index[:, 1:], nearest)
    torch.testing.assert_close(loss.double(), reference_of(v, u, found.embedding).detach(), **VALUE)


def test_eval_mode_with_an_empty_bank_is_byol() -> None:
    v, u = Case().batch_of()
    assert torch.equal(MeanShiftLoss(MemoryBank(13, 33), k=5).eval()(v, u), byol(v, u)[0])


@pytest.mark.parametrize("filled", [1, 3, 4])
def test_eval_mode_with_fewer_than_k_rows_uses_all_of_them(filled: int) -> None:
    bank = Case(filled=filled).bank()
    _, found = MeanShiftLoss(bank, k=5).eval()(*Case().batch_of(), return_neighbors=True)
    assert found.index[:, 1:].sort(dim=1).values.tolist() == [list(range(filled))] * 7


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_saved_in_the_middle_and_loaded_it_goes_on_bit_equal(tmp_path: Any, dtype: torch.dtype) -> None:
    case = Case(size=23, row_dtype=dtype, filled=0)

    def made() -> MeanShiftLoss:
        return MeanShiftLoss(MemoryBank(case.size, case.dim, dtype=dtype), k=linear(1, 9, steps=7))

    def step(criterion: MeanShiftLoss, seed: int) -> tuple[Tensor, Neighbors]:
        return criterion(*dataclasses.replace(case, seed=seed).batch_of(), return_neighbors=True)

    criterion = made()
    for seed in range(4):
        step(criterion, seed)
    torch.save(criterion.state_dict(), tmp_path / "criterion.pt")
    resumed = made()
    resumed.load_state_dict(torch.load(tmp_path / "criterion.pt", weights_only=True), strict=True)
    assert resumed.steps == 4
    for seed in range(4, 9):
        (loss, found), (resumed_loss, resumed_found) = step(criterion, seed), step(resumed, seed)
        assert torch.equal(loss, resumed_loss)
        assert torch.equal(found.index, resumed_found.index)
    assert resumed.steps == 9
    assert found.index.shape[1] == 9


def test_without_a_bank_the_state_is_the_step_count_alone() -> None:
    criterion = MeanShiftLoss(None, k=1)
    criterion(*Case().batch_of())
    resumed = MeanShiftLoss(None, k=1)
    resumed.load_state_dict(criterion.state_dict(), strict=True)
    assert resumed.steps == 1
    assert len(criterion.state_dict()) == 1


def test_repr_tells_k_and_the_bank() -> None:
    text = repr(MeanShiftLoss(MemoryBank(13, 33), k=5))
    assert "k=5" in text
    assert "MemoryBank(size=13, dim=33" in text


# Gradients, and rows that are not finite.


@pytest.mark.parametrize("k", [1, 5])
def test_no_gradient_reaches_target_or_bank(k: int) -> None:
    bank = Case().bank()
    v, u = Case().batch_of()
    u.requires_grad_()
    loss, found = MeanShiftLoss(bank, k)(v, u, return_neighbors=True)
    loss.backward()
    assert u.grad is None
    assert v.grad is not None
    assert v.grad.abs().max() > 0
    assert not any(part.requires_grad for part in (*found, *bank.state_dict().values()))


def test_no_gradient_reaches_given_neighbors() -> None:
    z = F.normalize(torch.randn(7, 5, 33), dim=2).requires_grad_()
    v = torch.randn(7, 33, requires_grad=True)
    mean_shift_loss(v, z).backward()
    assert z.grad is None
    assert v.grad is not None


def test_a_prediction_without_gradient_gives_a_loss_without_one() -> None:
    v, u = Case().batch_of()
    assert not MeanShiftLoss(Case().bank(), k=5)(v.detach(), u).requires_grad


def test_later_pushes_do_not_disturb_the_backward_of_earlier_losses() -> None:
    criterion = MeanShiftLoss(Case().bank(), k=5)
    v, u = Case().batch_of()
    loss = criterion(v, u)
    expected = torch.autograd.grad(loss, v, retain_graph=True)[0]
    for seed in range(1, 4):
        criterion(*Case(seed=seed).batch_of())
    assert torch.equal(torch.autograd.grad(loss, v)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nobodys_neighbor_now_or_later(backend: str, bad: float) -> None:
    bank = Case(backend=backend).bank()
    criterion = MeanShiftLoss(bank, k=13)
    v, u = Case().batch_of()
    u[2, 4] = bad
    _, found = criterion(v, u, return_neighbors=True)
    fine = [0, 1, 3, 4, 5, 6]
    slot = int(found.index[2, 0])
    assert bank.nonfinite == 1
    assert not (found.index[fine] == slot).any()
    assert found.embedding[fine].isfinite().all()
    loss, found = criterion(*Case(batch=3, seed=1).batch_of(), return_neighbors=True)
    assert loss.isfinite()
    assert not (found.index == slot).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_fewer_than_k_finite_rows_are_there_u_stands_in(backend: str) -> None:
    bank = MemoryBank(13, 33, backend=backend)
    bank.push(torch.full((11, 33), torch.nan))
    v, u = Case(batch=2).batch_of()
    loss, found = MeanShiftLoss(bank, k=5)(v, u, torch.tensor([3, 4]), return_neighbors=True)
    assert found.index.tolist() == [[11, 12, -1, -1, -1], [12, 11, -1, -1, -1]]
    assert found.label.tolist() == [[3, 4, -1, -1, -1], [4, 3, -1, -1, -1]]
    assert found.similarity[:, 2:].tolist() == [[-torch.inf] * 3] * 2
    assert torch.equal(found.embedding[:, 2:], unit(u)[:, None].expand(2, 3, 33))
    torch.testing.assert_close(loss.double(), reference_of(v, u, found.embedding).detach(), **VALUE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_eval_mode_u_stands_in_too_and_is_no_row_of_the_bank(backend: str) -> None:
    bank = MemoryBank(13, 33, backend=backend)
    bank.push(torch.cat([Case(batch=2, seed=1).batch_of()[1], torch.full((9, 33), torch.nan)]))
    v, u = Case().batch_of()
    _, found = MeanShiftLoss(bank, k=5).eval()(v, u, return_neighbors=True)
    assert found.index[:, [0, 3, 4]].tolist() == [[-1, -1, -1]] * 7
    assert found.index[:, 1:3].sort(dim=1).values.tolist() == [[0, 1]] * 7
    assert torch.equal(found.embedding[:, 3:], unit(u)[:, None].expand(7, 2, 33))


@pytest.mark.parametrize("backend", BACKENDS)
def test_u_that_are_out_of_the_bank_again_are_not_taken_for_missing_rows(backend: str) -> None:
    v, u = Case(batch=20).batch_of()
    u[-3:] = torch.nan  # two finite rows are left in the bank, those of u 15 and 16
    _, found = MeanShiftLoss(MemoryBank(5, 33, backend=backend), k=5)(v, u, torch.arange(20), return_neighbors=True)
    assert found.index[:15, [0, 3, 4]].tolist() == [[-1] * 3] * 15
    assert found.label[:15, 1:3].sort(dim=1).values.tolist() == [[15, 16]] * 15
    assert torch.equal(found.embedding[:15, 3:], unit(u)[:15, None].expand(15, 2, 33))


def test_the_gradient_in_closed_form_and_its_own_gradient_are_those_of_finite_differences() -> None:
    for batch, k, dim in ((1, 1, 3), (4, 5, 7)):
        v = (10 * torch.randn(batch, dim, dtype=torch.float64)).requires_grad_()
        z = F.normalize(torch.randn(batch, k, dim, dtype=torch.float64), dim=2)
        assert torch.autograd.gradcheck(_MeanShift.apply, (v, z))
        assert torch.autograd.gradgradcheck(_MeanShift.apply, (v, z))
        scaled = torch.autograd.grad(3 * _MeanShift.apply(v, z), v)[0]
        torch.testing.assert_close(scaled, 3 * torch.autograd.grad(_MeanShift.apply(v, z), v)[0])
        by_function = torch.func.grad(lambda v, z=z: mean_shift_loss(v, z))(v.detach())
        torch.testing.assert_close(by_function, scaled / 3, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [0.0, 1e-13, 1e-11])
def test_vectors_too_short_to_normalize_have_the_gradient_of_byol(length: float) -> None:
    v, u = Case().batch_of()
    v = (length * unit(v)).requires_grad_()
    _, expected = byol(v, u)
    loss = MeanShiftLoss(None, k=1)(v, u)
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], expected, rtol=0, atol=0)


def test_zero_vectors_give_a_finite_loss_and_gradient() -> None:
    v, u = torch.zeros(3, 33, requires_grad=True), torch.zeros(3, 33)
    loss = MeanShiftLoss(Case().bank(), k=5)(v, u)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, v)[0].isfinite().all()


# No waiting for the device: no value of a meta tensor can be read.


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_forward_and_backward_read_no_value_back(row_dtype: torch.dtype) -> None:
    with torch.device("meta"):
        criterion = MeanShiftLoss(MemoryBank(13, 33, dtype=row_dtype, backend="torch"), k=5)
        for batch in (7, 20):  # 20 wraps, and is above the bank's size
            v = torch.randn(batch, 33, requires_grad=True)
            loss, found = criterion(v, torch.randn(batch, 33), torch.arange(batch), return_neighbors=True)
            loss.backward()
            assert v.grad is not None
            assert found.index.shape == (batch, 5)
        with pytest.raises(RuntimeError, match="meta"):  # reading a value is detected
            loss.item()


# Errors name what is wrong, before anything changes.


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


V = torch.ones(2, 3)
CONSTRUCTION = {
    "k 0": (lambda: MeanShiftLoss(MemoryBank(4, 3), 0), ValueError, "k must be between 1 .* 4, got 0"),
    "k negative": (lambda: MeanShiftLoss(MemoryBank(4, 3), -2), ValueError, "k must .* got -2"),
    "k above the bank": (lambda: MeanShiftLoss(MemoryBank(4, 3), 5), ValueError, "k must .* 4, got 5"),
    "k without a bank": (lambda: MeanShiftLoss(None), ValueError, "bank=None .* got k=5"),
    "schedule without a bank": (lambda: MeanShiftLoss(None, linear(1, 1, 1)), ValueError, "bank=None"),
    "k a float": (lambda: MeanShiftLoss(MemoryBank(4, 3), 2.0), TypeError, "k must .* got 2.0"),
    "k a bool": (lambda: MeanShiftLoss(MemoryBank(4, 3), True), TypeError, "k must .* got True"),
    "k text": (lambda: MeanShiftLoss(MemoryBank(4, 3), "5"), TypeError, "k must .* got '5'"),
    "k None": (lambda: MeanShiftLoss(MemoryBank(4, 3), None), TypeError, "k must .* got None"),
}
FORWARD = {
    "prediction one row": ((V[0], V), ValueError, r"prediction must be \[B, D\].* got \[3\]"),
    "prediction 3d": ((V[None], V[None]), ValueError, r"prediction must .* got \[1, 2, 3\]"),
    "batch empty": ((V[:0], V[:0]), ValueError, r"prediction must .* got \[0, 3\]"),
    "prediction whole": ((V.long(), V), TypeError, "prediction must be floating point, got torch.int64"),
    "prediction complex": ((V.cfloat(), V), TypeError, "prediction must be floating point, got torch.complex64"),
    "target's batch": ((V, V[:1]), ValueError, r"target must be \[2, 3\] .* got \[1, 3\]"),
    "target's dim": ((V, V[:, :2]), ValueError, r"target must be \[2, 3\] .* got \[2, 2\]"),
    "target whole": ((V, V.int()), TypeError, "target must be floating point, got torch.int32"),
    "target elsewhere": ((V, meta(2, 3)), ValueError, "target must .* cpu, got meta"),
    "all but the bank elsewhere": ((meta(2, 3), meta(2, 3)), ValueError, "target must .* bank's device.* got meta"),
    "bank's dim": ((V[:, :2], V[:, :2]), ValueError, r"target must .* dim=3, got \[2, 2\]"),
    "labels' length": ((V, V, torch.arange(3)), ValueError, r"labels must be \[2\].* got \[3\]"),
    "labels 2d": ((V, V, torch.zeros(2, 1).long()), ValueError, r"labels must be \[2\].* got \[2, 1\]"),
    "labels floating": ((V, V, torch.ones(2)), TypeError, "labels must be integers, got torch.float32"),
    "labels bool": ((V, V, torch.ones(2).bool()), TypeError, "labels must be integers, got torch.bool"),
    "labels elsewhere": ((V, V, meta(2).long()), ValueError, "labels must .* cpu, got meta"),
}
BARE = {
    "prediction one row": ((V[0], V[:, None]), ValueError, r"prediction must .* got \[3\]"),
    "batch empty": ((V[:0], V[:0, None]), ValueError, r"prediction must .* got \[0, 3\]"),
    "prediction whole": ((V.long(), V[:, None]), TypeError, "prediction must be floating point, got torch.int64"),
    "neighbors 2d": ((V, V), ValueError, r"neighbors must be \[B, k, D\].* \[2, 3\], got \[2, 3\]"),
    "no neighbor": ((V, V[:, None][:, :0]), ValueError, r"neighbors must .* got \[2, 0, 3\]"),
    "neighbors' batch": ((V, V[:1, None]), ValueError, r"neighbors must .* got \[1, 1, 3\]"),
    "neighbors' dim": ((V, V[:, None, :2]), ValueError, r"neighbors must .* got \[2, 1, 2\]"),
    "neighbors whole": ((V, V[:, None].long()), TypeError, "neighbors must be floating point, got torch.int64"),
    "neighbors elsewhere": ((V, meta(2, 1, 3)), ValueError, "neighbors must .* cpu, got meta"),
}


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION.keys())
def test_a_criterion_that_makes_no_sense_is_refused(make: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("arguments", "error", "message"), FORWARD.values(), ids=FORWARD.keys())
def test_a_batch_that_does_not_fit_is_refused_and_changes_nothing(
    arguments: tuple, error: type[Exception], message: str, k: int
) -> None:
    criterion = MeanShiftLoss(MemoryBank(4, 3), k)
    criterion(V, torch.eye(3)[:2], torch.tensor([1, 2]))
    before = state_of(criterion)
    with pytest.raises(error, match=message):
        criterion(*arguments)
    assert_same_state(criterion, before)
    assert criterion.steps == 1
    assert len(criterion.bank) == 2
    assert criterion(V, V).isfinite()


@pytest.mark.parametrize("name", [name for name in FORWARD if "bank" not in name])
def test_a_batch_that_does_not_fit_is_refused_without_a_bank_too(name: str) -> None:
    arguments, error, message = FORWARD[name]
    criterion = MeanShiftLoss(None, k=1)
    with pytest.raises(error, match=message):
        criterion(*arguments)
    assert criterion.steps == 0


@pytest.mark.parametrize("k", [0, 0.4, 4.6, -3])
def test_a_schedule_out_of_range_is_refused_before_anything_is_pushed(k: float) -> None:
    criterion = MeanShiftLoss(MemoryBank(4, 3), lambda step: k if step else 2)
    criterion(V, V)
    before = state_of(criterion)
    with pytest.raises(ValueError, match=f"k must be between 1 and the bank's size, 4, got {round(k)}"):
        criterion(V, V)
    assert_same_state(criterion, before)


def test_a_backend_that_no_longer_works_is_told_before_anything_is_pushed() -> None:
    criterion = MeanShiftLoss(MemoryBank(4, 3), k=2)
    criterion.bank.backend = "unheard of"
    before = state_of(criterion)
    with pytest.raises(ValueError, match="unheard of"):
        criterion(V, V)
    assert_same_state(criterion, before)


@pytest.mark.parametrize(("arguments", "error", "message"), BARE.values(), ids=BARE.keys())
def test_mean_shift_loss_refuses_what_does_not_fit(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_shift_loss(*arguments)


def test_any_object_with_topk_serves_as_backend_and_gets_the_rows_where_they_lie() -> None:
    seen = []

    class Recording(TorchSearch):
        def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
            seen.append((rows.data_ptr(), rows.shape, queries.dtype, k))
            return super().topk(queries, rows, k)

    bank = MemoryBank(13, 33, dtype=torch.float16, backend=Recording())
    v, u = Case().batch_of()
    MeanShiftLoss(bank, k=5)(v, u)
    assert seen == [(bank.rows.data_ptr(), (7, 33), torch.float16, 5)]


def test_a_target_whose_norm_overflows_is_counted_and_is_no_neighbor() -> None:
    bank = MemoryBank(size=8, dim=4)
    criterion = MeanShiftLoss(bank, k=2)
    loss = criterion(torch.ones(2, 4), torch.tensor([[1e30] * 4, [1.0] * 4]))
    assert int(bank.nonfinite) == 1
    assert loss.isnan()
    _, neighbors = criterion(torch.ones(2, 4), torch.ones(2, 4), return_neighbors=True)
    assert 0 not in neighbors.index
    assert neighbors.embedding.isfinite().all()


@pytest.mark.parametrize("bank", [5, "bank", MemoryBank])
def test_a_bank_that_is_none_is_a_type_error(bank: object) -> None:
    with pytest.raises(TypeError, match="bank must be a MemoryBank or None"):
        MeanShiftLoss(bank, k=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "five"])
def test_a_schedule_that_gives_no_number_is_an_error_before_anything_is_pushed(value: object) -> None:
    bank = MemoryBank(size=8, dim=4)
    criterion = MeanShiftLoss(bank, k=lambda step: value)
    with pytest.raises(ValueError, match="the schedule of k must return a finite number"):
        criterion(torch.ones(2, 4), torch.ones(2, 4))
    assert len(bank) == criterion.steps == 0


def test_arguments_that_are_no_tensors_are_type_errors_that_name_them() -> None:
    criterion, v = MeanShiftLoss(MemoryBank(size=8, dim=4), k=1), torch.ones(2, 4)
    for arguments, name in (((1.0, v), "prediction"), ((v, None), "target"), ((v, v, [1, 2]), "labels")):
        with pytest.raises(TypeError, match=f"{name} must be a tensor"):
            criterion(*arguments)
    with pytest.raises(TypeError, match="neighbors must be a tensor"):
        mean_shift_loss(v, None)
