"""MSF as a method of solo-learn (github.com/vturrisi/solo-learn), which has BYOL and NNBYOL, but not MSF.

Copy this file to solo/methods/msf.py, and add it to solo/methods/__init__.py::

    from solo.methods.msf import MSF
    METHODS = {..., "msf": MSF}

Start from a config of BYOL (scripts/pretrain/*/byol.yaml) and change::

    method: "msf"
    method_kwargs:
      proj_hidden_dim: 4096
      proj_output_dim: 512
      pred_hidden_dim: 4096
      queue_size: 128000       # these four are the defaults; with k: 1 it is BYOL
      k: 5
      symmetric: False
      exclude_same_id: False
    momentum:
      base_tau: 0.99
      final_tau: 0.99          # byol.yaml has 1.0, with which the target stops moving at the end
    optimizer:                 # byol.yaml has LARS for large batches; the paper trains with plain SGD
      name: "sgd"              # leave out optimizer.kwargs: clip_lr, eta and exclude_bias_n_norm are LARS's
      lr: 0.05                 # for 256 images: solo-learn scales it by the batch size
      weight_decay: 1e-4
    scheduler:
      name: "warmup_cosine"
      warmup_epochs: 0

Use the augmentations of ReSSL (ressl.yaml, of cifar and imagenet-100): first a strong crop for the online encoder, then
a weak crop for the target ("w/s" in the paper). These options exist:

- Small crops (with another crop_size, after the two large crops) are more views of the online encoder.
- ``symmetric: True`` makes both large crops targets, each for all crops but itself, as in solo-learn's BYOL. In this
  case, make both crops strong.
- ``exclude_same_id: True`` excludes older views of an image from its neighbors. Use it if the bank is larger than the
  data set. It needs the image index in each batch, which ``data.format: "dali"`` provides only with
  ``dali.encode_indexes_into_labels: True``.

The bank is in Lightning's checkpoint, and all ranks share it. The base class runs both large crops through both
encoders; unless it is symmetric, the loss needs only half of this.

Tested on 2026-11-25 with an unmodified clone (main at commit 9187ea3, version 1.0.6), Python 3.11, PyTorch 2.14 and
Lightning 2.6 on a CPU: complete runs, resuming, and two processes with bfloat16 and accumulated gradients (see
tests/integrations/test_solo_learn_msf.py of msf_core).
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

    Besides the settings of `BaseMomentumMethod`, ``cfg.method_kwargs`` has proj_hidden_dim, proj_output_dim (D) and
    pred_hidden_dim, which have no defaults; queue_size (number of rows of the bank, 128,000), k (5), symmetric (False)
    and exclude_same_id (False).
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        settings = cfg.method_kwargs
        dim = settings.proj_output_dim
        self.projector = mlp(self.features_dim, settings.proj_hidden_dim, dim)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.predictor = mlp(dim, settings.pred_hidden_dim, dim)
        bank = MemoryBank(settings.queue_size, dim)
        self.criterion = MeanShiftLoss(bank, k=settings.k, exclude_same_id=settings.exclude_same_id)
        self.symmetric = settings.symmetric

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fill in the defaults of MSF, and those of the base class.

        Raises:
            ValueError: if a size of the heads is missing, the number of large crops is not two, or there are no ids for
                ``exclude_same_id``.
        """
        base_tau = OmegaConf.select(cfg, "momentum.base_tau", default=0.99)
        final_tau = OmegaConf.select(cfg, "momentum.final_tau", default=base_tau)
        cfg = super(MSF, MSF).add_and_assert_specific_cfg(cfg)
        cfg.momentum.final_tau = final_tau  # the base class would let it rise to 1
        for name in ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim"):
            if OmegaConf.select(cfg, f"method_kwargs.{name}") is None:
                raise ValueError(f"MSF needs method_kwargs.{name}")
        for name, value in (("queue_size", 128_000), ("k", 5), ("symmetric", False), ("exclude_same_id", False)):
            cfg.method_kwargs[name] = OmegaConf.select(cfg, f"method_kwargs.{name}", default=value)
        if cfg.data.num_large_crops != 2:
            raise ValueError(f"MSF takes two large crops, online and target, got {cfg.data.num_large_crops}")
        indexed = cfg.data.get("format") != "dali" or OmegaConf.select(cfg, "dali.encode_indexes_into_labels")
        if cfg.method_kwargs.exclude_same_id and not indexed:
            raise ValueError("exclude_same_id with data.format: dali needs dali.encode_indexes_into_labels: True")
        return cfg

    def on_train_start(self) -> None:
        """Start counting steps at the current step of the run.

        The base class starts at 0, so a resumed run with accumulated gradients would update the target once too often.
        """
        super().on_train_start()
        self.last_step = self.trainer.global_step

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The parameters of the base class, the projector and the predictor."""
        return [
            *super().learnable_params,
            {"name": "projector", "params": self.projector.parameters()},
            {"name": "predictor", "params": self.predictor.parameters()},
        ]

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        """The pairs of the base class, and the projectors; solo-learn averages the first of each into the second."""
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    def forward(self, X: Tensor) -> dict[str, Any]:
        """Add the projection z and the prediction p, [B, D] each, to the outputs of the base class."""
        out = super().forward(X)
        z = self.projector(out["feats"])
        return {**out, "z": z, "p": self.predictor(z)}

    def multicrop_forward(self, X: Tensor) -> dict[str, Any]:
        """Add the same to the outputs of the base class for a small crop."""
        out = super().multicrop_forward(X)
        z = self.projector(out["feats"])
        return {**out, "z": z, "p": self.predictor(z)}

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Any]:
        """Add the projection z, [B, D], to the outputs of the base class; in ``training_step`` it is "momentum_z"."""
        out = super().momentum_forward(X)
        return {**out, "z": self.momentum_projector(out["feats"])}

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        """Return MSF's loss and the online classifier's for a batch [indexes, crops, labels].

        The labels are used only for the classifier and the logged purity (NaN with k: 1, or without labels).
        """
        out = super().training_step(batch, batch_idx)
        indexes, _, labels = batch
        predictions, targets = out["p"], out["momentum_z"]  # large crops first
        v: Any = predictions if self.symmetric else [predictions[0], *predictions[2:]]
        u: Any = targets if self.symmetric else targets[1]
        ids = indexes if self.criterion.exclude_same_id else None
        loss, neighbors = self.criterion(v, u, labels, ids=ids, return_neighbors=True)
        first = neighbors[0] if self.symmetric else neighbors  # the first target's
        metrics = {
            "train_msf_loss": loss,
            "train_neighbor_purity": neighbor_purity(first.label, labels),
            "train_spread": embedding_spread(targets[1]),  # near 0 is collapse
        }
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        return loss + out["loss"]


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Return a projection or prediction head, like those of solo-learn's BYOL."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width_out))
