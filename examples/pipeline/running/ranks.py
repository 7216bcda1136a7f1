"""Several processes under torchrun: the process group, BatchNorm, and errors that all ranks share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from msf_core.distributed import Ranks
from pipeline.running.peers import Peers, lost_touch
from pipeline.running.seeds import seed_of

SILENCE = 3.0  # a rank that others wait for is lost after this many seconds without a sign of life


@contextmanager
def shared(ranks: Ranks) -> Iterator[None]:
    """Raise an error of one rank on all ranks, which wait for one another at the end of the block."""
    if ranks.size == 1:
        yield
        return
    with ranks.sharing_errors("prepare"):
        yield
    ranks.agree("prepare", same={})


@contextmanager
def joined(device: str, timeout: int) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that torchrun started, if there are any, and leave them at the end.

    Args:
        device: name of a PyTorch device; "auto" is the GPU if there is one. Under torchrun, each rank has its own GPU.
        timeout: seconds that a rank waits for another.

    Yields:
        The ranks, and the device of this one.

    Raises:
        ValueError: there is no such device here, or ranks would not find each other after a restart by torchrun.
        LostRank: a rank that this one waits for does not answer within the time-out.
    """
    chosen = device_of(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(), chosen
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    # gloo beside NCCL, so that exchanging the numbers of rows does not wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent_store and may_restart() and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "torchrun --max-restarts on several hosts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment: "
            "each host counts only its own restarts, and ranks with different counts would not find each other"
        )
    silence = min(SILENCE, timeout / 8)
    patience = timedelta(seconds=timeout - 3 * silence)  # the rest is for finding the lost rank
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    # torchrun's own store outlives a restart and then has addresses of processes that no longer exist.
    prefix = f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}" if agent_store else "start"
    store = dist.PrefixStore(prefix, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    peers = Peers(rank, size, prefix, silence)
    try:
        yield Ranks(), chosen
    except RuntimeError as error:
        if not lost_touch(error):
            raise
        raise peers.find(error) from error
    finally:
        peers.stop()
        dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """Return the PyTorch device with this name; for "auto", the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or a GPU such as cuda:0, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch sees no GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here, the first is cuda:0")
    if device.type != "cuda":  # GPUs are not tried here: under torchrun, each rank gets its own later
        try:
            torch.zeros(1, device=device).tolist()
        except Exception as error:  # each kind of device raises its own
            raise ValueError(f"--device {name}: PyTorch cannot compute on it here ({type(error).__name__})") from None
    return torch.device("cpu") if device.type == "cpu" else device


def restarted() -> bool:
    """Return whether torchrun restarted this process after a rank failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def may_restart() -> bool:
    """Return whether torchrun would restart this process."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def synchronized(module: nn.Sequential, device: torch.device) -> nn.Sequential:
    """Return the module with BatchNorm over the images of all ranks."""
    if device.type == "cuda":
        converted: nn.Sequential = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = SyncBatchNormAnywhere
    return module


def parallel(module: nn.Module, image_shape: tuple[int, ...], device: torch.device) -> DistributedDataParallel:
    """Return the module in DDP, which adds gradients in the same order in the first step as in all later ones.

    After its first backward pass, DDP regroups the gradients into different buckets, so that three or more ranks add
    them in a different order. A resumed run would then differ from an uninterrupted one. Here, that pass takes place
    before training, on two images of zeros, and leaves parameters, buffers, gradients and random numbers unchanged.

    Args:
        module: maps images [B, *image_shape] to a tensor.
        image_shape: shape [C, H, W] of the images.
        device: the device of the module.
    """
    wrapped = DistributedDataParallel(module)
    before = [buffer.clone() for buffer in module.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        wrapped(torch.zeros(2, *image_shape, device=device)).sum().backward()
    wrapped.zero_grad()
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)
    return wrapped


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; the gradient is summed over all ranks, too."""

    @staticmethod
    def forward(context: Any, part: Tensor) -> Tensor:
        """Return the sum."""
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients."""
        return SumOverRanks.forward(context, gradient)


class SyncBatchNormAnywhere(_BatchNorm):
    """A SyncBatchNorm for any device with all_reduce; PyTorch's needs a GPU. All ranks must pass the same shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` [B, C, …] normalized over the batches of all ranks."""
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        dtype, input = input.dtype, input.float()  # as BatchNorm under autocast
        others = [dimension for dimension in range(input.ndim) if dimension != 1]
        count = input.numel() // input.shape[1] * dist.get_world_size()
        mean: Tensor = SumOverRanks.apply(input.mean(dim=others, keepdim=True)) / dist.get_world_size()  # [1, C, …]
        centred = input - mean
        variance: Tensor = SumOverRanks.apply(centred.square().sum(dim=others, keepdim=True)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                weight = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.flatten(), weight)
                self.running_var.lerp_(variance.flatten() * count / (count - 1), weight)
        normal = centred * (variance + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return normal.to(dtype)
        return (normal * self.weight.view(mean.shape) + self.bias.view(mean.shape)).to(dtype)


def shuffled(module: Callable[[Tensor], Tensor], images: Tensor, ranks: Ranks, *seeds: int) -> Tensor:
    """Return ``module(images)``, where each rank processes a random share of all ranks' images (MoCo's shuffled BN).

    Args:
        module: maps images [B, …] to embeddings [B, D].
        images: images [B, …] of this rank; B must be the same on all ranks.
        ranks: the ranks that take part.
        seeds: seeds of the random order, the same on all ranks.
    """
    counts = [len(images)] * ranks.size
    everyones = ranks.gather(images, counts)
    order = torch.randperm(len(everyones), generator=torch.Generator().manual_seed(seed_of(*seeds)))
    mine = everyones[order.chunk(ranks.size)[ranks.rank].to(images.device, non_blocking=True)]
    if images.is_contiguous(memory_format=torch.channels_last):
        mine = mine.contiguous(memory_format=torch.channels_last)
    embeddings = ranks.gather(module(mine), counts)
    own = order.argsort().chunk(ranks.size)[ranks.rank]
    return embeddings[own.to(images.device, non_blocking=True)]
