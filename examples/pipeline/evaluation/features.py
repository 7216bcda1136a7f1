"""Features of images, extracted by each rank for its part, and nearest-neighbor classification."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msf_core import MemoryBank
from msf_core.distributed import Ranks
from msf_core.metrics import vote
from pipeline.data.source import UNREADABLE, DataSource
from pipeline.running.ranks import shared

Batch = tuple[Tensor, Tensor]  # images [b, C, H, W] or features [b, F] float32, and labels [b]
NEIGHBORS = (1, 20)  # the classifiers of the paper (section 3.2)


@torch.no_grad()
def features_of(backbone: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the features of batches of images, computed in eval mode; then restore the backbone's mode."""
    mode = backbone.training
    try:
        for images, labels in batches:
            features = backbone.eval()(images).float().flatten(1)
            yield features, labels.to(features.device)
    finally:
        backbone.train(mode)


def readable(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches of images without those that could not be read.

    Raises:
        OSError: none of the images could be read.
    """
    some = False
    for images, labels in batches:
        kept = labels != UNREADABLE
        if kept.any():
            some = True
            yield (images, labels) if kept.all() else (images[kept.to(images.device)], labels[kept])
    if not some:
        raise OSError("none of the images to evaluate on can be read")


def part_of_images(
    backbone: nn.Module, source: DataSource, split: str, ranks: Ranks, places: list[int] | None = None
) -> Iterator[Batch]:
    """Yield the features of this rank's part of a split, batch by batch; in rank order, the parts make up the split.

    All ranks use the BatchNorm statistics of rank 0, whose backbone is the one that is exported. Unreadable images are
    left out if they are to be skipped.

    Args:
        backbone: maps images [b, C, H, W] to features [b, F].
        source: source of the images.
        split: "train" or "val".
        ranks: the ranks that take part.
        places: indices of the images; None means all images.

    Raises:
        ValueError: there are fewer images than ranks.
    """
    if ranks.size == 1:
        return features_of(backbone, readable(source.images(split, places)))
    size = source.size(split) if places is None else len(places)
    if size < ranks.size:
        raise ValueError(f"{size} images of {split!r} cannot be divided over {ranks.size} ranks")
    for buffer in backbone.buffers():
        dist.broadcast(buffer, 0)
    begin, end = (size * place // ranks.size for place in (ranks.rank, ranks.rank + 1))
    own = list(range(begin, end)) if places is None else places[begin:end]
    return features_of(backbone, readable(source.images(split, own)))


def extract(
    backbone: nn.Module, source: DataSource, split: str, ranks: Ranks, places: list[int] | None = None
) -> Batch:
    """Return, on every rank, the features [n, F] and labels [n] of the parts of all ranks (see `part_of_images`)."""
    parts = part_of_images(backbone, source, split, ranks, places)
    with shared(ranks):
        batches = list(parts)
        features, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    if ranks.size == 1:
        return features, labels
    counts = ranks.agree("extract", same={"features": features.shape[1]}, count=len(labels))
    return ranks.gather(features, counts), ranks.gather(labels, counts)


def nearest_neighbor_accuracy(
    train: Iterable[Batch],
    size: int,
    val: Iterable[Batch],
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Return the accuracy of 1-NN and 20-NN by cosine similarity (paper section 3.2), as "nn1" and "nn20".

    Each of W ranks stores and searches 1/W of the training features, and otherwise holds only one batch at a time.

    Args:
        train: features and labels of this rank's part of the training images.
        size: the number of training images on all ranks, or more.
        val: features and labels of this rank's part of the test images.
        ranks: the ranks that take part; None means this process alone.
        dtype: dtype of the stored features.
    """
    several = ranks is not None and ranks.size > 1
    bank: MemoryBank | None = None
    classes = 0
    for features, labels in together(train, ranks):
        if bank is None:
            layout = "sharded" if several else "local"
            bank = MemoryBank(size, features.shape[1], dtype=dtype, layout=layout).to(features.device)
        bank.push(features, labels)
        classes = max(classes, int(labels.max()) + 1 if len(labels) else 0)
    assert bank is not None
    if ranks is not None and several:
        classes = max(ranks.agree("classes", same={}, count=classes))
    votes = {f"nn{k}": min(k, len(bank)) for k in NEIGHBORS}
    right = torch.zeros(len(votes) + 1, dtype=torch.int64, device=bank.rows.device)
    for features, labels in together(val, ranks):
        found = bank.search(features, max(votes.values()))
        predicted = [vote(found.similarity[:, :k], found.label[:, :k], classes) for k in votes.values()]
        right += torch.stack([(answer == labels).sum() for answer in predicted] + [labels.new_tensor(len(labels))])
    if several:
        dist.all_reduce(right)
    *counts, total = right.tolist()
    return {name: count / total for name, count in zip(votes, counts, strict=True)}


def together(batches: Iterable[Batch], ranks: Ranks | None) -> Iterator[Batch]:
    """Yield batches until no rank has any left; a rank that is done yields empty ones. All ranks share errors."""
    if ranks is None or ranks.size == 1:
        yield from batches
        return
    remaining = iter(batches)
    features = labels = torch.empty(0)  # every rank has at least one batch
    while True:
        left, problem = 0, None
        try:
            features, labels = next(remaining)
            left = 1
        except StopIteration:
            features, labels = features[:0], labels[:0]
        except (OSError, RuntimeError) as error:
            problem = error
        if not any(ranks.agree("batch", same={}, count=left, problem=problem)):
            return
        yield features, labels
