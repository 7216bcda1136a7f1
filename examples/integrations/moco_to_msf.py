"""From MoCo to MSF in plain PyTorch: two training loops to compare, and the parts for MoCo's repository.

    pip install -e '.[examples]'                       (in a clone)
    python examples/integrations/moco_to_msf.py        (scikit-learn's digits: 15 seconds on two CPU cores)

What changes from `moco` to `msf`, and why:

    queue and pointer, filled with random rows   ->  MemoryBank: starts empty, any batch size, saved in the state_dict
    a copy, and a loop over its parameters       ->  EMATarget
    InfoNCE against the queue, temperature       ->  MeanShiftLoss: the nearest rows of the bank are positives
    no prediction head                           ->  a prediction head, which prevents collapse without negatives
    heads without BatchNorm                      ->  heads with BatchNorm, as in the paper
    two strong views                             ->  a weak view for the target (paper section 3.1)

The settings are small, for the digits; imagenet_train.py has the paper's.

In a clone of github.com/facebookresearch/moco, `MSF` replaces ``moco.builder.MoCo``, and `WeakAndStrong` replaces
``moco.loader.TwoCropsTransform``. docs/integrations/moco.md lists the changes in its main_moco.py.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from msf_core import EMATarget, MeanShiftLoss, MemoryBank, knn_classify

DIM, BANK_SIZE, MOMENTUM, BATCH = 64, 1024, 0.97, 64


def moco(images: Tensor, epochs: int) -> nn.Module:
    """Train by MoCo; return the backbone."""
    online = make_encoder()
    target = copy.deepcopy(online).requires_grad_(False)
    queue, pointer = F.normalize(torch.randn(BANK_SIZE, DIM), dim=1), 0
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for batch in batches(images, epochs):
        q = F.normalize(online(strong(batch)), dim=1)  # [B, D]
        with torch.no_grad():
            for f, g in zip(target.parameters(), online.parameters(), strict=True):
                f.mul_(MOMENTUM).add_(g, alpha=1 - MOMENTUM)
            key = F.normalize(target(strong(batch)), dim=1)  # [B, D]
        logits = torch.cat([(q * key).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / 0.2  # [B, 1 + N]
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[pointer : pointer + BATCH] = key  # BATCH must divide BANK_SIZE
        pointer = (pointer + BATCH) % BANK_SIZE
    return online[0]


def msf(images: Tensor, epochs: int) -> nn.Module:
    """Train by MSF; return the backbone."""
    online, predictor = make_encoder(), make_head(DIM)
    target = EMATarget(online, MOMENTUM)
    criterion = MeanShiftLoss(MemoryBank(BANK_SIZE, DIM), k=5)
    optimizer = torch.optim.SGD(
        [*online.parameters(), *predictor.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4
    )
    for batch in batches(images, epochs):
        v = predictor(online(strong(batch)))  # [B, D]
        target.update(online)
        u = target(weak(batch))  # [B, D]
        loss = criterion(v, u)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return online[0]


class MSF(nn.Module):
    """Both encoders, the update and the loss in one module, which DDP wraps like ``moco.builder.MoCo``.

    The encoders have the same names as in MoCo, so that main_lincls.py and the detection scripts find
    ``module.encoder_q`` in a checkpoint. The bank is in the ``state_dict`` too.

    Args:
        base_encoder: creates an encoder with a layer ``fc``, such as ``torchvision.models.resnet50``.
        dim: dimension of the embeddings, D.
        K: number of rows of the bank.
        m: momentum of the target.
        k: number of neighbors.
        hidden: width of the projection and the prediction head.

    The defaults are the paper's.
    """

    def __init__(
        self,
        base_encoder: Callable[..., Any],
        dim: int = 512,
        K: int = 128_000,
        m: float = 0.99,
        k: int = 5,
        hidden: int = 4096,
    ) -> None:
        super().__init__()
        self.encoder_q = base_encoder()
        self.encoder_q.fc = make_head(self.encoder_q.fc.in_features, hidden, dim)
        self.predictor = make_head(dim, hidden, dim)
        self.encoder_k = EMATarget(self.encoder_q, m)
        self.criterion = MeanShiftLoss(MemoryBank(K, dim), k)

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        """Return the loss of strong views im_q and weak views im_k, both [B, 3, H, W]."""
        if self.training:  # like MoCo, update before the target's forward, once per optimizer step
            # With accumulated gradients, this would be more than once per step. Then remove this line, and call
            # model.module.encoder_k.update(model.module.encoder_q) after optimizer.step().
            self.encoder_k.update(self.encoder_q)
        u = self.encoder_k(im_k)  # [B, D]
        v = self.predictor(self.encoder_q(im_q))  # [B, D]
        loss: Tensor = self.criterion(v, u)
        return loss


class WeakAndStrong:
    """Two views of an image, by two transforms: [strong, weak], in the order of ``MSF.forward``."""

    def __init__(self, strong: Callable[[Any], Any], weak: Callable[[Any], Any]) -> None:
        self.strong, self.weak = strong, weak

    def __call__(self, image: Any) -> list[Any]:
        """Return the views."""
        return [self.strong(image), self.weak(image)]


def make_encoder() -> nn.Sequential:
    """Return a backbone of 128 features and a projection head."""
    layers: list[nn.Module] = []
    for channels, out, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(backbone, make_head(128))


def make_head(features: int, hidden: int = 256, dim: int = DIM) -> nn.Sequential:
    """Return a head of one hidden layer, as projection and as prediction head."""
    return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))


def batches(images: Tensor, epochs: int) -> Iterator[Tensor]:
    """Yield shuffled batches; the short one at the end of an epoch is left out."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            if len(chosen) == BATCH:
                yield images[chosen]


def weak(images: Tensor, amount: float = 0.1) -> Tensor:
    """Return a view [B, 1, 8, 8] of each image, shifted, scaled and turned by up to about ``amount``."""
    shift = amount * (2 * torch.rand(len(images), 2, 3) - 1)
    grid = F.affine_grid(torch.eye(2, 3) + shift, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def strong(images: Tensor) -> Tensor:
    """Return a view as of `weak`, by more, with noise and another contrast."""
    contrast = 0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)
    return contrast * weak(images, amount=0.25) + 0.1 * torch.randn_like(images)


@torch.no_grad()
def accuracy(
    backbone: nn.Module, train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor
) -> tuple[float, ...]:
    """Return the 1-NN accuracy with all labels of the training images, and with one a class, the first."""
    backbone.eval()
    features, queries = backbone(train), backbone(test)
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()])
    predicted = (knn_classify(queries, features[some], labels[some], k=1) for some in (slice(None), first))
    return tuple((answer == test_labels).float().mean().item() for answer in predicted)


def main() -> None:
    """Train both on the digits and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the same for every seed
    train, test = order[450:], order[:450]

    print("                 1-NN   1 label per class")
    for name, method in (("raw pixels", None), ("untrained", make_encoder), ("MoCo", moco), ("MSF, k = 5", msf)):
        torch.manual_seed(args.seed)
        if method is None:
            backbone: nn.Module = nn.Flatten()
        else:
            backbone = make_encoder()[0] if method is make_encoder else method(images[train], args.epochs)  # type: ignore[call-arg]
        nn1, one_label = accuracy(backbone, images[train], labels[train], images[test], labels[test])
        print(f"{name:<15} {nn1:6.3f} {one_label:8.3f}", flush=True)


if __name__ == "__main__":
    main()
