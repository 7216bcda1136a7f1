"""MSF as a method of solo-learn (github.com/vturrisi/solo-learn), which has BYOL and NNBYOL, but not MSF.

Copy this file to solo/methods/msf.py, import MSF in solo/methods/__init__.py, and enter it there in METHODS::

    from solo.methods.msf import MSF
    METHODS = {..., "msf": MSF}

A config is then that of BYOL (scripts/pretrain/*/byol.yaml) with::

    method: "msf"
    method_kwargs:
      proj_hidden_dim: 4096
      proj_output_dim: 512
      pred_hidden_dim: 4096
      queue_size: 128000  # the default, as k is; with k: 1 it is BYOL
      k: 5
    momentum:
      base_tau: 0.99
      final_tau: 0.99

and with the augmentations of ReSSL (ressl.yaml, of cifar and imagenet-100): one strong crop first, which is the online
encoder's view, and one weak one second, the target's ("w/s" in the paper). The bank travels in Lightning's checkpoint,
and all ranks share it.

Where it departs from solo-learn's BYOL: the loss is not symmetric (one view is the target, as in the paper), and the
momentum stays at ``momentum.base_tau`` (0.99, as in the paper) unless ``momentum.final_tau`` is given, as byol.yaml
does. The base class sends both views through both encoders, of which MSF needs half.

Written for solo-learn 1.0.6, which is on GitHub only (hooks read from solo/methods/base.py at commit c980e9e3f553).
Tested with PyTorch 2.15 on a base class copied by hand from that file (Lightning 2.6.6), and on the real one of PyPI's
1.0.2 of 2021, forced in beside a torch that it does not ask for, with its older names for these hooks translated; one
training step each, on a CPU. Not tested: an unmodified 1.0.6, and whole trainings with it. The tests, and what pip
said, are in tests/integrations/test_solo_learn_msf.py of msf_core.
"""

import copy
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from solo.methods.base import BaseMomentumMethod
from torch import Tensor, nn

from msf_core import MeanShiftLoss, MemoryBank, embedding_spread, neighbor_purity


class MSF(BaseMomentumMethod):
    """Mean Shift (Koohpayegani et al., ICCV 2021, arxiv.org/abs/2105.07269).

    Its settings are those of `BaseMomentumMethod`, and in ``cfg.method_kwargs``: proj_hidden_dim, proj_output_dim (D)
    and pred_hidden_dim, which have no defaults; queue_size (rows of the bank, 128,000) and k (5).
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        settings = cfg.method_kwargs
        dim = settings.proj_output_dim
        self.projector = mlp(self.features_dim, settings.proj_hidden_dim, dim)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.predictor = mlp(dim, settings.pred_hidden_dim, dim)
        self.criterion = MeanShiftLoss(MemoryBank(settings.queue_size, dim), k=settings.k)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fill in the defaults of MSF, and those of the base class.

        Raises:
            ValueError: a size of the heads is missing, or there are other crops than two large ones.
        """
        base_tau = OmegaConf.select(cfg, "momentum.base_tau", default=0.99)
        final_tau = OmegaConf.select(cfg, "momentum.final_tau", default=base_tau)
        cfg = super(MSF, MSF).add_and_assert_specific_cfg(cfg)
        cfg.momentum.final_tau = final_tau  # the base class would let it rise to 1
        for name in ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim"):
            if OmegaConf.select(cfg, f"method_kwargs.{name}") is None:
                raise ValueError(f"MSF needs method_kwargs.{name}")
        cfg.method_kwargs.queue_size = OmegaConf.select(cfg, "method_kwargs.queue_size", default=128_000)
        cfg.method_kwargs.k = OmegaConf.select(cfg, "method_kwargs.k", default=5)
        crops = (cfg.data.num_large_crops, cfg.data.num_small_crops)
        if crops != (2, 0):
            raise ValueError(f"MSF takes two large crops, online and target, and no small ones, got {crops}")
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The base class's, projector and predictor."""
        return [
            *super().learnable_params,
            {"name": "projector", "params": self.projector.parameters()},
            {"name": "predictor", "params": self.predictor.parameters()},
        ]

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        """The base class's and the projectors: solo-learn moves the second of each pair towards the first."""
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    def forward(self, X: Tensor) -> dict[str, Any]:
        """Add to the base class's outputs z, projected, and p, predicted from it; both [B, D]."""
        out = super().forward(X)
        z = self.projector(out["feats"])
        return {**out, "z": z, "p": self.predictor(z)}

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Any]:
        """Add z, [B, D], to the base class's outputs, which ``training_step`` then has as "momentum_z"."""
        out = super().momentum_forward(X)
        return {**out, "z": self.momentum_projector(out["feats"])}

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        """Return MSF's loss and the online classifier's for a batch [indexes, [online view, target view], labels].

        The labels serve the classifier and the logged purity (NaN with k: 1, or without labels); MSF never sees them.
        """
        out = super().training_step(batch, batch_idx)
        v, u, labels = out["p"][0], out["momentum_z"][1], batch[-1]
        loss, neighbors = self.criterion(v, u, labels, return_neighbors=True)
        metrics = {
            "train_msf_loss": loss,
            "train_neighbor_purity": neighbor_purity(neighbors.label, labels),
            "train_spread": embedding_spread(u),  # near 0 is collapse
        }
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        return loss + out["loss"]


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Projection and prediction head, as those of solo-learn's BYOL."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width_out))
