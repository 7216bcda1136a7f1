"""MSF as a method of stable-pretraining (github.com/rbalestr-lab/stable-pretraining).

Needs, in a clone: pip install -e '.[examples]' 'stable-pretraining>=0.1.8'

    python examples/integrations/stable_pretraining_msf.py             scikit-learn's digits on the CPU, half a minute
    python examples/integrations/stable_pretraining_msf.py --resume PATH    # the checkpoint that it printed

Copy the class `MSF`, a `stable_pretraining.Module`. It differs from the library's BYOL in three ways:

- `EMATarget` replaces `TeacherStudentWrapper`. `TeacherStudentCallback` updates every module that has ``teacher`` and
  ``update_teacher``, so only these two names are needed. As in the paper, the momentum stays at 0.99 and the target
  keeps its own BatchNorm statistics; the wrapper's momentum rises to 1, and it averages the statistics.
- `MeanShiftLoss` replaces `BYOLLoss`: the target's nearest neighbors in a bank become additional targets.
- As in the paper, a weak view goes to the target and a strong view to the student. A step has one forward of each;
  BYOL's symmetric loss needs two of each.

The bank, the step count of the loss and the update count of the target are in the checkpoint. `OnlineKNN`,
`OnlineProbe` and other callbacks read "embedding" and "label" from the output of `forward`, as usual.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import stable_pretraining as spt
import torch
import torchmetrics
from sklearn.datasets import load_digits
from stable_pretraining.callbacks import OnlineKNN, OnlineProbe, TeacherStudentCallback
from stable_pretraining.data import DataModule, FromTorchDataset, transforms
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from msf_core import EMATarget, MeanShiftLoss, MemoryBank, embedding_spread, neighbor_purity


class Encoder(nn.Module):
    """Backbone and projection head in one module, of which the target is a copy."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [B, F] of images, and their projection [B, D]."""
        features = self.backbone(images)
        return features, self.projector(features)


class MSF(spt.Module):
    """Mean Shift (Koohpayegani et al., ICCV 2021).

    Args:
        backbone: returns features [B, features].
        features: number of features.
        dim: dimension of the embeddings, D.
        hidden: width of the projection and the prediction head.
        bank_size: number of rows of the bank.
        k: number of neighbors.
        momentum: momentum of the target.
        lr: initial learning rate of SGD, which decays to 0 along a cosine, stable-pretraining's default schedule.

    The defaults are the paper's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        *,
        dim: int = 512,
        hidden: int = 4096,
        bank_size: int = 128_000,
        k: int = 5,
        momentum: float = 0.99,
        lr: float = 0.05,
    ) -> None:
        super().__init__(optim={"optimizer": partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-4)})
        self.student = Encoder(backbone, mlp(features, hidden, dim))
        self.teacher = EMATarget(self.student, momentum)
        self.predictor = mlp(dim, hidden, dim)
        self.criterion = MeanShiftLoss(MemoryBank(bank_size, dim), k)

    def forward(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        """Return the loss of a batch of weak and strong views, and the teacher's features for the callbacks.

        Outside of training, a batch has only one view of each image, and there is no loss.
        """
        if stage != "fit":
            return {"embedding": self.teacher(batch["image"])[0], "label": batch["label"]}
        weak, strong = batch["weak"], batch["strong"]
        embedding, u = self.teacher(weak["image"])
        v = self.predictor(self.student(strong["image"])[1])
        loss, neighbors = self.criterion(v, u, weak["label"], return_neighbors=True)
        self.log("fit/loss", loss, prog_bar=True)
        self.log("fit/spread", embedding_spread(u))  # near 0 is collapse
        self.log("fit/purity", neighbor_purity(neighbors.label, weak["label"]))  # the only use of the labels
        return {"loss": loss, "embedding": embedding, "label": weak["label"]}

    def update_teacher(self) -> None:
        """Update the teacher after an optimizer step; `TeacherStudentCallback` calls this.

        The callback also calls it after the first batch of each fit, when, with accumulated gradients, the optimizer
        has not stepped yet.
        """
        if self.trainer.global_step > self.teacher.updates:
            self.teacher.update(self.student)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return the paper's projection and prediction head."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def small_convnet() -> nn.Sequential:
    """Return a backbone of 96 features for the digits."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def digits(batch_size: int) -> DataModule:
    """Return scikit-learn's digits: 1,350 for training in two views, and 447 of other writers."""
    pixels, labels = load_digits(return_X_y=True)
    images = nn.functional.interpolate(torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, size=16)
    samples = list(zip(images, map(int, labels), strict=True))
    weak = v2.RandomAffine(5, (0.06, 0.06), (0.9, 1.1))
    strong = v2.Compose([v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.3), 10), v2.ColorJitter(0.4, 0.4)])
    views = transforms.MultiViewTransform({"weak": of_image(weak), "strong": of_image(strong)})
    names = ["image", "label"]
    return DataModule(
        train=DataLoader(FromTorchDataset(samples[:1350], names, views), batch_size, shuffle=True, drop_last=True),
        val=DataLoader(FromTorchDataset(samples[1350:], names), batch_size),
    )


def of_image(view: Any) -> Any:
    """Return a transform of a sample that replaces its image with a view."""
    return lambda sample: {**sample, "image": view(sample["image"])}


def evaluation(module: MSF, features: int, classes: int, queue: int) -> list[L.Callback]:
    """Return callbacks with a kNN and a linear classifier of the teacher's features, fitted during training."""
    metrics = {"accuracy": torchmetrics.classification.MulticlassAccuracy(classes, average="micro")}
    knn = OnlineKNN(
        name="knn",
        input="embedding",
        target="label",
        queue_length=queue,
        metrics=metrics,
        num_classes=classes,
        k=1,
        distance_metric="cosine",
    )
    probe = OnlineProbe(
        module,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(features, classes),
        loss=nn.CrossEntropyLoss(),
        metrics={name: metric.clone() for name, metric in metrics.items()},
    )
    return [knn, probe]


def main() -> None:
    """Train on the digits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="checkpoint to continue from, with the same --epochs")
    parser.add_argument("--out", type=Path, default=Path("runs/stable_pretraining"))
    flags = parser.parse_args()

    spt.set(verbose="WARNING", cache_dir=str(flags.out.resolve()))
    L.seed_everything(flags.seed)
    module = MSF(small_convnet(), 96, dim=64, hidden=256, bank_size=1024, momentum=0.97, lr=0.1)
    trainer = L.Trainer(
        max_epochs=flags.epochs,
        devices=1,
        accumulate_grad_batches=flags.accumulate,
        # Without TeacherStudentCallback here, Manager would append it after any ModelCheckpoint, and a checkpoint saved
        # after a step would contain the teacher from before that step.
        callbacks=[*evaluation(module, 96, 10, 1350), TeacherStudentCallback()],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,  # Manager has its own, of every epoch
    )
    resume = None if flags.resume is None else str(flags.resume.resolve())
    spt.Manager(trainer, module, digits(flags.batch_size), flags.seed, ckpt_path=resume, weights_only=False)()
    knn, probe = (float(trainer.callback_metrics[f"eval/{name}_accuracy"]) for name in ("knn", "probe"))
    print(f"accuracy: {knn:.3f} by the nearest neighbor, {probe:.3f} by the linear probe")
    saver: Any = trainer.checkpoint_callback
    print(f"checkpoint: {saver.best_model_path}")


if __name__ == "__main__":
    main()
