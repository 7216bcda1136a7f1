"""Folders of images: which folder holds which split, which classes there are, and what to hold out for evaluation."""

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from pipeline.data.pixels import read_image
from pipeline.data.scanning import LeftOut, Paths, Scan, joined, list_folder, printable
from pipeline.data.source import UNKNOWN, Found
from pipeline.running.flags import existing_folder

# Names of the folders of a split, in upper or lower case. A test set is used if there is no validation set.
TRAIN, VAL = {"train", "training"}, {"val", "valid", "validation", "dev"}
TEST = {"test", "testing", "eval", "evaluation", "holdout"}
# Words that make other names look like splits, as in train2017, seg_test and ValidationSet.
_LIKE_TRAIN, _LIKE_TEST = (
    re.compile(rf"({'|'.join(sorted(names))})(set|data|split|images?|imgs?)?s?")
    for names in (TRAIN | {"trainval"}, VAL | TEST)
)
LAYOUT = "DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE, with the same names of classes in both"


class ImageTree(Dataset[tuple[Tensor, int]]):
    """Images below a folder, and their labels. Paths and labels are kept only here.

    Attributes:
        paths: paths of the images.
        targets: labels [n] int64, indices in ``classes``; −1 without labels.
        classes: names of the classes, sorted; empty without labels.
    """

    def __init__(self, paths: Paths, targets: Tensor | None = None, classes: list[str] | None = None) -> None:
        self.paths, self.classes = paths, classes or []
        self.targets = torch.full((len(paths),), UNKNOWN) if targets is None else targets

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return (pixels [3, H, W] uint8, label)."""
        return read_image(self.paths[index]), int(self.targets[index])

    def part(self, chosen: Tensor) -> "ImageTree":
        """Return the images chosen by a tensor [n] of bool."""
        return ImageTree(self.paths.part(chosen), self.targets[chosen], self.classes)

    def held_out(self, fraction: float) -> tuple["ImageTree", "ImageTree"]:
        """Return (the rest, the held-out images): this fraction of each class, at least one image, but never all.

        The choice depends only on a hash of each path below the root. So it is the same for every seed, rank and
        machine, and hardly changes when images are added.
        """
        keys = [hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in self.paths.names()]
        places: list[list[int]] = [[] for _ in self.classes]
        for place, label in enumerate(self.targets.tolist()):
            places[label].append(place)
        out = torch.zeros(len(self), dtype=torch.bool)
        for own in places:
            count = min(len(own) - 1, max(1, round(fraction * len(own))))
            out[sorted(own, key=keys.__getitem__)[:count]] = True
        return self.part(~out), self.part(out)


def open_folder(root: Path, val_split: float = 0.0) -> tuple[ImageTree, ImageTree | None, Found]:
    """Return (training set, test set or None, what was found) of a folder of images.

    The layout is ImageNet's: ``root/train`` and ``root/val``, each with one folder per class. Other common names are
    accepted too (`TRAIN`, `VAL`, `TEST`). Without ``train``, the root itself is the training set. With fewer than two
    class folders, the images have no labels, and there is no test set. Classes are those of torchvision's ImageFolder,
    except that hidden, system and empty folders are not classes.

    Args:
        root: the folder.
        val_split: fraction of each class to hold out of the training set for testing, if there is no ``val``.

    Raises:
        ValueError: no such folder, no images, images beside class folders, folders that could be splits or classes,
            classes in ``val`` that ``train`` does not have, or a ``val_split`` that cannot be used here.
        OSError: a folder cannot be read.
    """
    existing_folder("--data", str(root))
    left_out = LeftOut()
    train_name, val_name = _splits(root, left_out)
    found = Scan(root / train_name)
    classes = _classes(found)
    if not len(found.paths):
        raise ValueError(_no_images(root, found))
    if train_name and not val_name and not classes:
        _refuse_a_class_called_train(root, train_name)
    _note_left_out(found, train_name, left_out)
    notes = _inner_splits(found, classes)
    train = _tree(found, classes)
    val, no_val = None, f"{root} has no folder val"
    if not classes:
        no_val = f"{found.root} has no folder for each class, so its images have no labels"
    elif val_name:
        val, no_val = _open_val(root / val_name, found, classes, left_out)
    tested = "" if val is None else f"{root / val_name} has {_counted(val)} to evaluate on"
    if val_split:
        if val is not None:
            raise ValueError(f"--val-split: {tested}, so nothing has to be held out")
        if not classes:
            raise ValueError(f"--val-split: {no_val}")
        train, val = train.held_out(val_split)
        if not len(val):
            raise ValueError(f"--val-split: no class in {found.root} has two images")
        tested = f"{_counted(val)} more are held out to evaluate on"
    lines = [f"{found.root} has {_counted(train)} to train on" + (f"; {tested}" if tested else ""), *notes]
    lines += [f"left out: {line}" for line in left_out.lines()]
    if val is None:
        instead = "; --val-split 0.1 evaluates on a tenth of each class, which is not trained on" if classes else ""
        lines.append(f"no evaluation: {no_val}; expected {LAYOUT}{instead}")
    return train, val, Found(tuple(map(printable, lines)), no_val if val is None else "")


def _splits(root: Path, left_out: LeftOut) -> tuple[str, str]:
    """Return the names of the folders with the training and the test images; "" if there is no such folder.

    Raises:
        ValueError: there seem to be splits, but it is unclear which is which.
    """
    folders, images = list_folder(root, beside := LeftOut())
    train, val, test = ([name for name in folders if name.lower() in names] for names in (TRAIN, VAL, TEST))
    tested = val or test
    for several in (train, tested):
        if len(several) > 1:
            raise ValueError(f"{root} has the folders {_listed(several)}: rename all but the one to use")
    if not train:
        if tested:
            raise ValueError(f"{root} has a folder {tested[0]} but no folder train: there are {_listed(folders)}")
        like_train, like_test = (
            [name for name in folders if _has_a_word(like, name)] for like in (_LIKE_TRAIN, _LIKE_TEST)
        )
        if like_train and like_test:
            raise ValueError(
                f"{root} has the folders {_listed([like_train[0], like_test[0]])}, which do not seem to be classes: "
                f"call them train and val, or give --data {root / like_train[0]} to train without evaluation"
            )
        return "", ""
    left_out.include(beside, "")
    for kind, names in (("images", images), ("folders", folders)):
        for name in names:
            if name not in train + tested[:1]:
                left_out.add(f"{kind} beside {train[0]}", name)
    return train[0], tested[0] if tested else ""


def _has_a_word(like: re.Pattern[str], name: str) -> bool:
    return any(like.fullmatch(word.lower()) for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name))


def _classes(found: Scan) -> list[str]:
    """Return the names of the class folders; [] if there are fewer than two.

    Raises:
        ValueError: there are images beside them, or they look like splits.
    """
    classes = list(found.children.get("", {}))
    if len(classes) < 2:
        return []
    if found.loose:
        example = printable(found.paths.name(0))
        raise ValueError(f"{found.root} has images beside its class folders, such as {example}: which class are they?")
    if splits := _pair(classes):
        raise ValueError(f"{found.root} has the folders {_listed(splits)}, which do not seem to be classes")
    return classes


def _pair(folders: Iterable[str]) -> list[str]:
    """Return a folder with the name of a training set and one with the name of a test set, or [] without both."""
    pair = [[name for name in folders if name.lower() in names][:1] for names in (TRAIN, VAL | TEST)]
    return [*pair[0], *pair[1]] if all(pair) else []


def _refuse_a_class_called_train(root: Path, train_name: str) -> None:
    """Raise ValueError if other folders beside train have images, too: all of them may be classes."""
    others = [name for name in list_folder(root, LeftOut())[0] if name.lower() not in TRAIN | VAL | TEST]
    if others := [name for name in others if len(Scan(root / name).paths)]:
        raise ValueError(
            f"{root} has images in {train_name} and, beside it, in {_listed(others)}: if {train_name} is a class, move "
            f"all of them into a folder of their own; if not, give --data {root / train_name}"
        )


def _note_left_out(found: Scan, below: str, left_out: LeftOut) -> None:
    left_out.include(found.left_out, below)
    for name in found.empty:
        left_out.add("folders without images", joined(below, name))


def _inner_splits(found: Scan, classes: list[str]) -> list[str]:
    """Return notes on folders further down that look like splits or classes.

    Raises:
        ValueError: there are folders that look like splits, and no classes above them.
    """
    inner = [(found.root / folder, names) for folder, names in found.children.items() if _pair(names)]
    for folder, names in inner[:1]:
        if not classes and len(inner) == 1:
            raise ValueError(f"the folders {_listed(_pair(names))} are further down: give --data {folder}")
        return [f"note: {folder} has the folders {_listed(_pair(names))}: the images of both are trained on"]
    if classes or "" in found.folders:
        return []
    common = posixpath.commonpath(found.folders)
    folders = found.children.get(common, {})
    if len(folders) < 2:
        return []
    return [f"note: {found.root / common} has {len(folders):,} folders: if they are classes, give it as --data"]


def _open_val(path: Path, learned: Scan, classes: list[str], left_out: LeftOut) -> tuple[ImageTree | None, str]:
    """Return the test images, or None and why they cannot be used.

    Raises:
        ValueError: some of their classes are not in the training set.
    """
    found = Scan(path)
    _note_left_out(found, path.name, left_out)
    folders = list(found.children.get("", {}))
    if not len(found.paths):
        return None, f"{path} has no images"
    if not folders:
        return None, f"{path} has {len(found.paths):,} images, but not in a folder for each class"
    strangers = [name for name in folders if name not in classes]
    if len(strangers) == len(folders):
        return None, f"{path} has no class of the training set, but {_listed(folders)}"
    if strangers:
        raise ValueError(f"{path} has classes that {learned.root} lacks: {_listed(strangers)}")
    if found.loose:
        left_out.add("images beside class folders", joined(path.name, found.paths.name(0)), found.loose)
    return _tree(found, classes), ""


def _no_images(root: Path, found: Scan) -> str:
    hint = "; its idx files are read with --dataset fashion-mnist" if list(root.glob("*-ubyte*")) else ""
    there = "".join(f"; there are {line}" for line in found.left_out.lines()[:2]) if not hint else ""
    return f"no images ({', '.join(IMG_EXTENSIONS)}) below {found.root}{hint}{there}"


def _counted(images: ImageTree) -> str:
    classes = len(images.targets.unique())
    labels = f"of {classes:,} class{'es' * (classes != 1)}" if images.classes else "without labels"
    return f"{len(images):,} image{'s' * (len(images) != 1)} {labels}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(printable, names[:5])) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _tree(found: Scan, classes: list[str]) -> ImageTree:
    """Return the images, with labels if there are classes; images outside the class folders are left out then."""
    if not classes:
        return ImageTree(found.paths)
    places = {name: place for place, name in enumerate(classes)}
    folders = torch.tensor([places.get(folder.split("/")[0], UNKNOWN) for folder in found.folders])
    labels = folders.repeat_interleave(torch.tensor(list(found.folders.values())))
    tree = ImageTree(found.paths, labels, classes)
    return tree.part(labels != UNKNOWN) if found.loose else tree
