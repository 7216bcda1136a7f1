"""The methods of `methods.py` whose losses, heads and queues are lightly's.

Each docstring says where the hyperparameters come from. "lightly" means its benchmark for small images
(docs/source/getting_started/benchmarks/cifar10_benchmark.py).
"""

import warnings

import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
from lightly.models.modules import NNMemoryBankModule, heads
from torch import Tensor, nn

from benchmarks.comparing.core import Method
from benchmarks.comparing.recipe import Recipe


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
    """MoCo v2 (arXiv 2003.04297) with temperature 0.2 and one query per image, as in the paper.

    There is no shuffled BatchNorm, because there is only one process.
    """

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.MoCoProjectionHead(features, recipe.hidden, recipe.dim), recipe.momentum)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(recipe.bank_size, recipe.dim))

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        loss: Tensor = self.criterion(self.encoder(second), self.target(first))
        return loss


class NNCLR(Method):
    """NNCLR (arXiv 2104.14548): SimCLR's loss with the nearest neighbor of one view; temperature 0.1, the paper's."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.NNCLRProjectionHead(features, recipe.hidden, recipe.dim))
        self.predictor = heads.NNCLRPredictionHead(recipe.dim, recipe.hidden, recipe.dim)
        self.criterion = NTXentLoss(temperature=0.1)
        self.bank = NNMemoryBankModule(size=(recipe.bank_size, recipe.dim))

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        z = [self.encoder(view) for view in (first, second)]
        p = [self.predictor(embedding) for embedding in z]
        near = [self.bank(z[0].detach(), update=False), self.bank(z[1].detach(), update=True)]
        loss: Tensor = (self.criterion(near[0], p[1]) + self.criterion(near[1], p[0])) / 2
        return loss


class SimSiam(Method):
    """SimSiam (arXiv 2011.10566, eq. 4); a projector of 2 layers, as in the paper for CIFAR-10 and in lightly."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        wide = recipe.wide
        projector = heads.ProjectionHead(
            [(features, wide, nn.BatchNorm1d(wide), nn.ReLU()), (wide, wide, nn.BatchNorm1d(wide), None)]
        )
        super().__init__(backbone, projector)
        self.predictor = heads.SimSiamPredictionHead(
            wide, wide // 4, wide
        )  # a bottleneck of a quarter, as in the paper
        self.criterion = NegativeCosineSimilarity()

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        z = [self.encoder(view) for view in (first, second)]
        p = [self.predictor(embedding) for embedding in z]
        loss: Tensor = (self.criterion(p[0], z[1].detach()) + self.criterion(p[1], z[0].detach())) / 2
        return loss


class SwAV(Method):
    """SwAV (arXiv 2006.09882, eq. 1, 2) with two crops; temperature 0.1, Sinkhorn's 0.05 and 3 rounds, the paper's."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.SwaVProjectionHead(features, recipe.hidden, recipe.dim))
        self.prototypes = heads.SwaVPrototypes(recipe.dim, recipe.prototypes)
        self.criterion = SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        self.prototypes.normalize()
        scores = [self.prototypes(F.normalize(self.encoder(view), dim=1)) for view in (first, second)]
        loss: Tensor = self.criterion(scores, []).squeeze()
        return loss


class BarlowTwins(Method):
    """Barlow Twins (arXiv 2103.03230, eq. 1) with λ = 0.005, the paper's.

    The loss is divided by the number of dimensions, because SGD depends on its scale; the paper's LARS does not.
    """

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.BarlowTwinsProjectionHead(features, recipe.wide, recipe.wide))
        self.criterion = BarlowTwinsLoss(lambda_param=5e-3)
        self.dimensions = recipe.wide

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        loss: Tensor = self.criterion(self.encoder(first), self.encoder(second)) / self.dimensions
        return loss


class VICReg(Method):
    """VICReg (arXiv 2105.04906, eq. 6) with the paper's 25, 25 and 1; divided by 25 for SGD, see `BarlowTwins`."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.VICRegProjectionHead(features, recipe.wide, recipe.wide))
        self.criterion = VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        loss: Tensor = self.criterion(self.encoder(first), self.encoder(second)) / 25
        return loss


class DINO(Method):
    """DINO (arXiv 2104.14294, eq. 3) with two global crops; temperatures 0.04 and 0.1, center momentum 0.9.

    The head has BatchNorm, as in the paper for convolutional networks, and in lightly.
    """

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly's weight_norm is PyTorch's old one
            head = heads.DINOProjectionHead(features, recipe.wide, recipe.dim, recipe.wide, batch_norm=True)
        super().__init__(backbone, head, recipe.momentum)
        self.criterion = DINOLoss(output_dim=recipe.wide, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9)

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        views = (first, second)
        loss: Tensor = self.criterion([self.target(view) for view in views], [self.encoder(view) for view in views])
        return loss
