"""mean_shift_loss and MeanShiftLoss against the paper."""

import torch

from msf_core import MeanShiftLoss, MemoryBank, reference


def test_the_loss_and_its_gradient_equal_the_reference() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(size=300, dim=33)
    bank.push(torch.randn(290, 33))
    v, u = torch.randn(7, 33, requires_grad=True), torch.randn(7, 33)
    loss = MeanShiftLoss(bank, k=5)(v, u)
    expected = reference.mean_shift_loss(v, u, bank.rows, k=5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, v)
    (expected_gradient,) = torch.autograd.grad(expected, v)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
