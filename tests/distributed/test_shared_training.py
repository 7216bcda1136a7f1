"""Training steps on several ranks, against one process with the whole batch."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msf_core import EMATarget, MeanShiftLoss, MemoryBank

INPUTS, DIM, BATCH, STEPS = 6, 8, 12, 20


def encoder() -> nn.Sequential:
    """An encoder without BatchNorm, whose statistics would cover only one rank's part of a batch."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(INPUTS, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, DIM))


def views(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, INPUTS, generator=generator)
    return images + 0.1 * torch.randn(BATCH, INPUTS, generator=generator), images


class WithBank(nn.Module):
    """An encoder and the criterion in one module, for DDP to wrap together."""

    def __init__(self, criterion: MeanShiftLoss) -> None:
        super().__init__()
        self.online, self.predictor, self.criterion = encoder(), nn.Linear(DIM, DIM), criterion

    def forward(self, image: Tensor, u: Tensor) -> Tensor:
        return self.criterion(self.predictor(self.online(image)), u)


def train(
    layout: str, k: Any, forwards: int, wrap: Callable[[WithBank], nn.Module], parts: int, part: int
) -> list[float]:
    """Return the losses of STEPS steps on one part of each batch, with ``forwards`` forwards before each backward."""
    model = WithBank(MeanShiftLoss(MemoryBank(64, DIM, layout=layout), k=k))
    wrapped = wrap(model)
    target = EMATarget(model.online, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for forward in range(forwards):
            weak, strong = (view.chunk(parts)[part] for view in views(step * forwards + forward))
            total = total + wrapped(strong, target(weak)) / forwards
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        target.update(model.online)
        losses.append(total.item())
    return losses


def equal_to_one_process(rank: int, layout: str, forwards: int, k: Any) -> None:
    world = dist.get_world_size()
    alone = train("local", k, forwards, lambda model: model, 1, 0)
    mine = torch.tensor(train(layout, k, forwards, DistributedDataParallel, world, rank))
    dist.all_reduce(mine)
    torch.testing.assert_close(mine / world, torch.tensor(alone), rtol=1e-4, atol=1e-5)
    assert alone[-1] < 0.5 * alone[0]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_twenty_steps_in_ddp_have_the_losses_of_one_process(ranks: Any, layout: str, forwards: int) -> None:
    ranks.run(equal_to_one_process, layout, forwards, 5)


def a_schedule(step: int) -> float:
    return 1 + step / 2


def test_so_have_those_with_a_schedule_of_k(two_ranks: Any) -> None:
    two_ranks.run(equal_to_one_process, "sharded", 1, a_schedule)


def rows_of_each(rank: int) -> None:
    local = WithBank(MeanShiftLoss(MemoryBank(16, DIM, layout="local"), k=3))
    wrapped = DistributedDataParallel(local)
    for step in range(2):
        _, images = views(step)
        u = nn.functional.one_hot(torch.full((4,), rank), DIM).float()
        wrapped(images[:4], u)
    assert (local.criterion.bank.rows[:8].argmax(dim=1) == rank).all(), "DDP has sent another rank's rows"


def test_ddp_does_not_send_the_rows_of_rank_0_over_those_of_others(two_ranks: Any) -> None:
    two_ranks.run(rows_of_each)


def failing_loss(rank: int, layout: str) -> list[str]:
    criterion = MeanShiftLoss(MemoryBank(32, DIM, layout=layout), k=2)
    good, odd = torch.randn(4, DIM), rank == 1
    criterion(good, good)
    before = len(criterion.bank), criterion.steps
    empty = MeanShiftLoss(MemoryBank(32, DIM, layout=layout), k=2).eval()
    if odd:  # nobody searches, and nobody waits
        with pytest.raises(ValueError, match="target must be"):
            empty(good, good[:, :3])
    assert torch.isfinite(empty(good, good))
    errors = []
    calls = [
        lambda: criterion(good, good[:, :3] if odd else good),
        lambda: criterion(good[:2] if odd else good, good),
        lambda: criterion(good[:0], good[:0]) if odd else criterion(good, good),
        lambda: criterion(good, good, torch.zeros(4) if odd else torch.zeros(4, dtype=torch.int64)),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        errors.append(str(raised.value))
    assert (len(criterion.bank), criterion.steps) == before
    criterion.eval()
    if layout == "sharded":
        with pytest.raises(ValueError, match="target must be"):
            criterion(good, good[:, :3] if odd else good)
    elif odd:  # nobody waits in eval mode
        with pytest.raises(ValueError, match="target must be"):
            criterion(good, good[:, :3])
    assert torch.isfinite(criterion(good, good))
    assert torch.isfinite(criterion.train()(good, good))
    return errors


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_wrong_batch_on_one_rank_is_an_error_of_the_loss_on_all(two_ranks: Any, layout: str) -> None:
    others, its_own = two_ranks.run(failing_loss, layout)
    assert others == [f"rank 1: {message}" for message in its_own]
    starts = ("target must be", "target must be", "prediction must be", "labels must be")
    assert [message[: len(start)] for start, message in zip(starts, its_own, strict=True)] == list(starts)


def exchanges_of_steps(rank: int, layout: str) -> list[int]:
    """Return the number of collectives that each step waits for; the batch size grows once."""
    criterion = MeanShiftLoss(MemoryBank(64, DIM, layout=layout), 5)
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        made: list[str] = []
        for name in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single"):
            if not hasattr(dist, name):
                continue
            collective = getattr(dist, name)
            patch.setattr(dist, name, lambda *a, c=collective, n=name, **o: (made.append(n), c(*a, **o)))
        for batch in (6, 6, 7, 6, 7, 6):
            made.clear()
            v, u = torch.randn(2, batch - rank, DIM)  # of a different size on each rank
            criterion(v.requires_grad_(), u).backward()
            counts.append(len(made))
    return counts


@pytest.mark.parametrize(("layout", "exchanges"), [("replicated", 1), ("sharded", 2)])
def test_a_step_waits_once_for_a_push_and_once_for_the_answers_of_shards(
    ranks: Any, layout: str, exchanges: int
) -> None:
    for counts in ranks.run(exchanges_of_steps, layout):
        for number, count in enumerate(counts):  # a batch larger than all before it may need one more
            assert exchanges <= count <= exchanges + (number in (0, 2))


def compiled_and_not(rank: int, layout: str) -> None:
    torch._dynamo.reset()
    plain, traced = (MeanShiftLoss(MemoryBank(64, DIM, layout=layout), k=3) for _ in range(2))
    compiled = torch.compile(traced, backend="aot_eager")
    for step in range(8):
        u = torch.randn(4, DIM, generator=torch.Generator().manual_seed(10 * step + rank))
        v = u.flip(0).requires_grad_()
        assert torch.equal(compiled(v, u), plain(v, u))
    for ours, theirs in zip((traced.bank.rows, traced.bank.labels), (plain.bank.rows, plain.bank.labels), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_compiled_criterion_shares_its_bank_too(two_ranks: Any, layout: str) -> None:
    two_ranks.run(compiled_and_not, layout)


def nan_batches(rank: int, layout: str) -> None:
    """A float16 overflow on one rank, as happens with mixed precision."""
    bank, world = MemoryBank(24, DIM, layout=layout), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    for step in range(10):
        u = torch.randn(3, DIM, generator=generator, dtype=torch.float32).half()
        if step % 3 == 1 and rank == world - 1:
            u = u * 60_000 * 2
            assert u.isinf().any()
        bank.push(u)
        found = bank.search(torch.randn(2, DIM, generator=generator), min(len(bank), 24))
        assert found.embedding.isfinite().all()
        assert (found.index[found.similarity == -torch.inf] == -1).all()
        there = found.index >= 0
        assert found.similarity[there].isfinite().all()
    assert int(bank.nonfinite) > 0
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, bank.nonfinite)
    assert len(set(map(int, counts))) == 1


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_batch_that_overflowed_on_one_rank_is_nobodys_neighbor(two_ranks: Any, layout: str) -> None:
    two_ranks.run(nan_batches, layout)


# A rank that is gone, or stalls


def push_until_told(rank: int, store: str, what: str, connection: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.barrier()  # before the short time limit: one process may start much later than the other
    bank = MemoryBank(8, DIM, layout="sharded", group=dist.new_group(timeout=timedelta(seconds=3)))
    bank.push(torch.ones(2, DIM))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL if what == "killed" else signal.SIGSTOP)
    started = time.monotonic()
    try:
        bank.push(torch.ones(2, DIM))
    except RuntimeError as error:
        connection.send((f"{error}", time.monotonic() - started, len(bank)))
    os._exit(0)


@pytest.mark.parametrize("what", ["killed", "stalled"])
def test_a_rank_that_is_gone_or_stalls_is_an_error_on_the_others(tmp_path: Path, what: str) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    processes = [
        context.Process(target=push_until_told, args=(rank, str(tmp_path / "store"), what, theirs)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert ours.poll(120), "it hangs"
        message, seconds, length = ours.recv()
        assert ("Timed out" if what == "stalled" else "onnection") in message
        assert seconds < 20
        assert length == 4  # the earlier rows are still there
    finally:
        for process in processes:
            process.kill()
            process.join()
