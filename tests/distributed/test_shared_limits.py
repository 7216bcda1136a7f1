"""Labels and ids of banks shared by several ranks: dtypes, searches that differ between ranks, and mixed states."""

import os
import re
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from msf_core import MeanShiftLoss, MemoryBank
from msf_core.distributed import Ranks

DIM = 4


def rows(seed: int) -> Tensor:
    return torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed))


def of_many_integers(rank: int, layout: str) -> None:
    bank = MemoryBank(8, DIM, layout=layout)
    kind = (torch.int32, torch.int64)[rank % 2]
    numbers = torch.arange(3, dtype=kind) + 3 * rank
    bank.push(rows(rank), numbers, numbers + 10)
    parts = (bank.state_dict()[name] for name in ("labels", "ids"))
    whole = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in parts]
    assert whole[0][:6].tolist() == list(range(6)), whole
    assert whole[1][:6].tolist() == list(range(10, 16)), whole
    assert bank.search(rows(rank), 1, labels=numbers).label[:, 0].tolist() == numbers.tolist()
    found = bank.search(rows(rank), 6, exclude_ids=numbers + 10)
    assert (found.index[:, -1] == -1).all()
    assert (found.index[:, :-1] >= 0).all()


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_ranks_may_number_in_different_dtypes(two_ranks: Any, layout: str) -> None:
    two_ranks.run(of_many_integers, layout)


def different_limits(rank: int) -> None:
    bank = MemoryBank(8, DIM, layout="sharded")
    ids = torch.arange(3)
    bank.push(rows(rank), ids, ids)
    with pytest.raises(ValueError, match="limits of the search must be the same on all ranks"):
        bank.search(rows(rank), 1, **({"labels": ids} if rank else {"exclude_ids": ids}))


def test_labels_here_and_ids_there_is_an_error(two_ranks: Any) -> None:
    two_ranks.run(different_limits)


def a_loss_with_options(rank: int, layout: str, same_label: bool, exclude_same_id: bool) -> None:
    """Labels and ids restrict the neighbors only if the options say so, as in one process with the whole batch."""
    options = {"same_label": same_label, "exclude_same_id": exclude_same_id}
    shared = MeanShiftLoss(MemoryBank(40, DIM, layout=layout), 4, **options)
    single = MeanShiftLoss(MemoryBank(40, DIM, layout="local"), 4, **options)
    world = dist.get_world_size()
    for step in range(4):
        u = torch.cat([rows(10 * step + r) for r in range(world)])
        numbers = torch.arange(3 * world) % 4
        part = slice(3 * rank, 3 * rank + 3)
        _, found = shared(u[part], u[part], numbers[part], ids=numbers[part], return_neighbors=True)
        _, expected = single(u, u, numbers, ids=numbers, return_neighbors=True)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs[part])


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_labels_and_ids_restrict_the_neighbors_of_the_loss_by_its_options_alone(ranks: Any, layout: str) -> None:
    for same_label, exclude_same_id in ((False, False), (True, False), (False, True), (True, True)):
        ranks.run(a_loss_with_options, layout, same_label, exclude_same_id)


def a_loss_of_views(rank: int, layout: str) -> None:
    """Views of the same image are not found, whichever rank pushed them; batch sizes differ between the ranks."""
    shared = MeanShiftLoss(MemoryBank(400, DIM, layout=layout), 4)
    single = MeanShiftLoss(MemoryBank(400, DIM, layout="local"), 4)
    counts = [1 + r % 2 for r in range(dist.get_world_size())]
    first = sum(counts[:rank])
    for step in range(3):
        views = [
            torch.cat([rows(20 * step + 10 * view + r)[:count] for r, count in enumerate(counts)]) for view in (0, 1)
        ]
        mine = [u[first : first + counts[rank]] for u in views]
        numbers = torch.arange(sum(counts)) + 10 * step
        _, found = shared(mine, mine, numbers[first : first + counts[rank]], return_neighbors=True)
        _, expected = single(views, views, numbers, return_neighbors=True)
        for ours, theirs in zip(found, expected, strict=True):
            for name in ("similarity", "embedding", "label"):  # slots differ: a rank pushes all its views at once
                whole = getattr(theirs, name)[first : first + counts[rank]]
                torch.testing.assert_close(getattr(ours, name), whole, msg=f"{name} of step {step}")
    if layout == "sharded":
        with pytest.raises(ValueError, match="views must be the same on all ranks"):
            shared(mine, mine if rank else mine[0])
    assert len(shared.bank) == 3 * 2 * sum(counts)


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_several_views_are_those_of_one_process(ranks: Any, layout: str) -> None:
    ranks.run(a_loss_of_views, layout)


def more_rows_than_the_bank(rank: int, layout: str, views: int) -> None:
    """The rows of all ranks overwrite some of this rank's rows, although its own rows alone would fit."""
    shared = MeanShiftLoss(MemoryBank(4 * views, DIM, layout=layout), 3)
    for step in range(3):
        own = [rows(step + 10 * rank + view) for view in range(views)]
        loss, found = shared(own if views > 1 else own[0], own if views > 1 else own[0], return_neighbors=True)
        assert loss.isfinite()
        for of_view in found if views > 1 else [found]:
            assert (of_view.index[:, 1:] >= 0).all()
            assert (of_view.index[:, 0] == -1).any() == (rank == 0)
            assert (of_view.index[:, 1:] != of_view.index[:, :1]).all()


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_batch_of_all_ranks_may_be_larger_than_the_bank(two_ranks: Any, layout: str) -> None:
    for views in (1, 2):
        two_ranks.run(more_rows_than_the_bank, layout, views)


def not_everyone_comes(rank: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=4))
    criterion = MeanShiftLoss(MemoryBank(8, DIM, group=group), 2)
    criterion(rows(0), rows(1))
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"(?s)not all ranks came to this push .*drop_last.*DDP.join\(\) alone"):
            criterion(rows(2), rows(3))
        assert len(criterion.bank) == 6
    dist.barrier()


def test_where_a_rank_makes_fewer_calls_the_error_tells_of_uneven_inputs(two_ranks: Any) -> None:
    two_ranks.run(not_everyone_comes)


LONG, NOT_UTF8 = "/pictures/" + "é" * 2_500 + ".jpg", os.fsdecode(b"/pictures/\xff \xe9.jpg") + "\ud800 "


def told_of(rank: int, text: str, exchanges: bool) -> str:
    ranks, problem = Ranks(), OSError(text) if rank == 1 else None
    call = partial(ranks.exchange, "search", [torch.zeros(2, 1)], [1, 1], problem)
    if not exchanges:
        call = partial(ranks.agree, "step", same={}, count=7, problem=problem)
    with pytest.raises(OSError, match=re.escape(text)) as raised:
        call()
    assert ranks.agree("step", same={}, count=rank) == [0, 1], "the ranks can go on"
    return str(raised.value)


@pytest.mark.parametrize("text", [LONG, NOT_UTF8, ""], ids=["of 5,014 bytes", "not UTF-8", "empty"])
def test_a_message_arrives_whole_and_in_any_encoding(two_ranks: Any, text: str) -> None:
    for exchanges in (False, True):
        assert two_ranks.run(told_of, text, exchanges) == [f"rank 1: {text}", text]


def smaller_into_full(rank: int) -> None:
    saved, bank = MemoryBank(40, DIM, layout="sharded"), MemoryBank(40, DIM, layout="sharded")
    saved.push(rows(rank), torch.arange(3), torch.arange(3))
    for _ in range(20):
        bank.push(rows(rank), torch.arange(3), torch.arange(3))
    bank.load_state_dict(saved.state_dict())
    for name, value in bank.state_dict().items():
        other = saved.state_dict()[name]
        assert torch.equal(*(x.to_local() if hasattr(x, "to_local") else x for x in (value, other))), name


def test_a_shard_that_a_state_does_not_reach_is_emptied(ranks: Any) -> None:
    ranks.run(smaller_into_full)


def mixed(rank: int, name: str) -> None:
    bank = MemoryBank(8, DIM, layout="sharded", dtype=torch.int8)
    bank.push(rows(rank), ids=torch.arange(3))
    state = bank.state_dict()
    with pytest.raises(RuntimeError, match=f"{name} must both be DTensors"):
        bank.load_state_dict(state | {name: state[name].full_tensor()})


@pytest.mark.parametrize("name", ["scale", "ids"])
def test_a_plain_companion_of_sharded_rows_is_named(two_ranks: Any, name: str) -> None:
    two_ranks.run(mixed, name)
