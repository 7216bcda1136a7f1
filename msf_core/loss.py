"""The loss of MSF (paper section 2), which pulls v toward the k nearest neighbors of u."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_core.checks import (
    check_labels,
    check_not_recomputed,
    check_not_replica,
    check_tensor,
    gives_memory_alone,
    whole_number,
)
from msf_core.layouts import Step
from msf_core.memory_bank import MemoryBank
from msf_core.ring import Found
from msf_core.rows import SHORTEST, UNKNOWN, Neighbors, unit_rows
from msf_core.schedules import Schedule

_NOTHING: AbstractContextManager[None] = nullcontext()


def mean_shift_loss(prediction: Tensor, neighbors: Tensor) -> Tensor:
    """Return (1/k) Σⱼ ‖v − zⱼ‖², averaged over the batch, where v is the normalized prediction and zⱼ its neighbors.

    With k = 1 this is bit-identical to BYOL's ‖v − u‖². The gradient depends only on the mean neighbor z̄ (paper
    section 2): Σⱼ ‖v − zⱼ‖² / k = ‖v − z̄‖² + Σⱼ ‖zⱼ − z̄‖² / k, and the second term does not contain v.

    Args:
        prediction: [B, D], any float dtype and scale. The loss is computed in float32, even under autocast.
        neighbors: [B, k, D] unit vectors, such as those of `MemoryBank.search`. They are not normalized here; for other
            vectors, the loss is not the paper's and may leave [0, 4]. They receive no gradient.

    Returns:
        A float32 scalar in [0, 4].

    Raises:
        ValueError: if shapes or devices do not match, or the batch is empty.
        TypeError: if a tensor is not floating point.

    >>> v, z = torch.tensor([[0.0, 2.0]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> mean_shift_loss(v, z)
    tensor(1.)
    """
    _check_prediction(prediction)
    check_tensor("neighbors", neighbors)
    if neighbors.ndim != 3 or neighbors.shape[1] < 1 or neighbors.shape[::2] != prediction.shape:
        raise ValueError(
            f"neighbors must be [B, k, D] for a prediction {list(prediction.shape)}, got {list(neighbors.shape)}"
        )
    if not neighbors.is_floating_point():
        raise TypeError(f"neighbors must be floating point, got {neighbors.dtype}")
    if neighbors.device != prediction.device:
        raise ValueError(f"neighbors must be on the prediction's device, {prediction.device}, got {neighbors.device}")

    return _mean_shift(prediction, neighbors.detach().float())


def _mean_shift(prediction: Tensor, z: Tensor) -> Tensor:
    prediction = prediction.float()
    # torch.func cannot transform the custom autograd function.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _formula(prediction, z)
    loss: Tensor = _MeanShift.apply(prediction, z)
    return loss


def _formula(prediction: Tensor, z: Tensor) -> Tensor:
    return (F.normalize(prediction, dim=1)[:, None] - z).square().sum(dim=2).mean()


class _MeanShift(torch.autograd.Function):
    """`_formula` with its gradient in closed form.

    For a prediction p, v = p / ‖p‖ and d = Σⱼ (v − zⱼ), the gradient with respect to v is 2 d / (B k), and with
    respect to p it is

        2/(B k) · (d − v (v·d)) / ‖p‖

    The operations are in the same order as in autograd, so with k = 1 the gradient is bit-identical to BYOL's.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, z: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(prediction, dim=1, keepdim=True)  # [B, 1]
        length = norm.clamp_min(SHORTEST)
        v = prediction / length  # [B, D]
        differences = v[:, None] - z  # [B, k, D]
        ctx.k = z.shape[1]
        ctx.save_for_backward(prediction, v, differences.sum(dim=1), norm, length)
        loss: Tensor = differences.square_().sum(dim=2).mean()
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        prediction, v, difference, norm, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            loss = _formula(prediction, (v - difference / ctx.k)[:, None])
            return torch.autograd.grad(loss, prediction, gradient, create_graph=True)[0], None
        by_v = difference * (gradient / (v.shape[0] * ctx.k / 2))  # [B, D]
        # A vector shorter than SHORTEST was not divided by its norm, so the loss depends on its length.
        radial = (by_v * (v / torch.threshold(norm, SHORTEST, torch.inf))).sum(dim=1, keepdim=True)  # [B, 1]
        return by_v.div_(length).sub_(v * radial), None


class MeanShiftLoss(nn.Module):
    """Push u into the bank, search for its k nearest neighbors, and return the `mean_shift_loss` of v with them.

    Here u is the target's embedding of one view of an image, and v the prediction from another view. In ``eval()``
    mode nothing is pushed, so a validation loss does not change the bank.

    The neighbors are u itself and the k − 1 nearest other rows. With k = 1 there is no search, and the loss is
    bit-identical to BYOL's. If the bank has fewer than k rows, all of them are used. If too few rows are finite and
    allowed, u takes the place of the missing neighbors.

    Two options that are not in the paper limit which rows can be neighbors. Both are exact; u itself is always used.

    Args:
        bank: the `MemoryBank`. It can be None if ``k=1``.
        k: number of neighbors, including u: an int, or a schedule, which is called with the number of training forwards
            so far and rounded. The count is saved in the ``state_dict``. The paper uses 5 (section 3.1).
        exclude_same_id: exclude rows with the id of u (pass ``ids``), which are older views of the same image; id −1
            excludes none. From now on the bank stores ids.
        same_label: use only rows with the label of u. This is supervised mean shift. For semi-supervised training, pass
            the label −1 for images without a label, for which any row is allowed (CMSF, ECCV 2022).

    Raises:
        ValueError: if k is below 1 or above the bank's size, or if there is no bank and k is not 1 or an option is set.
        TypeError: if ``bank`` is not a `MemoryBank` or None, or k is neither an int nor callable.

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
        if not callable(k):
            k = whole_number("k", k, "an int or a schedule of the step")
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
        with torch.inference_mode(False):  # tensors created in inference mode cannot be written to outside of it
            self._steps = torch.zeros((), dtype=torch.int64, device="cpu")  # a tensor, as `Ring.pushed_on_host`

    @property
    def steps(self) -> int:
        """Number of training forwards so far."""
        return int(self._steps)

    @overload
    def forward(
        self,
        prediction: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        return_neighbors: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        prediction: Tensor | Sequence[Tensor],
        target: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        return_neighbors: Literal[True],
    ) -> tuple[Tensor, Neighbors]: ...

    @overload
    def forward(
        self,
        prediction: Tensor | Sequence[Tensor],
        target: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        return_neighbors: Literal[True],
    ) -> tuple[Tensor, list[Neighbors]]: ...

    def forward(
        self,
        prediction: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        return_neighbors: bool = False,
    ) -> Tensor | tuple[Tensor, Neighbors] | tuple[Tensor, list[Neighbors]]:
        """Push the targets of a batch and return the loss.

        Pass several views of the images as lists. The loss is then the mean over pairs of a prediction and a target:

        - ``criterion([p1, p2, p3], u)`` pairs the target with every prediction. Likewise, a single prediction is paired
          with every target.
        - ``criterion([p1, p2], [z1, z2])`` pairs prediction i with every target j ≠ i. This is BYOL's symmetric loss.
        - ``criterion([p1, p2, p3, p4], [z1, z2])`` is multi-crop as in DINO: the first two crops are the global ones,
          and the others are paired with both targets.

        All targets are pushed, those of the first view first. Targets of the same image are never each other's
        neighbors, so with V targets and n rows in the bank, n − V rows are left for each. A call with lists is one step
        of a k schedule.

        Args:
            prediction: v [B, D], the output of predictor(encoder(view)), or a list of these. Any float dtype and scale.
            target: u [B, D], the output of the target encoder, or a list of these. It is detached, and normalized in
                float32.
            labels: [B] integers stored with the rows, −1 if unknown. Used only for the purity, unless ``same_label``.
            ids: [B] integers stored with the rows that identify the image of each u, −1 if unknown.
            return_neighbors: also return the `Neighbors` that were used, u first.

        Returns:
            The loss, a float32 scalar in [0, 4]. With ``return_neighbors``, a pair (loss, `Neighbors`); if ``target``
            is a list, the second item is a list with the neighbors of each target.

        Raises:
            ValueError: if shapes or devices do not match, the batch is empty, the lists leave no pair, a schedule's k
                is out of range, or ``ids`` for ``exclude_same_id`` or labels for ``same_label`` are missing.
            TypeError: if a tensor is not floating point, or labels or ids are not integers.
            ImportError: if the bank's backend does not work on its device.
            RuntimeError: if activation checkpointing runs the forward a second time, or if it runs in training mode in
                a replica of DataParallel.
        """
        bank, pushing = self.bank, self.training
        with self._checking(bank):
            predictions, targets = _views("prediction", prediction), _views("target", target)
            k = self._check(bank, predictions, targets, labels, ids)
            numbered = not (isinstance(prediction, Tensor) or isinstance(target, Tensor))
            pairs = _pairs(len(predictions), len(targets), numbered)
        views = len(targets)
        if views > 1:
            labels, ids = (None if beside is None else beside.repeat(views) for beside in (labels, ids))
        u = unit_rows(targets[0] if views == 1 else torch.cat(targets))  # [V·B, D]
        slots, found = None, None
        if bank is not None and pushing:
            slots, found = bank.step(u, labels, ids, Step(k, views, self.same_label, self.exclude_same_id))
        elif bank is not None:
            same, other = labels if self.same_label else None, ids if self.exclude_same_id else None
            found = bank.others(u, k, labels=same, exclude_ids=other)
        if pushing:
            self._steps.add_(1)
        z = u[:, None]
        if found is not None:
            others = torch.where((found.index < 0)[..., None], z, found.embedding)  # u replaces missing neighbors
            z = torch.cat([z, others], dim=1)  # [V·B, k, D]
        if len(pairs) == 1:
            loss = _mean_shift(predictions[pairs[0][0]], z if views == 1 else z.chunk(views)[pairs[0][1]])
        else:
            of_view = z.chunk(views)
            loss = torch.stack([_mean_shift(predictions[i], of_view[j]) for i, j in pairs]).mean()
        if not return_neighbors:
            return loss
        neighbors = self._neighbors(z, slots, labels, found)
        if isinstance(target, Tensor):
            return loss, neighbors
        return loss, [Neighbors(*parts) for parts in zip(*(part.chunk(views) for part in neighbors), strict=True)]

    def _checking(self, bank: MemoryBank | None) -> AbstractContextManager[None]:
        """Return the context for `_check`, in which an error is raised on all ranks that share the bank."""
        if bank is None or not (self.training or self._k_of_step() > 1):
            return _NOTHING
        return bank.checking(pushing=self.training)

    def _k_of_step(self) -> int:
        return _rounded(self.k(self.steps)) if callable(self.k) else whole_number("k", self.k)

    def _neighbors(self, z: Tensor, slots: Tensor | None, labels: Tensor | None, found: Found | None) -> Neighbors:
        """Return the neighbors that were used, z [B, k, D], u first."""
        unknown = torch.full(z.shape[:1], UNKNOWN, device=z.device)
        own = Neighbors(
            similarity=z.new_ones(z.shape[0], 1),
            index=(torch.full_like(unknown, -1) if slots is None else slots)[:, None],
            embedding=z[:, :1],
            label=(unknown if labels is None else labels.long())[:, None],
        )
        if found is None or self.bank is None:
            return own
        others = self.bank.neighbors(found)
        return Neighbors(
            similarity=torch.cat([own.similarity, others.similarity], dim=1),
            index=torch.cat([own.index, others.index], dim=1),
            embedding=z,
            label=torch.cat([own.label, others.label], dim=1),
        )

    def _check(
        self,
        bank: MemoryBank | None,
        predictions: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        ids: Tensor | None,
    ) -> int:
        """Return this step's k, or raise before anything changes."""
        if self.training:
            check_not_replica(self)
            check_not_recomputed("MeanShiftLoss")
        k = self._k_of_step()
        several = ", or a list of views" if len(predictions) == 1 else ""
        _check_prediction(predictions[0], _name("prediction", predictions, 0), several)
        _check_k(k, bank)
        first = predictions[0]
        for i in range(1, len(predictions)):
            _check_like(first, predictions[i], _name("prediction", predictions, i))
        for i, target in enumerate(targets):
            _check_like(first, target, _name("target", targets, i))
        if labels is not None:
            check_labels(labels, first)
        if ids is not None:
            check_labels(ids, first, "ids")
        if self.exclude_same_id and ids is None:
            raise ValueError("exclude_same_id needs the ids of the batch, got none")
        if self.same_label and labels is None:
            raise ValueError("same_label needs the labels of the batch (−1 if unknown), got none")
        if bank is not None:
            bank.check("target", targets[0])
            bank.check_backend(k - 1 + len(targets))
        return k

    def reset(self) -> None:
        """Empty the bank and set the step count to 0, for example after a forward on dummy data.

        If ranks share the bank, call this on all of them.
        """
        if self.bank is not None:
            self.bank.clear()
        self._steps.zero_()

    def reset_parameters(self) -> None:
        """Do the same as `reset`. This is PyTorch's name for initializing a module after ``to_empty``."""
        self.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MeanShiftLoss":
        """Apply ``fn`` as `torch.nn.Module` does; ``to_empty`` also sets the step count to 0."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if gives_memory_alone(fn):
            self._steps.zero_()
        return self

    def get_extra_state(self) -> Tensor:
        """Return the number of training forwards so far, for the ``state_dict``."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the saved number of training forwards."""
        self._steps.fill_(int(state))

    def extra_repr(self) -> str:
        """Describe k and the options."""
        options = (name for name in ("exclude_same_id", "same_label") if getattr(self, name))
        return ", ".join([f"k={self.k}", *(f"{name}=True" for name in options)])


def _rounded(k: float) -> int:
    try:
        return round(float(k))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the schedule of k must return a finite number, got {k!r}") from error


def _views(name: str, given: object) -> tuple[Tensor, ...]:
    """Return the views of a batch as a tuple; a single tensor is one view."""
    if isinstance(given, Tensor):
        return (given,)
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(given).__name__}")
    if not given:
        raise ValueError(f"{name} must be a tensor or a list of tensors, got an empty list")
    return tuple(given)


def _pairs(predictions: int, targets: int, numbered: bool) -> list[tuple[int, int]]:
    """Return the pairs (prediction, target). If both are lists of views, no prediction is paired with its own view."""
    pairs = [(i, j) for i in range(predictions) for j in range(targets) if not numbered or i != j]
    if not pairs:
        raise ValueError(
            "prediction i is paired with every target j ≠ i, so lists of one prediction and one target leave no pair: "
            "pass one of them as a tensor"
        )
    return pairs


def _name(name: str, views: Sequence[Tensor], i: int) -> str:
    return name if len(views) == 1 else f"{name}[{i}]"


def _check_prediction(prediction: Tensor, name: str = "prediction", several: str = "") -> None:
    check_tensor(name, prediction)
    if prediction.ndim != 2 or prediction.shape[0] < 1:
        raise ValueError(f"{name} must be [B, D] with at least 1 row{several}, got {list(prediction.shape)}")
    if not prediction.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {prediction.dtype}")


def _check_like(prediction: Tensor, view: Tensor, name: str) -> None:
    """Raise unless a view is floating point and has the shape and device of the first prediction."""
    check_tensor(name, view)
    if view.shape != prediction.shape:
        raise ValueError(f"{name} must be {list(prediction.shape)} like the first prediction, got {list(view.shape)}")
    if not view.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {view.dtype}")
    if view.device != prediction.device:
        raise ValueError(f"{name} must be on the prediction's device, {prediction.device}, got {view.device}")


def _check_k(k: int, bank: MemoryBank | None) -> None:
    if bank is None and k != 1:
        raise ValueError(f"bank=None goes with k=1 (BYOL), got k={k}")
    if k < 1 or (bank is not None and k > bank.size):
        raise ValueError(
            f"k must be between 1 and the bank's size{f', {bank.size}' if bank is not None else ''}, got {k}"
        )
