"""The criterion and the bank do what users of PyTorch expect of a module, wherever it is made and whoever calls it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from msf_core import (
    EMATarget,
    MeanShiftLoss,
    MemoryBank,
    effective_rank,
    embedding_spread,
    knn_classify,
    mean_shift_loss,
    neighbor_purity,
)
from msf_core.search import registry

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
SIZE, DIM = 6, 3


def batch(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def criterion_of(dtype: torch.dtype = torch.float32, device: str | None = None) -> MeanShiftLoss:
    return MeanShiftLoss(MemoryBank(SIZE, DIM, dtype=dtype, device=device), k=3)


def trained(dtype: torch.dtype = torch.float32) -> MeanShiftLoss:
    criterion = criterion_of(dtype)
    for step in range(3):
        criterion(batch(step), batch(step + 10), torch.arange(4), ids=torch.arange(4))
    return criterion


def next_losses(criterion: MeanShiftLoss) -> list[float]:
    return [criterion(batch(20 + i), batch(30 + i), ids=torch.arange(4)).item() for i in range(3)]


# The meta device.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("made", ["on meta", "on meta, memory by a function of one's own", "here", "moved to meta"])
def test_to_empty_leaves_an_empty_bank_and_no_steps(
    monkeypatch: pytest.MonkeyPatch, made: str, dtype: torch.dtype
) -> None:
    if made.startswith("on meta"):
        with torch.device("meta"):
            criterion = criterion_of(dtype)
            criterion.bank.keep_ids()
    else:
        criterion = trained(dtype)
        if made == "moved to meta":
            criterion.to("meta")
    assert criterion.bank.rows.is_meta == (made != "here")
    empty_like = torch.empty_like

    def filled_with_rubbish(*args: Any, **kwargs: Any) -> Tensor:
        return empty_like(*args, **kwargs).fill_(77)

    monkeypatch.setattr(torch, "empty_like", filled_with_rubbish)
    if "own" in made:
        nn.Sequential(criterion)._apply(lambda part: torch.empty_like(part, device="cpu"))
    else:
        nn.Sequential(criterion).to_empty(device="cpu")
    monkeypatch.undo()

    fresh = criterion_of(dtype)
    fresh.bank.keep_ids()
    assert criterion.steps == 0
    assert len(criterion.bank) == 0
    for name, part in fresh.state_dict().items():
        assert torch.equal(criterion.state_dict()[name], part), name
    assert next_losses(criterion) == next_losses(fresh)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assign_gives_a_bank_on_meta_the_saved_tensors_themselves(dtype: torch.dtype) -> None:
    saved = trained(dtype)
    state = {name: part.clone() for name, part in saved.state_dict().items()}
    with torch.device("meta"):
        criterion = criterion_of(dtype)
    assert criterion.load_state_dict(state, assign=True) == ([], [])
    rows = "bank.int8_rows" if dtype == torch.int8 else "bank.rows"
    assert criterion.bank.rows.data_ptr() == state[rows].data_ptr()
    assert criterion.bank.labels.data_ptr() == state["bank.labels"].data_ptr()
    assert next_losses(criterion) == next_losses(saved)


def test_assign_converts_what_does_not_fit() -> None:
    saved = trained(torch.float32)
    with torch.device("meta"):
        smaller = MeanShiftLoss(MemoryBank(4, DIM, dtype=torch.bfloat16), k=3)
    smaller.load_state_dict(saved.state_dict(), assign=True)
    expected = MemoryBank(4, DIM, dtype=torch.bfloat16)
    expected.load_state_dict(saved.bank.state_dict())
    assert torch.equal(smaller.bank.rows, expected.rows)
    assert torch.equal(smaller.bank.ids, expected.ids)
    assert len(smaller.bank) == 4
    assert smaller.bank.dtype == torch.bfloat16


def test_without_assign_a_bank_on_meta_says_what_to_do_and_so_does_a_state_of_nothing() -> None:
    with torch.device("meta"):
        nothing = criterion_of()
    with pytest.raises(RuntimeError, match=r"bank is on the meta device: call to_empty first, or .* assign=True"):
        nothing.load_state_dict(trained().state_dict())
    with pytest.raises(ValueError, match="bank is on the meta device: call to_empty first"):
        nothing(batch(0), batch(1))
    criterion = trained()
    before = next_losses(trained())
    with pytest.raises(RuntimeError, match="saved buffers are on the meta device and have no values"):
        criterion.load_state_dict(nothing.state_dict(), assign=True)
    assert next_losses(criterion) == before


def test_reset_makes_the_criterion_as_new() -> None:
    for reset in (MeanShiftLoss.reset, MeanShiftLoss.reset_parameters):
        criterion, fresh = trained(), criterion_of()
        reset(criterion)
        assert (criterion.steps, len(criterion.bank)) == (0, 0)
        assert next_losses(criterion) == next_losses(fresh)
    bank = trained().bank
    bank.reset_parameters()
    assert len(bank) == 0
    without_bank = MeanShiftLoss(None, k=1)
    without_bank(batch(0), batch(1))
    without_bank.reset()
    assert without_bank.steps == 0


# Where and with what a module is created.


def test_device_is_where_the_rows_lie() -> None:
    assert MemoryBank(SIZE, DIM, device="meta", dtype=torch.int8).scale.is_meta
    with torch.device("meta"):
        bank = MemoryBank(SIZE, DIM, device=torch.device("cpu"))
    bank.push(batch(0))
    assert len(bank) == 4
    with pytest.raises(RuntimeError, match="nowhere"):
        MemoryBank(SIZE, DIM, device="nowhere")


def test_a_backend_that_works_on_the_gpu_alone_is_not_refused_before_the_bank_has_moved_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def why_not(name: str, device_type: str) -> str | None:
        return None if device_type == "cuda" else "CUDA alone"

    monkeypatch.setattr(registry, "why_not", why_not)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in (None, "meta"):
        MemoryBank(SIZE, DIM, backend="torch", device=device)
    with pytest.raises(ImportError, match="CUDA alone"):
        MemoryBank(SIZE, DIM, backend="torch", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="CUDA alone"):
        MemoryBank(SIZE, DIM, backend="torch")


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_other_libraries_serve(kind: Callable[[int], Any]) -> None:
    bank = MemoryBank(kind(SIZE), kind(DIM))
    criterion = MeanShiftLoss(bank, k=kind(2))
    criterion(batch(0), batch(1))
    assert (type(bank.size), type(bank.dim), type(criterion.k)) == (int, int, int)
    assert bank.search(batch(0), kind(2)).index.shape == (4, 2)
    criterion.k = kind(3)
    assert criterion(batch(2), batch(3), return_neighbors=True)[1].index.shape == (4, 3)


@pytest.mark.parametrize("size", [np.float64(4.0), np.True_, torch.tensor(4.0), "4", None])
def test_what_is_no_whole_number_is_named(size: object) -> None:
    with pytest.raises(TypeError, match="size must be an int, got"):
        MemoryBank(size, DIM)
    with pytest.raises(TypeError, match="k must be an int or a schedule of the step, got"):
        MeanShiftLoss(MemoryBank(SIZE, DIM), k=size)


def test_a_dtype_by_name_is_told_from_the_dtype() -> None:
    with pytest.raises(TypeError, match=r"must be torch.float32, torch.float16, .* got 'float16'"):
        MemoryBank(SIZE, DIM, dtype="float16")


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_made_and_moved_and_fed_in_inference_mode_it_trains_afterwards(dtype: torch.dtype, moves: bool) -> None:
    with torch.inference_mode():
        criterion = criterion_of(dtype)
        if moves:
            criterion.to("meta").to_empty(device="cpu").half()
        criterion(batch(0), batch(1), ids=torch.arange(4))
        u = batch(3)
    expected = criterion_of(dtype)
    expected(batch(0), batch(1), ids=torch.arange(4))
    v, same_v = batch(2).requires_grad_(), batch(2).requires_grad_()
    criterion(v, u).backward()
    expected(same_v, batch(3)).backward()
    assert torch.equal(v.grad, same_v.grad)
    criterion.load_state_dict(trained(dtype).state_dict())
    assert next_losses(criterion) == next_losses(trained(dtype))


# Activation checkpointing.


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["MeanShiftLoss", "MemoryBank.push"])
def test_a_push_inside_activation_checkpointing_is_an_error_and_not_a_second_push(reentrant: bool, what: str) -> None:
    criterion = criterion_of()

    def loss_of(v: Tensor) -> Tensor:
        if what == "MeanShiftLoss":
            return criterion(v, batch(1))
        criterion.bank.push(batch(1))
        return v.square().sum()

    loss = checkpoint(loss_of, batch(0).requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=f"{what} ran twice .* Keep it outside of torch.utils.checkpoint"):
        loss.backward()
    assert len(criterion.bank) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_outside_or_without_a_push_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Also a criterion that a hook calls during backward."""
    for training in (True, False):
        criterion, plain = trained().train(training), trained().train(training)
        v, same_v = batch(0).requires_grad_(), batch(0).requires_grad_()
        plain(same_v * same_v, batch(1)).backward()
        if training:
            prediction = checkpoint(torch.square, v, use_reentrant=reentrant)
            loss = criterion(prediction, batch(1))
        else:
            loss = checkpoint(lambda v, criterion: criterion(v * v, batch(1)), v, criterion, use_reentrant=reentrant)
        loss.backward()
        assert torch.equal(v.grad, same_v.grad)
    seen, v = trained(), batch(0).requires_grad_()
    v.register_hook(lambda gradient: seen(batch(2), batch(3)).detach() * gradient)
    v.sum().backward()
    assert seen.steps == 4


def test_copies_of_data_parallel_push_nothing() -> None:
    criterion = criterion_of()
    replica = criterion._replicate_for_data_parallel()  # what nn.DataParallel makes for each GPU
    bank = criterion.bank._replicate_for_data_parallel()
    for call in (lambda: replica(batch(0), batch(1)), lambda: bank.push(batch(0))):
        with pytest.raises(RuntimeError, match=r"copy that nn.DataParallel makes .*: call it outside"):
            call()
    assert len(criterion.bank) == 0
    assert nn.DataParallel(criterion)(batch(0), batch(1)).isfinite()  # without GPUs that is the module itself
    assert len(criterion.bank) == 4


# Devices without float64.


class NoFloat64(TorchDispatchMode):
    """Refuses what Apple's GPUs refuse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and part.dtype in (torch.float64, torch.complex128):
                raise AssertionError(f"{func} gave {part.dtype}")
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_on_a_device_needs_float64(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        batch(0).double()
    x, labels = batch(0, 40), torch.arange(40) % 4
    online = nn.Linear(DIM, DIM)
    with NoFloat64():
        target = EMATarget(online, momentum=0.5, buffers="ema")
        criterion = MeanShiftLoss(MemoryBank(SIZE, DIM, dtype=dtype), k=3, exclude_same_id=True, same_label=True)
        for training in (True, True, False):
            prediction = online(x)
            loss, found = criterion.train(training)(prediction, target(x), labels, ids=labels, return_neighbors=True)
            loss.backward()
            criterion([prediction.detach(), x], [target(x), x], labels, ids=labels)
            target.update(online)
            neighbor_purity(found.label, labels)
        criterion.bank.age(criterion.bank.search(x, 2, labels=labels, exclude_ids=labels).index)
        mean_shift_loss(x, found.embedding)
        embedding_spread(x)
        effective_rank(x)
        knn_classify(x, x, labels, k=3)
        criterion.load_state_dict(criterion.state_dict())
        criterion.to("cpu").reset()
