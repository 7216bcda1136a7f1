"""A bank shared by several ranks, compared with the bank of one process that pushes the whole batch."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from msf_core import MemoryBank, Neighbors
from msf_core.ring import Found
from msf_core.search.torch_backend import TorchSearch

DIM = 5
# Number of rows that each rank pushes: equal, uneven, none at all, and more than the bank holds.
PUSHES = {
    2: [(3, 3), (2, 0), (0, 4), (0, 0), (9, 14), (1, 5)],
    4: [(2, 2, 2, 2), (1, 0, 3, 2), (0, 0, 0, 5), (7, 1, 9, 4)],
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The whole batch of a step, which every rank can draw, and its labels; some rows are not finite."""
    rows = torch.randn(sum(counts), DIM, generator=generator(seed)) * 3
    rows[4::11] = torch.nan
    return rows.to(dtype), torch.arange(sum(counts)) + 100 * seed


def part(whole: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
    return whole.split(list(counts))[rank]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def whole_state(bank: MemoryBank) -> dict[str, Tensor]:
    """All rows and labels, wherever they are kept."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in bank.state_dict().items()
    }


def assert_same_neighbors(found: Neighbors, expected: Neighbors, single: MemoryBank) -> None:
    """Compare similarities, slots (up to ties), and labels and embeddings with those in the slots of ``single``."""
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0, atol=1e-6)
    assert torch.equal(found.index < 0, expected.index < 0)
    lists = zip(found.index.tolist(), expected.index.tolist(), expected.similarity.tolist(), strict=True)
    for mine, theirs, similarity in lists:
        clear = [s > similarity[-1] + 2e-6 for s in similarity]  # rows that tie with the last one may differ
        missed = {i for i, c in zip(theirs, clear, strict=True) if c} - set(mine)
        assert not missed, (mine, theirs)
        assert len({i for i in mine if i >= 0}) == sum(i >= 0 for i in mine), "a neighbor occurs twice"
    ring = single._ring
    there = single.neighbors(Found(found.similarity, found.index, ring.embeddings(found.index)))
    assert torch.equal(found.label, there.label)
    assert torch.equal(found.embedding, there.embedding)
    assert found.embedding.dtype == torch.float32


class Single(MemoryBank):
    """The bank of one process, which counts the steps."""

    def __init__(self, size: int, dim: int = DIM, **options: Any) -> None:
        super().__init__(size, dim, layout="local", **options)
        self.calls = 0


def push_all(bank: MemoryBank, single: Single, rank: int, steps: int, dtype: torch.dtype = torch.float32) -> None:
    pushes = PUSHES[dist.get_world_size()]
    for step in range(single.calls, single.calls + steps):
        counts = pushes[step % len(pushes)]
        rows, labels = batch(step, counts, dtype)
        unlabeled = step % 3 == 2
        mine = None if unlabeled or (step % 3 == 1 and rank == 0) else part(labels, counts, rank)
        if step % 3 == 1:
            labels[: counts[0]] = -1  # rank 0 has none
        slots = bank.push(part(rows, counts, rank), mine)
        expected = single.push(rows, None if unlabeled else labels)
        assert torch.equal(slots, part(expected, counts, rank))
        assert len(bank) == len(single)
        assert bank.full == single.full
    single.calls += steps


# Contents


def equals_one_process(rank: int, layout: str, size: int, dtype: torch.dtype) -> None:
    bank = MemoryBank(size, DIM, dtype=dtype, layout=layout)
    single = Single(size, dtype=dtype)
    for _ in range(12):
        push_all(bank, single, rank, 1)
    push_all(bank, single, rank, 9)
    for name, value in whole_state(bank).items():
        assert same_bits(value, single.state_dict()[name]), name
    assert int(bank.nonfinite) > 0
    bank.clear()
    single.clear()
    push_all(bank, single, rank, 2)
    for name, value in whole_state(bank).items():
        assert same_bits(value, single.state_dict()[name]), name


@pytest.mark.parametrize("size", [3, 16, 37])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_contents_have_the_bits_of_one_process_that_pushes_the_whole_batch(ranks: Any, layout: str, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ranks.run(equals_one_process, layout, size, dtype)


def batches_of_any_dtype_are_gathered(rank: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        bank, single = MemoryBank(8, DIM), Single(8)
        push_all(bank, single, rank, 6, dtype)
        assert same_bits(bank.rows, single.rows)
    slots = bank.push(torch.full((1, DIM), 2.0, dtype=torch.float16 if rank else torch.float64))  # the dtypes differ
    assert torch.allclose(bank.rows[slots], torch.tensor(DIM**-0.5))


def test_embeddings_of_any_dtype_keep_their_bits(ranks: Any) -> None:
    ranks.run(batches_of_any_dtype_are_gathered)


def keeps_a_share(rank: int, size: int) -> tuple[int, int]:
    bank = MemoryBank(size, DIM, layout="sharded")
    assert f"layout='sharded', bytes={bank.rows.nbytes + bank.labels.nbytes}" in repr(bank)
    return len(bank.rows), len(bank.labels)


@pytest.mark.parametrize("size", [1, 3, 8, 37])
def test_a_rank_of_a_sharded_bank_keeps_one_of_w_parts(ranks: Any, size: int) -> None:
    kept = ranks.run(keeps_a_share, size)
    assert sum(rows for rows, _ in kept) == sum(labels for _, labels in kept) == size
    assert max(rows for rows, _ in kept) == -(-size // ranks.size)


def talks_to_nobody(rank: int) -> None:
    bank = MemoryBank(6, DIM, layout="local")
    if rank == 0:  # alone: a shared bank would wait for the others
        bank.push(torch.ones(2, DIM))
        bank.search(torch.ones(1, DIM), 1)
    dist.barrier()
    assert len(bank) == (2 if rank == 0 else 0)


def test_a_local_bank_is_each_ranks_own(two_ranks: Any) -> None:
    two_ranks.run(talks_to_nobody)


# Search


def finds_what_one_process_finds(rank: int, layout: str, backend: Any, dtype: torch.dtype, size: int) -> None:
    bank = MemoryBank(size, DIM, dtype=dtype, layout=layout, backend=backend)
    single = Single(size, dtype=dtype, backend=backend)
    world = dist.get_world_size()
    for step in range(8):
        push_all(bank, single, rank, step % 3 + 1)
        counts = [(4, 1, 0, 3), (0, 2, 5, 1), (3, 3, 3, 3), (0, 0, 0, 0)][step % 4][:world]
        queries = torch.randn(sum(counts), DIM, generator=generator(step))
        queries[2::7] = torch.nan
        for k in {1, min(3, len(single)), len(single)}:
            expected = single.search(queries, k)
            mine = [value.split(list(counts))[rank] for value in expected]
            assert_same_neighbors(bank.search(part(queries, counts, rank), k), Neighbors(*mine), single)


@pytest.mark.parametrize("backend", ["torch", "faiss", TorchSearch()], ids=["torch", "faiss", "an object"])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_search_finds_what_one_process_finds(ranks: Any, layout: str, backend: Any) -> None:
    for dtype, size in ((torch.float32, 37), (torch.float32, 3), (torch.float16, 16), (torch.bfloat16, 37)):
        ranks.run(finds_what_one_process_finds, layout, backend, dtype, size)


def exactly_the_same_similarities(rank: int) -> None:
    """At sizes at which the products could differ."""
    bank, single = MemoryBank(4096, 64, layout="sharded"), MemoryBank(4096, 64, layout="local")
    rows = torch.randn(4096, 64, generator=generator(0))
    bank.push(rows.chunk(dist.get_world_size())[rank], torch.arange(4096).chunk(dist.get_world_size())[rank])
    single.push(rows, torch.arange(4096))
    queries = torch.randn(32, 64, generator=generator(1 + rank))
    found, expected = bank.search(queries, 20), single.search(queries, 20)
    assert_same_neighbors(found, expected, single)
    assert torch.equal(found.label, found.index)


def test_a_sharded_search_is_exact_at_size(ranks: Any) -> None:
    ranks.run(exactly_the_same_similarities)


# Errors are raised on all ranks and change nothing, and the next call works


def caught(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Fails(TorchSearch):
    """A backend that fails on rank 0, as one that runs out of memory does."""

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if dist.get_rank() == 0:
            raise MemoryError("out of memory, say")
        return super().topk(queries, rows, k)


def wrong_calls(rank: int, layout: str) -> list[str]:
    last = dist.get_world_size() - 1
    bank = MemoryBank(8, DIM, layout=layout)
    bank.push(torch.ones(2, DIM), torch.arange(2))
    before = {name: value.clone() for name, value in whole_state(bank).items()}
    good, odd = torch.ones(2, DIM), rank == last
    calls = [
        lambda: bank.push(torch.ones(2, DIM + 1) if odd else good),
        lambda: bank.push(good.long() if odd else good),
        lambda: bank.push(good, torch.zeros(3, dtype=torch.int64) if odd else None),
        lambda: bank.push(None if odd else good),
    ]
    if layout == "sharded":
        bank.backend = Fails()
        calls += [
            lambda: bank.search(good, 99 if odd else 1),
            lambda: bank.search(good, 2 if odd else 1),
            lambda: bank.search(good[:, :2] if odd else good, 1),
            lambda: bank.search(good, 1) if odd else bank.push(good),
            lambda: bank.push(good[0]) if odd else bank.search(good, 1),
            lambda: bank.search(torch.ones(2, DIM), 2),
        ]
    errors = [caught(call) for call in calls]
    for name, value in whole_state(bank).items():
        assert same_bits(value, before[name]), name
    bank.backend = "torch"
    assert len(bank) == 2 * dist.get_world_size()
    assert len(bank.push(good)) == 2
    assert bank.search(good, 3).similarity.shape == (2, 3)
    return errors


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_what_is_wrong_on_one_rank_is_an_error_on_all_and_changes_nothing(ranks: Any, layout: str) -> None:
    expected = [
        ("ValueError", f"embeddings must be [B, {DIM}]"),
        ("TypeError", "embeddings must be floating"),
        ("ValueError", "labels must be [2]"),
        ("TypeError", "embeddings must be a tensor, got NoneType"),
        ("ValueError", "k must be between 1 and"),
        ("ValueError", "k must be the same on all ranks, got 1 on rank 0"),
        ("ValueError", f"queries must be [B, {DIM}]"),
        ("RuntimeError", "all ranks must make the same calls in the same order, got push on rank 0"),
        ("ValueError", f"embeddings must be [B, {DIM}]"),
        ("RuntimeError", "MemoryError: out of memory, say"),
    ]
    last = ranks.size - 1
    for rank, errors in enumerate(ranks.run(wrong_calls, layout)):
        assert len(errors) == (10 if layout == "sharded" else 4)
        for number, (error, (kind, message)) in enumerate(zip(errors, expected, strict=False)):
            failing = None if number in (5, 7) else 0 if number == 9 else last
            named = f"rank {failing}: " if failing not in (None, rank) else ""
            assert error.startswith(f"{kind}: {named}{message}"), error


def other_banks(rank: int) -> list[str]:
    odd = rank == 1
    behind = MemoryBank(8, DIM)
    if odd:  # like a bank that only one rank has loaded
        behind.load_state_dict(MemoryBank(8, DIM, layout="local").state_dict() | {"pushed": torch.tensor(3)})
    return [
        caught(lambda: MemoryBank(9 if odd else 8, DIM).push(torch.ones(1, DIM))),
        caught(lambda: MemoryBank(8, DIM + odd).push(torch.ones(1, DIM + odd))),
        caught(lambda: MemoryBank(8, DIM, dtype=torch.float16 if odd else torch.float32).push(torch.ones(1, DIM))),
        caught(lambda: behind.push(torch.ones(1, DIM))),
    ]


def test_banks_that_are_not_the_same_do_not_drift_apart_in_silence(two_ranks: Any) -> None:
    one, other = two_ranks.run(other_banks)
    assert one == other
    expected = [
        "size must be the same on all ranks, got 8 on rank 0, 9 on rank 1",
        f"dim must be the same on all ranks, got {DIM} on rank 0, {DIM + 1} on rank 1",
        "dtype of the bank must be the same on all ranks, got float32 on rank 0, float16 on rank 1",
        "number of rows pushed so far must be the same on all ranks, got 0 on rank 0, 3 on rank 1",
    ]
    assert one == [f"ValueError: {message}" for message in expected]


# Groups, copies, and errors when a bank is created


def in_a_group(rank: int) -> None:
    members = [1, 3]
    group = dist.new_group(members)
    if rank not in members:
        with pytest.raises(ValueError, match="group must have this process"):
            MemoryBank(4, DIM, group=group)
        return
    for layout in ("replicated", "sharded"):
        bank, single = MemoryBank(7, DIM, layout=layout, group=group), MemoryBank(7, DIM, layout="local")
        assert bank.group is group
        for seed in range(4):
            counts = (seed, 3)
            rows, labels = batch(seed, counts)
            place = members.index(rank)
            slots = bank.push(part(rows, counts, place), part(labels, counts, place))
            assert torch.equal(slots, part(single.push(rows, labels), counts, place))
            assert_same_neighbors(bank.search(rows, 2), single.search(rows, 2), single)
        for name, value in whole_state(bank).items():
            assert same_bits(value, single.state_dict()[name]), name
        wrong = caught(lambda bank=bank: bank.push(torch.ones(1, DIM + (rank == 3))))
        assert wrong.startswith("ValueError: embeddings" if rank == 3 else "ValueError: rank 1: embeddings"), wrong
        twin = copy.deepcopy(bank)
        assert twin.group is group
        assert len(twin.push(torch.ones(1, DIM))) == 1
        with pytest.raises(TypeError, match="state_dict"):
            pickle.dumps(bank)


def test_a_bank_of_a_sub_group_is_shared_by_that_group_alone(four_ranks: Any) -> None:
    four_ranks.run(in_a_group)


def test_one_process_needs_no_process_group() -> None:
    single = MemoryBank(7, DIM, layout="local")
    rows, labels = batch(0, (9,))
    for layout in ("replicated", "sharded"):
        bank = MemoryBank(7, DIM, layout=layout)
        assert torch.equal(bank.push(rows, labels), single.push(rows, labels))
        for name, value in bank.state_dict().items():
            assert same_bits(value, single.state_dict()[name])
        single.clear()
        assert len(pickle.loads(pickle.dumps(bank))) == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "scattered"}, ValueError, "layout must be one of replicated, sharded, local, got 'scattered'"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed process group or None, got 'world'"),
    ],
)
def test_a_wrong_layout_or_group_is_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryBank(4, DIM, **options)


def made_too_early(rank: int) -> None:
    bank = MemoryBank(4, DIM, layout="sharded", group=None)
    bank._layout.shards = 1  # as if there had been no process group yet
    with pytest.raises(RuntimeError, match=r"sharded for 1 ranks, but now there are 2.*after torch.distributed.init"):
        bank.push(torch.ones(1, DIM))


def test_a_sharded_bank_made_before_the_process_group_says_so(two_ranks: Any) -> None:
    two_ranks.run(made_too_early)


# Ids, limited searches, and int8 rows


def push_with_ids(bank: MemoryBank, single: Single, rank: int, steps: int) -> None:
    pushes = PUSHES[dist.get_world_size()]
    for step in range(steps):
        counts = pushes[step % len(pushes)]
        rows, labels = batch(step, counts)
        labels, ids = labels % 3 - 1, labels % 5 - 1
        ids_of = None if step == 0 else ids
        mine = None if ids_of is None else part(ids, counts, rank)
        slots = bank.push(part(rows, counts, rank), part(labels, counts, rank), mine)
        assert torch.equal(slots, part(single.push(rows, labels, ids_of), counts, rank))


def limited_search_equals_one_process(rank: int, layout: str, size: int, dtype: torch.dtype) -> None:
    bank, single = MemoryBank(size, DIM, dtype=dtype, layout=layout), Single(size, dtype=dtype)
    push_with_ids(bank, single, rank, 9)
    for name, value in whole_state(bank).items():
        assert same_bits(value, single.state_dict()[name]), name
    world = dist.get_world_size()
    queries = torch.randn(3 * world, DIM, generator=generator(77))[3 * rank : 3 * rank + 3 - rank % 2]
    labels, ids = torch.tensor([-1, 0, 1])[: len(queries)], torch.tensor([2, -1, 1])[: len(queries)]
    for limits in ({}, {"labels": labels}, {"exclude_ids": ids}, {"labels": labels, "exclude_ids": ids}):
        k = min(3, size)
        found = bank.search(queries, k, **limits)
        assert_same_neighbors(found, single.search(queries, k, **limits), single)


@pytest.mark.parametrize("size", [1, 3, 37])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_limited_searches_are_those_of_one_process(ranks: Any, layout: str, size: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.int8):
        ranks.run(limited_search_equals_one_process, layout, size, dtype)


def not_everyone_has_ids(rank: int, layout: str) -> None:
    bank = MemoryBank(8, DIM, layout=layout)
    rows, ids = torch.randn(3, DIM, generator=generator(rank)), torch.arange(3)
    with pytest.raises(ValueError, match="presence of ids must be the same on all ranks"):
        bank.push(rows, ids=ids if rank else None)
    assert len(bank) == 0
    assert bank.ids is None
    bank.push(rows, ids=ids)
    if layout == "sharded":
        with pytest.raises(ValueError, match="limits of the search must be the same on all ranks"):
            bank.search(rows, 1, exclude_ids=ids if rank else None)
        with pytest.raises(ValueError, match=r"exclude_ids must be \[3\]"):
            bank.search(rows, 1, exclude_ids=ids if rank else ids[:2])
    assert len(bank) == min(8, 3 * dist.get_world_size())


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_all_ranks_have_ids_or_none(two_ranks: Any, layout: str) -> None:
    two_ranks.run(not_everyone_has_ids, layout)
