"""Image trees as found in practice: links, system files, splits with other names, and images that are held out."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import SMALL_NETWORK, blank_pictures, make_tree
from torchvision.datasets import ImageFolder

import imagenet_eval
import imagenet_train
from pipeline.data.opening import open_source
from pipeline.data.pixels import labels_of
from pipeline.data.scanning import SHOWN
from pipeline.data.source import DataSource, Share
from pipeline.data.trees import ImageTree, open_folder


def grow(root: Path, *paths: str) -> Path:
    """Make empty files, folders ("name/") and links ("name -> target") below a folder."""
    for path in paths:
        name, _, target = path.partition(" -> ")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (root / name).symlink_to(target)
        elif name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).touch()
    return root


def split(name: str, count: int = 2) -> list[str]:
    """Return the paths of the images of two classes below a folder."""
    return [f"{name}/{label}/{i}.jpg" for label in ("cat", "dog") for i in range(count)]


def names(images: ImageTree | None) -> list[str]:
    return [] if images is None else list(images.paths.names())


# Which images are found


def test_images_and_their_order_are_those_of_torchvision_links_included(tmp_path: Path) -> None:
    grow(tmp_path, "far/b.JPEG", "far/deep/a.png", "far/deep-er/a.png", "one.jpg", "tree/")
    tree = grow(tmp_path / "tree", "bird -> ../far", "cat/z.jpg", "cat/a.webp", "cat/linked.jpg -> ../../one.jpg")
    grow(tree, "cat/inner -> ../../far/deep", "dog/album.jpg/1.tif", "dog/Album/2.bmp", "Zebra/1.ppm", "cat-2/1.jpg")
    grow(tmp_path / "whole", "train -> ../tree")
    theirs = ImageFolder(str(tree))
    for root, train_root in ((tree, tree), (tmp_path / "whole", tmp_path / "whole" / "train")):
        train, _, _ = open_folder(root)
        expected = [(str(train_root / Path(path).relative_to(tree)), label) for path, label in theirs.samples]
        assert list(zip(train.paths, labels_of(train).tolist(), strict=True)) == expected
        assert train.classes == theirs.classes == ["Zebra", "bird", "cat", "cat-2", "dog"]


@pytest.mark.parametrize("below", ["train/", "", "train/all/", "all/"])
def test_without_class_folders_there_are_no_labels(tmp_path: Path, below: str) -> None:
    for i in range(3):
        grow(tmp_path, f"{below}{i}.jpg")
        Image.fromarray(np.full((20, 20, 3), i, dtype=np.uint8)).save(tmp_path / below / f"{i}.jpg")
    train, val, found = open_folder(tmp_path)
    assert (len(train), val, train.classes) == (3, None, [])
    assert [(int(image.max()), label) for image, label in (train[i] for i in range(3))] == [(0, -1), (1, -1), (2, -1)]
    assert "has no folder for each class, so its images have no labels" in found.no_val


def test_leavings_of_systems_are_neither_classes_nor_images_and_all_that_is_left_out_is_counted(tmp_path: Path) -> None:
    tree = grow(
        tmp_path / "many", *split("train"), *split("val", 1), "README.md", "loose.jpg", "raw/x.jpg", ".git/x.jpg"
    )
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"):
        grow(tree / "train", f"{folder}/0.jpg", f"cat/{folder}/0.jpg")
    grow(tree, "train/cat/._0.jpg", "train/.DS_Store", "train/cat/Thumbs.db", "val/.DS_Store", "train/none/deep/")
    grow(tree, "train/cat/a.heic", "train/dog/b.HEIC", "train/cat/LICENSE", "train/list.txt", "val/lion/notes.txt")
    grow(tree, "train/cat/gone.jpg -> nowhere", "train/cat/self.jpg -> self.jpg", "train/cat/loop -> ../../train")
    grow(tree, "train/dog/back -> ../dog", "val/cat/loop -> ..")
    train, val, found = open_folder(tree)
    assert names(train) == ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]
    assert (train.classes, names(val)) == (["cat", "dog"], ["cat/0.jpg", "dog/0.jpg"])
    first = f"{tree}/train has 4 images of 2 classes to train on; {tree}/val has 2 images of 2 classes to evaluate on"
    assert found.lines == (
        first,
        "left out: hidden or system folders (11), such as .git",
        "left out: hidden or system files (4), such as train/.DS_Store",
        "left out: links back to a folder that they are in (3), such as train/cat/loop",
        "left out: .heic files (2), such as train/cat/a.heic",
        "left out: .txt files (2), such as train/list.txt",
        "left out: folders without images (2), such as train/none",
        "left out: links that lead nowhere (2), such as train/cat/gone.jpg",
        "left out: .md files (1), such as README.md",
        "left out: 3 other kinds (3), such as files without an extension",
    )
    assert len(found.lines) == SHOWN + 2
    assert found.no_val == ""
    few = grow(tmp_path / "few", *split("train"), "LICENSE", "raw/0.jpg", "1.jpg")
    os.mkfifo(few / "train" / "dog" / "pipe.jpg")  # reading it would wait forever
    assert open_folder(few)[2].lines[1:-1] == (
        "left out: files without an extension (1), such as LICENSE",
        "left out: folders beside train (1), such as raw",
        "left out: images beside train (1), such as 1.jpg",
        "left out: things that are neither files nor folders (1), such as train/dog/pipe.jpg",
    )


@pytest.mark.skipif(os.name == "nt", reason="file names are always text on Windows")
def test_a_file_name_that_is_no_text_is_read_and_can_be_printed(tmp_path: Path) -> None:
    for folder in ("cat", "dog\n"):
        grow(tmp_path / folder, os.fsdecode(b"caf\xe9.jpg"), os.fsdecode(b"\xe9.txt"))
    (tmp_path / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    train, _, found = open_folder(tmp_path)
    assert all(os.path.exists(path) for path in train.paths)
    assert names(train)[1] == "dog\n/caf\udce9.jpg"
    assert found.lines[1] == "left out: .txt files (2), such as cat/\\xe9.txt"
    "\n".join(found.lines).encode()


# Which images belong to which split

UNDERSTOOD: dict[str, tuple[list[str], str]] = {
    "train and val": (split("train") + split("val", 1), "val"),
    "in capitals": (split("Train") + split("Val", 1), "Val"),
    "in long": (split("training") + split("validation", 1), "validation"),
    "shortened": (split("train") + split("valid", 1), "valid"),
    "a test set alone": (split("train") + split("test", 1), "test"),
    "a test set beside": (split("train") + split("val", 1) + split("test", 3), "val"),
    "others beside": (split("train") + split("val", 1) + ["extra/raw/1.jpg", "val2017/1.jpg"], "val"),
    "others beside a training set alone": ([*split("train"), "extra/1.jpg"], ""),
    "classes of trains": ([f"{name}/{i}.jpg" for name in ("train_station", "train_interior") for i in (0, 1)], ""),
}


@pytest.mark.parametrize(("paths", "val_name"), UNDERSTOOD.values(), ids=UNDERSTOOD.keys())
def test_splits_are_known_by_their_customary_names(tmp_path: Path, paths: list[str], val_name: str) -> None:
    train, val, found = open_folder(grow(tmp_path, *paths))
    assert (len(train), len(train.classes)) == (4, 2)
    assert names(val) == (["cat/0.jpg", "dog/0.jpg"] if val_name else [])
    assert (f"{tmp_path / val_name} has 2 images of 2 classes to evaluate on" in found.lines[0]) == bool(val_name)
    assert ("no evaluation: " in found.lines[-1]) == (not val_name)


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing": ([], r"no images \(\.jpg, .*\) below "),
    "other files alone": (["cat/a.heic", "dog/b.heic"], r"no images .*; there are \.heic files \(2\), such as cat/a\."),
    "val alone": (split("val"), "has a folder val but no folder train: there are val"),
    "a class beside a test set": ([*split("x"), "test/0.jpg"], "has a folder test but no folder train: .* test, x"),
    "two training sets": (split("train") + split("Train"), "has the folders Train, train: rename all but"),
    "two test sets": (split("train") + split("val") + split("valid"), "has the folders val, valid: rename all but"),
    "names with a year": (
        ["train2017/0.jpg", "val2017/0.jpg"],
        "the folders train2017, val2017, which do not seem to be .* or give --data .*/train2017 to train without",
    ),
    "names with a prefix": (split("seg_train") + split("seg_test"), "the folders seg_train, seg_test, which do not"),
    "names in one": (split("TrainData") + split("testImages"), "the folders TrainData, testImages, which do not seem"),
    "splits further down": (
        [*split("ILSVRC/Data/CLS-LOC/train"), "ILSVRC/Data/CLS-LOC/val/0.jpg", "ILSVRC/Lists/0.txt"],
        r"the folders train, val are further down: give --data .*/ILSVRC/Data/CLS-LOC$",
    ),
    "splits in train": (split("train/train") + split("train/val"), "train has the folders train, val, which do not"),
    "a class called train": (["train/0.jpg", "car/0.jpg"], "in train and, beside it, in car: if train is a class"),
    "images beside classes": ([*split("train"), "train/0.jpg"], r"beside its class folders, such as 0\.jpg: which"),
    "a class that train lacks": (
        [*split("train"), *split("val"), "val/ant/0.jpg"],
        "val has classes that .* lacks: ant",
    ),
}


@pytest.mark.parametrize(("paths", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_told_is_refused_by_name(tmp_path: Path, paths: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_folder(grow(tmp_path, *paths))


def test_no_such_folder_and_a_file_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--data: no such folder: {tmp_path}/nowhere"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"--data must be a folder, got the file {tmp_path}/file"):
        open_folder(grow(tmp_path, "file") / "file")


USELESS: dict[str, tuple[list[str], str]] = {
    "no val": ([], "has no folder val"),
    "an empty val": (["val/cat/"], "val has no images"),
    "a flat val": (["val/ILSVRC2012_val_00000001.JPEG", "val/2.jpg"], "val has 2 images, but not in a folder for each"),
    "Tiny ImageNet": (["val/images/0.jpg"], "val has no class of the training set, but images"),
}


@pytest.mark.parametrize(("paths", "message"), USELESS.values(), ids=USELESS.keys())
def test_a_val_that_does_not_serve_is_said_at_the_start_with_what_helps(
    tmp_path: Path, paths: list[str], message: str
) -> None:
    grow(tmp_path, *split("train"), *paths)
    train, val, found = open_folder(tmp_path)
    assert (len(train), val) == (4, None)
    assert re.search(
        rf"^no evaluation: .*{message}.* expected DIR/train/CLASS/IMAGE .*; --val-split 0\.1 evaluates on a tenth",
        found.lines[-1],
    )
    assert message in found.no_val
    train, val, found = open_folder(tmp_path, val_split=0.5)
    assert (len(train), len(val or [])) == (2, 2)
    assert "2 images of 2 classes more are held out to evaluate on" in found.lines[0]
    assert not any("no evaluation" in line for line in found.lines)


def test_classes_or_splits_further_down_are_noted(tmp_path: Path) -> None:
    _, _, found = open_folder(grow(tmp_path / "a", *split("images")))
    assert f"note: {tmp_path / 'a' / 'images'} has 2 folders: if they are classes, give it as --data" in found.lines
    train, _, found = open_folder(grow(tmp_path / "b", *split("bottle/train"), "bottle/test/1.jpg", "cable/test/1.jpg"))
    assert train.classes == ["bottle", "cable"]
    assert (
        f"note: {tmp_path / 'b' / 'bottle'} has the folders train, test: the images of both are trained on"
        in found.lines
    )


def test_labels_of_val_are_places_in_the_classes_of_train(tmp_path: Path) -> None:
    grow(tmp_path, *[f"train/{name}/0.jpg" for name in "abc"], "val/c/0.jpg", "val/a/", "val/b/1.jpg", "val/loose.jpg")
    train, val, found = open_folder(tmp_path)
    assert (train.targets.tolist(), val.targets.tolist()) == ([0, 1, 2], [1, 2])
    assert names(val) == ["b/1.jpg", "c/0.jpg"]
    assert "left out: images beside class folders (1), such as val/loose.jpg" in found.lines


# What is held out


def test_the_part_held_out_is_balanced_and_depends_on_names_alone(tmp_path: Path) -> None:
    counts = {"a": 20, "b": 7, "c": 2, "d": 1}
    grow(tmp_path / "one", *[f"{name}/{i}.jpg" for name, count in counts.items() for i in range(count)])
    train, val, _ = open_folder(tmp_path / "one", 0.2)
    assert (train.targets.bincount().tolist(), val.targets.bincount().tolist()) == ([16, 6, 1, 1], [4, 1, 1])
    everything = names(open_folder(tmp_path / "one")[0])
    assert sorted(names(train) + names(val)) == sorted(everything)
    held = [name for name in names(val) if name.startswith("a/")]
    assert held not in (everything[:4], everything[16:20]), "neither the first nor the last of a class"
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "train")
    grow(tmp_path / "two" / "train", *[f"a/{i}.png" for i in range(3)], "Z/0.jpg", "Z/1.jpg")
    again = open_folder(tmp_path / "two", 0.2)[1]
    assert [name for name in names(again) if name[0] in "bcd"] == [name for name in names(val) if name[0] in "bcd"]
    assert len(set(names(again)) & set(names(val))) >= 5
    assert set(names(val)) <= set(names(open_folder(tmp_path / "one", 0.5)[1]))


def test_a_split_that_does_not_go_with_the_images_is_a_clear_error(tmp_path: Path) -> None:
    grow(tmp_path / "whole", *split("train"), *split("val"))
    with pytest.raises(ValueError, match=r"--val-split: .*/val has 4 images .* so nothing has to be held out"):
        open_folder(tmp_path / "whole", 0.1)
    with pytest.raises(ValueError, match=r"--val-split: .* has no folder for each class, so its images have no labels"):
        open_folder(grow(tmp_path / "flat", "0.jpg", "1.jpg"), 0.1)
    with pytest.raises(ValueError, match=r"--val-split: no class in .* has two images"):
        open_folder(grow(tmp_path / "single", "a/0.jpg", "b/0.jpg"), 0.1)
    for dataset, fraction, message in (
        ("folder", 1.0, r"at least 0 and below 1, got 1\.0"),
        ("folder", float("nan"), "at least 0 and below 1, got nan"),
        ("digits", 0.1, "is for a folder of images, but digits has test images of its own"),
    ):
        with pytest.raises(ValueError, match=f"--val-split .*{message}"):
            source_of(tmp_path, dataset=dataset, val_split=fraction)


def source_of(data: Path, dataset: str = "folder", val_split: float = 0.0) -> DataSource:
    return open_source(
        dataset,
        str(data),
        image_size=16,
        augmentation="w/s",
        share=Share(4),
        workers=0,
        seed=0,
        device=torch.device("cpu"),
        val_split=val_split,
    )


# Paths in memory


def test_paths_are_one_sequence_that_worker_processes_share(tmp_path: Path) -> None:
    train, _, _ = open_folder(grow(tmp_path, *split("train", 3)))
    paths = train.paths
    assert (len(paths), paths[-1], paths.name(4)) == (6, str(tmp_path / "train" / "dog" / "2.jpg"), "dog/1.jpg")
    assert list(paths) == [paths[i] for i in range(6)]
    assert list(pickle.loads(pickle.dumps(paths))) == list(paths)
    assert source_of(tmp_path).names() == [paths.name(i) for i in range(6)]
    with pytest.raises(IndexError, match="there are 6 files, got index 6"):
        paths[6]
    assert all(isinstance(part, torch.Tensor) for name, part in vars(paths).items() if name != "root")


# A whole run


def test_a_run_says_first_what_it_found_and_is_evaluated_on_the_part_that_it_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tree = make_tree(tmp_path / "tree", train=8, val=1)
    for image in (tree / "val").rglob("*.jpg"):
        image.rename(tree / "val" / f"{image.parent.name}.jpg")
    for folder in (tree / "val").glob("class*[0-9]"):
        folder.rmdir()
    run = tmp_path / "run"
    flags = ["--data", str(tree), *SMALL_NETWORK, "--batch-size", "6", "--workers", "0", "--steps", "3"]
    with blank_pictures():
        assert imagenet_train.main([*flags, "--val-split", "0.25", "--out", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        f"{tree}/train has 18 images of 3 classes to train on; 6 images of 3 classes more are held out to evaluate on"
    )
    expected = json.loads((run / "results.json").read_text())["rows"]["MSF, k = 5"]
    for data in ([], ["--data", str(tree / ".." / "tree")]):
        out = tmp_path / "record.json"
        assert imagenet_eval.main(["knn", str(run), *data, "--workers", "0", "--out", str(out)]) == 0
        record = json.loads(out.read_text())
        assert (record["data"]["training_images"], record["data"]["test_images"]) == (18, 6)
        assert record["results"]["nn1"] == expected["nn1"]
    capsys.readouterr()
    tree.rename(tmp_path / "moved")
    command = ["knn", str(run), "--data", str(tmp_path / "moved"), "--workers", "0"]
    assert imagenet_eval.main([*command, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "val has 3 images, but not in a folder for each class; the run held out --val-split 0.25" in error
    assert imagenet_eval.main([*command, "--val-split", "0.25", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["results"]["nn1"] == expected["nn1"]
    with blank_pictures():
        assert imagenet_train.main(["--resume", str(run), "--data", str(tmp_path / "moved")]) == 0
    assert "18 images of 3 classes to train on; 6 images of 3 classes more are held out" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())["rows"]["MSF, k = 5"] == expected
