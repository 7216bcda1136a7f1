"""Mean Shift as a LightningModule: bank, target and loss under Lightning's Trainer, on one process or several.

Needs, in a clone: pip install -e '.[examples]' lightning

    python examples/integrations/lightning_msf.py                      scikit-learn's digits on the CPU, under a minute
    python examples/integrations/lightning_msf.py --data IMAGES --arch resnet50       IMAGES/train and IMAGES/val
    python examples/integrations/lightning_msf.py --devices 2          two processes, which share one bank
    python examples/integrations/lightning_msf.py --resume runs/lightning/last.ckpt

The bank, the target and the loss are submodules: they move with the module and are in Lightning's checkpoints, from
which a run goes on exactly, in the middle of an epoch too. Checkpoints are for step boundaries, as ModelCheckpoint
writes them. They are written by rank 0, which suits the replicated bank (the default), not a local or sharded one.
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets, models
from torchvision.transforms import v2

from msf_core import EMATarget, MeanShiftLoss, MemoryBank, embedding_spread, knn_classify, neighbor_purity


class MSF(L.LightningModule):
    """An encoder, a predictor, and what Mean Shift adds: the target, and the loss with its bank.

    Args:
        arch: "digits", or a ResNet of torchvision by its name.
        dim: of an embedding, D.
        hidden: width of the two MLPs.
        bank_size: rows of the bank.
        k: neighbors.
        momentum: of the target.
        lr: of SGD, with a cosine to 0.

    The defaults suit the digits. The paper has dim 512, hidden 4096, 128,000 rows, momentum 0.99 and lr 0.05.
    """

    def __init__(
        self,
        arch: str = "digits",
        dim: int = 64,
        hidden: int = 256,
        bank_size: int = 1024,
        k: int = 5,
        momentum: float = 0.97,
        lr: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        backbone, features = build_backbone(arch)
        self.encoder = nn.Sequential(backbone, mlp(features, hidden, dim))
        self.predictor = mlp(dim, hidden, dim)
        self.target = EMATarget(self.encoder, momentum)
        self.criterion = MeanShiftLoss(MemoryBank(bank_size, dim), k)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of (weak views, strong views, labels); a label that is not known is −1."""
        weak, strong, labels = batch
        u, v = self.target(weak), self.predictor(self.encoder(strong))  # [B, D] each
        loss, neighbors = self.criterion(v, u, labels, return_neighbors=True)
        self.log_dict({"loss": loss, "spread": embedding_spread(u)}, prog_bar=True)
        self.log("purity", neighbor_purity(neighbors.label, labels), prog_bar=True)  # NaN where no label is known
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the target follow each step, which is not each batch where gradients are accumulated."""
        super().optimizer_step(*args, **kwargs)
        # Not in on_train_batch_end: ModelCheckpoint saves before the module's hook of that name runs.
        self.target.update(self.encoder)

    def on_validation_epoch_start(self) -> None:
        """Start with no features."""
        self.seen: list[list[tuple[Tensor, Tensor]]] = [[], []]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        """Keep features and labels of the training images (loader 0) and of those to classify (loader 1)."""
        images, labels = batch
        self.seen[dataloader_idx].append((self.encoder[0](images), labels))

    def on_validation_epoch_end(self) -> None:
        """Log the share of images whose nearest training image, of all ranks', has their label."""
        parts = [torch.cat(part) for images in self.seen for part in zip(*images, strict=True)]
        gathered: Any = self.all_gather(parts)  # [ranks, n, …] each or, of one process, [n, …]
        shapes = [(-1, *part.shape[1:]) for part in parts]
        features, labels, queries, truth = (part.view(shape) for part, shape in zip(gathered, shapes, strict=True))
        found = knn_classify(queries, features, labels, k=1)
        self.log("val_1nn", (found == truth).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """SGD as in the paper, over what has gradients: encoder and predictor."""
        trained = [*self.encoder.parameters(), *self.predictor.parameters()]
        optimizer = torch.optim.SGD(trained, lr=self.hparams["lr"], momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return the paper's projection and prediction head."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def build_backbone(arch: str) -> tuple[nn.Module, int]:
    """Return a backbone without a classifier, and its number of features."""
    if arch != "digits":
        resnet = models.get_model(arch, weights=None)
        features = resnet.fc.in_features
        resnet.fc = nn.Identity()
        return resnet, features
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 96


class Images(L.LightningDataModule):
    """The digits, or a folder with train/ and val/, a folder a class in each; ``batch_size`` is that of one rank."""

    def __init__(self, folder: str | None = None, batch_size: int = 64, workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.folder, self.batch_size, self.workers, self.seed = folder, batch_size, workers, seed

    def setup(self, stage: str) -> None:
        """Open the images."""
        self.train: Any
        self.val: Any
        if self.folder is None:
            pixels, labels = load_digits(return_X_y=True)
            images = nn.functional.interpolate(torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, size=16)
            digits = list(zip(images, map(int, labels), strict=True))
            self.train, self.val, self.center = digits[:1350], digits[1350:], v2.Identity()  # other writers
            self.weak: Any = v2.RandomAffine(5, (0.06, 0.06), (0.9, 1.1))
            self.strong: Any = v2.Compose([v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.3), 10), v2.ColorJitter(0.4, 0.4)])
        else:
            self.train, self.val = (datasets.ImageFolder(f"{self.folder}/{part}") for part in ("train", "val"))
            normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            end = [v2.ToImage(), v2.ToDtype(torch.float32, True), normalize]
            crop = [v2.RGB(), v2.RandomResizedCrop(224, (0.2, 1)), v2.RandomHorizontalFlip()]
            colors = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
            blur = v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5)
            self.weak, self.strong = v2.Compose([*crop, *end]), v2.Compose([*crop, *colors, blur, *end])
            self.center = v2.Compose([v2.RGB(), v2.Resize(256), v2.CenterCrop(224), *end])

    def train_dataloader(self) -> DataLoader:
        """Return batches of (weak views, strong views, labels)."""
        trainer: Any = self.trainer
        if len(self.train) < self.batch_size * trainer.world_size:
            raise ValueError(f"{len(self.train)} images are less than a batch of {self.batch_size} on each process")
        views = Views(self.train, [self.weak, self.strong], self.seed)
        keys = Keys(views, self.batch_size, self.seed, trainer)
        return DataLoader(views, self.batch_size, sampler=keys, drop_last=True, num_workers=self.workers)

    def val_dataloader(self) -> list[DataLoader]:
        """Return batches of (images, labels): those to find neighbors among, and those to classify."""
        # Lightning divides them over the ranks, and repeats an image where that does not come out even.
        return [
            DataLoader(Views(part, [self.center]), 256, num_workers=self.workers) for part in (self.train, self.val)
        ]


class Views(Dataset):
    """Views of an image and its label; those of a key (epoch, index) are always the same, whoever asks for them."""

    def __init__(self, images: Any, kinds: list[Any], seed: int = 0) -> None:
        self.images, self.kinds, self.seed = images, kinds, seed

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Any, ...]:
        """Return a view of each kind, and the label."""
        epoch, index = (0, key) if isinstance(key, int) else key
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 10_000 + epoch) * len(self) + index)
            return (*(view(image) for view in self.kinds), label)


class Keys(DistributedSampler):
    """Keys (epoch, index) of this rank's images, from where the run is on.

    That is told by the count of batches that the loss keeps, which a checkpoint brings back. Lightning's own count of
    epochs is one too high in some runs resumed from the end of an epoch (2.6, with max_steps).
    """

    def __init__(self, images: Views, batch_size: int, seed: int, trainer: Any) -> None:
        super().__init__(images, trainer.world_size, trainer.global_rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.criterion = trainer.lightning_module.criterion

    def __iter__(self) -> Iterator[Any]:
        self.epoch, batch = divmod(self.criterion.steps, len(self) // self.batch_size)
        return iter([(self.epoch, index) for index in super().__iter__()][batch * self.batch_size :])


def main() -> None:
    """Train, and tell the accuracy before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train/ and val/, a folder a class in each; default: the digits")
    parser.add_argument("--arch", default="digits", help='"digits" or a ResNet of torchvision')
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images of one process and step")
    parser.add_argument("--bank-size", type=int, default=1024)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimizer step")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument(
        "--resume", help="a checkpoint to go on from, with the same --epochs: the rate's cosine is in it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    flags = parser.parse_args()
    if (flags.data is None) != (flags.arch == "digits"):
        parser.error(
            "--data DIR and --arch, a ResNet of torchvision, go together; the digits have an encoder of their own"
        )

    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")  # see Keys
    L.seed_everything(flags.seed)
    images = Images(flags.data, flags.batch_size, flags.workers, flags.seed)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # hosts of a shared bank talk by gloo
    trainer = L.Trainer(
        max_epochs=flags.epochs,
        devices=flags.devices,
        strategy="auto" if flags.devices == 1 else DDPStrategy(process_group_backend=backend),
        accumulate_grad_batches=flags.accumulate,
        check_val_every_n_epoch=5,
        log_every_n_steps=10,
        logger=CSVLogger(flags.out),
        callbacks=[ModelCheckpoint(flags.out, every_n_train_steps=flags.save_every, save_last=True)],
    )
    model = MSF(flags.arch, bank_size=flags.bank_size)
    before = trainer.validate(model, images, verbose=False)[0]["val_1nn"]
    trainer.fit(model, images, ckpt_path=flags.resume)
    trainer.save_checkpoint(flags.out / "last.ckpt")  # the end, which is seldom a multiple of --save-every
    after = trainer.validate(model, images, verbose=False)[0]["val_1nn"]
    if trainer.is_global_zero:
        print(f"1-NN accuracy: {before:.3f} untrained, {after:.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
