"""MeanShiftLoss on CUDA: equal to the loss on the CPU and, for k = 1, to BYOL."""

import pytest
import torch
from torch import Tensor

from msf_core import MeanShiftLoss, MemoryBank, available_backends, mean_shift_loss, reference

pytestmark = pytest.mark.gpu

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# For comparisons with the CPU, by the dtype of the prediction.
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},
}


@pytest.fixture
def backend(backend_name: str) -> str:
    return backend_name


def batch(rows: int = 7, dim: int = 33, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v, u = (torch.randn(rows, dim, generator=generator).to(dtype) for _ in range(2))
    return v, u


def bank_of(device: str, dtype: torch.dtype = torch.float32, backend: str = "torch") -> MemoryBank:
    """A bank that has wrapped around, with the same bits on every device: filled on the CPU, then moved."""
    bank = MemoryBank(313, 33, dtype=dtype, backend=backend)
    bank.push(batch(400, seed=9)[0], torch.arange(400))
    return bank.to(device)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("input_dtype", list(TOLERANCE))
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_loss_neighbors_and_gradient_equal_those_of_the_cpu(
    backend: str, dtype: torch.dtype, input_dtype: torch.dtype, k: int
) -> None:
    results = []
    for device in ("cpu", "cuda"):
        v, u = (tensor.to(device) for tensor in batch(dtype=input_dtype))
        v.requires_grad_()
        criterion = MeanShiftLoss(bank_of(device, dtype, backend if device == "cuda" else "torch"), k)
        loss, found = criterion(v, u, return_neighbors=True)
        loss.backward()
        results.append((loss.detach().cpu(), v.grad.cpu(), found.similarity.cpu(), found.embedding[:, 0].cpu()))
        assert loss.device == v.device
        assert v.grad.dtype == input_dtype
    # u may differ between the devices by one float32 rounding, and so, once stored, by one rounding of the rows' dtype.
    rounding = 0 if dtype == torch.float32 else 0.1 * torch.finfo(dtype).eps
    tolerance = TOLERANCE[input_dtype]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=tolerance["rtol"], atol=tolerance["atol"] + rounding)


@pytest.mark.parametrize("input_dtype", list(TOLERANCE))
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_k_1_is_byol_to_the_last_bit_in_value_and_gradient(
    backend: str, dtype: torch.dtype, input_dtype: torch.dtype
) -> None:
    v, u = (tensor.cuda() for tensor in batch(dtype=input_dtype))
    v.requires_grad_()
    byol = reference.byol_loss(v.float(), u.float())
    (byol_gradient,) = torch.autograd.grad(byol, v)
    for bank in (None, bank_of("cuda", dtype, backend)):
        loss = MeanShiftLoss(bank, k=1)(v, u)
        assert torch.equal(loss, byol)
        assert torch.equal(torch.autograd.grad(loss, v)[0], byol_gradient)


def test_float32_rows_give_the_reference_on_the_rows_after_the_push(backend: str) -> None:
    bank = bank_of("cuda", backend=backend)
    v, u = (tensor.cuda() for tensor in batch())
    v.requires_grad_()
    loss = MeanShiftLoss(bank, k=5)(v, u)
    expected = reference.mean_shift_loss(v, u, bank.rows, k=5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=2e-6)
    gradients = [torch.autograd.grad(value, v)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5])
def test_autocast_changes_neither_loss_nor_gradient(backend: str, autocast: torch.dtype, k: int) -> None:
    v, u = (tensor.cuda() for tensor in batch())
    v.requires_grad_()
    plain = MeanShiftLoss(bank_of("cuda", backend=backend), k)(v, u)
    with torch.autocast("cuda", autocast):
        loss = MeanShiftLoss(bank_of("cuda", backend=backend), k)(v, u)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    assert torch.equal(*(torch.autograd.grad(value, v)[0] for value in (loss, plain)))


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_predictions_that_autocast_made_train_their_layer(autocast: torch.dtype) -> None:
    torch.manual_seed(0)
    predictor = torch.nn.Linear(33, 33).cuda()
    criterion = MeanShiftLoss(bank_of("cuda"), k=5)
    with torch.autocast("cuda", autocast):
        v = predictor(batch()[0].cuda())
        assert v.dtype == autocast
        loss = criterion(v, batch()[1].cuda().to(autocast))
    loss.backward()
    assert 0 <= loss <= 4
    assert predictor.weight.grad.isfinite().all()
    assert predictor.weight.grad.abs().max() > 0


def test_tensors_on_different_devices_are_refused_and_change_nothing() -> None:
    criterion = MeanShiftLoss(bank_of("cuda"), k=5)
    v, u = batch()
    labels = torch.arange(7)
    before = {name: tensor.clone() for name, tensor in criterion.state_dict().items()}
    for arguments, message in (
        ((v, u), "target must be on the bank's device, cuda.* got cpu"),
        ((v.cuda(), u), "target must be on the prediction's device, cuda.* got cpu"),
        ((v, u.cuda()), "target must be on the prediction's device, cpu, got cuda"),
        ((v.cuda(), u.cuda(), labels), "labels must be on the device of the embeddings, cuda.* got cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion(*arguments)
    with pytest.raises(ValueError, match=r"neighbors must be on the prediction's device, cuda.* got cpu"):
        mean_shift_loss(v.cuda(), u[:, None])
    for name, tensor in criterion.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_k_beyond_the_backend_is_refused_before_anything_is_pushed() -> None:
    reason = available_backends("cuda")["faiss"]
    if reason is not None:
        pytest.skip(reason)
    bank = MemoryBank(3000, 33, backend="faiss").cuda()
    bank.push(torch.randn(2500, 33, device="cuda"))
    v, u = (tensor.cuda() for tensor in batch())
    with pytest.raises(ValueError, match="2048"):
        MeanShiftLoss(bank, k=2049)(v, u)
    assert len(bank) == 2500


def test_a_criterion_saved_on_cuda_goes_on_bit_equal_there() -> None:
    criterion, resumed = (MeanShiftLoss(bank_of("cuda"), k=5) for _ in range(2))
    criterion(*(tensor.cuda() for tensor in batch(seed=1)))
    resumed.load_state_dict(criterion.state_dict(), strict=True)
    v, u = (tensor.cuda() for tensor in batch(seed=2))
    assert torch.equal(criterion(v, u), resumed(v, u))
    assert resumed.steps == 2
