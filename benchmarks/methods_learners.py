"""The methods that `methods.py` compares, each a class of few lines over one interface.

Losses, heads and queues are lightly's where it has them; MSF and BYOL are msf_core's, and what no library has is in
`methods_losses`. Each docstring says where the numbers are from: "lightly" is its benchmark for small images
(docs/source/getting_started/benchmarks/cifar10_benchmark.py). Widths, the target's momentum and the sizes of banks are
the recipe's for all methods; all have SGD and a cosine, where some papers have LARS.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
from lightly.models.modules import NNMemoryBankModule, heads
from torch import Tensor, nn

from benchmarks.methods_losses import (
    cluster_prediction,
    consistent_contrast,
    similarity_distillation,
    spherical_kmeans,
)
from benchmarks.methods_recipe import Recipe
from msf_core import EMATarget, MeanShiftLoss, MemoryBank
from msf_core.rows import unit_rows
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
        loss: Tensor = self.criterion(self.predictor(self.encoder(second)), self.target(first))
        return loss


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
        loss: Tensor = self.criterion(predictions, [self.target(view) for view in views])
        return loss


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


class SimSiam(Method):
    """SimSiam (arXiv 2011.10566, eq. 2); a projector of 2 layers, as there for CIFAR-10 (appendix D) and in lightly."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        wide = recipe.wide
        projector = heads.ProjectionHead(
            [(features, wide, nn.BatchNorm1d(wide), nn.ReLU()), (wide, wide, nn.BatchNorm1d(wide), None)]
        )
        super().__init__(backbone, projector)
        self.predictor = heads.SimSiamPredictionHead(wide, wide // 4, wide)  # a bottleneck of a quarter, as there
        self.criterion = NegativeCosineSimilarity()

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        z = [self.encoder(view) for view in (first, second)]
        p = [self.predictor(embedding) for embedding in z]
        loss: Tensor = (self.criterion(p[0], z[1].detach()) + self.criterion(p[1], z[0].detach())) / 2
        return loss


class NNCLR(Method):
    """NNCLR (arXiv 2104.14548, eq. 3): SimCLR's loss with one view's nearest neighbor; temperature 0.1 as there."""

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


class SwAV(Method):
    """SwAV (arXiv 2006.09882, eq. 2) with two crops; temperature 0.1 and Sinkhorn's 0.05 and 3 rounds as there."""

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
    """Barlow Twins (arXiv 2103.03230, eq. 1), λ = 0.005 as there.

    Divided by the number of dimensions: LARS, which the paper has, does not see the scale of a loss, and SGD does.
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
    """VICReg (arXiv 2105.04906, eq. 6) with the paper's 25, 25 and 1; divided by 25, as `BarlowTwins` is scaled."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.VICRegProjectionHead(features, recipe.wide, recipe.wide))
        self.criterion = VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        loss: Tensor = self.criterion(self.encoder(first), self.encoder(second)) / 25
        return loss


class DINO(Method):
    """DINO (arXiv 2104.14294, eq. 3) with two global crops; temperatures 0.04 and 0.1 and the center's 0.9 as there.

    The head has BatchNorm, as for convolutional networks there and in lightly.
    """

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        with warnings.catch_warnings(
            action="ignore", category=FutureWarning
        ):  # lightly's weight_norm is PyTorch's old one
            head = heads.DINOProjectionHead(features, recipe.wide, recipe.dim, recipe.wide, batch_norm=True)
        super().__init__(backbone, head, recipe.momentum)
        self.criterion = DINOLoss(output_dim=recipe.wide, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9)

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        views = (first, second)
        loss: Tensor = self.criterion([self.target(view) for view in views], [self.encoder(view) for view in views])
        return loss


class ISD(Method):
    """ISD: `similarity_distillation` with a bank of the target's embeddings, random ones at first as in its code.

    Temperatures 0.1 and 0.01, the heads and w/s are those of its ResNet50 (github.com/UMBCvision/ISD).
    """

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, mlp(features, recipe.hidden, recipe.dim), recipe.momentum)
        self.predictor = mlp(recipe.dim, recipe.hidden, recipe.dim)
        self.bank = MemoryBank(recipe.bank_size, recipe.dim)
        self.bank.push(torch.randn(recipe.bank_size, recipe.dim))

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        u, v = unit_rows(self.target(first)), F.normalize(self.predictor(self.encoder(second)), dim=1)
        loss = similarity_distillation(v, u, self.bank.rows.clone(), student=0.1, teacher=0.01)
        self.bank.push(u)
        return loss


class CO2(Method):
    """CO2: `consistent_contrast` on MoCo v2, with one bank for both of its terms; its 0.05 and 0.3 are for MoCo v2."""

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.MoCoProjectionHead(features, recipe.hidden, recipe.dim), recipe.momentum)
        self.bank = MemoryBank(recipe.bank_size, recipe.dim)
        self.bank.push(torch.randn(recipe.bank_size, recipe.dim))

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        assert self.target is not None
        q, p = F.normalize(self.encoder(second), dim=1), unit_rows(self.target(first))
        loss = consistent_contrast(q, p, self.bank.rows.clone(), temperature=0.2, consistency=0.05, alpha=0.3)
        self.bank.push(p)
        return loss


class DeepCluster(Method):
    """DeepCluster-v2: `cluster_prediction` of both views, with clusters of the last epoch's embeddings, in a bank.

    Three clusterings and temperature 0.1 as in its code (github.com/facebookresearch/swav, main_deepclusterv2.py).
    Before the first step all images pass once, without gradient; the first view's embeddings are clustered.
    """

    HEADS = 3
    centroids: Tensor
    assignments: Tensor

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.SwaVProjectionHead(features, recipe.hidden, recipe.dim))
        self.recipe = recipe
        self.bank = MemoryBank(recipe.batch_size, recipe.dim)  # `start` tells the number of images
        self.clusterings = 0
        self.register_buffer("centroids", F.normalize(torch.randn(self.HEADS, recipe.prototypes, recipe.dim), dim=2))
        self.register_buffer("assignments", torch.full((self.HEADS, 1), -1))  # of each image

    def start(self, views: Iterator[tuple[Tensor, Tensor, Tensor]], images: int) -> None:
        """Fill the bank with an epoch of embeddings, and cluster them."""
        whole = images // self.recipe.batch_size * self.recipe.batch_size
        device = self.centroids.device
        self.bank = MemoryBank(whole, self.recipe.dim, device=device)
        self.assignments = torch.full((self.HEADS, images), -1, device=device)
        with torch.no_grad():
            for first, _, ids in views:
                self.bank.push(self.encoder(first), ids=ids)
        self.cluster()

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """See `Method`."""
        z = [F.normalize(self.encoder(view), dim=1) for view in (first, second)]
        self.bank.push(z[0], ids=ids)
        assigned = self.assignments[:, ids.clamp(max=self.assignments.shape[1] - 1)]  # [H, B]
        losses = [cluster_prediction(view, self.centroids, assigned, temperature=0.1) for view in z]
        return torch.stack(losses).mean()

    def after_step(self) -> None:
        """Cluster anew after each epoch."""
        if self.clusterings and int(self.bank.pushed) % self.bank.size == 0:
            self.cluster()

    def cluster(self) -> None:
        """Cluster the bank, each time from other centroids."""
        assert self.bank.ids is not None
        self.assignments.fill_(-1)
        for head in range(self.HEADS):
            seed = self.clusterings * self.HEADS + head
            clusters = min(self.recipe.prototypes, len(self.bank))
            self.centroids[head, :clusters], nearest = spherical_kmeans(self.bank.rows, clusters, seed)
            self.assignments[head, self.bank.ids] = nearest
        self.clusterings += 1


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    title: str
    build: Callable[[nn.Module, int, Recipe], Method]
    augmentation: str  # views of the target / of the online encoder


UNTRAINED = "untrained"
METHODS = {
    "msf": Entry("MSF w/s", MSF, "w/s"),
    "msf-ss": Entry("MSF", MSF, "s/s"),
    "msf-ww": Entry("MSF w/w", MSF, "w/w"),
    "byol-asym": Entry("BYOL-asym", BYOLAsym, "s/s"),
    "byol-asym-ws": Entry("BYOL-asym w/s", BYOLAsym, "w/s"),
    "byol": Entry("BYOL", BYOL, "s/s"),
    "isd": Entry("ISD", ISD, "w/s"),
    "co2": Entry("CO2", CO2, "s/s"),
    "moco-v2": Entry("MoCo v2", MoCo, "s/s"),
    "simclr": Entry("SimCLR", SimCLR, "s/s"),
    "nnclr": Entry("NNCLR", NNCLR, "s/s"),
    "simsiam": Entry("SimSiam", SimSiam, "s/s"),
    "swav": Entry("SwAV", SwAV, "s/s"),
    "deepcluster-v2": Entry("DeepCluster-v2", DeepCluster, "s/s"),
    "barlow-twins": Entry("Barlow Twins", BarlowTwins, "s/s"),
    "vicreg": Entry("VICReg", VICReg, "s/s"),
    "dino": Entry("DINO", DINO, "s/s"),
    UNTRAINED: Entry("untrained", MSF, "w/s"),
}
