"""How well neighbours and embeddings do: purity, spread, and nearest-neighbour classification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from msf_core.checks import check_labels, check_tensor
from msf_core.rows import SHORTEST, UNKNOWN, unit_rows
from msf_core.search import SearchBackend, find_backend
from msf_core.search.base import exact_float32, without_autocast


def neighbor_purity(neighbor_labels: Tensor, labels: Tensor) -> Tensor:
    """Share of the neighbours 2 to k that have the query's label, averaged over the queries (paper section 3.4).

    The first column, u itself, is left out. So are unknown labels (−1): such neighbours do not count for their
    query, and a query with an unknown label, or without a known neighbour, does not count at all.

    Args:
        neighbor_labels: [B, k] integers, nearest first: `Neighbors.label`.
        labels: [B] integers.

    Returns:
        A float32 scalar in [0, 1] on the device of the labels; NaN where no query counts, as for k = 1.
        Does not wait for the device.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: arguments that are no tensors.

    >>> neighbor_purity(torch.tensor([[3, 3, 4], [5, -1, 5]]), torch.tensor([3, 5]))
    tensor(0.7500)
    """
    check_tensor("neighbor_labels", neighbor_labels)
    check_tensor("labels", labels)
    if neighbor_labels.ndim != 2 or labels.shape != neighbor_labels.shape[:1]:
        raise ValueError(
            "neighbor_labels and labels must be [B, k] and [B], "
            f"got {list(neighbor_labels.shape)} and {list(labels.shape)}"
        )
    others = neighbor_labels[:, 1:]  # [B, k − 1]
    known = (others >= 0) & (labels[:, None] >= 0)
    same = (others == labels[:, None]) & known
    share = same.sum(dim=1) / known.sum(dim=1)  # [B], NaN where a query does not count
    return share.nanmean()


def embedding_spread(embeddings: Tensor) -> Tensor:
    """Deviation over the batch of the normalized embeddings, mean over the dimensions, times √D.

    Near 1 where the embeddings fill the sphere, 0 where all are the same: the number that tells collapse
    (the training curve of SimSiam, Chen & He 2021, figure 2).

    Args:
        embeddings: [B, D], any float dtype and scale, at least two rows.

    Returns:
        A float32 scalar on their device. Does not wait for the device.

    Raises:
        ValueError: another shape.

    >>> embedding_spread(torch.eye(4))
    tensor(1.)
    >>> embedding_spread(torch.ones(8, 4))
    tensor(0.)
    """
    check_tensor("embeddings", embeddings)
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise ValueError(f"embeddings must be [B, D] with at least two rows, got {list(embeddings.shape)}")
    unit = F.normalize(embeddings.detach().float(), dim=1)  # [B, D]
    root: float = unit.shape[1] ** 0.5
    return unit.std(dim=0).mean() * root


def effective_rank(embeddings: Tensor) -> Tensor:
    """How many directions the normalized embeddings of a batch use: (Σλ)² / Σλ² of their covariance's eigenvalues λ.

    This participation ratio is n where n directions have equal variance, 0 where all embeddings are the same, and NaN
    where one of them is not finite. It needs products alone, no decomposition. Between 0 and the smaller of B − 1
    and D.

    Args:
        embeddings: [B, D], any float dtype and scale, at least two rows.

    Returns:
        A float32 scalar on their device. Does not wait for the device.

    Raises:
        ValueError: another shape.

    >>> effective_rank(torch.eye(4))
    tensor(3.)
    >>> effective_rank(torch.ones(8, 4))
    tensor(0.)
    """
    check_tensor("embeddings", embeddings)
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise ValueError(f"embeddings must be [B, D] with at least two rows, got {list(embeddings.shape)}")
    unit = F.normalize(embeddings.detach().float(), dim=1)  # [B, D]
    # In float32: beside the first, embeddings that are nearly alike differ exactly, and their scale does not matter.
    beside = unit - unit[0]
    beside = beside / beside.abs().amax().clamp_min(SHORTEST)
    centered = beside - beside.mean(dim=0)
    with without_autocast(unit.device), exact_float32(unit.device):
        # Both products have the same eigenvalues.
        gram = centered @ centered.T if len(unit) < unit.shape[1] else centered.T @ centered
    trace, square = gram.trace(), gram.square().sum()
    return torch.where(square == 0, 0.0, trace.square() / square)


@torch.no_grad()
def knn_classify(
    queries: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int = 20,
    *,
    backend: str | SearchBackend = "auto",
    chunk: int = 1024,
) -> Tensor:
    """Label queries by the vote of their k most similar features (paper section 3.2: k = 1 and k = 20).

    Args:
        queries: [Q, D] floats of any scale.
        features: [n, D] floats of any scale; both are normalized in float32.
        labels: [n] integers, 0 or above.
        k: votes, between 1 and n. A tie goes to the label with the larger sum of similarities.
        backend: as of `MemoryBank`.
        chunk: queries at a time; extra memory is about chunk × (k + number of classes) × 8 bytes, beside a
            normalized copy of the features.

    Returns:
        [Q] int64; −1 for a query that is not finite.

    Raises:
        ValueError: shapes that do not fit, an unknown label, k or chunk out of range.
        TypeError: labels that are not integers, or a backend without ``topk``.

    >>> knn_classify(torch.tensor([[2.0, 0.1]]), torch.eye(2), torch.tensor([5, 9]), k=1)
    tensor([5])
    """
    for name, value in (("queries", queries), ("features", features), ("labels", labels)):
        check_tensor(name, value)
    if queries.ndim != 2 or features.ndim != 2 or queries.shape[1] != features.shape[1]:
        raise ValueError(
            f"queries and features must be [Q, D] and [n, D], got {list(queries.shape)} and {list(features.shape)}"
        )
    check_labels(labels, features)
    if not 1 <= k <= features.shape[0] or chunk < 1:
        raise ValueError(f"k must be between 1 and {features.shape[0]} and chunk at least 1, got k={k}, chunk={chunk}")
    if labels.min() < 0:
        raise ValueError(f"labels must be 0 or above: unknown ones cannot vote, got {int(labels.min())}")
    search = find_backend(backend, features.device)
    unit, labels = unit_rows(features), labels.long()
    classes = int(labels.max()) + 1
    predicted = []
    for part in queries.split(chunk):
        similarity, index = search.topk(unit_rows(part), unit, k)
        found = labels[index.clamp(min=0)].masked_fill_(index < 0, UNKNOWN)  # −1: a feature that is not finite
        predicted.append(vote(similarity, found, classes))
    return torch.cat(predicted)


def vote(similarity: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the label that most neighbours of each query have; a tie goes to the larger sum of similarities.

    Args:
        similarity: [Q, k] floats, and
        labels: [Q, k] int64 below ``classes``, of each query's neighbours, as in `Neighbors`; −1 has no vote.
        classes: how many there are.

    Returns:
        [Q] int64; −1 where nobody voted.
    """
    known, place = labels >= 0, labels.clamp(min=0)
    votes = similarity.new_zeros((len(labels), classes), dtype=torch.float32)
    votes.scatter_add_(1, place, known.float())
    most = votes.amax(dim=1, keepdim=True)  # [Q, 1]
    sums = torch.zeros_like(votes).scatter_add_(1, place, similarity.float().masked_fill(~known, 0.0))
    best = sums.masked_fill_(votes < most, -torch.inf).argmax(dim=1)
    return best.masked_fill(most[:, 0] == 0, UNKNOWN)
