"""The interface of the methods that `methods.py` compares, and those built on msf_core: MSF, BYOL, ISD, CO2,
DeepCluster-v2.

Each docstring says where the hyperparameters come from. The widths, the target's momentum and the bank sizes come from
the recipe and are the same for all methods. All methods use SGD with a cosine schedule, also where the paper uses LARS.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from lightly.models.modules import heads
from torch import Tensor, nn

from benchmarks.comparing.losses import (
    cluster_prediction,
    consistent_contrast,
    similarity_distillation,
    spherical_kmeans,
)
from benchmarks.comparing.recipe import Recipe
from msf_core import EMATarget, MeanShiftLoss, MemoryBank
from msf_core.rows import unit_rows
from pipeline.models.backbones import Encoder, mlp


class Method(nn.Module):
    """One method: an encoder to train, in some methods a target that follows it, and a loss of two views.

    Args:
        backbone: the network that is evaluated.
        projector: its projection head.
        momentum: momentum of the target encoder; None: there is no target.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, momentum: float | None = None) -> None:
        super().__init__()
        self.encoder = Encoder(backbone, projector)
        self.target = None if momentum is None else EMATarget(self.encoder, momentum)

    def start(self, views: Iterable[tuple[Tensor, Tensor, Tensor]], images: int) -> None:
        """Prepare for the first step, given an epoch's views (target, online, ids) and the number of images."""

    def loss(self, first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            first: [B, C, H, W], for the target, if there is one.
            second: [B, C, H, W], another view of the same images.
            ids: [B] int64, the images' indices in the training set.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Do what comes after the optimizer's step."""
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


class ISD(Method):
    """ISD: `similarity_distillation` with a bank of the target's embeddings.

    The temperatures 0.1 and 0.01, the heads, w/s and the random rows at the start are those of the authors' code for
    ResNet50 (github.com/UMBCvision/ISD).
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
    """CO2: `consistent_contrast` on MoCo v2, with one bank for both terms.

    The consistency temperature 0.05 is lightly's default. The weight 0.3 has not been checked against the paper.
    """

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
    """DeepCluster-v2: `cluster_prediction` of both views. The bank keeps an epoch of embeddings, which are clustered.

    Three clusterings and temperature 0.1 as in the authors' code (github.com/facebookresearch/swav,
    main_deepclusterv2.py). Before the first step, all images are encoded once without gradient. Only embeddings of the
    first view are clustered.
    """

    HEADS = 3
    centroids: Tensor
    assignments: Tensor

    def __init__(self, backbone: nn.Module, features: int, recipe: Recipe) -> None:
        super().__init__(backbone, heads.SwaVProjectionHead(features, recipe.hidden, recipe.dim))
        self.recipe = recipe
        self.bank = MemoryBank(
            recipe.batch_size, recipe.dim
        )  # replaced in `start`, where the number of images is known
        self.clusterings = 0
        self.register_buffer("centroids", F.normalize(torch.randn(self.HEADS, recipe.prototypes, recipe.dim), dim=2))
        self.register_buffer("assignments", torch.full((self.HEADS, 1), -1))  # of each image

    def start(self, views: Iterable[tuple[Tensor, Tensor, Tensor]], images: int) -> None:
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
        """Cluster the bank, starting from new random centroids."""
        assert self.bank.ids is not None
        self.assignments.fill_(-1)
        for head in range(self.HEADS):
            seed = self.clusterings * self.HEADS + head
            clusters = min(self.recipe.prototypes, len(self.bank))
            self.centroids[head, :clusters], nearest = spherical_kmeans(self.bank.rows, clusters, seed)
            self.assignments[head, self.bank.ids] = nearest
        self.clusterings += 1
