"""The measured cases: a search, a step of msf_core, a step in the authors' formulation, a ResNet50 training step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring.measure import time_once
from msf_core import MeanShiftLoss, MemoryBank, reference

FILL_CHUNK_ROWS = 16384
RECALL_QUERIES = 8
# Rows whose similarities differ by less than the rounding of float32 products are a tie.
RECALL_TOLERANCE = 1e-6
RESNET_CPU_BATCH = 8
RESNET_CPU_REPEATS = 2
RESNET_CUDA_REPEATS = 10

Step = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Problem:
    """The sizes of one search: N ``rows`` of ``dim`` D, ``batch`` queries, ``k`` neighbors."""

    rows: int
    dim: int
    batch: int
    k: int
    dtype: str
    device: str

    @property
    def search_gflop(self) -> float:
        """GFLOP per query by the formula 2·N·D."""
        return 2e-9 * self.rows * self.dim

    @property
    def authors_gflop(self) -> float:
        """GFLOP per query of the authors' step by the formula 6·N·D: two products forward, one backward."""
        return 3 * self.search_gflop


def fill_bank(problem: Problem, backend: str = "auto") -> MemoryBank:
    """Return a full bank of random unit rows from a seeded generator.

    One chunk is random. The others are copies of it with rotated dimensions, which are as far apart and fast to create.
    """
    device = torch.device(problem.device)
    bank = MemoryBank(problem.rows, problem.dim, dtype=getattr(torch, problem.dtype), backend=backend).to(device)
    generator = torch.Generator(device).manual_seed(0)
    chunk = torch.randn(min(FILL_CHUNK_ROWS, problem.rows), problem.dim, generator=generator, device=device)
    for number, start in enumerate(range(0, problem.rows, FILL_CHUNK_ROWS)):
        bank.push(chunk[: problem.rows - start].roll(number, dims=1))
    return bank


def make_batches(problem: Problem, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return ``count`` pairs of predictions v and targets u, [B, D] each."""
    device = torch.device(problem.device)
    generator = torch.Generator(device).manual_seed(1)
    pairs = torch.randn(count, 2, problem.batch, problem.dim, generator=generator, device=device)
    return [(v, u) for v, u in pairs]


def our_step(bank: MemoryBank, k: int) -> Step:
    """Return a step of msf_core (push u, search, loss, backward to v), which returns the loss."""
    criterion = MeanShiftLoss(bank, k)

    def step(v: Tensor, u: Tensor) -> Tensor:
        loss: Tensor = criterion(v.detach().requires_grad_(), u)
        loss.backward()
        return loss.detach()

    return step


def authors_step(bank: MemoryBank, k: int) -> Step:
    """Return the same step in the authors' formulation (`reference`), in float32, on a copy of the bank's rows."""
    rows = bank.rows.to(torch.float32, copy=True)
    start = int(bank.pushed)

    def step(v: Tensor, u: Tensor) -> Tensor:
        nonlocal start
        slots = (start + torch.arange(u.shape[0], device=u.device)) % rows.shape[0]
        rows[slots] = reference.unit(u)
        start += u.shape[0]
        loss = reference.mean_shift_loss_two_matrices(v.detach().requires_grad_(), u, rows, k, dtype=torch.float32)
        loss.backward()
        return loss.detach()

    return step


def count_gflop(call: Callable[[], Result], queries: int) -> tuple[float, Result]:
    """Run ``call``; return the GFLOP per query that PyTorch's counter saw (products only), and the result."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return 1e-9 * counter.get_total_flops() / queries, result


class Truth:
    """The true nearest rows of a few queries, by float64 brute force, to compute the recall of searches in a bank."""

    def __init__(self, bank: MemoryBank, queries: Tensor, most: int) -> None:
        """Find the ``most`` nearest rows of the first few queries [Q, D], which are rounded as in a search."""
        self.rows = bank.rows[: len(bank)]
        self.queries = F.normalize(queries[:RECALL_QUERIES].float(), dim=1).to(bank.dtype).double()  # [q, D]
        best = self.queries.new_empty(self.queries.shape[0], 0)
        for chunk in self.rows.split(FILL_CHUNK_ROWS):
            best = torch.cat([best, self.queries @ chunk.double().T], dim=1)
            best = best.topk(min(most, best.shape[1]), dim=1).values
        self.similarity = best  # [q, most], descending

    def recall(self, index: Tensor) -> float:
        """Return the share of the true k nearest among the rows found, [Q, k].

        A row counts if its similarity reaches the k-th best up to float32 rounding. Duplicates count once.
        """
        index = index[:RECALL_QUERIES]  # [q, k]
        k = index.shape[1]
        similarity = (self.queries[:, None] * self.rows[index.clamp(min=0)].double()).sum(dim=2)  # [q, k]
        right = (similarity >= self.similarity[:, k - 1 : k] - RECALL_TOLERANCE) & (index >= 0)
        hits = [len(set(row[mask].tolist())) for row, mask in zip(index, right, strict=True)]
        return sum(hits) / (k * len(hits))


def time_resnet50_step(device: torch.device, batch: int) -> tuple[list[float], int, str]:
    """Time the encoders' part of a training step, the denominator of every share.

    It runs forward and backward of the online ResNet50 and forward of the target, on 224 x 224 images, channels last,
    in train mode. It has no heads, optimizer or data loading, so the share of a whole training run is a little smaller.
    On CUDA, it uses bfloat16 autocast on ``batch`` images, a number that is halved whenever memory runs out. On a CPU,
    it uses float32 on a few images.

    Returns:
        Seconds of each run, the number of images in it, and the name of the arithmetic.

    Raises:
        ImportError: if torchvision is not installed.
    """
    from torchvision.models import resnet50

    cuda = device.type == "cuda"
    online, target = (resnet50().to(device, memory_format=torch.channels_last) for _ in range(2))
    target.requires_grad_(False)
    images = batch if cuda else min(batch, RESNET_CPU_BATCH)
    while True:
        try:
            seconds = _time_encoders(online, target, images, device)
            return seconds, images, "bfloat16 autocast" if cuda else "float32"
        except torch.OutOfMemoryError:
            if images == 1:
                raise
            images //= 2
            torch.cuda.empty_cache()


def _time_encoders(online: nn.Module, target: nn.Module, images: int, device: torch.device) -> list[float]:
    x = torch.randn(images, 3, 224, 224, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = online(x).float().square().mean()
            with torch.no_grad():
                target(x)
        loss.backward()
        online.zero_grad(set_to_none=True)

    for _ in range(3 if device.type == "cuda" else 1):
        step()
    return [
        time_once(step, device) for _ in range(RESNET_CUDA_REPEATS if device.type == "cuda" else RESNET_CPU_REPEATS)
    ]
