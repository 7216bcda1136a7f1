"""lightly's BYOL example changed to MSF: a loss with a bank, a weak view for the target, and half the forwards.

    pip install -e '.[examples]' lightly                      (in a clone)
    python examples/integrations/lightly_msf.py               (scikit-learn's digits: about a minute on two CPU cores)
    python examples/integrations/lightly_msf.py --data DIR    (a folder of images, as LightlyDataset reads it)

Based on lightly's examples/pytorch/byol.py (lightly 1.6, MIT license). lightly_byol_to_msf.diff has all changes for
MSF. It applies to both files: `patch byol.py lightly_byol_to_msf.diff` changes lightly's example to MSF, and
`patch -R lightly_msf.py lightly_byol_to_msf.diff` changes this file to BYOL.

BYOL predicts each view from the other. In the MSF paper, only the strong view goes through the online encoder and only
the weak one through the target, which halves the forwards. For a short run on digits, this file also has a ResNet with
half the blocks, SGD with momentum, a lower target momentum, and weaker views. As in lightly's example, views of a
folder have 32 × 32 pixels: for photographs, increase both values of input_size.
"""
# ruff: noqa: I001  (imports in the order of lightly's example, so that one diff fits both)

import argparse
import copy
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import functional as pictures

from lightly.data import LightlyDataset
from msf_core import MeanShiftLoss, MemoryBank
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.byol_transform import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
)
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import cosine_schedule
from msf_core.metrics import knn_classify


class BYOL(nn.Module):
    """The networks of BYOL, which are those of MSF: online encoder, prediction head, momentum encoder."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Return v, the prediction [B, 256] for images."""
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return self.prediction_head(z)

    def forward_momentum(self, x: Tensor) -> Tensor:
        """Return u, the momentum encoder's projection [B, 256] of images, detached."""
        z = self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))
        return z.detach()


class Digits(torch.utils.data.Dataset):
    """scikit-learn's 1,797 digits as PIL images; LightlyDataset sets ``transform``."""

    transform: Any = None

    def __init__(self) -> None:
        pixels, self.labels = load_digits(return_X_y=True)
        grays = (pixels.reshape(-1, 8, 8) * 255 / 16).astype("uint8")
        self.images = [Image.fromarray(gray).resize((32, 32)).convert("RGB") for gray in grays]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (views, label)."""
        return self.transform(self.images[index]), int(self.labels[index])


@torch.no_grad()
def hundred_label_accuracy(backbone: nn.Module, digits: Digits) -> float:
    """Return the 1-NN accuracy on all digits except the first hundred, which are the labeled ones."""
    images = [pictures.normalize(pictures.to_tensor(image), **IMAGENET_NORMALIZE) for image in digits.images]
    features = backbone.cpu().eval()(torch.stack(images)).flatten(start_dim=1)
    labels = torch.tensor(digits.labels)
    predicted = knn_classify(features[100:], features[:100], labels[:100], k=1)
    return (predicted == labels[100:]).float().mean().item()


parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("--data", help="folder of images (default: scikit-learn's digits)")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument(
    "--momentum",
    type=float,
    default=0.97,
    help="initial momentum of the target (default: 0.97; lightly: 0.996), which rises to 1 in the last epoch",
)
args = parser.parse_args()
torch.manual_seed(0)

resnet = ResNet(BasicBlock, [1, 1, 1, 1])
backbone = nn.Sequential(*list(resnet.children())[:-1])
model = BYOL(backbone)

device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)

transform = BYOLTransform(
    view_1_transform=BYOLView1Transform(
        input_size=32, gaussian_blur=0.0, min_scale=0.2, cj_prob=0, random_gray_scale=0
    ),
    view_2_transform=BYOLView2Transform(input_size=32, gaussian_blur=0.0),
)
digits = Digits()
if args.data:
    dataset = LightlyDataset(args.data, transform=transform)
else:
    print(f"1-NN with 100 labels, untrained: {hundred_label_accuracy(copy.deepcopy(backbone), digits):.3f}")
    transform = BYOLTransform(  # no flips and no small crops, because they change digits
        BYOLView1Transform(32, cj_prob=0, min_scale=0.6, random_gray_scale=0, gaussian_blur=0, hf_prob=0),
        BYOLView2Transform(32, min_scale=0.5, gaussian_blur=0, solarization_prob=0, hf_prob=0),
    )
    dataset = LightlyDataset.from_torch_dataset(digits, transform=transform)

if len(dataset) < args.batch_size:
    raise SystemExit(f"{len(dataset)} images are less than a batch of {args.batch_size}: lower --batch-size")
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=args.batch_size,
    shuffle=True,
    drop_last=True,
)

criterion = MeanShiftLoss(MemoryBank(size=4096, dim=256), k=5).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)

print("Starting Training")
for epoch in range(args.epochs):
    total_loss = torch.zeros((), device=device)
    momentum_val = cosine_schedule(epoch, args.epochs, args.momentum, 1)
    for batch in dataloader:
        x0, x1 = batch[0]
        update_momentum(model.backbone, model.backbone_momentum, m=momentum_val)
        update_momentum(model.projection_head, model.projection_head_momentum, m=momentum_val)
        x0 = x0.to(device)
        x1 = x1.to(device)
        z0 = model.forward_momentum(x0)
        p1 = model(x1)
        loss = criterion(p1, z0)
        total_loss += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    avg_loss = total_loss / len(dataloader)
    print(f"epoch: {epoch:>02}, loss: {avg_loss:.5f}")

if not args.data:
    print(f"1-NN with 100 labels, trained: {hundred_label_accuracy(backbone, digits):.3f}")
