"""Rows as a bank keeps them, and what a search for neighbors among them gives."""

from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = -1
"""The label, or id, of a row of which it is not known."""
SHORTEST = 1e-12
"""A row shorter than this is divided by it instead of by its norm, as torch.nn.functional.normalize does."""


class Neighbors(NamedTuple):
    """The k nearest rows of Q queries, nearest first.

    A place for which the bank held no finite row that may be found has similarity −inf, index −1, a zero embedding
    and label −1.
    """

    similarity: Tensor
    """[Q, k] float32, cosine similarity, descending."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """[Q, k] int64, slots of the bank."""
    embedding: Tensor
    """[Q, k, D] float32 unit vectors. Rows of another dtype are brought back to unit length."""
    label: Tensor
    """[Q, k] int64, −1 where unknown."""


def unit_rows(x: Tensor) -> Tensor:
    """Return the rows of x [B, D] as float32 unit vectors; all NaN where the norm of a row is not finite."""
    x = x.detach().float()
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # [B, 1]
    return x / norm.nan_to_num_(nan=torch.nan, posinf=torch.nan).clamp_min_(SHORTEST)


def packed(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return float32 rows [B, D] in the dtype of a bank, and for int8 the scale [B] float32 of each.

    An int8 row is rounded to whole parts of its largest value, which becomes 127. The scale brings it back to its
    length, so that rounding turns a unit vector, but does not shorten it; it is NaN for a row with NaN.
    """
    if dtype != torch.int8:
        return rows.to(dtype), None
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)  # [B, 1]
    whole = (rows * (127 / largest)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).round_()
    length = torch.linalg.vector_norm(rows, dim=1)
    return whole.to(torch.int8), length / torch.linalg.vector_norm(whole, dim=1).clamp(min=1.0)


def unpacked(values: Tensor, scale: Tensor | None) -> Tensor:
    """Return rows [..., D] of a bank as float32 unit vectors; scale [...] goes with int8 ones."""
    if scale is not None:
        return values * scale[..., None]
    if values.dtype == torch.float32:
        return values
    norm: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
    return values / norm.clamp_min_(SHORTEST)
