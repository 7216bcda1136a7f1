"""The health of a run: averages over an epoch, computed without waiting for the GPU, and warnings."""

import math
from typing import Any

import torch
from torch import Tensor

from msf_core import MemoryBank, Neighbors, effective_rank, embedding_spread, neighbor_purity

# For a micro-batch: the loss; the purity of neighbors 2 to k, if labels are known; `embedding_spread` and
# `effective_rank` of u; the mean similarity of neighbors 2 to k, and how long ago they were pushed; and how far the
# two views are apart, in standard deviations of their pixels.
MEASURES = ("loss", "purity", "spread", "rank", "similarity", "age", "difference")
# On the digits, the spread stays above 0.8 in healthy runs, and falls to 0.2 without a predictor.
COLLAPSING = 0.5  # warn if the spread is lower
LINE = 1.5  # warn if the effective rank is lower
SAME = 0.01  # warn if the difference is lower


def measure(
    loss: Tensor,
    u: Tensor,
    neighbors: Neighbors,
    labels: Tensor,
    views: tuple[Tensor, Tensor],
    bank: MemoryBank | None,
) -> dict[str, Tensor]:
    """Return the `MEASURES` of a micro-batch as scalars on its device, the age in rows; NaN if not measurable."""
    others = neighbors.similarity[:, 1:]
    found = others > -torch.inf
    similarity = torch.where(found, others, 0.0).sum() / found.sum()
    age = torch.full_like(similarity, torch.nan)
    if bank is not None:
        rows_ago = bank.age(neighbors.index[:, 1:])
        age = torch.where(rows_ago < 0, 0, rows_ago).sum() / (rows_ago >= 0).sum()
    return {
        "loss": loss.detach(),
        "purity": neighbor_purity(neighbors.label, labels),
        "spread": embedding_spread(u),
        "rank": effective_rank(u),
        "similarity": similarity,
        "age": age,
        "difference": (views[0] - views[1]).abs().mean() / views[0].std(),
    }


def warnings_of(row: dict[str, Any]) -> list[str]:
    """Return warnings for an epoch's averages; none for a healthy run."""
    said = []
    if row["spread"] < COLLAPSING or row["rank"] < LINE:
        said.append(
            "the encoder is collapsing: the embeddings of different images are becoming the same "
            f"(spread below {COLLAPSING}, or effective rank below {LINE}); is there a predictor on the online side, "
            "and BatchNorm in it?"
        )
    if row["difference"] < SAME:
        said.append(
            "both encoders see the same view: neighbors will be those of an untrained encoder, or worse, although "
            "loss and spread look healthy (paper section 3); draw the views of the two encoders independently"
        )
    return said


class Averages:
    """Sums and counts of measures. A loss that is not finite makes its average NaN or infinite on purpose."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, len(MEASURES), dtype=torch.float64, device=device)
        self._shown = self.sums.cpu()
        self._copied: torch.cuda.Event | None = None

    def add(self, measured: dict[str, Tensor]) -> None:
        """Add a micro-batch's `MEASURES`."""
        measures = torch.stack([measured[name].double() for name in MEASURES])
        counts = measures.isfinite()
        counts[0] = True
        self.sums += torch.stack([torch.where(counts, measures, 0.0), counts])

    def means(self) -> dict[str, float]:
        """Return the averages of a few steps ago, so that nothing waits for the GPU."""
        if not self.sums.is_cuda:
            return means_of(self.sums)
        if self._copied is None:
            self._shown = self._shown.pin_memory()
        elif not self._copied.query():
            return {}
        shown = means_of(self._shown)
        self._shown.copy_(self.sums, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return shown


def means_of(sums: Tensor) -> dict[str, float]:
    """Return the averages, given sums and counts [2, measures]; NaN if nothing was measured."""
    total, count = sums.tolist()
    return {name: a / n if n else math.nan for name, a, n in zip(MEASURES, total, count, strict=True)}
