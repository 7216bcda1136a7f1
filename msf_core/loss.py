"""The loss of MSF (paper section 2): pull v towards the k nearest neighbours of u."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_core.checks import check_labels, check_tensor
from msf_core.memory_bank import MemoryBank
from msf_core.rows import UNKNOWN, Neighbors, unit_rows
from msf_core.schedules import Schedule


def mean_shift_loss(prediction: Tensor, neighbors: Tensor) -> Tensor:
    """Mean over the batch of (1/k) Σⱼ ‖v − zⱼ‖², for v the unit vector along each prediction.

    With k = 1 this is BYOL's ‖v̂ − û‖², to the last bit. For the gradient only the mean neighbour counts, as
    the paper remarks (section 2): Σⱼ ‖v − zⱼ‖² / k = ‖v − z̄‖² + Σⱼ ‖zⱼ − z̄‖² / k, where v is in the first
    term alone. The code computes the right-hand side.

    Args:
        prediction: [B, D], any float dtype and scale; computed in float32, under autocast too.
        neighbors: [B, k, D], unit vectors. No gradient flows into them.

    Returns:
        A float32 scalar in [0, 4].

    Raises:
        ValueError: shapes or devices that do not fit, or an empty batch.
        TypeError: tensors that are not floating.

    >>> v, z = torch.tensor([[0.0, 2.0]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> mean_shift_loss(v, z)
    tensor(1.)
    """
    _check_prediction(prediction)
    check_tensor("neighbors", neighbors)
    if neighbors.ndim != 3 or neighbors.shape[1] < 1 or neighbors.shape[::2] != prediction.shape:
        raise ValueError(
            f"neighbors must be [B, k, D] beside a prediction {list(prediction.shape)}, got {list(neighbors.shape)}"
        )
    if not neighbors.is_floating_point():
        raise TypeError(f"neighbors must be floating, got {neighbors.dtype}")
    if neighbors.device != prediction.device:
        raise ValueError(f"neighbors must be on the prediction's device, {prediction.device}, got {neighbors.device}")

    with torch.autocast(prediction.device.type, enabled=False):
        v = F.normalize(prediction.float(), dim=1)  # [B, D]
        z = neighbors.detach().float()  # [B, k, D]
        z_mean = z.mean(dim=1)  # [B, D]; for k = 1 exactly u, and the next line exactly 0
        z_spread = (z - z_mean[:, None]).square_().sum(dim=2).mean(dim=1)  # [B]
        return ((v - z_mean).pow(2).sum(dim=1) + z_spread).mean()


class MeanShiftLoss(nn.Module):
    """Push u into the bank, find its k nearest neighbours there, and return their `mean_shift_loss` with v.

    u is its own first neighbour by construction: the set is the exact u and the k − 1 nearest other rows.
    So k = 1 is BYOL's loss to the last bit, with no search. While the bank holds fewer than k rows, those
    there are serve; where fewer than k of them are finite, or may serve, u stands in. In ``eval()`` mode nothing
    is pushed, so a validation loss leaves the bank as it was.

    Two options, beyond the paper, restrict which rows may serve. Both are exact; u serves always.

    Args:
        bank: the `MemoryBank`; None is allowed with ``k=1``.
        k: neighbours that serve, u included: an int, or a schedule of the number of training forwards so far
            (rounded; the count is saved in the ``state_dict``). The paper uses 5 (section 3.1).
        exclude_same_id: rows with the ``ids`` of u, older augmentations of the same image, do not serve; id −1
            excludes none. The bank keeps ids from now on.
        same_label: only rows with the label of u serve: supervised mean shift, and semi-supervised with label −1
            for those u that any row may serve (CMSF, ECCV 2022).

    Raises:
        ValueError: k below 1 or above the bank's size, or no bank with another k than 1, or with those options.
        TypeError: another bank, or a k that is neither an int nor callable.

    >>> bank = MemoryBank(size=128, dim=16)
    >>> criterion = MeanShiftLoss(bank, k=5)
    >>> v = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    >>> loss = criterion(v, target=v.detach())
    >>> loss.backward()
    >>> len(bank), 0 <= loss.item() <= 4
    (8, True)
    """

    def __init__(
        self,
        bank: MemoryBank | None,
        k: int | Schedule = 5,
        *,
        exclude_same_id: bool = False,
        same_label: bool = False,
    ) -> None:
        super().__init__()
        if not (bank is None or isinstance(bank, MemoryBank)):
            raise TypeError(f"bank must be a MemoryBank or None, got {bank!r}")
        if isinstance(k, bool) or not (isinstance(k, int) or callable(k)):
            raise TypeError(f"k must be an int or a schedule of the step, got {k!r}")
        if isinstance(k, int):
            _check_k(k, bank)
        elif bank is None:
            raise ValueError("a schedule of k needs a bank; bank=None goes with k=1")
        if bank is None and (exclude_same_id or same_label):
            raise ValueError("exclude_same_id and same_label need a bank; bank=None goes with k=1")
        if bank is not None and exclude_same_id:
            bank.keep_ids()
        self.bank = bank
        self.k = k
        self.exclude_same_id = exclude_same_id
        self.same_label = same_label
        self._steps = torch.zeros((), dtype=torch.int64, device="cpu")  # no int, as `MemoryBank._pushed`

    @property
    def steps(self) -> int:
        """Training forwards so far."""
        return int(self._steps)

    @overload
    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        return_neighbors: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        return_neighbors: Literal[True],
    ) -> tuple[Tensor, Neighbors]: ...

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        return_neighbors: bool = False,
    ) -> Tensor | tuple[Tensor, Neighbors]:
        """Return the loss of a batch, and push its targets.

        Args:
            prediction: v [B, D], the online side: predictor(encoder(view)). Any float dtype and scale.
            target: u [B, D], the target side. Detached; normalized in float32.
            labels: [B] integers that are kept beside the rows, −1 where unknown; for purity only, unless
                ``same_label``.
            ids: [B] integers that are kept beside the rows: which image each u is of, −1 where unknown.
            return_neighbors: also return the `Neighbors` that served, u first.

        Returns:
            The loss, a float32 scalar in [0, 4]; with ``return_neighbors`` a pair (loss, `Neighbors`).

        Raises:
            ValueError: shapes or devices that do not fit, an empty batch, a schedule's k out of range, no ``ids`` with
                ``exclude_same_id`` or no labels with ``same_label``.
            TypeError: tensors that are not floating, labels or ids that are not integers.
            ImportError: the bank's backend does not work on its device.
        """
        if self._waits_for_others():
            with self.bank.sharing_errors(pushing=self.training):  # type: ignore[union-attr]
                k = self._check(prediction, target, labels, ids)
        else:
            k = self._check(prediction, target, labels, ids)
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            u = unit_rows(target)  # [B, D]
            neighbors = self._find_neighbors(u, labels, ids, k)
        if self.training:
            self._steps.add_(1)
        loss = mean_shift_loss(prediction, neighbors.embedding)
        return (loss, neighbors) if return_neighbors else loss

    def _waits_for_others(self) -> bool:
        """Tell whether other ranks wait for this one in the forward: also with an error, but only where they do."""
        if self.bank is None or not self.bank.waits_for_others(pushing=self.training):
            return False
        return self.training or (len(self.bank) > 0 and self._k_of_step() > 1)

    def _k_of_step(self) -> int:
        return self.k if isinstance(self.k, int) else _rounded(self.k(self.steps))

    def _find_neighbors(self, u: Tensor, labels: Tensor | None, ids: Tensor | None, k: int) -> Neighbors:
        slots = torch.full((u.shape[0],), -1, device=u.device)
        if self.bank is not None and self.training:
            slots = self.bank.push(u, labels, ids)
        own = Neighbors(
            similarity=u.new_ones(u.shape[0], 1),
            index=slots[:, None],
            embedding=u[:, None],
            label=torch.full_like(slots, UNKNOWN)[:, None] if labels is None else labels[:, None].long(),
        )
        limits = {"labels": labels if self.same_label else None, "exclude_ids": ids if self.exclude_same_id else None}
        if self.training and self.bank is not None and k > 1:
            # A batch of k fills k rows at least; only a smaller one has to ask.
            there = k if u.shape[0] >= k else min(k, len(self.bank))
            others = self.bank.find(u, there, leave_out=slots, **limits)  # [B, k − 1]
        elif self.bank is not None and min(k - 1, len(self.bank)) > 0:
            others = self.bank.find(u, min(k - 1, len(self.bank)), **limits)
        else:
            return own
        absent = (others.index < 0)[..., None]
        embedding = torch.cat([own.embedding, others.embedding], dim=1)  # [B, k, D]
        embedding[:, 1:] = torch.where(absent, u[:, None], embedding[:, 1:])
        return Neighbors(
            similarity=torch.cat([own.similarity, others.similarity], dim=1),
            index=torch.cat([own.index, others.index], dim=1),
            embedding=embedding,
            label=torch.cat([own.label, others.label], dim=1),
        )

    def _check(self, prediction: Tensor, target: Tensor, labels: Tensor | None, ids: Tensor | None) -> int:
        """Return this step's k, or raise before anything changes."""
        k = self._k_of_step()
        _check_prediction(prediction)
        _check_k(k, self.bank)
        check_tensor("target", target)
        if target.shape != prediction.shape:
            raise ValueError(f"target must be {list(prediction.shape)} as the prediction, got {list(target.shape)}")
        if not target.is_floating_point():
            raise TypeError(f"target must be floating, got {target.dtype}")
        if target.device != prediction.device:
            raise ValueError(f"target must be on the prediction's device, {prediction.device}, got {target.device}")
        check_labels(labels, target)
        check_labels(ids, target, "ids")
        if self.exclude_same_id and ids is None:
            raise ValueError("exclude_same_id needs the ids of the batch, got none")
        if self.same_label and labels is None:
            raise ValueError("same_label needs the labels of the batch, −1 where unknown, got none")
        if self.bank is not None:
            self.bank.check("target", target)
            self.bank.check_backend(k)
        return k

    def get_extra_state(self) -> Tensor:
        """Return the number of training forwards so far, for the ``state_dict``."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the saved number of training forwards over."""
        self._steps.fill_(int(state))

    def extra_repr(self) -> str:
        """Describe k, and what restricts the neighbors."""
        options = (name for name in ("exclude_same_id", "same_label") if getattr(self, name))
        return ", ".join([f"k={self.k}", *(f"{name}=True" for name in options)])


def _rounded(k: float) -> int:
    try:
        return round(float(k))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the schedule of k must give a finite number, got {k!r}") from error


def _check_prediction(prediction: Tensor) -> None:
    check_tensor("prediction", prediction)
    if prediction.ndim != 2 or prediction.shape[0] < 1:
        raise ValueError(f"prediction must be [B, D] with at least one row, got {list(prediction.shape)}")
    if not prediction.is_floating_point():
        raise TypeError(f"prediction must be floating, got {prediction.dtype}")


def _check_k(k: int, bank: MemoryBank | None) -> None:
    if bank is None and k != 1:
        raise ValueError(f"bank=None goes with k=1 (BYOL), got k={k}")
    if k < 1 or (bank is not None and k > bank.size):
        raise ValueError(
            f"k must be between 1 and the bank's size{f', {bank.size}' if bank is not None else ''}, got {k}"
        )
