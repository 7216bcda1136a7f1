"""How a bank stores rows, and the result of a search among them."""

from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = -1
"""The label or id of a row whose label or id is unknown."""
SHORTEST = 1e-12
"""Rows shorter than this are divided by it instead of by their norm, as in torch.nn.functional.normalize."""


class Neighbors(NamedTuple):
    """The k nearest rows of Q queries, nearest first.

    If a query has fewer than k neighbors, because rows are not finite or are excluded, the last entries have similarity
    −inf, index −1, a zero embedding and label −1.
    """

    similarity: Tensor
    """[Q, k] float32, cosine similarity, descending."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """[Q, k] int64, slots of the bank."""
    embedding: Tensor
    """[Q, k, D] float32 unit vectors. Rows of other dtypes are normalized again."""
    label: Tensor
    """[Q, k] int64, −1 if unknown."""


def unit_rows(x: Tensor) -> Tensor:
    """Return the rows of x [B, D] as float32 unit vectors. If the norm of a row is not finite, the row is all NaN."""
    x = x.detach().float()
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # [B, 1]
    return x / norm.nan_to_num_(nan=torch.nan, posinf=torch.nan).clamp_min_(SHORTEST)


def packed(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Convert float32 rows [B, D] to the dtype of a bank; for int8 also return a float32 scale for each row, [B].

    For int8, the largest absolute value of a row becomes 127. The scale restores the exact length of the row, so
    rounding changes only its direction. The scale of a row with NaN is NaN.
    """
    if dtype != torch.int8:
        return rows.to(dtype), None
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)  # [B, 1]
    whole = (rows * (127 / largest)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).round_()
    length = torch.linalg.vector_norm(rows, dim=1)
    return whole.to(torch.int8), length / torch.linalg.vector_norm(whole, dim=1).clamp(min=1.0)


def unpacked(values: Tensor, scale: Tensor | None) -> Tensor:
    """Return rows [..., D] of a bank as float32 unit vectors; int8 rows need their scale [...]."""
    if scale is not None:
        return values * scale[..., None]
    if values.dtype == torch.float32:
        return values
    norm: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
    return values / norm.clamp_min_(SHORTEST)
