"""lightly's NNCLR example with `MSFMemoryBankModule` instead of `NNMemoryBankModule`, which changes one line.

    pip install -e '.[examples]' lightly                        (in a clone)
    python examples/integrations/lightly_nnclr.py               (scikit-learn's digits: half a minute on two CPU cores)
    python examples/integrations/lightly_nnclr.py --data DIR    (a folder of images, as LightlyDataset reads it)

Based on lightly's examples/pytorch/nnclr.py (lightly 1.6, MIT license). This file has a smaller backbone, SGD with
momentum, and the temperature 0.1 of the NNCLR paper, so that a few epochs show an effect.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, ResNet

from msf_core import MemoryBank


class MSFMemoryBankModule(nn.Module):
    """A replacement for lightly's ``NNMemoryBankModule`` with a `MemoryBank`: the argument and the call are the same.

    Differences from lightly's module:

    - Lightly's bank starts full of random unit vectors, and returns them until they are overwritten. Here, unfilled
      rows are never returned, so the results differ until the bank is full. While it is empty, the output itself is
      returned (the loss is then SimCLR's); after that, the nearest filled row.
    - A batch that reaches the end of the bank continues at its beginning. Lightly's bank drops the remaining rows. The
      contents are the same if the batch size divides the size of the bank.
    - Rows are stored as unit vectors. Lightly's bank returns them with their original length and the same direction;
      NTXentLoss normalizes them anyway.
    - A row with NaN or Inf is never returned. If there is no other row, the output itself is returned.
    - It is faster: on a CPU slightly with 1,024 rows, and several times with large banks.
    - The rows are in the ``state_dict`` (lightly's are not), so a resumed run keeps them. Use ``persistent=False`` to
      leave them out, for example to load a checkpoint without them.

    Args:
        size: (number of rows, dimensions). As in lightly since 1.6, a single number is an error.
        options: options of `MemoryBank`: ``dtype``, ``backend``, ``persistent`` and ``layout``. By default, all ranks
            share one bank and update it together. "local" corresponds to lightly's bank under torch.distributed outside
            of DDP; DDP would broadcast the rows of rank 0.

    Raises:
        ValueError: if ``size`` is not a pair.

    >>> nn_replacer = MSFMemoryBankModule(size=(2**16, 128))
    >>> z = torch.randn(8, 128)
    >>> nn_replacer(z, update=True).shape
    torch.Size([8, 128])
    """

    def __init__(self, size: int | Sequence[int], **options: Any) -> None:
        super().__init__()
        if isinstance(size, int) or len(size) != 2:
            raise ValueError(f"size must be (number of rows, dimensions), got {size!r}")
        self.size = tuple(size)
        self.bank = MemoryBank(*self.size, **options)

    @torch.no_grad()
    def forward(self, output: Tensor, update: bool = False) -> Tensor:
        """Return the row nearest to each output, in the bank before the update.

        Args:
            output: [B, D] floats of any scale.
            update: also push the output into the bank.

        Returns:
            [B, D] float32 unit vectors, without gradient.

        Raises:
            ValueError: if a shape or device does not match.
        """
        if not len(self.bank):
            nearest = F.normalize(output.float(), dim=1)  # [B, D]
        else:
            found = self.bank.search(output, k=1)
            nearest = found.embedding[:, 0]
            missing = found.index < 0  # [B, 1]
            if nearest.is_cuda or missing.any():  # on a GPU, any() would synchronize
                nearest = torch.where(missing, F.normalize(output.float(), dim=1), nearest)
        if update:
            self.bank.push(output)
        return nearest


class NNCLR(nn.Module):
    """Backbone, projection and prediction head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = NNCLRProjectionHead(512, 512, 128)
        self.prediction_head = NNCLRPredictionHead(128, 512, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projection, detached, and the prediction of images."""
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)


class Digits(Dataset):
    """scikit-learn's 1,797 digits as PIL images; LightlyDataset sets ``transform``."""

    transform: Any = None

    def __init__(self) -> None:
        pixels, self.labels = load_digits(return_X_y=True)
        grays = (pixels.reshape(-1, 8, 8) * 255 / 16).astype("uint8")
        self.images = [Image.fromarray(gray).convert("RGB") for gray in grays]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (views, label)."""
        return self.transform(self.images[index]), int(self.labels[index])


def train(model: NNCLR, memory_bank: nn.Module, loader: DataLoader, epochs: int, device: str) -> list[float]:
    """Train as lightly's example does, with either library's bank; print and return the mean loss of each epoch."""
    criterion = NTXentLoss(temperature=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        total_loss = torch.zeros((), device=device)
        for (x0, x1), _, _ in loader:
            z0, p0 = model(x0.to(device))
            z1, p1 = model(x1.to(device))
            z0 = memory_bank(z0, update=False)
            z1 = memory_bank(z1, update=True)
            loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
            total_loss += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(total_loss) / len(loader))
        print(f"epoch: {epoch:>02}, loss: {losses[-1]:.5f}")
    return losses


def main() -> None:
    """Train on the digits or on a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images (default: scikit-learn's digits)")
    parser.add_argument("--size", type=int, default=32, help="pixels of a view (default: 32)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bank-size", type=int, default=1024)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    gentle: dict[str, Any] = {} if args.data else {"hf_prob": 0.0, "min_scale": 0.3}  # flips change digits
    transform = SimCLRTransform(input_size=args.size, gaussian_blur=0.0, **gentle)
    if args.data:
        dataset = LightlyDataset(str(args.data), transform=transform)
    else:
        dataset = LightlyDataset.from_torch_dataset(Digits(), transform=transform)
    if len(dataset) < args.batch_size:
        raise SystemExit(f"{len(dataset)} images are less than a batch of {args.batch_size}: lower --batch-size")
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)

    backbone = nn.Sequential(*list(ResNet(BasicBlock, [1, 1, 1, 1]).children())[:-1])  # 512 features, as ResNet18
    model = NNCLR(backbone).to(device)
    memory_bank = MSFMemoryBankModule(size=(args.bank_size, 128)).to(device)  # was: NNMemoryBankModule(size=(…, 128))
    train(model, memory_bank, loader, args.epochs, device)
    print(f"the bank at the end: {memory_bank.bank}")


if __name__ == "__main__":
    main()
