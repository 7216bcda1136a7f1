"""MemoryBank against collections.deque(maxlen=size), its saved state, and its errors."""

import copy
import io
import pickle
from collections import deque
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from msf_core import MemoryBank
from msf_core.search import load_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = st.integers(0, 20)  # few, so that rows repeat, and also occur as queries
SIZES = st.integers(1, 7)
# Rows with these values have no finite norm; in the last kind, the entries are finite but their norm is not.
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "overflow": 3e38}


def snapshot(bank: MemoryBank) -> tuple[dict[str, Tensor], int]:
    return {name: buffer.clone() for name, buffer in bank.state_dict().items()}, len(bank)


def assert_unchanged(bank: MemoryBank, before: tuple[dict[str, Tensor], int]) -> None:
    buffers, length = before
    assert len(bank) == length
    for name, buffer in bank.state_dict().items():
        assert_bits_equal(buffer, buffers[name])


def assert_bits_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)  # dtype, shape and values


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def filled_bank(size: int = 6, dim: int = 3, count: int = 8, **options: object) -> MemoryBank:
    """A bank that has wrapped around, with labels 0 … count − 1 and one row of NaN."""
    bank = MemoryBank(size, dim, **options)
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
    rows[-1] = torch.nan
    bank.push(rows, torch.arange(count))
    return bank


class BankBesideDeque(RuleBasedStateMachine):
    """The model is a deque of (row, label, slot), oldest first; slots follow from the number of pushed rows."""

    def __init__(self, dtype: torch.dtype, backend: str, assert_k_nearest: Callable[..., None]) -> None:
        super().__init__()
        self.dtype, self.backend, self.assert_k_nearest = dtype, backend, assert_k_nearest

    def new_bank(self, size: int) -> MemoryBank:
        return MemoryBank(size, self.dim, dtype=self.dtype, backend=self.backend)

    @initialize(size=SIZES, dim=st.sampled_from([2, 3, 33]))
    def start(self, size: int, dim: int) -> None:
        self.dim = dim
        self.bank = self.new_bank(size)
        self.model: deque[tuple[Tensor, int, int]] = deque(maxlen=size)
        self.pushed = self.nonfinite = 0
        self.saved = None

    @rule(count=st.integers(1, 5), seed=SEEDS)
    def push_a_few(self, count: int, seed: int) -> None:
        self.push(count, {}, True, torch.float32, seed)

    @rule(
        count=st.integers(0, 17),
        bad=st.dictionaries(st.integers(0, 16), st.sampled_from(sorted(BAD)), max_size=3),
        labeled=st.booleans(),
        dtype=st.sampled_from([*DTYPES, torch.float64]),
        seed=SEEDS,
    )
    def push(self, count: int, bad: dict[int, str], labeled: bool, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        batch = 10 * torch.randn(count, self.dim, generator=generator)
        bad = {i: kind for i, kind in bad.items() if i < count}
        for i, kind in bad.items():
            batch[i, 0 if kind != "overflow" else slice(None)] = BAD[kind]
        batch = batch.to(dtype)
        labels = torch.randint(0, 1000, (count,), generator=generator) if labeled else None
        given = batch.clone()
        slots = self.bank.push(batch, labels)
        assert_bits_equal(batch, given)

        rows = F.normalize(batch.float(), dim=1).to(self.dtype)
        rows[sorted(bad)] = torch.nan
        size = self.bank.size
        expected = [(self.pushed + i) % size if i >= count - size else -1 for i in range(count)]
        assert slots.dtype == torch.int64
        assert slots.tolist() == expected
        for i in range(count):
            self.model.append((rows[i], int(labels[i]) if labeled else -1, (self.pushed + i) % size))
        self.pushed += count
        self.nonfinite += len(bad)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 4), scale=st.sampled_from([1e-3, 1.0, 100.0]), seed=SEEDS)
    def search(self, data: st.DataObject, count: int, scale: float, seed: int) -> None:
        k = data.draw(st.integers(1, len(self.model)))
        queries = scale * torch.randn(count, self.dim, generator=torch.Generator().manual_seed(seed))
        found = self.bank.search(queries, k)
        unit = F.normalize(queries, dim=1).to(self.dtype)
        row_at, label_at = {-1: torch.zeros(self.dim)}, {-1: -1}
        rows = torch.full((max(slot for *_, slot in self.model) + 1, self.dim), torch.nan, dtype=self.dtype)
        for row, label, slot in self.model:
            rows[slot], label_at[slot] = row, label
            row_at[slot] = row if self.dtype == torch.float32 else F.normalize(row.float(), dim=0)
        self.assert_k_nearest(found.similarity, found.index, unit, rows, k, largest=1.0)
        assert found.label.tolist() == [[label_at[slot] for slot in row] for row in found.index.tolist()]
        embedding = torch.stack([torch.stack([row_at[slot] for slot in row]) for row in found.index.tolist()])
        torch.testing.assert_close(found.embedding, embedding, rtol=0, atol=1e-7)

    @precondition(lambda self: self.pushed)
    @rule()
    def save(self) -> None:
        state = through_a_file(self.bank.state_dict())
        self.saved = (state, list(self.model), self.pushed, self.nonfinite)

    @precondition(lambda self: self.saved)
    @rule(size=st.none() | SIZES)
    def load(self, size: int | None) -> None:
        """Load over the contents of this bank, or over those of a new bank of some size."""
        state, contents, pushed, self.nonfinite = self.saved
        if size is not None:
            self.bank = self.new_bank(size)
            self.bank.push(torch.ones(size, self.dim), torch.full((size,), 77))
        size, saved_size = self.bank.size, state["rows"].shape[0]
        self.bank.load_state_dict(state)
        if size == saved_size:
            self.model, self.pushed = deque(contents, maxlen=size), pushed
            for name, buffer in self.bank.state_dict().items():
                assert_bits_equal(buffer, state[name])
        else:
            newest = contents[-size:]
            self.model = deque(((row, label, slot) for slot, (row, label, _) in enumerate(newest)), maxlen=size)
            self.pushed = len(newest)

    @precondition(lambda self: self.bank.full)
    @rule()
    def clear(self) -> None:
        self.bank.clear()
        self.model.clear()
        self.pushed = self.nonfinite = 0
        fresh = self.new_bank(self.bank.size)
        for name, buffer in self.bank.state_dict().items():
            assert_bits_equal(buffer, getattr(fresh, name))

    @rule(which=st.integers(0, 7))
    def call_wrongly(self, which: int) -> None:
        bank, good = self.bank, torch.ones(2, self.dim)
        error, call = [
            (ValueError, lambda: bank.push(torch.ones(2, self.dim + 1))),
            (ValueError, lambda: bank.push(torch.ones(self.dim))),
            (TypeError, lambda: bank.push(good.long())),
            (ValueError, lambda: bank.push(good, torch.zeros(3, dtype=torch.int64))),
            (TypeError, lambda: bank.push(good, torch.zeros(2))),
            (ValueError, lambda: bank.search(good, len(bank) + 1)),
            (ValueError, lambda: bank.search(good, 0)),
            (TypeError, lambda: bank.search(good.long(), 1)),
        ][which]
        before = snapshot(bank)
        with pytest.raises(error):
            call()
        assert_unchanged(bank, before)

    @invariant()
    def equals_the_model(self) -> None:
        bank = self.bank
        assert len(bank) == len(self.model)
        assert bank.full == (len(self.model) == bank.size)
        assert bank.dtype == self.dtype
        assert int(bank.pushed) == self.pushed
        assert int(bank.nonfinite) == self.nonfinite
        assert not bank.rows[len(bank) :].any()  # unfilled
        assert (bank.labels[len(bank) :] == -1).all()
        oldest_first = torch.arange(self.pushed - len(bank), self.pushed) % bank.size
        assert oldest_first.tolist() == [slot for *_, slot in self.model]
        assert bank.labels[oldest_first].tolist() == [label for _, label, _ in self.model]
        if self.model:
            assert_bits_equal(bank.rows[oldest_first], torch.stack([row for row, *_ in self.model]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bank_equals_a_deque_whatever_is_done_to_it(
    dtype: torch.dtype, backend_name: str, assert_k_nearest: Callable[..., None]
) -> None:
    run_state_machine_as_test(
        lambda: BankBesideDeque(dtype, backend_name, assert_k_nearest),
        settings=settings(max_examples=30, stateful_step_count=30),
    )


# Rows on the way in and out


def test_rows_are_unit_vectors_along_what_was_pushed() -> None:
    bank = MemoryBank(size=9, dim=5, dtype=torch.float16)
    pushed = 100 * torch.randn(7, 5)
    slots = bank.push(pushed)
    rows = bank.rows[slots].double()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(rows * pushed.double().norm(dim=1, keepdim=True), pushed.double(), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_of_queries_and_of_pushed_rows_does_not_matter(dtype: torch.dtype) -> None:
    rows, queries = torch.randn(20, 8), torch.randn(4, 8)
    results = []
    for scale in (1.0, 2.0**-10, 2.0**10):  # powers of two: the same to the last bit
        bank = MemoryBank(size=20, dim=8, dtype=dtype)
        bank.push(scale * rows)
        results.append(bank.search(scale * queries, k=5))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert_bits_equal(value, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embeddings_found_are_float32_unit_vectors_along_the_rows(dtype: torch.dtype) -> None:
    bank = MemoryBank(size=50, dim=33, dtype=dtype)
    bank.push(torch.randn(50, 33))
    found = bank.search(torch.randn(6, 33, dtype=torch.float64), k=7)
    assert found.embedding.dtype == torch.float32
    assert found.embedding.shape == (6, 7, 33)
    torch.testing.assert_close(found.embedding.double().norm(dim=2), torch.ones(6, 7).double(), rtol=0, atol=3e-7)
    along = F.cosine_similarity(found.embedding.double(), bank.rows[found.index].double(), dim=2)
    torch.testing.assert_close(along, torch.ones(6, 7).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_rounding_made_long_is_no_more_similar_than_one(dtype: torch.dtype, backend_name: str) -> None:
    bank = MemoryBank(size=200, dim=33, dtype=dtype, backend=backend_name)
    rows = torch.randn(200, 33)
    bank.push(rows)
    assert (bank.rows.double().norm(dim=1) > 1).any()
    similarity = bank.search(rows, k=1).similarity
    assert similarity.max() == 1
    assert similarity.min() > 0.99


def test_unfilled_slots_are_never_found(backend_name: str) -> None:
    bank = MemoryBank(size=10, dim=2, backend=backend_name)
    bank.push(torch.tensor([[-1.0, 0.0], [-1.0, -1.0]]))  # an unfilled slot, all zeros, would be nearer
    assert sorted(bank.search(torch.tensor([[1.0, 0.0]]), k=2).index[0].tolist()) == [0, 1]


def test_rows_without_a_finite_norm_are_counted_and_never_found(backend_name: str) -> None:
    bank = MemoryBank(size=6, dim=2, backend=backend_name)
    slots = bank.push(torch.tensor([[v, 1.0] for v in (1.0, *BAD.values())]), torch.arange(5))
    assert slots.tolist() == [0, 1, 2, 3, 4]
    assert int(bank.nonfinite) == 4
    assert bank.rows[1:5].isnan().all()
    found = bank.search(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), k=3)
    assert found.index.tolist() == [[0, -1, -1]] * 2
    assert found.label.tolist() == [[0, -1, -1]] * 2
    assert (found.similarity[:, 1:] == -torch.inf).all()
    assert torch.equal(found.embedding[:, 1:], torch.zeros(2, 2, 2))
    assert torch.equal(found.embedding[:, 0], bank.rows[[0, 0]])


def test_a_query_of_nan_finds_nothing(backend_name: str) -> None:
    bank = filled_bank(backend=backend_name)
    found = bank.search(torch.tensor([[torch.nan, 0.0, 0.0], [torch.inf, 0.0, 0.0]]), k=2)
    assert (found.index == -1).all()
    assert (found.label == -1).all()
    assert not found.embedding.any()
    assert (found.similarity == -torch.inf).all()


def test_labels_of_any_integer_dtype_are_kept_as_int64() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        bank = MemoryBank(size=3, dim=2)
        bank.push(torch.randn(3, 2), torch.tensor([5, 6, 7], dtype=dtype))
        assert bank.search(torch.randn(1, 2), k=3).label.dtype == torch.int64
        assert bank.labels.tolist() == [5, 6, 7]


def test_nothing_in_the_bank_takes_part_in_a_gradient() -> None:
    bank = MemoryBank(size=4, dim=3)
    bank.push(torch.randn(4, 3, requires_grad=True))
    found = bank.search(torch.randn(2, 3, requires_grad=True), k=2)
    assert not bank.rows.requires_grad
    assert not found.similarity.requires_grad
    assert not found.embedding.requires_grad


def test_results_share_no_memory_with_the_bank() -> None:
    bank = filled_bank()
    before = snapshot(bank)
    found = bank.search(torch.randn(1, 3), k=5)
    for tensor in (*found, bank.push(torch.zeros(0, 3))):
        tensor.fill_(99)
    assert_unchanged(bank, before)


def test_the_repr_tells_size_dim_dtype_fill_backend_and_bytes() -> None:
    bank = MemoryBank(size=10, dim=4, dtype=torch.bfloat16, backend="torch")
    bank.push(torch.randn(3, 4))
    text = repr(bank)
    for part in ("size=10", "dim=4", "dtype=bfloat16", "filled=3", "backend='torch'", "bytes=160"):
        assert part in text
    assert "backend='TorchSearch'" in repr(MemoryBank(2, 2, backend=load_backend("torch")))


# Saved state, copies and casts


def test_saving_loading_and_going_on_is_bit_equal_to_going_on() -> None:
    bank, resumed = filled_bank(), MemoryBank(6, 3)
    resumed.load_state_dict(through_a_file(bank.state_dict()))
    batch, labels = torch.randn(4, 3), torch.tensor([50, 51, 52, 53])
    assert torch.equal(bank.push(batch, labels), resumed.push(batch, labels))
    assert_unchanged(resumed, snapshot(bank))


def test_a_bank_that_is_not_persistent_saves_nothing_and_loads_strictly() -> None:
    bank = filled_bank(persistent=False)
    assert bank.state_dict() == {}
    before = snapshot(bank)
    bank.load_state_dict({}, strict=True)
    assert_unchanged(bank, before)
    with pytest.raises(RuntimeError, match=r"Unexpected.*rows"):
        bank.load_state_dict(filled_bank().state_dict())
    assert_unchanged(bank, before)


@pytest.mark.parametrize("name", ["rows", "labels", "pushed", "nonfinite"])
def test_a_missing_key_is_named_and_nothing_is_loaded(name: str) -> None:
    parent = torch.nn.ModuleDict({"bank": MemoryBank(6, 3)})
    state = torch.nn.ModuleDict({"bank": filled_bank()}).state_dict()
    del state[f"bank.{name}"]
    before = snapshot(parent["bank"])
    with pytest.raises(RuntimeError, match=f'Missing key.*"bank.{name}"'):
        parent.load_state_dict(state)
    result = parent.load_state_dict(state, strict=False)
    assert result.missing_keys == [f"bank.{name}"]
    assert result.unexpected_keys == []
    assert_unchanged(parent["bank"], before)


def test_an_unexpected_key_is_named_under_strict_loading_only() -> None:
    parent = torch.nn.ModuleDict({"bank": MemoryBank(6, 3)})
    state = torch.nn.ModuleDict({"bank": filled_bank()}).state_dict()
    state["bank.extra"] = torch.zeros(())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bank\.extra"'):
        parent.load_state_dict(state)
    result = parent.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["bank.extra"])
    assert_unchanged(parent["bank"], snapshot(filled_bank()))


def test_rows_of_another_dim_are_an_error_that_names_it_and_changes_nothing() -> None:
    bank = filled_bank(dim=3)
    before = snapshot(bank)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"dim=3.*\[6, 5\]"):
            bank.load_state_dict(filled_bank(dim=5).state_dict(), strict=strict)
        assert_unchanged(bank, before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", torch.zeros(0, 3), r"\[0, 3\]"),
        ("rows", torch.zeros(18), r"\[18\]"),
        ("labels", torch.zeros(5, dtype=torch.int64), r"6 saved rows have labels of shape \[5\]"),
        ("pushed", torch.tensor(-1), "pushed.*-1"),
        ("pushed", torch.tensor(2.5), "pushed.*2.5"),
        ("pushed", torch.tensor([8]), r"pushed.*\[8\]"),
        ("nonfinite", torch.tensor(-2), "nonfinite.*-2"),
        ("nonfinite", torch.tensor(1.5), "nonfinite.*1.5"),
    ],
)
def test_a_corrupt_saved_buffer_is_an_error_that_changes_nothing(name: str, value: Tensor, message: str) -> None:
    bank = MemoryBank(6, 3)
    bank.push(torch.randn(2, 3))
    before = snapshot(bank)
    with pytest.raises(RuntimeError, match=f"not loaded.*{message}"):
        bank.load_state_dict(filled_bank().state_dict() | {name: value})
    assert_unchanged(bank, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_rows_load_into_a_half_precision_bank_rounded(dtype: torch.dtype) -> None:
    saved = filled_bank()
    for size in (6, 4):
        bank = MemoryBank(size, 3, dtype=dtype)
        bank.load_state_dict(saved.state_dict())
        assert bank.dtype == dtype
        newest = (torch.arange(8 - size, 8)) % 6
        here = torch.arange(8 - size, 8) % 6 if size == 6 else torch.arange(size)
        assert_bits_equal(bank.rows[here], saved.rows[newest].to(dtype))
        assert bank.labels[here].tolist() == list(range(8 - size, 8))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_copies_are_equal_and_independent(duplicate: Callable[[MemoryBank], MemoryBank]) -> None:
    bank = filled_bank()
    before = snapshot(bank)
    twin = duplicate(bank)
    assert_unchanged(twin, before)
    slots = twin.push(torch.ones(3, 3), torch.tensor([90, 91, 92]))
    assert_unchanged(bank, before)
    assert torch.equal(slots, bank.push(torch.ones(3, 3), torch.tensor([90, 91, 92])))
    assert_unchanged(twin, snapshot(bank))


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda bank: bank.to(torch.half)]
)
def test_a_cast_of_the_model_leaves_the_rows_as_they_were_asked_for(cast: Callable[[nn.Module], nn.Module]) -> None:
    bank = filled_bank()
    before = snapshot(bank)
    assert cast(bank) is bank
    assert_unchanged(bank, before)
    assert bank.push(torch.ones(1, 3), torch.tensor([70])).tolist() == [2]
    assert bank.search(torch.ones(1, 3), k=1).label.tolist() == [[70]]


def test_the_bank_has_no_buffers_that_ddp_would_send_and_moves_with_its_module_all_the_same() -> None:
    bank = filled_bank()
    assert not list(bank.buffers())
    model = nn.ModuleDict({"bank": bank}).to("meta")
    assert {tensor.device.type for tensor in bank.state_dict().values()} == {"meta"}
    assert len(bank) == 6  # the host's own count
    assert model.to_empty(device="cpu")["bank"].rows.shape == (6, 3)


# Errors


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "size .*at least 1.* 0", {"size": 0}),
        (ValueError, "size .*at least 1.* -3", {"size": -3}),
        (ValueError, "dim .*at least 1.* 0", {"dim": 0}),
        (TypeError, "size .*int.* 2.5", {"size": 2.5}),
        (TypeError, "dim .*int.* True", {"dim": True}),
        (TypeError, r"dtype .*torch\.float64", {"dtype": torch.float64}),
        (TypeError, r"dtype .*torch\.int64", {"dtype": torch.int64}),
        (ValueError, "backend 'nearest'.*'auto', 'torch', 'faiss'", {"backend": "nearest"}),
        (TypeError, r"backend .*topk\(queries, rows, k\).*object", {"backend": object()}),
        (TypeError, "backend .*topk.* None", {"backend": None}),
    ],
)
def test_a_wrong_argument_of_the_bank_is_named(error: type[Exception], message: str, options: dict) -> None:
    with pytest.raises(error, match=message):
        MemoryBank(**({"size": 4, "dim": 2} | options))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"embeddings .*\[B, 3\].*\[2, 4\]", lambda bank: bank.push(torch.ones(2, 4))),
        (ValueError, r"embeddings .*\[B, 3\].*\[3\]", lambda bank: bank.push(torch.ones(3))),
        (ValueError, r"embeddings .*\[1, 2, 3\]", lambda bank: bank.push(torch.ones(1, 2, 3))),
        (TypeError, r"embeddings .*torch\.int64", lambda bank: bank.push(torch.ones(2, 3).long())),
        (TypeError, r"embeddings .*torch\.complex64", lambda bank: bank.push(torch.ones(2, 3) + 1j)),
        (ValueError, "embeddings .*cpu.*meta.*move", lambda bank: bank.push(torch.ones(2, 3, device="meta"))),
        (ValueError, r"labels .*\[2\].*\[3\]", lambda bank: bank.push(torch.ones(2, 3), torch.arange(3))),
        (ValueError, r"labels .*\[2\].*\[2, 1\]", lambda bank: bank.push(torch.ones(2, 3), torch.ones(2, 1).long())),
        (TypeError, r"labels .*torch\.float32", lambda bank: bank.push(torch.ones(2, 3), torch.ones(2))),
        (TypeError, r"labels .*torch\.bool", lambda bank: bank.push(torch.ones(2, 3), torch.ones(2) > 0)),
        (TypeError, r"labels .*torch\.complex64", lambda bank: bank.push(torch.ones(2, 3), torch.ones(2) + 1j)),
        (
            ValueError,
            "labels .*cpu.*meta",
            lambda bank: bank.push(torch.ones(2, 3), torch.arange(2, device="meta")),
        ),
        (ValueError, r"queries .*\[2, 4\]", lambda bank: bank.search(torch.ones(2, 4), 1)),
        (ValueError, r"queries .*\[3\]", lambda bank: bank.search(torch.ones(3), 1)),
        (TypeError, r"queries .*torch\.int32", lambda bank: bank.search(torch.ones(2, 3).int(), 1)),
        (ValueError, "queries .*cpu.*meta", lambda bank: bank.search(torch.ones(2, 3, device="meta"), 1)),
        (ValueError, "k .*1 and the 6 rows.* 7", lambda bank: bank.search(torch.ones(2, 3), 7)),
        (ValueError, "k .*1 and the 6 rows.* 0", lambda bank: bank.search(torch.ones(2, 3), 0)),
        (ValueError, "k .*1 and the 6 rows.* -1", lambda bank: bank.search(torch.ones(2, 3), -1)),
    ],
)
def test_a_wrong_call_names_the_argument_and_changes_nothing(
    error: type[Exception], message: str, call: Callable[[MemoryBank], object]
) -> None:
    bank = filled_bank()
    before = snapshot(bank)
    with pytest.raises(error, match=message):
        call(bank)
    assert_unchanged(bank, before)


def test_an_empty_bank_has_nothing_to_search() -> None:
    with pytest.raises(ValueError, match="the 0 rows in the bank, got 1"):
        MemoryBank(4, 2).search(torch.ones(1, 2), 1)


def test_more_neighbors_than_the_backend_finds_are_refused() -> None:
    backend = load_backend("torch").__class__()
    backend.most_neighbors = {"cpu": 2}
    bank = filled_bank(backend=backend)
    with pytest.raises(ValueError, match=r"k .*at most 2 .*cpu.* 3"):
        bank.search(torch.ones(1, 3), 3)
    assert bank.search(torch.ones(1, 3), 2).index.shape == (1, 2)


def test_loading_a_banks_own_state_leaves_it_as_it_is() -> None:
    bank = MemoryBank(size=8, dim=3)
    bank.push(torch.randn(5, 3), torch.arange(5))
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    bank.load_state_dict(bank.state_dict())
    assert len(bank) == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.state_dict().items())


@pytest.mark.parametrize("value", [[[1.0, 0.0]], None, 3], ids=["list", "None", "int"])
def test_what_is_no_tensor_is_a_type_error_that_names_it(value: object) -> None:
    bank = MemoryBank(size=8, dim=2)
    with pytest.raises(TypeError, match="embeddings must be a tensor"):
        bank.push(value)
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        bank.push(torch.ones(1, 2), [1])
    assert len(bank) == 0


@pytest.mark.parametrize("k", [1.0, None, True])
def test_a_k_that_is_no_int_is_a_type_error(k: object) -> None:
    bank = MemoryBank(size=8, dim=2)
    bank.push(torch.eye(2))
    with pytest.raises(TypeError, match="k must be an int, got"):
        bank.search(torch.eye(2), k)


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_the_age_of_a_slot_counts_the_rows_pushed_since(size: int, batches: list[int]) -> None:
    bank, pushed_at = MemoryBank(size, 2), {}
    for count in batches:
        before = int(bank.pushed)
        for place, slot in enumerate(bank.push(torch.ones(count, 2)).tolist()):
            if slot >= 0:
                pushed_at[slot] = before + place
    slots = torch.tensor([-1, *pushed_at])
    assert bank.age(slots).tolist() == [-1, *(sum(batches) - 1 - number for number in pushed_at.values())]
