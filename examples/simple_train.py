"""Train an encoder with Mean Shift in plain PyTorch, in one file that you can copy from.

Needs, in a clone: pip install -e '.[examples]'

    python examples/simple_train.py                  scikit-learn's digits, half a minute on two CPU cores
    python examples/simple_train.py --data DIR       a folder of images with a folder for each class (ImageFolder)

examples/imagenet_train.py also has checkpoints, the paper's evaluation, and several GPUs.
"""

import argparse
from typing import Any

import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from msf_core import EMATarget, MeanShiftLoss, MemoryBank, embedding_spread, knn_classify, neighbor_purity


class Digits(Dataset[tuple[Any, int]]):
    """1,797 scanned digits of 8×8 pixels."""

    def __init__(self, transform: Any) -> None:
        pixels, self.labels = load_digits(return_X_y=True)
        self.images = [Image.fromarray((image * 15.9).astype("uint8").reshape(8, 8)).convert("RGB") for image in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(self.labels[index])


class TwoViews:
    """A weak view for the target encoder, and a strong one for the online encoder."""

    def __init__(self, weak: Any, strong: Any) -> None:
        self.weak, self.strong = weak, strong

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return both views of an image."""
        return self.weak(image), self.strong(image)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a projection or prediction head (section 3.1 of the paper)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def main(arguments: list[str] | None = None) -> None:
    """Train, and print how good the neighbors are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", help="folder of images (default: the digits)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    torch.manual_seed(flags.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The data: two views of each image for training, and the plain images for evaluation.
    if flags.data:
        size, hidden, dim, bank_size, lr = 224, 4096, 512, 128_000, 0.05  # as in the paper
        weak = T.Compose([T.RandomResizedCrop(size, (0.2, 1.0)), T.RandomHorizontalFlip(), T.ToTensor()])
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
        strong = T.Compose([jitter, T.RandomGrayscale(0.2), T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], 0.5), weak])
        plain = T.Compose([T.Resize(256), T.CenterCrop(size), T.ToTensor()])
        views = torchvision.datasets.ImageFolder(flags.data, TwoViews(weak, strong))
        images = torchvision.datasets.ImageFolder(flags.data, plain)
        backbone, features = torchvision.models.resnet50(), 2048
        backbone.fc = nn.Identity()
    else:
        size, hidden, dim, bank_size, lr = 16, 256, 64, 1024, 0.1
        weak = T.Compose([T.Resize(size), T.RandomAffine(5, (0.05, 0.05)), T.ToTensor()])
        shake = T.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10)
        strong = T.Compose([T.Resize(size), T.ColorJitter(0.4, 0.4), shake, T.ToTensor()])
        views, images = Digits(TwoViews(weak, strong)), Digits(T.Compose([T.Resize(size), T.ToTensor()]))
        layers = [(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, 32), (32, 64), (64, 128))]
        backbone, features = nn.Sequential(*sum(layers, ()), nn.Flatten()), 512
    batch_size, workers = (256, 8) if flags.data else (64, 0)
    if len(views) < batch_size:
        parser.error(f"{flags.data} has {len(views)} images, but a batch needs {batch_size}")
    loader = DataLoader(views, batch_size, shuffle=True, drop_last=True, num_workers=workers)

    # The method: an online encoder with a predictor, a target that averages its weights, a bank and the loss.
    encoder = nn.Sequential(backbone, mlp(features, hidden, dim)).to(device)
    predictor = mlp(dim, hidden, dim).to(device)
    target = EMATarget(encoder, momentum=0.99 if flags.data else 0.97)
    criterion = MeanShiftLoss(MemoryBank(bank_size, dim), k=5).to(device)
    optimizer = torch.optim.SGD([*encoder.parameters(), *predictor.parameters()], lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=flags.epochs * len(loader))
    for epoch in range(flags.epochs):
        for (weak_view, strong_view), labels in loader:
            u = target(weak_view.to(device))
            v = predictor(encoder(strong_view.to(device)))
            loss, neighbors = criterion(v, u, labels.to(device), return_neighbors=True)  # labels only for the purity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            target.update(encoder)
        purity = neighbor_purity(neighbors.label, labels.to(device))
        print(f"epoch {epoch + 1}: loss {loss:.3f}, purity {purity:.2f}, spread {embedding_spread(u):.2f}", flush=True)

    # Classify half of the images by their nearest neighbor in the other half, with the features of the backbone.
    loader = DataLoader(images, 256, num_workers=workers)
    with torch.no_grad():
        found = [(backbone.eval()(batch.to(device)), labels) for batch, labels in loader]
    rows, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    half = torch.randperm(len(rows)) < len(rows) // 2
    guessed = knn_classify(rows[~half], rows[half], labels[half].to(device), k=1).cpu()
    print(f"1-NN accuracy on half of the images, from the other half: {(guessed == labels[~half]).float().mean():.3f}")


if __name__ == "__main__":
    main()
