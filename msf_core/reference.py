"""The paper in slow, obvious float64 lines. Tests and benchmarks compare with it; nothing else uses it.

Mean Shift for Self-Supervised Learning, ICCV 2021, section 2. Letters as there: u the target embedding, v the
prediction, z the neighbours; B batch, N rows of the bank, D dimensions.
"""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Return x / ‖x‖₂ along the last dimension."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length


def mean_shift_loss(v: Tensor, u: Tensor, bank: Tensor, k: int) -> Tensor:
    """L = (1/k) Σⱼ ‖v − zⱼ‖²₂, mean over the batch, z₁ … z_k the rows of the bank nearest to u.

    Args:
        v: predictions [B, D], any scale.
        u: targets [B, D], any scale; they must be among the rows of the bank already.
        bank: [N, D], any scale.
        k: neighbours, u included.
    """
    v, u, bank = unit(v.double()), unit(u.double()), unit(bank.double())
    losses = []
    for v_i, u_i in zip(v, u, strict=True):
        distance = ((u_i - bank) ** 2).sum(dim=1)  # [N]
        z = bank[distance.argsort(stable=True)[:k]]  # [k, D]
        losses.append(((v_i - z) ** 2).sum(dim=1).mean())
    return torch.stack(losses).mean()


def mean_shift_loss_two_matrices(
    v: Tensor, u: Tensor, bank: Tensor, k: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Compute the same loss as the authors' published code forms it: two full distance matrices, one differentiated.

    The bank is cloned as there, and its rows must be unit vectors already. ``dtype`` is for benchmarks, which run
    this form at the precision the authors train in.
    """
    v, u, bank = unit(v.to(dtype)), unit(u.to(dtype)), bank.clone().to(dtype)
    distance_u = 2 - 2 * (u @ bank.T)  # [B, N]; the product first, as there
    distance_v = 2 - 2 * (v @ bank.T)  # [B, N]
    nearest = distance_u.topk(k, dim=1, largest=False).indices  # [B, k]
    return distance_v.gather(1, nearest).mean(dim=1).mean()


def byol_loss(v: Tensor, u: Tensor) -> Tensor:
    """‖v̂ − û‖²₂, mean over the batch (Grill et al. 2020, eq. 2), in the dtype of its arguments."""
    difference = torch.nn.functional.normalize(v, dim=1) - torch.nn.functional.normalize(u, dim=1)
    return difference.pow(2).sum(dim=1).mean()
