"""Which labels a few-label evaluation may use: a share of each class, a number of each class, or a list."""

from pathlib import Path

import torch
from torch import Tensor

from training.data import DataSource, seed_of


def share_of_each_class(labels: Tensor, percent: float, seed: int) -> list[int]:
    """Return the places of ``percent`` of each class's images, rounded, at least one."""
    if not 0 < percent <= 100:
        raise ValueError(f"--percent must be above 0 and at most 100, got {percent:g}")
    counts = {label: max(1, round(count * percent / 100)) for label, count in _counts(labels).items()}
    return _drawn(labels, counts, seed)


def some_of_each_class(labels: Tensor, count: int, seed: int) -> list[int]:
    """Return the places of ``count`` images of each class.

    Raises:
        ValueError: a class has fewer.
    """
    if count < 1:
        raise ValueError(f"--per-class must be at least 1, got {count}")
    if few := {label: there for label, there in _counts(labels).items() if there < count}:
        raise ValueError(f"--per-class {count}: class {min(few)} has only {few[min(few)]} images")
    return _drawn(labels, dict.fromkeys(_counts(labels), count), seed)


def listed(path: Path, source: DataSource) -> list[int]:
    """Return the places of the images whose file names the file lists, a line each, as SimCLR's 1percent.txt does.

    Raises:
        ValueError: no such file, a name that no image has, or images that are no files.
    """
    try:
        wanted = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    places = {name: place for place, name in enumerate(source.names())}
    if not places:
        raise ValueError("--list goes with a folder of images in class folders")
    names = [Path(name).name for name in wanted]
    if strangers := sorted(set(names) - places.keys()):
        raise ValueError(f"{path} lists {len(strangers)} images that are not there, as {strangers[0]}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} lists no images, or some of them twice")
    return sorted(places[name] for name in names)


def _counts(labels: Tensor) -> dict[int, int]:
    found, counts = labels.unique(return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _drawn(labels: Tensor, counts: dict[int, int], seed: int) -> list[int]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed)))
    chosen = [order[labels[order] == label][:count] for label, count in counts.items()]
    return torch.cat(chosen).sort().values.tolist()
