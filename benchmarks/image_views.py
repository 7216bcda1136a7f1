"""Compare how fast views of images are created: by the trainer, by its version 0.2 (with Pillow), and by lightly.

    python benchmarks/image_views.py          (64 generated JPEGs of 500 × 375, views of 224 pixels; 2 to 3 minutes)
    python benchmarks/image_views.py --data DIR           the JPEGs of a folder instead

Photographs are read by a DataLoader with one worker. The figure is the images per second and core of that worker, with
two views of each image. "before" is the code of the trainer up to version 0.2, kept here for comparison: Pillow,
torchvision's transforms and float32 views. "now" is the current code, which leaves everything except decoding and
cropping to the device. "whole" does everything on the CPU in one process, for both "now" and "before". lightly's
transforms are MoCoV2Transform and BYOLTransform with their defaults at this size. Their views differ from ours, so the
comparison is only approximate.

Small images have 32 × 32 pixels. The trainer's data source runs in one process and thread, and "before" in a
DataLoader with one worker.

Rounds of all variants alternate, in changing order, so that a slowdown of the machine affects all of them. Ratios are
those of medians. OUT/image_views.jsonl gets one record per variant, OUT/image_views.md the table (also printed), and
OUT/image_views.png the plot. The breakdown times each part separately, in one thread, on the same images.

On a GPU, the script also measures the time of the device's part of a batch, and the share of a ResNet50 training run
that is spent waiting for data.
"""

import argparse
import contextlib
import csv
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import positive, settle_device_and_folder
from benchmarks.measuring.measure import (
    Record,
    describe_environment,
    in_words,
    quantiles,
    time_interleaved,
    write_jsonl,
)
from benchmarks.measuring.tables import format_seconds
from pipeline.data.photos import IMAGENET_MEAN, IMAGENET_STD, Crops
from pipeline.data.pixels import read_image
from pipeline.data.small import SmallImages, Split
from pipeline.data.source import Share
from pipeline.running.seeds import seed_of
from pipeline.views.crops import PER_VIEW, STRONG, WEAK, crop_boxes, draws, resized_crop, views_of
from pipeline.views.rendering import Rendering

BEFORE, NOW = "before: Pillow", "now: worker"
WHOLE = {"before: Pillow": "before, whole", "now: worker": "now, whole, on the CPU"}
SMALL_BEFORE, SMALL_NOW, SMALL_PLAIN = "before: Pillow, 32 px", "now, 32 px", "now, 32 px, without blur"
SMALL_COUNT = 2048  # number of images in the small set
PART_COLORS = {  # the parts of a worker's work for an image
    "decoding": "#4477aa",
    "two crops": "#66ccee",
    "draws and two crops": "#66ccee",
    "jitter and grayscale": "#ddaa33",
    "blur": "#cc6677",
    "flip, conversion, normalization": "#aa3377",
    "collating": "#999999",
}


@dataclass(frozen=True)
class Task:
    """What to measure: ``batches`` batches of ``batch`` images in each of ``rounds`` rounds."""

    files: list[Path]
    size: int
    batch: int
    batches: int
    rounds: int
    device: torch.device


class ByPillow(Dataset[tuple[Any, ...]]):
    """The trainer's views up to version 0.2: a Pillow image, transformed by torchvision once for each view."""

    def __init__(self, load: Callable[[int], Image.Image], kinds: list[Callable[[Any], Tensor]]) -> None:
        self.load, self.kinds = load, kinds

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.load(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(0, 0, index))
            return (*(view(image) for view in self.kinds), 0)


def pillow_view(strength: str, size: int) -> v2.Compose:
    """Return the transform of version 0.2 from a Pillow image to a weak ("w") or strong ("s") normalized view."""
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True)
    return v2.Compose([v2.RGB(), crop, *(pillow_colors(size) if strength == "s" else []), *pillow_ends()])


def pillow_colors(size: int) -> list[v2.Transform]:
    """Return the transforms that only a strong view has."""
    return [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(max(3, size // 10 // 2 * 2 + 1), sigma=(0.1, 2.0))], p=0.5),
    ]


def pillow_ends() -> list[v2.Transform]:
    """Return the last transforms of a view: flip, conversion and normalization."""
    scale = v2.ToDtype(torch.float32, scale=True)
    return [v2.RandomHorizontalFlip(), v2.ToImage(), scale, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def pillow_file(files: list[Path], index: int) -> Image.Image:
    """Return the decoded image of a file."""
    with Image.open(files[index % len(files)]) as file:
        image: Image.Image = file.convert("RGB")
        return image


class OfFiles(Dataset[tuple[Tensor, int]]):
    """Images of files as the trainer reads them; indices beyond the last file start again at the first."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(str(self.files[index % len(self.files)])), 0


class Lightly(Dataset[tuple[Any, ...]]):
    """A transform of lightly, applied to the images of files."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.files, self.transform = files, transform

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.transform(pillow_file(self.files, index)), 0)


def make_photos(folder: Path, count: int, width: int = 500, height: int = 375) -> list[Path]:
    """Write JPEGs that resemble photographs: blobs of several sizes and some noise, about 75 kB at 500 × 375."""
    files = []
    for number in range(count):
        generator = np.random.default_rng(number)
        pixels = np.zeros((height, width, 3))
        for side in (4, 16, 64, 160):
            small = generator.normal(size=(height // side + 2, width // side + 2, 3)).astype(np.float32)
            for c in range(3):
                plane = Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC)
                pixels[..., c] += np.asarray(plane) * side**0.5
        pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
        pixels += generator.normal(size=pixels.shape) * 8
        files.append(folder / f"{number}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], quality=92)
    return files


def main() -> None:
    """Run the benchmark with the arguments of the command line."""
    args = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        files = sorted(Path(args.data).rglob("*.jp*g")) if args.data else make_photos(Path(made), args.images)
        task = Task(files, args.size, args.batch, args.batches, args.rounds, torch.device(args.device))
        records = [*rates(task), *breakdown(task)]
        if args.train_steps:
            records.append(training_run(task, args.train_steps, made))
        report = write_report(records, task)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "image_views.jsonl")
    (args.out / "image_views.md").write_text(report, encoding="utf-8")
    draw(records, args.out / "image_views.png")
    print(report)
    print(f"written: image_views.jsonl, image_views.md, image_views.png in {args.out}")


def environment(task: Task) -> dict[str, Any]:
    """Describe the machine and the libraries that create views."""
    found = describe_environment(torch.device("cpu"))
    for name in ("torchvision", "pillow", "lightly"):
        with contextlib.suppress(ImportError):
            found["versions"][name] = version(name)
    if task.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(task.device)
    return found


def rates(task: Task) -> list[Record]:
    """Time all methods alternately, and return a record of the images per second of each."""
    calls = methods(task)
    calls_by_name = {name: call for name, (call, _) in calls.items()}
    seconds = time_interleaved(calls_by_name, dict.fromkeys(calls, task.rounds), torch.device("cpu"), _itself)
    described = environment(task)
    records = []
    for name, (_, count) in calls.items():
        values = [count / s for s in seconds[name]]
        parameters = {"method": name, "size": 32 if "32 px" in name else task.size, "batch": task.batch, "views": 2}
        records.append(Record("images_per_second", parameters, *quantiles(values), "images/s", len(values), described))
    medians = {record.parameters["method"]: record.median for record in records}
    for record in records:
        name = record.parameters["method"]
        base = SMALL_BEFORE if "32 px" in name else WHOLE[BEFORE] if "whole" in name else BEFORE
        record.derived["times_before"] = record.median / medians[base]
    return records


def _itself(call: Callable[[], object], device: torch.device) -> float:
    """Return the time that a call measures itself, because its worker must start before the clock."""
    taken: Any = call()
    return float(taken)


def methods(task: Task) -> dict[str, tuple[Callable[[int], float], int]]:
    """Return name -> (function that times a round, number of images per round)."""
    count = task.batch * task.batches
    pillow: list[Callable[[Any], Tensor]] = [pillow_view(strength, task.size) for strength in "ws"]
    before = ByPillow(partial(pillow_file, task.files), pillow)
    now = Crops(OfFiles(task.files), [WEAK, STRONG], task.size, seed=0)
    calls: dict[str, tuple[Callable[[int], float], int]] = {
        BEFORE: (partial(with_a_worker, before, task, False), count),
        NOW: (partial(with_a_worker, now, task, True), count),
        WHOLE[BEFORE]: (partial(alone, before, task, None), count),
        WHOLE[NOW]: (partial(alone, now, task, renderings(task.size, torch.device("cpu"))), count),
    }
    for name, transform in lightly_transforms(task.size).items():
        calls[name] = (partial(with_a_worker, Lightly(task.files, transform), task, False), count)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SMALL_COUNT, 3, 32, 32), generator=generator).byte()
    split = Split(images, torch.zeros(SMALL_COUNT, dtype=torch.int64))
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    small = ByPillow(
        lambda index: Image.fromarray(pixels[index % SMALL_COUNT]), [pillow_view(strength, 32) for strength in "ws"]
    )
    larger = replace(task, batch=16 * task.batch, batches=1)
    calls[SMALL_BEFORE] = (partial(with_a_worker, small, larger, False), larger.batch)
    for name, blur in ((SMALL_NOW, STRONG.blur), (SMALL_PLAIN, 0.0)):
        source = SmallImages(
            split,
            split,
            size=32,
            views=views_of("w/s", blur),
            share=Share(256),
            seed=0,
            device=torch.device("cpu"),
        )
        calls[name] = (partial(small_round, source), 256 * 2)
    return calls


def with_a_worker(images: Dataset[Any], task: Task, keyed: bool, number: int) -> float:
    """Return the seconds that one worker takes for a round's batches, after it has started and made one batch."""
    first = number * (task.batches + 1) * task.batch
    places: list[Any] = list(range(first, first + (task.batches + 1) * task.batch))
    keys = [(0, place) for place in places] if keyed else places
    loader = iter(DataLoader(images, batch_size=task.batch, sampler=keys, num_workers=1))
    next(loader)
    started = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - started


def alone(images: Dataset[Any], task: Task, render: list[Rendering] | None, number: int) -> float:
    """Return the seconds that this process takes for all work on a round's batches, including rendering."""
    started = time.perf_counter()
    for batch in range(task.batches):
        first = (number * task.batches + batch) * task.batch
        keys = [(0, first + place) if render else first + place for place in range(task.batch)]
        made = default_collate([images[key] for key in keys])
        if render:
            target, online, rows, *_ = made
            render[0](target, rows[:, :PER_VIEW])
            render[1](online, rows[:, PER_VIEW:])
    return time.perf_counter() - started


def small_round(source: SmallImages, number: int) -> float:
    """Return the seconds of two batches of 256 small images."""
    views = source.train_views(number, 0)
    next(views)
    started = time.perf_counter()
    for _ in range(2):
        next(views)
    return time.perf_counter() - started


def renderings(size: int, device: torch.device) -> list[Rendering]:
    """Return the renderings of the weak and of the strong view."""
    return [Rendering(view, size, IMAGENET_MEAN, IMAGENET_STD, device) for view in (WEAK, STRONG)]


def lightly_transforms(size: int) -> dict[str, Any]:
    """Return lightly's transforms by name; an empty dict if lightly is not installed."""
    try:
        from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
        from lightly.transforms.moco_transform import MoCoV2Transform
    except ImportError:
        return {}
    byol = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    return {"lightly MoCoV2Transform": MoCoV2Transform(input_size=size), "lightly BYOLTransform": byol}


def breakdown(task: Task) -> list[Record]:
    """Time each part of creating the two views of an image separately, in one thread, alternating."""
    parts = {**pillow_parts(task), **own_parts(task)}
    calls = {name: call for name, (call, _) in parts.items()}
    seconds = time_interleaved(calls, dict.fromkeys(calls, task.rounds), torch.device("cpu"))
    described = environment(task)
    records = [
        Record(
            "part",
            {"part": name, "size": task.size, "images": images},
            *quantiles([s / images for s in seconds[name]]),
            "s/image",
            task.rounds,
            described,
        )
        for name, (_, images) in parts.items()
    ]
    return records + device_part(task, described)


def pillow_parts(task: Task) -> dict[str, tuple[Callable[[int], object], int]]:
    """Return the parts of "before": name -> (function that does this for a batch, number of images)."""
    images = [pillow_file(task.files, index) for index in range(task.batch)]
    crop = v2.RandomResizedCrop(task.size, scale=(0.2, 1.0), antialias=True)
    crops = [crop(image) for image in images]
    jitter, gray, blur = pillow_colors(task.size)
    ends = v2.Compose(pillow_ends())
    tensors = [(ends(one), ends(one)) for one in crops]

    def each(values: list[Any], function: Callable[[Any], object], times: int) -> Callable[[int], object]:
        def call(number: int) -> None:
            torch.manual_seed(number)
            for value in values:
                for _ in range(times):
                    function(value)

        return call

    whole: dict[str, Callable[[int], object]] = {
        "decoding": lambda number: [pillow_file(task.files, index) for index in range(task.batch)],
        "two crops": each(images, crop, 2),
        "jitter and grayscale": each(crops, v2.Compose([jitter, gray]), 1),
        "blur": each(crops, blur, 1),
        "flip, conversion, normalization": each(crops, ends, 2),
        "collating": lambda number: default_collate(tensors),
    }
    return {f"before: {name}": (call, task.batch) for name, call in whole.items()}


def own_parts(task: Task) -> dict[str, tuple[Callable[[int], object], int]]:
    """Return the parts of "now", as in `pillow_parts`; the device's parts run on the CPU."""
    files = [str(task.files[index % len(task.files)]) for index in range(task.batch)]
    images = [read_image(file) for file in files]
    rows = draws(0, 0, 0, task.batch)[:, :PER_VIEW]
    cropped = zip(images, rows.split(1), strict=True)
    crops = default_collate([resized_crop(image, box_of(image, row), task.size) for image, row in cropped])
    cpu = torch.device("cpu")
    one = [(crop, crop) for crop in crops]
    plain, colored, blurred = (
        Rendering(view, task.size, IMAGENET_MEAN, IMAGENET_STD, cpu)
        for view in (WEAK, replace(STRONG, blur=0.0), replace(STRONG, jitter=0.0, gray=0.0))
    )

    def rows_of(number: int) -> Tensor:
        return draws(0, number, 0, task.batch)[:, :PER_VIEW]

    def crop_twice(number: int) -> None:
        for place, image in enumerate(images):
            row = draws(0, number, place, 1)
            for part in row.split(PER_VIEW, dim=1):
                resized_crop(image, box_of(image, part), task.size)

    whole: dict[str, Callable[[int], object]] = {
        "decoding": lambda number: [read_image(file) for file in files],
        "draws and two crops": crop_twice,
        "collating": lambda number: default_collate(one),
        "device: weak view": lambda number: plain(crops, rows_of(number)),
        "device: strong view without blur": lambda number: colored(crops, rows_of(number)),
        "device: weak view with blur": lambda number: blurred(crops, rows_of(number)),
    }
    return {f"now: {name}": (call, task.batch) for name, call in whole.items()}


def box_of(image: Tensor, row: Tensor) -> np.ndarray:
    """Return the crop box of an image for one view's draws [1, PER_VIEW]."""
    box: np.ndarray = crop_boxes(row, image.shape[1], image.shape[2], STRONG.area)[0]
    return box


def device_part(task: Task, described: dict[str, Any]) -> list[Record]:
    """Time a GPU's part of both views for a batch of 256 crops; return no record without a GPU."""
    if task.device.type != "cuda":
        return []
    count = 256
    crops = torch.randint(0, 256, (count, 3, task.size, task.size), device=task.device).byte()
    render = renderings(task.size, task.device)
    drawn = [draws(0, epoch, 0, count) for epoch in range(task.rounds)]

    def both(number: int) -> None:
        render[0](crops, drawn[number][:, :PER_VIEW])
        render[1](crops, drawn[number][:, PER_VIEW:])

    both(0)  # compiles
    seconds = time_interleaved({"both": both}, {"both": task.rounds}, task.device)["both"]
    parameters = {"part": "now: both views on the GPU, a batch", "size": task.size, "images": count}
    return [Record("device_part", parameters, *quantiles(seconds), "s", len(seconds), described)]


def training_run(task: Task, steps: int, folder: str) -> Record:
    """Train on the files for some steps; return the images per second and the share of time spent waiting for data."""
    import imagenet_train

    tree = Path(folder) / "tree"
    tree.mkdir()
    for number in range(2 * task.batch):  # two steps per epoch
        (tree / f"{number}.jpg").symlink_to(task.files[number % len(task.files)].resolve())
    flags = ["--data", str(tree), "--image-size", str(task.size), "--batch-size", str(task.batch)]
    flags += ["--device", str(task.device), "--steps", str(steps), "--checkpoint-every", "10000"]
    flags += ["--out", f"{folder}/run"]
    if task.device.type == "cpu":  # a trial run of this benchmark
        flags += ["--arch", "resnet18", "--stem", "imagenet", "--hidden", "64", "--dim", "32"]
        flags += ["--bank-size", "256", "--k", "2"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = imagenet_train.main(flags)
    if status:
        raise RuntimeError(f"the training run ended with status {status}")
    with (Path(folder) / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))[1:] or [{}]
    speeds = [float(row["images_per_second"]) for row in rows if row]
    waiting = [float(row["data_share"]) for row in rows if row]
    parameters = {"method": "training run", "flags": flags[2:-2], "steps": steps}
    derived = {"data_share": quantiles(waiting).median}
    return Record(
        "training", parameters, *quantiles(speeds), "images/s", len(speeds), environment(task), derived=derived
    )


def write_report(records: list[Record], task: Task) -> str:
    """Return the whole report in Markdown."""
    kilobytes = sum(file.stat().st_size for file in task.files) / len(task.files) / 1000
    found = records[0].environment
    rates_of = [record for record in records if record.name == "images_per_second"]
    lines = ["| two views of each image | images a second and core (20–80 %) | times before |", "| --- | --- | --- |"]
    for record in rates_of:
        spread = f"{record.median:,.0f} ({record.q20:,.0f}–{record.q80:,.0f})"
        lines.append(f"| {record.parameters['method']} | {spread} | {record.derived['times_before']:.2f} |")
    parts = ["| part, alone on one thread | an image (20–80 %) |", "| --- | --- |"]
    for record in records:
        if record.name in ("part", "device_part"):
            spread = f"{format_seconds(record.q20)}–{format_seconds(record.q80)}"
            parts.append(f"| {record.parameters['part']} | {format_seconds(record.median)} ({spread}) |")
    trained = [
        f"Training run: {record.median:,.0f} images per second, waiting for data for "
        f"{record.derived['data_share']:.1%} of the time ({' '.join(record.parameters['flags'])})."
        for record in records
        if record.name == "training"
    ]
    gpu = "" if task.device.type == "cuda" else "The GPU's part and a training run on one: unmeasured, no GPU."
    texts = [
        "# How fast views are made",
        in_words(found),
        f"{len(task.files)} JPEGs of {kilobytes:.0f} kB on average, views of {task.size} pixels, w/s; {task.rounds} "
        f"rounds of {task.batches} batches of {task.batch} in turns, ratios of medians. One worker or one process, one "
        "thread.",
        "\n".join(lines),
        "\n".join(parts),
        *trained,
        gpu,
    ]
    return "\n\n".join(text for text in texts if text) + "\n"


def draw(records: list[Record], path: Path) -> None:
    """Plot the images per second, and the time of each part of an image, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(3, 2))
    shown = [r for r in records if r.name == "images_per_second" and "32 px" not in r.parameters["method"]]
    for place, record in enumerate(reversed(shown)):
        method = record.parameters["method"]
        color = "#117733" if method.startswith("now") else "#999999" if method.startswith("before") else "#4477aa"
        left.barh(place, record.median, color=color)
        left.errorbar(
            record.median, place, xerr=[[record.median - record.q20], [record.q80 - record.median]], color="#333333"
        )
        at = (record.q80, place)
        left.annotate(f"{record.median:,.0f}", at, xytext=(6, 0), textcoords="offset points", va="center")
    left.set_yticks(range(len(shown)), [record.parameters["method"] for record in reversed(shown)])
    left.set_xlim(0, 1.15 * max(record.q80 for record in shown))
    left.set_xlabel("images per second and core, two views of each; bar: 20–80 %")
    for place, prefix in enumerate(("now", "before")):
        begin = 0.0
        for record in records:
            name = record.parameters.get("part", "").removeprefix(f"{prefix}: ")
            if record.name == "part" and name in PART_COLORS and record.parameters["part"] != name:
                label = name if prefix == "before" else "_"
                right.barh(place, 1000 * record.median, left=begin, color=PART_COLORS[name], label=label)
                begin += 1000 * record.median
    right.legend(frameon=False, fontsize=9)
    right.set_yticks(range(2), ["now: worker", "before"])
    right.set_xlabel("ms of a worker per image, part by part")
    found = records[0].environment
    where = f"{found['device']}, {found['instructions']}, {found['date'][:10]}"
    figure.suptitle(f"Views of photographs: {where}", fontsize=12)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; if it is wrong, exit with code 2 and a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="device that renders views (default: cuda if available)"
    )
    parser.add_argument("--data", default="", help="folder of JPEGs (default: generated images)")
    parser.add_argument("--images", type=positive, default=64, help="number of generated images (default: 64)")
    parser.add_argument("--size", type=positive, default=224, help="size of the views in pixels (default: 224)")
    parser.add_argument("--batch", type=positive, default=16, help="images per batch (default: 16)")
    parser.add_argument("--batches", type=positive, default=3, help="batches per round (default: 3)")
    parser.add_argument("--rounds", type=positive, default=9, help="number of rounds (default: 9)")
    parser.add_argument("--train-steps", type=int, help="steps of a training run (default: 40 on CUDA, else 0: none)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    args = parser.parse_args()
    settle_device_and_folder(parser, args)
    if args.data and not any(Path(args.data).rglob("*.jp*g")):
        parser.error(f"--data {args.data}: no JPEGs there")
    if args.train_steps is None:
        args.train_steps = 40 if args.device == "cuda" else 0
    if args.train_steps < 0:
        parser.error(f"--train-steps must be at least 0, got {args.train_steps}")
    return args


if __name__ == "__main__":
    main()
