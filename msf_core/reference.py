"""The paper as simple, slow float64 code. Only tests and benchmarks use it.

The symbols are those of "Mean Shift for Self-Supervised Learning" (ICCV 2021, section 2): u is the target embedding, v
the prediction, z the neighbors; B is the batch size, N the number of rows of the bank, D the dimension.
"""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Return x / ‖x‖₂ along the last dimension."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length


def mean_shift_loss(v: Tensor, u: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return L = (1/k) Σⱼ ‖v − zⱼ‖²₂, averaged over the batch, where z₁ … z_k are the rows of the bank nearest to u.

    Args:
        v: predictions [B, D], any scale.
        u: targets [B, D], any scale, which must already be rows of the bank.
        bank: [N, D], any scale.
        k: number of neighbors, including u.
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
    """Return the same loss, computed like the authors' code: with two full distance matrices, one with a gradient.

    Like their code, this clones the bank, whose rows must be unit vectors. ``dtype`` lets benchmarks use the precision
    in which the authors train.
    """
    v, u, bank = unit(v.to(dtype)), unit(u.to(dtype)), bank.clone().to(dtype)
    distance_u = 2 - 2 * (u @ bank.T)  # [B, N]; the product first, as in the authors' code
    distance_v = 2 - 2 * (v @ bank.T)  # [B, N]
    nearest = distance_u.topk(k, dim=1, largest=False).indices  # [B, k]
    return distance_v.gather(1, nearest).mean(dim=1).mean()


def byol_loss(v: Tensor, u: Tensor) -> Tensor:
    """Return ‖v̂ − û‖²₂, averaged over the batch (Grill et al. 2020, eq. 2), in the dtype of the arguments."""
    difference = torch.nn.functional.normalize(v, dim=1) - torch.nn.functional.normalize(u, dim=1)
    return difference.pow(2).sum(dim=1).mean()
