"""Find the images below a folder in one pass, and count the other files by kind."""

import itertools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

# Files and folders that systems and programs create. Names that begin with a dot are treated the same way.
SYSTEM = {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM |= {"__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"}
Identity = tuple[int, int]  # of a folder on disk: device and inode
SHOWN = 8  # kinds of left-out files that are listed


class Paths(Sequence[str]):
    """The paths of many files below one folder.

    They are kept as bytes in two tensors, which take 8 bytes and the length of the path for each file. Worker processes
    share these tensors; a list of strings would be copied into each of them.
    """

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root = str(root)
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self._ends = torch.frombuffer(ends, dtype=torch.int64)
        self._text = torch.frombuffer(text or bytearray(1), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.path.join(self.root, self.name(index))

    def name(self, index: int) -> str:
        """Return the path of a file below the root, with "/" between its folders."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} files, got index {index}")
        begin, end = self._ends[index % len(self) :][:2].tolist()
        return os.fsdecode(self._text[begin:end].numpy().tobytes())

    def names(self) -> Iterator[str]:
        """Yield all paths below the root."""
        text = self._text.numpy().tobytes()
        return (os.fsdecode(text[begin:end]) for begin, end in itertools.pairwise(self._ends.tolist()))

    def part(self, chosen: Tensor) -> "Paths":
        """Return the paths chosen by a tensor [n] of bool."""
        return Paths(Path(self.root), itertools.compress(self.names(), chosen.tolist()))


class LeftOut:
    """Files and folders that are not used: how many there are of each kind, and one example."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, path: str, count: int = 1) -> None:
        """Count something of a kind, such as "hidden files". The example that comes first by name is kept."""
        counted, example = self._found.get(kind, (0, path))
        self._found[kind] = (counted + count, min(example, path))

    def include(self, other: "LeftOut", below: str) -> None:
        """Add what was left out in the folder ``below``."""
        for kind, (count, example) in other._found.items():
            self.add(kind, joined(below, example), count)

    def lines(self) -> list[str]:
        """Return each kind with its count and its example, the most frequent first."""
        ordered = sorted(self._found.items(), key=lambda item: (-item[1][0], item[0]))
        lines = [f"{kind} ({count:,}), such as {printable(example)}" for kind, (count, example) in ordered[:SHOWN]]
        if rest := ordered[SHOWN:]:
            lines.append(f"{len(rest)} other kinds ({sum(count for _, (count, _) in rest):,}), such as {rest[0][0]}")
        return lines


class Scan:
    """The images below a folder, in the order of torchvision's ImageFolder: by class, by folder, by name.

    Links are followed, but not back to a folder that they are in. Hidden and system files and folders are ignored.

    Attributes:
        paths: the images.
        folders: the number of images directly in each folder that has any, by its path below the root ("" is the
            root itself), in the order of the images.
        empty: the folders directly below the root without any image in them.
        left_out: everything else.

    Raises:
        OSError: a folder cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.left_out = root, LeftOut()
        found = {folder: "\0".join(sorted(files)) for folder, files in _walk(root, self.left_out)}
        order = sorted(found, key=lambda folder: (folder.split("/")[0], folder))
        self.folders = {folder: found[folder].count("\0") + 1 for folder in order if found[folder]}
        tops = {folder.split("/")[0] for folder in order if folder}
        self.empty = sorted(tops - {folder.split("/")[0] for folder in self.folders})
        names = (joined(folder, file) for folder in self.folders for file in found[folder].split("\0"))
        self.paths = Paths(root, names)

    @cached_property
    def children(self) -> dict[str, dict[str, None]]:
        """The names of the folders directly below each folder, if they have images at any depth."""
        children: dict[str, dict[str, None]] = {}
        for folder in self.folders:
            while folder:
                above, _, name = folder.rpartition("/")
                children.setdefault(above, {})[name] = None
                folder = above
        return children

    @property
    def loose(self) -> int:
        """How many images are directly in the root."""
        return self.folders.get("", 0)


def list_folder(root: Path, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the images directly in a folder, sorted; count the rest as left out."""
    folders, images = _entries(str(root), "", left_out)
    return sorted(entry.name for entry in folders), sorted(images)


def joined(folder: str, name: str) -> str:
    """Join a folder, which may be "", and a name with "/" on every system."""
    return f"{folder}/{name}" if folder else name


def printable(path: str) -> str:
    r"""Return a path that can be printed: bytes that are not UTF-8 as ``\xff``, line breaks as ``\n``."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _walk(root: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder, by its path below the root, and the names of the images directly in it."""
    stack: list[tuple[str, tuple[Identity, ...]]] = [("", (_identity(str(root)),))]
    while stack:
        folder, above = stack.pop()
        folders, images = _entries(os.path.join(root, folder), folder, left_out)
        for entry in folders:
            identity, name = _identity(entry.path), joined(folder, entry.name)
            if identity in above:
                left_out.add("links back to a folder that they are in", name)
            else:
                stack.append((name, (*above, identity)))
        yield folder, images


def _entries(path: str, folder: str, left_out: LeftOut) -> tuple[list[os.DirEntry[str]], list[str]]:
    """Return the folders and the names of the images directly in a folder. Only links need a second disk access."""
    folders, images = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            is_folder = _is(os.DirEntry.is_dir, entry)
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                left_out.add(f"hidden or system {'folders' if is_folder else 'files'}", joined(folder, entry.name))
            elif is_folder:
                folders.append(entry)
            elif entry.name.lower().endswith(IMG_EXTENSIONS) and _is(os.DirEntry.is_file, entry):
                images.append(entry.name)
            else:
                left_out.add(_kind_of(entry), joined(folder, entry.name))
    return folders, images


def _kind_of(entry: os.DirEntry[str]) -> str:
    """Return what kind of thing it is, in words; it is not an image."""
    if not _is(os.DirEntry.is_file, entry):
        return "links that lead nowhere" if entry.is_symlink() else "things that are neither files nor folders"
    ending = os.path.splitext(entry.name)[1].lower()
    return f"{printable(ending)} files" if ending else "files without an extension"


def _is(kind: Callable[[os.DirEntry[str]], bool], entry: os.DirEntry[str]) -> bool:
    try:
        return kind(entry)
    except OSError:  # a link to itself, or into a folder without permission
        return False


def _identity(path: str) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino
