"""The paper's linear protocol (section 3.2): one linear layer on frozen, normalized, standardized features."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from msf_core.distributed import Ranks
from pipeline.evaluation.features import Batch, together
from pipeline.running.seeds import seed_of


@dataclass(frozen=True)
class Protocol:
    """How the layer is trained. The defaults are the paper's."""

    lrs: tuple[float, ...] = (0.01,)  # one layer is trained with each
    epochs: int = 40
    batch_size: int = 256  # over all ranks
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (15, 30)  # epochs at which the learning rate falls to a tenth
    seed: int = 0


class Standardize(nn.Module):
    """Scales features to unit length, then every dimension to zero mean and unit variance over the training set."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, features: Tensor) -> Tensor:
        """Return features [b, F], standardized."""
        return (F.normalize(features, dim=1) - self.mean) / self.deviation

    @classmethod
    def fitted(cls, batches: Iterable[Batch], ranks: Ranks) -> "Standardize":
        """Compute the statistics of all ranks' features, in batches [b, F]. A constant dimension is not scaled."""
        sums = None
        for features, _ in together(batches, ranks):
            unit = F.normalize(features, dim=1).double()
            own = torch.stack([unit.sum(dim=0), unit.square().sum(dim=0), unit.new_full(unit.shape[1:], len(unit))])
            sums = own if sums is None else sums + own
        assert sums is not None
        if ranks.size > 1:
            dist.all_reduce(sums)
        mean, square = sums[0] / sums[2], sums[1] / sums[2]
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        constant = deviation < 1e-7
        return cls(mean.float(), deviation.masked_fill(constant, 1.0).float())


def batches_of(count: int, epoch: int, protocol: Protocol, ranks: Ranks) -> list[list[int]]:
    """Return the images of an epoch's batches for this rank; a last batch with fewer images than ranks is dropped."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(protocol.seed, epoch))).tolist()
    whole = [order[first : first + protocol.batch_size] for first in range(0, count, protocol.batch_size)]
    return [batch[ranks.rank :: ranks.size] for batch in whole if len(batch) >= ranks.size]


def train_linear(
    views: Callable[[int], Iterator[Batch]],
    standardize: Standardize,
    classes: int,
    protocol: Protocol,
    ranks: Ranks,
    progress: Callable[[float], None] = lambda loss: None,
) -> nn.ModuleList:
    """Return a trained layer for each of the protocol's learning rates; all see the same features.

    Args:
        views: maps an epoch to this rank's features [b, F] and labels [b], in the batches of `batches_of`.
        standardize: standardizes the features.
        classes: the number of classes.
        protocol: how to train.
        ranks: the ranks that take part.
        progress: called after every epoch with its mean loss.
    """
    torch.manual_seed(protocol.seed)
    first = nn.Linear(len(standardize.mean), classes)
    layers = nn.ModuleList(nn.Linear(first.in_features, classes) for _ in protocol.lrs).to(standardize.mean.device)
    for layer in layers:
        layer.load_state_dict(first.state_dict())
    optimizer = torch.optim.SGD(
        [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(layers, protocol.lrs, strict=True)],
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(protocol.milestones), gamma=0.1)
    for epoch in range(protocol.epochs):
        losses = []
        for features, labels in together(views(epoch), ranks):
            inputs = standardize(features)
            count = torch.tensor(float(len(labels)), device=inputs.device)
            if ranks.size > 1:
                dist.all_reduce(count)
            loss = sum(F.cross_entropy(layer(inputs), labels, reduction="sum") for layer in layers) / count
            optimizer.zero_grad()
            loss.backward()
            if ranks.size > 1:
                for parameter in layers.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
            optimizer.step()
            losses.append(loss.detach())
        schedule.step()
        mean = torch.stack(losses).mean() / len(layers)
        if ranks.size > 1:
            dist.all_reduce(mean)
        progress(float(mean))
    return layers


@torch.no_grad()
def accuracy(
    layers: Sequence[nn.Module], standardize: Standardize, batches: Iterable[Batch], ranks: Ranks
) -> list[dict[str, float]]:
    """Return the accuracy of each layer: "top1" and, with at least five classes, "top5".

    Args:
        layers: the layers from `train_linear`.
        standardize: standardizes the features.
        batches: features and labels of this rank's part of the test images.
        ranks: the ranks that take part.
    """
    right = torch.zeros(len(layers), 2, dtype=torch.float64, device=standardize.mean.device)
    total = torch.zeros((), dtype=torch.float64, device=standardize.mean.device)
    five = 0
    for features, labels in together(batches, ranks):
        inputs = standardize(features)
        for place, layer in enumerate(layers):
            logits = layer(inputs)
            five = min(5, logits.shape[1])
            hits = logits.topk(five, dim=1).indices == labels[:, None]
            right[place] += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum()])
        total += len(labels)
    if ranks.size > 1:
        dist.all_reduce(right)
        dist.all_reduce(total)
    names = ("top1", "top5") if five == 5 else ("top1",)
    return [dict(zip(names, row, strict=False)) for row in (right / total).tolist()]
