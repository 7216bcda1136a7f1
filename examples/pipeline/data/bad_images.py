"""Images that cannot be read: records of them, and their replacements."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate, get_worker_info

from msf_core.distributed import Ranks
from pipeline.data.pixels import UnreadableImage
from pipeline.running.seeds import seed_of

ACTIONS = ("error", "skip")
TRIES = 100  # number of replacements to try for an unreadable image before giving up
LIST = "bad_images.txt"
IDLE = -1  # instead of an image's index: the worker is not reading an image
Item = tuple[Any, list[UnreadableImage]]  # an item of a data set or None, and the images that could not be read for it


class BadImages:
    """Unreadable images that this rank has found, as path -> reason.

    With ``skip`` they are replaced or left out. Otherwise the first one is an error.
    """

    def __init__(self, action: str = "error") -> None:
        self.skip = action == "skip"
        self.found: dict[str, str] = {}

    def note(self, met: list[UnreadableImage], *, lost: bool) -> None:
        """Record the unreadable images of a batch.

        Args:
            met: the images that could not be read.
            lost: whether there is no batch, because an image has no readable replacement.

        Raises:
            UnreadableImage: images are not to be skipped, or an image has no readable replacement.
        """
        if met and not self.skip:
            reason = f"{met[0].reason}; repair or replace the file, or skip it: --on-bad-image skip"
            raise UnreadableImage(met[0].path, reason)
        if lost:
            reason = f"{met[-1].reason}; {TRIES} other images, tried one after another, could not be read either"
            raise UnreadableImage(met[-1].path, reason)
        self.found |= {error.path: error.reason for error in met}

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Skip unreadable images in this block, even if they are errors otherwise: a figure must not end a run."""
        before, self.skip = self.skip, True
        try:
            yield
        finally:
            self.skip = before

    def of_all(self, ranks: Ranks) -> dict[str, str]:
        """Return the unreadable images of all ranks. Every rank must call this."""
        if ranks.size == 1:
            return dict(self.found)
        parts: list[Any] = [None] * ranks.size
        dist.all_gather_object(parts, self.found, group=ranks.group)
        return {path: reason for part in parts for path, reason in part.items()}


class Noting(Dataset[Item]):
    """The items of a data set, each with the images that could not be read for it; workers raise no `UnreadableImage`.

    Args:
        items: a data set that raises `UnreadableImage`. A key, or the last element of a tuple key, is an image's index.
        bad: whether to skip unreadable images.
        instead: maps a key to the keys of other items, of which the first readable one is taken in its place.
        blank: the item if there is none to take.
        workers: number of processes that read.
    """

    def __init__(
        self,
        items: Dataset[Any],
        bad: BadImages,
        instead: Callable[[Any], Iterable[Any]] = lambda key: (),
        blank: Any = None,
        workers: int = 0,
    ) -> None:
        self.items, self.bad, self.instead, self.blank = items, bad, instead, blank
        self._reading = torch.full((workers,), IDLE).share_memory_()

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Item:
        met: list[UnreadableImage] = []
        try:
            return self._read(key), met
        except UnreadableImage as error:
            met.append(error)
        for other in self.instead(key) if self.bad.skip else ():
            try:
                return self._read(other), met
            except UnreadableImage as error:
                met.append(error)
        return (self.blank if self.bad.skip else None), met

    def read_by(self, worker: int) -> int | None:
        """Return the index of the image that a worker is reading, or was when it crashed; None between images."""
        place = int(self._reading[worker])
        return None if place == IDLE else place

    def _read(self, key: Any) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.items[key]
        self._reading[worker.id] = key[-1] if isinstance(key, tuple) else key
        try:
            return self.items[key]
        finally:
            self._reading[worker.id] = IDLE


class Drawn:
    """The keys of an image's replacements, a pure function of (seed, epoch, index)."""

    def __init__(self, seed: int, places: range | list[int]) -> None:
        self.seed, self.places = seed, places

    def __call__(self, key: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """Yield (epoch, index, index of the image to read); the first index still determines the views."""
        for number in range(TRIES):
            yield (*key, self.places[seed_of(self.seed, *key, number) % len(self.places)])


def collated(items: list[Item]) -> Item:
    """Return a batch of items, or None if one is missing, and all images that could not be read for it."""
    made = [item for item, _ in items]
    batch = None if any(item is None for item in made) else default_collate(made)
    return batch, [error for _, met in items for error in met]


def write_list(path: Path, found: dict[str, str]) -> None:
    """Write a line for each image: its path as the file system has it, a tab, and the reason."""
    lines = [
        os.fsencode(name).replace(b"\n", b"\\n") + os.fsencode(f"\t{reason}\n")
        for name, reason in sorted(found.items())
    ]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(lines))
    temporary.replace(path)
