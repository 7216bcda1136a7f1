"""The reference itself: compared with results by hand, and its two forms with each other."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from msf_core import reference

FORMS = (reference.mean_shift_loss, reference.mean_shift_loss_two_matrices)


def random(rows: int, dim: int, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bank_of(u: Tensor, size: int, seed: int) -> Tensor:
    """Random unit rows with u among them, as after a push."""
    return reference.unit(torch.cat([random(size, u.shape[1], seed), u]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "expected"), [(1, 2.0), (2, 1.2), (3, 0.8), (4, 1.1)])
def test_a_case_by_hand(form, k: int, expected: float) -> None:
    bank = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    # v = (0, 1) is at squared distances 2, 0.4, 0, 2 of u = (1, 0) and of the others, nearest to u first.
    loss = form(torch.tensor([[0.0, 7.0]]), torch.tensor([[0.5, 0.0]]), bank, k)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


@given(st.integers(1, 20), st.integers(2, 65), st.integers(0, 50), st.data())
@settings(max_examples=60)
def test_the_two_forms_agree_in_value_and_gradient(batch: int, dim: int, size: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**31))
    v, u = random(batch, dim, seed).requires_grad_(), random(batch, dim, seed + 1)
    bank = bank_of(u, size, seed + 2)
    k = data.draw(st.integers(1, bank.shape[0]))
    value, other = (form(v, u, bank, k) for form in FORMS)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)
    gradient, other_gradient = (torch.autograd.grad(loss, v)[0] for loss in (value, other))
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-8, atol=1e-12)


@given(st.integers(1, 20), st.integers(2, 65), st.integers(0, 2**31))
@settings(max_examples=30)
@example(7, 33, 0)
def test_k_1_is_byol_in_both_forms(batch: int, dim: int, seed: int) -> None:
    v, u = random(batch, dim, seed), random(batch, dim, seed + 1)
    expected = reference.byol_loss(v, u)
    for form in FORMS:
        torch.testing.assert_close(form(v, u, bank_of(u, 13, seed + 2), 1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_scales_of_v_and_u_and_the_order_of_the_bank_do_not_matter(form) -> None:
    v, u = random(7, 33, 0), random(7, 33, 1)
    bank = bank_of(u, 13, 2)
    shuffled = bank[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(form(3 * v, 0.1 * u, shuffled, 5), form(v, u, bank, 5))


def test_the_slow_form_normalizes_the_bank_too() -> None:
    v, u, bank = random(7, 33, 0), random(7, 33, 1), bank_of(random(7, 33, 1), 13, 2)
    torch.testing.assert_close(reference.mean_shift_loss(v, u, 7 * bank, 5), reference.mean_shift_loss(v, u, bank, 5))


@pytest.mark.parametrize("form", FORMS)
def test_the_bank_and_the_arguments_stay_as_they_were(form) -> None:
    arguments = random(7, 33, 0), random(7, 33, 1), bank_of(random(7, 33, 1), 13, 2)
    before = [tensor.clone() for tensor in arguments]
    form(*arguments, 5)
    assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_matrices_form_runs_at_the_precision_asked_for(dtype: torch.dtype) -> None:
    v, u = random(7, 33, 0), random(7, 33, 1)
    bank = bank_of(u, 13, 2)
    loss = reference.mean_shift_loss_two_matrices(v, u, bank, 20, dtype)
    assert loss.dtype == dtype
    exact = reference.mean_shift_loss_two_matrices(v, u, bank, 20)
    torch.testing.assert_close(loss.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_byol_by_hand_in_the_dtype_of_its_arguments(dtype: torch.dtype) -> None:
    v, u = torch.tensor([[0.0, 2.0], [5.0, 0.0]], dtype=dtype), torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=dtype)
    loss = reference.byol_loss(v, u)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, torch.tensor(3.0, dtype=dtype))  # (2 + 4) / 2
