"""Metrics of neighbors and embeddings: purity, spread, effective rank, and nearest-neighbor classification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from msf_core.checks import check_labels, check_tensor
from msf_core.rows import SHORTEST, UNKNOWN, unit_rows
from msf_core.search import SearchBackend, find_backend
from msf_core.search.base import exact_float32, without_autocast


def neighbor_purity(neighbor_labels: Tensor, labels: Tensor) -> Tensor:
    """Return the share of neighbors 2 to k that have the query's label, averaged over the queries (paper section 3.4).

    The first neighbor, u itself, does not count. Neighbors with an unknown label (−1) do not count either, and neither
    do queries whose own label is unknown or that have no neighbor with a known label. Does not synchronize with the
    device.

    Args:
        neighbor_labels: [B, k] integers, nearest first, such as `Neighbors.label`.
        labels: [B] integers.

    Returns:
        A float32 scalar in [0, 1] on the device of the labels; NaN if no query counts, for example with k = 1.

    Raises:
        ValueError: if the shapes do not match.
        TypeError: if an argument is not a tensor.

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
    """Return √D times the standard deviation of the normalized embeddings in each dimension, averaged over dimensions.

    It is near 1 if the embeddings spread over the sphere, and 0 if all are the same, so it detects collapse (SimSiam,
    Chen & He 2021, figure 2). Does not synchronize with the device.

    Args:
        embeddings: [B, D], any float dtype and scale, at least two rows.

    Returns:
        A float32 scalar on the same device.

    Raises:
        ValueError: if the shape is not [B, D] with at least two rows.

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
    """Return how many directions the normalized embeddings use: (Σλ)² / Σλ², for eigenvalues λ of their covariance.

    This participation ratio is n if n directions have equal variance, and 0 if all embeddings are the same. It is at
    most B − 1 and at most D, and NaN if an embedding is not finite. It is computed from matrix products, without a
    decomposition. Does not synchronize with the device.

    Args:
        embeddings: [B, D], any float dtype and scale, at least two rows.

    Returns:
        A float32 scalar on the same device.

    Raises:
        ValueError: if the shape is not [B, D] with at least two rows.

    >>> effective_rank(torch.eye(4))
    tensor(3.)
    >>> effective_rank(torch.ones(8, 4))
    tensor(0.)
    """
    check_tensor("embeddings", embeddings)
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise ValueError(f"embeddings must be [B, D] with at least two rows, got {list(embeddings.shape)}")
    unit = F.normalize(embeddings.detach().float(), dim=1)  # [B, D]
    # If embeddings are nearly alike, their differences from the first one are exact in float32. They are then rescaled.
    beside = unit - unit[0]
    beside = beside / beside.abs().amax().clamp_min(SHORTEST)
    centered = beside - beside.mean(dim=0)
    with without_autocast(unit.device), exact_float32(unit.device):
        # Both products have the same nonzero eigenvalues.
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
    """Classify queries by a vote of their k most similar features (paper section 3.2, with k = 1 and k = 20).

    Args:
        queries: [Q, D] floats of any scale, normalized in float32.
        features: [n, D] floats of any scale, normalized in float32.
        labels: [n] integers, at least 0.
        k: number of votes, between 1 and n. A tie goes to the label with the larger sum of similarities.
        backend: as for `MemoryBank`.
        chunk: number of queries searched at once. The extra memory is about chunk × (k + number of classes) × 8 bytes,
            plus a normalized copy of the features.

    Returns:
        [Q] int64 labels; −1 for queries that are not finite.

    Raises:
        ValueError: if shapes do not match, a label is unknown, or k or chunk is out of range.
        TypeError: if labels are not integers, or the backend has no ``topk``.

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
        raise ValueError(f"labels must be 0 or above, because unknown labels cannot vote, got {int(labels.min())}")
    search = find_backend(backend, features.device)
    unit, labels = unit_rows(features), labels.long()
    classes = int(labels.max()) + 1
    predicted = []
    for part in queries.split(chunk):
        similarity, index = search.topk(unit_rows(part), unit, k)
        found = labels[index.clamp(min=0)].masked_fill_(index < 0, UNKNOWN)  # −1 if features are not finite
        predicted.append(vote(similarity, found, classes))
    return torch.cat(predicted)


def vote(similarity: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the most frequent label among the neighbors of each query.

    A tie goes to the label with the larger sum of similarities.

    Args:
        similarity: [Q, k] floats, the similarities of the neighbors, as in `Neighbors`.
        labels: [Q, k] int64, the labels of the neighbors, below ``classes``; −1 does not vote.
        classes: number of classes.

    Returns:
        [Q] int64 labels; −1 if a query has no votes.
    """
    known, place = labels >= 0, labels.clamp(min=0)
    votes = similarity.new_zeros((len(labels), classes), dtype=torch.float32)
    votes.scatter_add_(1, place, known.float())
    most = votes.amax(dim=1, keepdim=True)  # [Q, 1]
    sums = torch.zeros_like(votes).scatter_add_(1, place, similarity.float().masked_fill(~known, 0.0))
    best = sums.masked_fill_(votes < most, -torch.inf).argmax(dim=1)
    return best.masked_fill(most[:, 0] == 0, UNKNOWN)
