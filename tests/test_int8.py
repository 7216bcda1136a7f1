"""Int8 rows: how close they are to the pushed rows, how much memory they take, and how they are saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msf_core import MeanShiftLoss, MemoryBank, mean_shift_loss
from msf_core.rows import packed, unpacked


def rows_of(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def floats(bank: MemoryBank) -> Tensor:
    return unpacked(bank.rows, bank.scale)


@given(count=st.integers(1, 30), dim=st.integers(1, 200), power=st.integers(-20, 20), seed=st.integers(0, 2**31))
def test_a_row_is_rounded_by_half_a_step_at_most_and_keeps_its_length(
    count: int, dim: int, power: int, seed: int
) -> None:
    bank = MemoryBank(count, dim, dtype=torch.int8)
    bank.push(rows_of(count, dim, seed) * 2.0**power)
    unit = F.normalize(rows_of(count, dim, seed), dim=1)
    assert bank.rows.dtype == torch.int8
    assert (bank.rows.abs().amax(dim=1) == 127).all()
    torch.testing.assert_close(floats(bank).norm(dim=1), torch.ones(count), rtol=0, atol=1e-6)
    step = unit.abs().amax(dim=1, keepdim=True) / 127
    turned = F.normalize(floats(bank), dim=1) * (bank.rows.float() * step).norm(dim=1, keepdim=True)
    assert ((turned - unit).abs() <= 0.501 * step).all()


def test_a_row_of_zeros_or_of_nan_stays_one() -> None:
    bank = MemoryBank(4, 3, dtype=torch.int8)
    bank.push(torch.tensor([[0.0, 0.0, 0.0], [torch.nan, 1.0, 0.0], [torch.inf, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert int(bank.nonfinite) == 2
    found = bank.search(torch.tensor([[0.0, 2.0, 0.0]]), 4)
    assert found.index.tolist() == [[3, 0, -1, -1]]
    assert found.similarity.tolist() == [[1.0, 0.0, -torch.inf, -torch.inf]]
    assert found.embedding[0].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_million_rows_of_512_dimensions_take_less_than_half_a_gib() -> None:
    with torch.device("meta"):
        bank = MemoryBank(1_024_000, 512, dtype=torch.int8)
    assert bank.nbytes == 1_024_000 * (512 + 4 + 8) < 2**29
    small = MemoryBank(1000, 512, dtype=torch.int8)
    assert "dtype=int8" in repr(small)
    assert f"bytes={1000 * (512 + 4 + 8)}" in repr(small)


@given(count=st.integers(1, 12), dim=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_with_k_1_the_loss_is_byol_to_the_last_bit(count: int, dim: int, seed: int) -> None:
    criterion = MeanShiftLoss(MemoryBank(20, dim, dtype=torch.int8), k=1)
    u = rows_of(count, dim, seed)
    v, other = (rows_of(count, dim, seed + 1).requires_grad_() for _ in range(2))
    loss, byol = criterion(v, u), mean_shift_loss(other, F.normalize(u, dim=1)[:, None])
    assert torch.equal(loss, byol)
    assert torch.equal(*(torch.autograd.grad(x, y)[0] for x, y in ((loss, v), (byol, other))))


def test_neighbors_are_those_of_float32_rows_but_for_near_ties() -> None:
    """Random rows are the hard case; benchmarks/results has the recall on embeddings of a trained encoder."""
    exact, small = MemoryBank(5000, 64), MemoryBank(5000, 64, dtype=torch.int8)
    for bank in (exact, small):
        bank.push(rows_of(5000, 64, 0))
    queries = rows_of(200, 64, 1)
    true, found = exact.search(queries, 5), small.search(queries, 5)
    recall = (found.index[:, :, None] == true.index[:, None]).any(2).float().mean()
    assert recall > 0.95
    torch.testing.assert_close(found.similarity, true.similarity, rtol=0, atol=0.02)


# State


def filled(dtype: torch.dtype, size: int = 6, count: int = 9, dim: int = 5) -> MemoryBank:
    bank = MemoryBank(size, dim, dtype=dtype)
    rows = rows_of(count, dim, 3)
    rows[-2] = torch.nan
    bank.push(rows, torch.arange(count), torch.arange(count) + 100)
    return bank


def test_saving_loading_and_going_on_is_bit_equal_to_going_on() -> None:
    bank, other = filled(torch.int8), MemoryBank(6, 5, dtype=torch.int8)
    assert list(bank.state_dict()) == ["int8_rows", "scale", "labels", "ids", "pushed", "nonfinite"]
    other.load_state_dict({name: value.clone() for name, value in bank.state_dict().items()})
    for each in (bank, other):
        each.push(rows_of(4, 5, 8))
    for name, value in bank.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    bank.load_state_dict(bank.state_dict())
    for name, value in bank.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [3, 6, 10])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.int8, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.int8])
def test_a_state_of_any_dtype_loads_into_a_bank_of_any_other(
    saved: torch.dtype, wanted: torch.dtype, size: int
) -> None:
    state = filled(torch.float32 if saved == torch.float64 else saved).state_dict()
    if saved == torch.float64:
        state["rows"] = state["rows"].double()
    bank = MemoryBank(size, 5, dtype=wanted)
    bank.load_state_dict(state)
    assert bank.rows.dtype == wanted
    true = F.normalize(rows_of(9, 5, 3), dim=1)[3:]
    true[-2] = torch.nan
    kept = min(size, 6)
    order = torch.arange(9)[3:][-kept:]
    by_label = {int(label): row for label, row in zip(bank.labels, floats(bank), strict=True)}
    for label in order.tolist():
        torch.testing.assert_close(by_label[label], true[label - 3], rtol=0, atol=0.02, equal_nan=True)
    found = bank.search(true[:1], kept)
    assert (found.index >= 0).sum() == kept - 1
    if size > 6:
        assert (bank.rows[kept:] == 0).all()
        assert bank.labels[kept:].tolist() == [-1] * (size - 6)


@pytest.mark.parametrize(("saved", "wanted"), [(torch.int8, torch.float32), (torch.float32, torch.int8)])
def test_a_checkpoint_in_place_never_casts_between_int8_and_floats(
    tmp_path: Path, saved: torch.dtype, wanted: torch.dtype
) -> None:
    """torch.distributed.checkpoint casts what it loads to the dtypes of a state; int8 rows also need their scale."""
    dcp.save({"bank": filled(saved).state_dict()}, checkpoint_id=tmp_path)
    bank = filled(wanted)
    before = bank.rows.clone()
    with pytest.raises(dcp.api.CheckpointException, match="rows"):
        dcp.load({"bank": bank.state_dict()}, checkpoint_id=tmp_path)
    torch.testing.assert_close(bank.rows, before, rtol=0, atol=0, equal_nan=True)
    through = filled(saved)
    through.clear()
    state = {"bank": through.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    bank.load_state_dict(state["bank"])
    torch.testing.assert_close(floats(bank), floats(filled(wanted)), rtol=0, atol=0.02, equal_nan=True)


def test_a_row_of_hardly_any_length_stays_short_when_it_is_loaded() -> None:
    rows = torch.tensor([[1e-17, 0.0, 0.0], [0.0, 1.0, 0.0]])
    bank, small = MemoryBank(2, 3), MemoryBank(2, 3, dtype=torch.int8)
    bank.push(rows)
    small.load_state_dict(bank.state_dict())
    assert floats(small).norm(dim=1).tolist() == pytest.approx([1e-5, 1.0], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "must have a scale if they are int8"),
        ({"scale": torch.zeros(3)}, "have scale of shape"),
        ({"scale": torch.zeros(6, dtype=torch.int64)}, "scale must be floating"),
        ({"ids": torch.zeros(6)}, "integers, got ids"),
        ({"int8_rows": torch.zeros(6, 5, dtype=torch.int16)}, "floating point or int8, got torch.int16"),
        ({"int8_rows": torch.zeros(6, 5)}, "must have a scale if they are int8"),
        ({"int8_rows": None}, r"Missing key\(s\).*\"rows\""),
    ],
)
def test_a_corrupt_state_is_an_error_that_changes_nothing(change: dict[str, Any], message: str) -> None:
    bank, state = filled(torch.int8), filled(torch.int8, count=4).state_dict()
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    state = {name: value for name, value in (state | change).items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(state)
    for name, value in bank.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_cast_of_the_model_leaves_rows_and_scale_as_they_are() -> None:
    bank = filled(torch.int8).half()
    assert bank.rows.dtype == torch.int8
    assert bank.scale is not None
    assert bank.scale.dtype == torch.float32


def test_packing_does_not_depend_on_what_else_is_in_the_batch() -> None:
    unit = F.normalize(rows_of(7, 33, 5), dim=1)
    values, scale = packed(unit, torch.int8)
    one, its = packed(unit[3:4], torch.int8)
    assert torch.equal(values[3:4], one)
    assert scale is not None
    assert its is not None
    torch.testing.assert_close(scale[3:4], its, rtol=1e-6, atol=0)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.int8])
def test_rows_of_another_dtype_are_brought_to_unit_length(saved: torch.dtype, wanted: torch.dtype) -> None:
    one, other = MemoryBank(6, 50, dtype=saved), MemoryBank(6, 50, dtype=wanted)
    one.push(rows_of(6, 50, 0))
    other.load_state_dict(one.state_dict())
    length = floats(other).norm(dim=1)
    torch.testing.assert_close(length, torch.ones(6), rtol=0, atol=1e-6)


def test_a_cleared_bank_is_saved_as_a_new_one() -> None:
    bank = MemoryBank(4, 3, dtype=torch.int8)
    bank.push(rows_of(4, 3, 0))
    bank.clear()
    for name, value in MemoryBank(4, 3, dtype=torch.int8).state_dict().items():
        assert torch.equal(bank.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "have ids of shape"),
        ({"ids": [1] * 6}, "must be tensors"),
        ({"scale": "x"}, "must be tensors"),
        ({"int8_rows": torch.zeros(6, 5, dtype=torch.int64), "scale": None}, "floating point or int8, got torch.int64"),
        ({"int8_rows": torch.zeros(6, 5, dtype=torch.bool), "scale": None}, "floating point or int8, got torch.bool"),
    ],
)
def test_more_corrupt_states(change: dict[str, Any], message: str) -> None:
    bank = MemoryBank(6, 5, dtype=torch.int8)
    bank.push(rows_of(6, 5, 0), ids=torch.arange(6))
    before = {n: v.clone() for n, v in bank.state_dict().items()}
    state = {n: v for n, v in (before | change).items() if v is not None}
    with pytest.raises(RuntimeError, match=message):
        bank.load_state_dict(state)
    assert all(torch.equal(v, before[n]) for n, v in bank.state_dict().items())
