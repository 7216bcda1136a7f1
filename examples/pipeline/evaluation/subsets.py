"""Which labels a few-label evaluation may use: a share of each class, a number of each class, or a list."""

from collections import defaultdict
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from pipeline.data.source import DataSource
from pipeline.running.flags import existing_file
from pipeline.running.seeds import seed_of


def share_of_each_class(labels: Tensor, percent: float, seed: int) -> list[int]:
    """Return the indices of ``percent`` % of each class's images, rounded, but at least one per class."""
    if not 0 < percent <= 100:
        raise ValueError(f"--percent must be above 0 and at most 100, got {percent:g}")
    counts = {label: max(1, round(count * percent / 100)) for label, count in _counts(labels).items()}
    return _drawn(labels, counts, seed)


def some_of_each_class(labels: Tensor, count: int, seed: int) -> list[int]:
    """Return the indices of ``count`` images of each class.

    Raises:
        ValueError: a class has fewer images.
    """
    if count < 1:
        raise ValueError(f"--per-class must be at least 1, got {count}")
    if few := {label: there for label, there in _counts(labels).items() if there < count}:
        raise ValueError(f"--per-class {count}: class {min(few)} has only {few[min(few)]} images")
    return _drawn(labels, dict.fromkeys(_counts(labels), count), seed)


def listed(path: Path, source: DataSource) -> list[int]:
    """Return the indices of the images that a file lists, one per line; duplicates are taken once.

    A line is a path below the folder of the training images ("class/image.jpg"), or only a file name, as in SimCLR's
    1percent.txt, if no other image has this name. Empty lines and lines that begin with # are ignored.

    Raises:
        ValueError: the file does not exist, is not text, or lists no images; a listed image does not exist, or its
            name is not unique; or the images of the source are not files.
    """
    wanted = _lines(existing_file("--list", str(path)))
    places = {name: place for place, name in enumerate(source.names())}
    if not places:
        raise ValueError("--list needs a folder of images in class folders")
    called = defaultdict(list)
    for name in places:
        called[PurePosixPath(name).name].append(name)
    found, strangers = set(), []
    for line in wanted:
        name = str(PurePosixPath(line))  # without "./"
        if name in places:
            found.add(places[name])
        elif line.startswith("#"):
            continue
        elif len(same := called.get(name, [])) > 1:
            others = f" and {len(same) - 2} more" if len(same) > 2 else ""
            raise ValueError(
                f"--list {path}: {name} may be {same[0]} or {same[1]}{others}: list paths with their class folders"
            )
        elif same:
            found.add(places[same[0]])
        else:
            strangers.append(line)
    if strangers:
        count = f"{len(strangers)} of {len(wanted)} listed images, such as {strangers[0]}"
        raise ValueError(f"--list {path}: not in the training set: {count}")
    if not found:
        raise ValueError(f"--list {path} lists no images")
    return sorted(found)


def _lines(path: Path) -> list[str]:
    """Return the nonempty lines of a text file, without the byte order mark that Windows programs may write first."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--list {path} is not a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"--list {path} cannot be read: {error.strerror or error}") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _counts(labels: Tensor) -> dict[int, int]:
    found, counts = labels.unique(return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _drawn(labels: Tensor, counts: dict[int, int], seed: int) -> list[int]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed)))
    chosen = [order[labels[order] == label][:count] for label, count in counts.items()]
    return torch.cat(chosen).sort().values.tolist()
