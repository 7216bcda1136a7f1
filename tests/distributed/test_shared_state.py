"""The saved state of a bank shared by several ranks, loaded into banks of any layout and number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from msf_core import MeanShiftLoss, MemoryBank
from msf_core.distributed import as_shard, blocks_of, shard_bounds

DIM = 4
LAYOUTS = ("replicated", "sharded")


def fill(bank: MemoryBank, pushes: int, with_ids: bool = False) -> MemoryBank:
    """Push the same batches of 12 rows into any bank; each rank of a shared bank pushes its part."""
    world = dist.get_world_size() if bank.layout != "local" and dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    for step in range(pushes):
        rows = torch.randn(12, DIM, generator=torch.Generator().manual_seed(step))
        if step == pushes - 1:
            rows[5] = torch.nan
        labels = torch.arange(12) + 12 * step
        ids = labels.chunk(world)[rank] + 1000 if with_ids else None
        bank.push(rows.chunk(world)[rank], labels.chunk(world)[rank], ids)
    return bank


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def assert_same_bank(bank: MemoryBank, expected: MemoryBank) -> None:
    ours, theirs = whole(bank.state_dict()), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.nan_to_num(7.0), theirs[name].nan_to_num(7.0)), name
    assert len(bank) == len(expected)


def goes_on_alike(bank: MemoryBank, expected: MemoryBank) -> None:
    """The next push goes to the same slots, and a search finds the same."""
    world = dist.get_world_size() if bank.layout != "local" else 1
    start = 2 * dist.get_rank() if world > 1 else 0
    everyones = torch.randn(2 * world, DIM, generator=torch.Generator().manual_seed(99))
    rows = everyones[start : start + 2]
    slots = expected.push(everyones)
    assert torch.equal(bank.push(rows), slots[start : start + 2])
    assert torch.equal(bank.search(rows, 3).index, expected.search(rows, 3).index)
    assert_same_bank(bank, expected)


def into_every_other(rank: int, saved_layout: str, pushes: int, saved_dtype: torch.dtype) -> None:
    saved = fill(
        MemoryBank(10, DIM, layout=saved_layout, dtype=saved_dtype), pushes, with_ids=saved_dtype == torch.int8
    )
    single = fill(MemoryBank(10, DIM, layout="local", dtype=saved_dtype), pushes, with_ids=saved_dtype == torch.int8)
    for layout in (*LAYOUTS, "local"):
        for size in (10, 13, 4, 1, 40):
            for dtype in (torch.float32, torch.int8):
                options: dict[str, Any] = {"size": size, "dim": DIM, "dtype": dtype}
                bank, expected = MemoryBank(**options, layout=layout), MemoryBank(**options, layout="local")
                fill(bank, 1)
                expected.load_state_dict(single.state_dict())
                bank.load_state_dict(saved.state_dict())
                assert_same_bank(bank, expected)
                if size > 2 and len(bank) >= 3:
                    goes_on_alike(bank, expected)
    assert_same_bank(saved, single)  # it was only read
    saved.load_state_dict(saved.state_dict())  # the state shares the bank's memory
    assert_same_bank(saved, single)


@pytest.mark.parametrize("pushes", [1, 5])
@pytest.mark.parametrize("saved_layout", LAYOUTS)
def test_the_state_of_any_layout_loads_into_any_layout_and_size(ranks: Any, saved_layout: str, pushes: int) -> None:
    for dtype in (torch.float32, torch.int8):
        ranks.run(into_every_other, saved_layout, pushes, dtype)


def other_state(rank: int) -> None:
    bank = fill(MemoryBank(10, DIM, layout="sharded"), 2)
    before = {name: value.clone() for name, value in whole(bank.state_dict()).items()}
    state = MemoryBank(10, DIM + 1, layout="sharded").state_dict()
    with pytest.raises(RuntimeError, match=f"dim={DIM}"):
        bank.load_state_dict(state)
    mixed = bank.state_dict() | {"labels": torch.zeros(10, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="both be DTensors"):
        bank.load_state_dict(mixed)
    for name, value in whole(bank.state_dict()).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_a_sharded_state_that_does_not_fit_changes_nothing(two_ranks: Any) -> None:
    two_ranks.run(other_state)


# torch.distributed.checkpoint


def criterion_of(layout: str, size: int = 21) -> MeanShiftLoss:
    return MeanShiftLoss(MemoryBank(size, DIM, layout=layout), k=3)


def saved_by(rank: int, folder: str, layout: str) -> int:
    criterion = criterion_of(layout)
    fill(criterion.bank, 3)
    criterion._steps.fill_(3)
    dcp.save({"criterion": criterion.state_dict()}, checkpoint_id=folder)
    return criterion.bank.rows.nbytes


def loaded_by(rank: int, folder: str, layout: str) -> None:
    criterion = criterion_of(layout)
    state = {"criterion": criterion.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    criterion.load_state_dict(state["criterion"])
    assert criterion.steps == 3
    single = fill(MemoryBank(21, DIM, layout="local"), 3)
    assert_same_bank(criterion.bank, single)
    goes_on_alike(criterion.bank, single)


def loaded_in_another_size(rank: int, folder: str, layout: str) -> None:
    """As the README says: through a bank of the saved size."""
    saved = criterion_of(layout)
    state = {"criterion": saved.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    criterion = criterion_of(layout, size=8)
    criterion.load_state_dict(state["criterion"])
    assert criterion.steps == 3
    expected = MemoryBank(8, DIM, layout="local")
    expected.load_state_dict(fill(MemoryBank(21, DIM, layout="local"), 3).state_dict())
    assert_same_bank(criterion.bank, expected)
    goes_on_alike(criterion.bank, expected)


@pytest.mark.parametrize("saved_layout", LAYOUTS)
def test_a_distributed_checkpoint_of_four_ranks_loads_on_two_four_and_one(
    two_ranks: Any, four_ranks: Any, tmp_path: Path, saved_layout: str
) -> None:
    folder = str(tmp_path / "checkpoint")
    sizes = four_ranks.run(saved_by, folder, saved_layout)
    if saved_layout == "sharded":
        files = {path.name: path.stat().st_size for path in Path(folder).glob("*.distcp")}
        assert len(files) == 4, files  # each rank has written its part
        assert max(sizes) == 6 * DIM * 4
    for layout in LAYOUTS:
        for processes in (four_ranks, two_ranks):
            processes.run(loaded_by, folder, layout)
            processes.run(loaded_in_another_size, folder, layout)
    criterion = criterion_of("replicated")
    state = {"criterion": criterion.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    criterion.load_state_dict(state["criterion"])
    assert_same_bank(criterion.bank, fill(MemoryBank(21, DIM), 3))


def as_plain_tensors(rank: int) -> dict[str, Tensor]:
    criterion = criterion_of("sharded")
    fill(criterion.bank, 3)
    return get_model_state_dict(criterion, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def test_a_full_state_dict_of_a_sharded_bank_is_that_of_one_process(two_ranks: Any) -> None:
    state = two_ranks.run(as_plain_tensors)[0]
    criterion = criterion_of("replicated")
    criterion.load_state_dict(state)
    assert_same_bank(criterion.bank, fill(MemoryBank(21, DIM), 3))


def travels_in_blocks(rank: int) -> None:
    world = dist.get_world_size()
    whole = torch.arange(33.0).view(11, 3)
    begin, end = shard_bounds(11, world, rank)
    blocks = list(blocks_of(as_shard(whole[begin:end], 11, None), whole.device, most=2 * 3 * 4))  # two rows
    assert max(len(block) for _, block in blocks) == 2
    for first, block in blocks:
        assert torch.equal(block, whole[first : first + len(block)])
    assert sum(len(block) for _, block in blocks) == 11


def test_the_shards_of_others_come_in_blocks_of_a_few_rows(ranks: Any) -> None:
    ranks.run(travels_in_blocks)
