"""Images that cannot be read, and reader processes that die: a run names what it met, loses nothing, and ends."""

import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_imagenet_train import SMALL, assert_same_run, error_of, train
from test_training import assert_same, batches, make_tree, photos
from torch.utils.data import Dataset

import imagenet_eval
import imagenet_train
from pipeline.data.bad_images import TRIES
from pipeline.data.photos import ReaderEnded
from pipeline.data.pixels import UnreadableImage, path_of, pixels_of, read_image
from pipeline.data.source import UNREADABLE
from pipeline.data.trees import open_folder

# Every kind of file, damaged in every way

NOISE = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
RGB = Image.fromarray(NOISE)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FILES = {
    "jpeg": encoded(RGB, "JPEG"),
    "progressive jpeg": encoded(RGB, "JPEG", progressive=True),
    "cmyk jpeg": encoded(RGB.convert("CMYK"), "JPEG"),
    "png": encoded(RGB, "PNG"),
    "palette png": encoded(RGB.quantize(16), "PNG"),
    "16 bit png": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
    "webp": encoded(RGB, "WEBP"),
    "lossless webp": encoded(RGB, "WEBP", lossless=True),
    "gif": encoded(RGB.quantize(16), "GIF", save_all=True, append_images=[RGB.rotate(90).quantize(8)]),
    "bmp": encoded(RGB.quantize(16), "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "lzw tiff": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "ppm": encoded(RGB, "PPM"),
}


class OneFile(Dataset):
    def __init__(self, path: Path) -> None:
        self.paths = [str(path)]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return read_image(self.paths[index]), 7


@settings(max_examples=400)
@example("png", 0.5, [])  # torchvision's PNG decoder crashes the process here
@given(
    st.sampled_from(sorted(FILES)),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 255)), max_size=12),
)
def test_a_damaged_file_is_pixels_or_named_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, length: float, changes: list[tuple[float, bool, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    content = bytearray(FILES[kind][: round(length * len(FILES[kind]))])
    for place, in_header, value in changes if content else []:
        content[int(place * (min(len(content), 64) if in_header else len(content)))] = value
    path.write_bytes(content)
    met: list[UnreadableImage] = []
    try:
        image, label = pixels_of(OneFile(path), 0)
    except UnreadableImage as error:
        met.append(error)
    if not met:
        assert (image.dtype, image.ndim, len(image), label) == (torch.uint8, 3, 3, 7)
        assert image.numel() > 0
    for error in met:
        assert str(error) == f"cannot read image {path}: {error.reason}"
        assert error.path == str(path)
        assert error.reason
        assert "\n" not in error.reason


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, depth: int = 8, color: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)


WRONG = {
    "nothing in it": (b"", "the file is empty"),
    "text": (b"not a JPEG", "not an image, or too little of one: it begins with b'not a JPEG'"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "it begins with b'<!DOCTYPE html><'"),
    "half a JPEG": (FILES["jpeg"][: len(FILES["jpeg"]) // 2], "Truncated"),
    "a PNG that breaks off": (png(header(4, 4))[:30], "too little of one"),
    "a JPEG of a billion pixels": (
        FILES["jpeg"].replace(struct.pack(">HH", 23, 31), struct.pack(">HH", 40_000, 40_000)),
        "DecompressionBombError: Image size (1600000000 pixels) exceeds limit",
    ),
    "a PNG of a billion pixels": (png(header(40_000, 40_000), (b"IDAT", zlib.compress(b"\0"))), "1600000000 pixels"),
    "a chunk of text that unpacks to much": (
        png(header(1, 1), (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 21))), (b"IDAT", zlib.compress(bytes(4)))),
        "ecompressed data too large",
    ),
}


@pytest.mark.parametrize(("content", "reason"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_read_is_named_with_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "odd.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"cannot read image .*odd\.jpg: .*{re.escape(reason)}"):
        pixels_of(open_folder(tmp_path)[0], 0)


def test_what_is_no_file_or_may_not_be_read_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "odd.jpg"
    with pytest.raises(UnreadableImage, match=r"odd\.jpg: No such file or directory$"):
        pixels_of(OneFile(path), 0)
    os.mkfifo(path)
    with pytest.raises(UnreadableImage, match=r"odd\.jpg: not a regular file$"):
        pixels_of(OneFile(path), 0)
    path.unlink()
    (tmp_path / "closed").mkdir(mode=0)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65_534)  # root may read everything
    try:
        with pytest.raises(UnreadableImage, match=r"odd\.jpg: Permission denied$"):
            pixels_of(OneFile(tmp_path / "closed" / "odd.jpg"), 0)
    finally:
        os.seteuid(me)


@pytest.mark.parametrize(
    ("problem", "reason"), [(MemoryError(), "MemoryError"), (ValueError("two\nlines"), "ValueError: two lines")]
)
def test_whatever_a_decoder_raises_is_one_line_that_survives_pickling(problem: Exception, reason: str) -> None:
    class Raising(Dataset):
        _images = ("here/ä\udcff\n.jpg",)

        def __getitem__(self, index: int) -> None:
            raise problem

    assert path_of(torch.utils.data.Subset(Raising(), [0]), 0) == Raising._images[0]
    with pytest.raises(UnreadableImage) as raised:
        pixels_of(Raising(), 0)
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value) == rf"cannot read image here/ä\xff\n.jpg: {reason}"
    assert (again.path, again.reason) == (Raising._images[0], reason)


# What a run sees instead of bad images

BAD = {"train": ("class0/1.jpg", "class2/\udcff\n.jpg"), "val": ("class1/1.jpg",)}  # at places 1 and 11, and at 5


def spoil(tree: Path, *splits: str) -> list[Path]:
    paths = [tree / split / name for split in splits for name in BAD[split]]
    for path in paths:
        if not path.exists():
            (path.parent / "3.jpg").rename(path)
        path.write_bytes(path.read_bytes()[:100])
    return paths


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = make_tree(tmp_path_factory.mktemp("damaged") / "tree", train=4, val=4)
    spoil(tree, *BAD)
    return tree


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_file_in_one_line(damaged: Path, workers: int) -> None:
    source = photos(damaged, workers=workers)
    for reads in (
        lambda: batches(source, epoch=0),
        lambda: list(source.images("val")),
        lambda: list(source.supervised_views(0, [[0, 1], [11]])),
    ):
        with pytest.raises(UnreadableImage, match=r"^cannot read image \S+\.jpg: .*: --on-bad-image skip$"):
            reads()
    assert source.bad.found == {}


def test_what_is_skipped_is_replaced_by_a_function_of_seed_epoch_and_index(damaged: Path) -> None:
    alone, helped = (photos(damaged, workers=workers, on_bad_image="skip") for workers in (0, 2))
    first = batches(alone, epoch=1)
    assert_same(first, batches(helped, epoch=1))
    assert_same(first[2:], batches(photos(damaged, on_bad_image="skip"), epoch=1, first=2))
    names = {Path(path).relative_to(damaged).as_posix() for path in alone.bad.found}
    assert names == {f"train/{name}" for name in BAD["train"]}
    assert alone.bad.found == helped.bad.found
    items = alone._loader.dataset
    stand_ins = [list(items.instead((epoch, 1)))[:3] for epoch in range(4)]
    assert len({tuple(place for _, _, place in keys) for keys in stand_ins}) > 1, "another epoch must use another image"
    epoch, index, place = next(key for key in items.instead((1, 1)) if key[2] not in (1, 11))
    (weak, _, row, label, seen), met = items[1, 1]
    assert torch.equal(row, items.items[1, 1, place][2])
    assert not torch.equal(row, items.items[1, place][2]), "its views must differ from those in its own turn"
    assert (label, seen, Path(met[0].path).name) == (place // 4, place, "1.jpg")
    assert torch.equal(weak, items.items[epoch, index, place][0])


def test_a_classifier_is_trained_on_no_image_that_it_was_not_given(damaged: Path) -> None:
    source = photos(damaged, on_bad_image="skip")
    views = list(source.supervised_views(3, [[1, 4], [11]]))  # 1 and 11 are bad, 4 is of class 1
    assert [labels.tolist() for _, labels in views] == [[1, 1], [1]]
    assert not torch.equal(views[0][0][0], views[0][0][1]), "each must have its own view"


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_without_and_keeps_its_places(damaged: Path, workers: int) -> None:
    source = photos(damaged, workers=workers, on_bad_image="skip")
    labels = torch.cat([labels for _, labels in source.images("val")])
    assert labels.tolist() == [0, 0, 0, 0, 1, UNREADABLE, 1, 1, 2, 2, 2, 2]
    images, labels = next(source.images("val", [5, 3]))
    assert labels.tolist() == [UNREADABLE, 0]
    assert source.displayable(images)[0].max() < 1e-6 < source.displayable(images)[1].max()


def test_a_set_without_readable_images_is_an_error(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, train=2, val=1)
    for path in tree.rglob("*.jpg"):
        path.write_bytes(b"")
    source = photos(tree, on_bad_image="skip")
    with pytest.raises(UnreadableImage, match=f"the file is empty; {TRIES} other images"):
        batches(source, epoch=0)


# Whole runs


@pytest.fixture(scope="module")
def skipped(damaged: Path) -> Path:
    """The folder of a run that skipped bad images from its first step on."""
    run = damaged.parent / "skipped"
    with pytest.MonkeyPatch.context() as patch:
        straight_to_training(patch)
        assert train("--data", damaged, *SMALL, "--on-bad-image", "skip", "--out", run) == 0
    return run


def straight_to_training(patch: pytest.MonkeyPatch) -> None:
    """Leave out the evaluation of the untrained encoder, which reads every image of a small set."""
    patch.setattr(imagenet_train, "add_rows_before", lambda trainer: trainer.notes.update(before={}))


def test_a_run_stopped_by_a_bad_file_goes_on_without_it(
    damaged: Path, skipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight_to_training(monkeypatch)
    assert train("--data", damaged, *SMALL, "--out", tmp_path / "run") == 1
    printed = capsys.readouterr()
    assert re.search(r"^error: cannot read image \S+/train/class./\S+\.jpg: .*--on-bad-image skip$", printed.err, re.M)
    assert f"continue with --resume {tmp_path / 'run'}" in printed.out
    bad = damaged / "train" / BAD["train"][0]
    content = bad.read_bytes()
    bad.unlink()
    try:
        refused = error_of(capsys, "--resume", tmp_path / "run", "--on-bad-image", "skip")
    finally:
        bad.write_bytes(content)
    assert "had 12 training images, but there are now 11" in refused
    assert "put removed files back (with --on-bad-image skip, an empty file" in refused

    assert train("--resume", tmp_path / "run", "--on-bad-image", "skip") == 0
    assert_same_run(skipped, tmp_path / "run")
    lines = (tmp_path / "run" / "bad_images.txt").read_bytes().splitlines()
    expected = [os.fsencode(damaged / split / name).replace(b"\n", rb"\n") for split in BAD for name in BAD[split]]
    assert [line.partition(b"\t")[0] for line in lines] == sorted(expected)
    assert all(line.partition(b"\t")[2] for line in lines)
    printed = capsys.readouterr()
    assert f"3 images could not be read: see {tmp_path / 'run' / 'bad_images.txt'}" in printed.out
    assert printed.err.count("warning: cannot read") >= 1
    assert printed.out.splitlines()[-1].endswith(", bad_images.txt"), "the closing list names every file"


def test_a_bad_test_image_costs_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, run = make_tree(tmp_path / "tree", train=4, val=4), tmp_path / "run"
    (bad,) = spoil(tree, "val")
    straight_to_training(monkeypatch)
    assert train("--data", tree, *SMALL, "--out", run) == 1
    said = capsys.readouterr().err
    assert f"error: the encoder is trained, but its evaluation failed: cannot read image {bad}: " in said
    assert f"imagenet_eval.py knn {run}" in said
    assert {path.name for path in run.iterdir()} >= {
        "backbone.safetensors",
        "checkpoint.pt",
        "curves.png",
        "neighbors.png",
    }
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 6
    flags = ["knn", str(run), "--workers", "0", "--out", str(tmp_path / "record.json")]
    assert imagenet_eval.main(flags) == 2
    assert str(bad) in capsys.readouterr().err
    assert imagenet_eval.main([*flags, "--on-bad-image", "skip"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["protocol"]["unreadable images"] == 1
    assert record["results"]["nn1"] * 11 == pytest.approx(round(record["results"]["nn1"] * 11)), "of eleven images"
    assert (tmp_path / "bad_images.txt").read_text().startswith(f"{bad}\t")


def test_checking_the_images_lists_all_bad_ones_and_trains_nothing(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--check-images", "--workers", 2, "--out", tmp_path / "run"]
    assert train("--data", damaged, *flags) == 1
    found, *lines, summary = capsys.readouterr().out.splitlines()
    assert found.startswith(f"{damaged}/train has 12 images of 3 classes to train on; {damaged}/val has 12 images of ")
    names = ["train/class0/1.jpg", r"train/class2/\xff\n.jpg", "val/class1/1.jpg"]
    assert [line.partition(": ")[0] for line in lines] == [f"{damaged}/{name}" for name in names]
    assert summary == "2 of 12 images in train and 1 of 12 images in val cannot be read"
    assert train("--data", make_tree(tmp_path / "sound"), *flags) == 0
    assert capsys.readouterr().out.endswith("\n0 of 18 images in train and 0 of 6 images in val cannot be read\n")
    assert train(*flags) == 0
    assert "there is nothing to check" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# Processes that end


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


def test_a_worker_that_is_killed_is_an_error_where_its_images_are_waited_for(tmp_path: Path) -> None:
    before, others = signal.getsignal(signal.SIGCHLD), set(workers())
    views = photos(make_tree(tmp_path), workers=1).train_views(0, 0)
    next(views)
    assert signal.getsignal(signal.SIGCHLD) is before, "a dead worker would interrupt any step with an error"
    (worker,) = set(workers()) - others
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGINT)
    next(views)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ReaderEnded, match=r"has ended: SIGKILL, probably because memory ran out: try fewer --workers"):
        list(views)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers must inherit the patch")
def test_a_file_that_crashes_its_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree(tmp_path)

    def crashing(path: str) -> torch.Tensor:
        if path.endswith("class1/1.jpg"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return read_image(path)

    monkeypatch.setattr("pipeline.data.trees.read_image", crashing)
    source = photos(tree, workers=2)
    for split, reading in (("train", source.train_views(0, 0)), ("val", source.images("val"))):
        said = f"has ended: SIGSEGV while it read {tree}/{split}/class1/1.jpg: repair or remove the file"
        with pytest.raises(ReaderEnded, match=re.escape(said)):
            list(reading)


def ended(pid: int) -> bool:
    """Return whether the process is gone, or a zombie that its parent has not noticed yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc is needed to see whether a process is alive")
def test_workers_end_with_the_process_that_reads(tmp_path: Path) -> None:
    """Each of two processes has two loaders with one worker each; an error ends one process, and SIGKILL the other."""
    script = """
import multiprocessing, os, signal, sys
from pathlib import Path
import torch
from pipeline.data.photos import Photos
from pipeline.data.source import Share
from pipeline.data.trees import open_folder
train, val, _ = open_folder(Path(sys.argv[1]))
options = {"size": 32, "has_labels": True, "share": Share(4), "workers": 1, "seed": 0}
for how in ("an error", "SIGKILL"):
    child = os.fork()
    if not child:
        source = Photos(train, val, **options, device=torch.device("cpu"))
        kept = [source.train_views(0, 0), source.images("train")]
        for views in kept:
            next(views)
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("no more")
    print("ended by", os.waitpid(child, 0)[1], flush=True)
"""
    command = [sys.executable, "-c", script, str(make_tree(tmp_path))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.stderr.endswith("\nOSError: no more\n"), done.stderr
    first, ends, second, killed = done.stdout.splitlines()
    assert (ends, killed) == ("ended by 256", f"ended by {int(signal.SIGKILL)}")
    workers = [int(pid) for pid in (first + " " + second).split()]
    assert len(workers) == 4
    until = time.monotonic() + 60
    while not all(map(ended, workers)):
        assert time.monotonic() < until, "workers are still alive"
        time.sleep(0.05)
