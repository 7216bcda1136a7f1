"""The methods that `methods.py` compares, each a class of few lines over one interface.

Losses, heads and queues are lightly's where it has them; MSF and BYOL are msf_core's, and what no library has is in
`methods_losses`. Each docstring says where the numbers are from: "lightly" is its benchmark for small images
(docs/source/getting_started/benchmarks/cifar10_benchmark.py). Widths, the target's momentum and the sizes of banks are
the recipe's for all methods; all have SGD and a cosine, where some papers have LARS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightly.loss import NTXentLoss
from lightly.models.modules import heads
from torch import Tensor, nn

from benchmarks.methods_recipe import Recipe
from msf_core import EMATarget, MeanShiftLoss, MemoryBank
from training.models import Encoder, mlp


class Method(nn.Module):
    """One method: an encoder that is trained, perhaps a target that follows it, and a loss of two views.

    Args:
        backbone: what is evaluated in the end.
        projector: its projection head.
        momentum: of a target encoder; None is no target.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, momentum: float | None = None) -> None:
        super().__init__()
        self.encoder = Encoder(backbone, projector)
        self.target = None if momentum is None else EMATarget(self.encoder, momentum)

    def start(self, views: Iterator[tuple[Tensor, Tensor, Tensor]], images: int) -> None:
        """Prepare for the first step, given an epoch's views (target, online, ids) and the number of images."""

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            first: [B, C, H, W], the target's view where there is a target.
            second: [B, C, H, W], another view of the same images.
            ids: [B] int64, which images they are.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Do what follows the optimizer's step."""
        if self.target is not None:
            self.target.update(self.encoder)


class MSF(Method):
    """Mean Shift (ICCV 2021, section 2): the k nearest neighbors of u; heads and k as in section 3.1."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe, neighbors: bool = True) -> None:
        super().__init__(backbone, mlp(features, recipe.hidden, recipe.dim), recipe.momentum)
        self.predictor = mlp(recipe.dim, recipe.hidden, recipe.dim)
        bank = MemoryBank(recipe.bank_size, recipe.dim) if neighbors else None
        self.criterion = MeanShiftLoss(bank, k=recipe.k if neighbors else 1)

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        return self.criterion(self.predictor(self.encoder(second)), self.target(first))


class BYOLAsym(MSF):
    """BYOL-asym (the MSF paper, section 3.1): MSF with k = 1, so without a bank."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, features, recipe, neighbors=False)


class BYOL(BYOLAsym):
    """BYOL (arXiv 2006.07733, eq. 2): each view predicts the target's embedding of the other."""

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        views = (first, second)
        predictions = [self.predictor(self.encoder(view)) for view in views]
        return self.criterion(predictions, [self.target(view) for view in views])


class SimCLR(Method):
    """SimCLR (arXiv 2002.05709, eq. 1); temperature 0.5, the paper's for CIFAR-10 and lightly's."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.SimCLRProjectionHead(features, recipe.hidden, recipe.dim))
        self.criterion = NTXentLoss(temperature=0.5)

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        loss: Tensor = self.criterion(self.encoder(first), self.encoder(second))
        return loss


class MoCo(Method):
    """MoCo v2 (arXiv 2003.04297); temperature 0.2 as there, one query a pair as in the 200 epochs of Table 2.

    With one process there is no shuffled BatchNorm.
    """

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.MoCoProjectionHead(features, recipe.hidden, recipe.dim), recipe.momentum)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(recipe.bank_size, recipe.dim))

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        loss: Tensor = self.criterion(self.encoder(second), self.target(first))
        return loss


METHODS: dict[str, "Entry"]


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    title: str
    build: Callable[[nn.Module, int, Recipe], Method]
    augmentation: str  # views of the target / of the online encoder


METHODS = {
    "msf": Entry("MSF w/s", MSF, "w/s"),
    "msf-ss": Entry("MSF", MSF, "s/s"),
    "msf-ww": Entry("MSF w/w", MSF, "w/w"),
    "byol": Entry("BYOL", BYOL, "s/s"),
    "byol-asym": Entry("BYOL-asym", BYOLAsym, "s/s"),
    "byol-asym-ws": Entry("BYOL-asym w/s", BYOLAsym, "w/s"),
    "simclr": Entry("SimCLR", SimCLR, "s/s"),
    "moco-v2": Entry("MoCo v2", MoCo, "s/s"),
}
UNTRAINED = "untrained"
METHODS[UNTRAINED] = Entry("untrained", MSF, "w/s")
