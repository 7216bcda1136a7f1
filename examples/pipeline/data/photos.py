"""Photographs: worker processes decode and crop them, and everything else that makes a view is done on the device."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as transforms

from pipeline.data.bad_images import BadImages, Drawn, Noting, collated
from pipeline.data.pixels import labels_of, path_of, pixels_of
from pipeline.data.prefetch import SideStream
from pipeline.data.scanning import printable
from pipeline.data.source import UNREADABLE, Found, Share, Views, epoch_order
from pipeline.data.trees import ImageTree
from pipeline.running.seeds import seed_of
from pipeline.views.crops import PAPERS, PER_VIEW, SUPERVISED, View, crop_boxes, draws, resized_crop
from pipeline.views.rendering import Normalization, Rendering

LONGEST = 16  # evaluation first cuts longer images to between 16 and 20 times their short side
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ReaderEnded(OSError):
    """A process that reads images has ended unexpectedly."""


class Photos:
    """Data sets of (image, label), read by worker processes.

    A worker sends the two crops of an image as uint8, and the row of draws from which the rest of its views is
    computed. The encoder is trained on ``train``. Evaluation uses ``gallery`` as its training set (by default
    ``train``; another set if most of ``train`` has no labels), and tests on ``val``. ``views`` are the views of the
    target and of the online encoder. ``bad`` records unreadable images. If they are skipped, each is replaced: in
    training by another image of the training set, and for a classifier by another of the images that it is trained on.
    Evaluation leaves them out.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any] | None,
        *,
        gallery: Dataset[Any] | None = None,
        found: Found | None = None,
        size: int,
        has_labels: bool,
        share: Share,
        workers: int,
        seed: int,
        device: torch.device,
        views: tuple[View, View] = PAPERS,
        bad: BadImages | None = None,
    ) -> None:
        self.bad = BadImages() if bad is None else bad
        self.image_shape = (3, size, size)
        self.train_size = len(train)  # type: ignore[arg-type]
        self.has_labels, self.has_val = has_labels, val is not None and has_labels
        self.workers: int | None = workers
        self.found = found or Found()
        self.facts: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self._sets = {"train": _Centred(train if gallery is None else gallery, size)}
        if val is not None:
            self._sets["val"] = _Centred(val, size)
        self._device = device
        self._normalized = Normalization(IMAGENET_MEAN, IMAGENET_STD, device)
        self._target, self._online, self._classifier = (
            Rendering(view, size, IMAGENET_MEAN, IMAGENET_STD, device) for view in (*views, SUPERVISED)
        )
        self._supervised = Crops(self._sets["train"].images, [SUPERVISED], size, seed, stream=1)
        self._side = SideStream(device)
        self._options: dict[str, Any] = {
            "batch_size": share.batch_size // share.accumulate // share.ranks,
            "num_workers": workers,
            "pin_memory": device.type == "cuda",
            "worker_init_fn": _leave_signals_to_the_parent,
            "collate_fn": collated,
            "generator": torch.Generator(),  # its draws must not disturb those of the model
        }
        self._noting = partial(Noting, workers=workers)
        self._order = _EpochOrder(self.train_size, seed, share)
        self._seed = seed
        self._loader = DataLoader(
            self._noting(Crops(train, list(views), size, seed), self.bad, Drawn(seed, range(self.train_size))),
            sampler=self._order,
            drop_last=True,
            persistent_workers=workers > 0,
            **self._options,
        )

    def train_views(self, epoch: int, first: int) -> Iterator[Views]:
        """See `DataSource`."""
        self._order.epoch, self._order.first = epoch, first
        return self._side.over(self._batches(self._loader), self._rendered)

    def images(self, split: str, indices: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        blank = (torch.zeros(self.image_shape, dtype=torch.uint8), UNREADABLE)
        loader = DataLoader(self._noting(self._sets[split], self.bad, blank=blank), sampler=indices, **self._options)
        for images, labels in self._batches(loader):
            yield self._normalized(self._to_device(images)), labels

    def supervised_views(self, epoch: int, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `DataSource`."""
        keys = [[(epoch, index) for index in chosen] for chosen in batches]
        options = {name: value for name, value in self._options.items() if name != "batch_size"}
        chosen = Drawn(self._seed, sorted(index for batch in batches for index in batch))
        crops_of = self._noting(self._supervised, self.bad, chosen)
        for crops, rows, labels, _ in self._batches(DataLoader(crops_of, batch_sampler=keys, **options)):
            yield self._classifier(self._to_device(crops), rows[:, :PER_VIEW]), self._to_device(labels)

    def check(self, split: str, indices: list[int], bad: BadImages) -> Iterator[int]:
        """Read these images of "train" or "val", note unreadable ones in ``bad``, and yield the size of each batch."""
        looks = self._noting(_Looks(self._sets[split].images), bad, blank=1)
        for read in self._batches(DataLoader(looks, sampler=indices, **{**self._options, "batch_size": 16}), bad):
            yield len(read)

    def labels(self, split: str) -> Tensor:
        """See `DataSource`."""
        return labels_of(self._sets[split].images)

    def size(self, split: str) -> int:
        """See `DataSource`."""
        return len(self._sets[split])

    def names(self) -> list[str]:
        """See `DataSource`."""
        images = self._sets["train"].images
        return list(images.paths.names()) if isinstance(images, ImageTree) else []

    def displayable(self, images: Tensor) -> np.ndarray:
        """See `DataSource`."""
        return self._normalized.undone(images).numpy()

    def _batches(self, loader: DataLoader[Any], bad: BadImages | None = None) -> Iterator[Any]:
        """Start a loader's workers, and return an iterator over its batches that notes unreadable images in ``bad``."""
        return _noted(_started(loader), self.bad if bad is None else bad)

    def _rendered(self, batch: list[Tensor]) -> Views:
        target, online, rows, labels, ids = batch
        return (
            self._target(self._to_device(target), rows[:, :PER_VIEW]),
            self._online(self._to_device(online), rows[:, PER_VIEW:]),
            self._to_device(labels),
            self._to_device(ids),
        )

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)


class Crops(Dataset[tuple[Any, ...]]):
    """One crop of an image per kind of view, its row of draws, label and index: a function of (seed, epoch, index).

    A key (epoch, index, other) reads the image with index ``other``, with the draws of (epoch, index).
    """

    def __init__(self, images: Dataset[Any], kinds: list[View], size: int, seed: int, stream: int = 0) -> None:
        self.images, self.kinds, self.size, self.stream = images, kinds, size, stream
        self.seed = seed_of(seed)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Any, ...]:
        epoch, index = key[:2]
        image, label = pixels_of(self.images, key[-1])
        row = draws(self.seed, epoch, index, 1, self.stream)
        crops = []
        for kind, part in zip(self.kinds, row.split(PER_VIEW, dim=1), strict=False):
            (box,) = crop_boxes(part, image.shape[1], image.shape[2], kind.area)
            crops.append(resized_crop(image, box, self.size))
        return (*crops, row[0], label, key[-1])


class _Centred(Dataset[tuple[Tensor, int]]):
    """The evaluation view (section 3.2: resize to 256, center crop of 224, or in that proportion), uint8."""

    def __init__(self, images: Dataset[Any], size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = pixels_of(self.images, index)
        resized = transforms.resize(middle(image), [round(self.size * 256 / 224)], antialias=True)
        return transforms.center_crop(resized, [self.size]).contiguous(), label


def middle(image: Tensor) -> Tensor:
    """Cut the ends off a very long image [3, H, W], to less than 20 times its short side; return others unchanged.

    If its short side is resized to 256, an image of 1 x 5,000 pixels takes a gigabyte, and the center crop keeps one
    square of it. So the ends are cut off first. Each end loses an even multiple of the short side, which keeps the
    center and the resized pixels where they are.
    """
    short = min(image.shape[1:])
    top, left = (max(0, side // short - LONGEST) // 4 * 2 * short for side in image.shape[1:])
    return image[:, top : image.shape[1] - top, left : image.shape[2] - left]


class _Looks(Dataset[int]):
    """The number 1 for each image that can be read."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __getitem__(self, index: int) -> int:
        pixels_of(self.images, index)
        return 1


class _EpochOrder(Sampler[tuple[int, int]]):
    """The (epoch, index) keys of this rank's images of one epoch, starting at micro-batch ``first``."""

    def __init__(self, size: int, seed: int, share: Share) -> None:
        self.size, self.seed, self.share = size, seed, share
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        micro_batches = self.share.micro_batches(epoch_order(self.size, self.seed, self.epoch))
        own = micro_batches[self.first :, self.share.rank].flatten()
        return iter([(self.epoch, index) for index in own.tolist()])


def workers_of(wanted: int) -> int:
    """Return the number of processes that read images for this rank: ``wanted``, or its share of the cores for −1."""
    return wanted if wanted >= 0 else max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore a Ctrl-C or SIGTERM sent to the whole process group: workers end only when their parent does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # see `_signals_kept`


_reading: "WeakSet[Any]" = WeakSet()  # iterators over loaders with workers


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a loader's workers, and return an iterator over its batches. The workers end when this process exits."""
    if not loader.num_workers:
        return iter(loader)
    with _signals_kept():
        batches = iter(loader)
    _reading.add(batches)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # the last one registered runs first, before anything waits for the workers
    return batches


def _noted(batches: Iterator[Any], bad: BadImages) -> Iterator[Any]:
    while True:
        try:
            batch, met = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # the latter two from a connection to a worker
            if not hasattr(batches, "_workers") or (
                type(error) is RuntimeError and "DataLoader worker" not in str(error)
            ):
                raise
            raise ReaderEnded(_why_ended(batches)) from error
        bad.note(met, lost=batch is None)
        yield batch


def _why_ended(batches: Any) -> str:
    """Return why a worker ended and, if its decoder crashed, on which image."""
    closed = connection.wait([worker.sentinel for worker in batches._workers], timeout=1)
    for worker in batches._workers:
        if worker.sentinel in closed:
            worker.join(1)
    ends = [(number, worker.exitcode) for number, worker in enumerate(batches._workers) if worker.exitcode]
    if not ends:
        return "a process that reads images has ended"
    number, code = ends[0]
    what = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    place = batches._dataset.read_by(number)
    if what == "SIGKILL":
        what += ", probably because memory ran out: try fewer --workers"
    elif place is not None:
        path = path_of(batches._dataset.items.images, place)
        what += f" while it read {printable(path)}: repair or remove the file"
    return f"a process that reads images has ended: {what}"


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Block SIGINT and SIGTERM while workers start in this block, and restore the handler of SIGCHLD afterwards.

    So no signal can end a worker before it ignores signals. PyTorch's handler of SIGCHLD would raise an error when a
    worker dies, even in the middle of a step. Without it, the error is raised within seconds by the code that waits for
    the worker's images, and no step is left half done.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    children = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not children:
            signal.signal(signal.SIGCHLD, children)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    """Kill the workers. They ignore SIGTERM, so Python's own cleanup would wait for them forever."""
    for batches in list(_reading):
        if hasattr(batches, "_pin_memory_thread_done_event"):
            batches._pin_memory_thread_done_event.set()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
