"""Repeat the experiments of the MSF paper (section 3.4 and the figures) with several seeds, and draw the figures.

Needs, in a clone: pip install -e '.[examples]'

    python examples/experiments.py                                k = 1, 5 and 20 on the digits: a few minutes
    python examples/experiments.py k bank augmentation            these three experiments in full, on the digits
    python examples/experiments.py k bank --dataset fashion-mnist --data DIR      on Fashion-MNIST
    python examples/experiments.py bank --data IMAGENET           the paper's Figure 3, on ImageNet
    python examples/experiments.py k --seeds 1 -- --arch resnet18 --epochs 20     flags after -- go to the trainer

Each experiment is a grid of runs of imagenet_train.py. Finished runs below --out are not repeated, and stopped runs are
resumed. Experiments share the runs that they have in common.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE

from msf_core.distributed import Ranks
from pipeline.data.opening import DATASETS, open_source
from pipeline.data.source import DataSource, Share
from pipeline.evaluation.features import features_of
from pipeline.evaluation.scores import COLUMNS
from pipeline.experiments.runs import Run, Runs
from pipeline.figures.paper import draw_against, draw_bars, draw_over_epochs, draw_points, spread_of
from pipeline.figures.pictures import draw_neighbors
from pipeline.models.encoders import load_encoder
from pipeline.running.environment import environment, in_words
from pipeline.running.flags import Parser
from pipeline.running.seeds import seed_of

Variants = dict[str, tuple[str, ...]]  # name -> flags of the trainer
SMALL = tuple(name for name in DATASETS if name not in ("digits", "folder"))
PLAIN = ("--k", "5")  # the flags of a run that most experiments share
TSNE_CLASSES, TSNE_IMAGES = 10, 1_000
QUERIES, NEIGHBORS, GALLERY = 8, 4, 5_000  # for Figure 2


@dataclass(frozen=True)
class Experiment:
    """An experiment: what it varies, and what the paper found."""

    title: str
    paper: str
    variants: Callable[[str], Variants]  # given the name of a data set
    x_label: str = ""  # set if the variants are numbers
    logarithmic: bool = False


def k_values(dataset: str) -> Variants:
    """Return values of k, the number of neighbors including the target itself."""
    ks = (2, 5, 10, 20) if dataset in SMALL else (2, 5, 10, 20, 50)
    return {"1": ("--method", "byol"), **{str(k): ("--k", str(k)) for k in ks}}


def quick_k_values(dataset: str) -> Variants:
    """Return a few values of k; on the digits, these runs are half as long."""
    shorter = ("--steps", "900") if dataset == "digits" else ()
    return {name: (*flags, *shorter) for name, flags in k_values(dataset).items() if name in ("1", "5", "20")}


def bank_sizes(dataset: str) -> Variants:
    """Return the bank sizes of the paper's Figure 3, or smaller ones for small data sets."""
    sizes: tuple[int, ...] = (256, 1_000, 4_000, 16_000, 64_000, 128_000, 256_000, 512_000, 1_024_000)
    if dataset == "digits":
        sizes = (64, 256, 1_024, 2_048)
    elif dataset in SMALL:
        sizes = (256, 1_024, 8_192, 32_768)
    return {str(size): ("--bank-size", str(size)) for size in sizes}


def augmentations(dataset: str) -> Variants:
    """Return the views of target / online encoder, for both methods."""
    methods: Variants = {"MSF": PLAIN, "BYOL": ("--method", "byol")}
    return {
        f"{name} {views}": flags if views == "w/s" else ("--augmentation", views, *flags)
        for name, flags in methods.items()
        for views in ("s/s", "w/s", "w/w")
    }


def schedules(dataset: str) -> Variants:
    """Return linear schedules of k over the run."""
    constant: Variants = {"5": PLAIN}
    return constant | {
        "1 to 5": ("--k", "1", "--k-end", "5"),
        "1 to 10": ("--k", "1", "--k-end", "10"),
        "2 to 20": ("--k", "2", "--k-end", "20"),
        "10 to 1": ("--k", "10", "--k-end", "1"),
    }


def same_views(dataset: str) -> Variants:
    """Return training with two views, and with one view for both encoders."""
    return {"two views": PLAIN, "the same view": ("--views", "same")}


def predictors(dataset: str) -> Variants:
    """Return training with and without a prediction head."""
    return {"MLP": PLAIN, "none": ("--predictor", "none")}


def purity_variants(dataset: str) -> Variants:
    """Return the variants of the paper's Figure 4: k, and the views."""
    ks: Variants = {f"k = {k}": ("--k", str(k)) for k in (2, 5, 10, 20)}
    return ks | {f"k = 5, {views}": ("--augmentation", views, *PLAIN) for views in ("s/s", "w/w")}


EXPERIMENTS = {
    "k": Experiment("Neighbors k", "k = 10 has 0.5 more 1-NN than k = 5", k_values, "k", logarithmic=True),
    "quick": Experiment("Neighbors k", "k = 10 has 0.5 more 1-NN than k = 5", quick_k_values, "k", logarithmic=True),
    "bank": Experiment("Rows of the bank (Fig. 3)", "128K does as well as 1M", bank_sizes, "rows", logarithmic=True),
    "augmentation": Experiment(
        "Views of target / online encoder (Table 7)",
        "1-NN of MSF is 62.0 with w/s, 60.6 with s/s, 54.6 with w/w",
        augmentations,
    ),
    "views": Experiment("One view for both encoders", "it collapses in the first epoch", same_views),
    "predictor": Experiment("Prediction head", "the method has one on the online side", predictors),
    "purity": Experiment("Purity over epochs (Fig. 4)", "it is drawn for k and for the views", purity_variants),
    "k-schedule": Experiment("k that changes over the run", "named as future work, not measured", schedules),
    "tsne": Experiment("t-SNE over epochs (Table 2, right)", "clusters of classes form", lambda dataset: {"MSF": ()}),
    "neighbors": Experiment("Neighbors over epochs (Fig. 2)", "they become alike", lambda dataset: {"MSF": ()}),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = build_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    flags, for_trainer = parser.parse_args(given[:end]), given[end + 1 :]
    names: list[str] = flags.experiment or ["quick"]
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"unknown experiment {unknown[0]!r}: choose from {', '.join(EXPERIMENTS)}")
    if flags.seeds < 1 or flags.jobs < 0:
        parser.error(f"--seeds must be at least 1 and --jobs at least 0, got {flags.seeds} and {flags.jobs}")
    if misplaced := {"--dataset", "--data"}.intersection(for_trainer):
        parser.error(f"{min(misplaced)} determines the values of a grid: give it before the --")
    dataset = flags.dataset or ("folder" if flags.data else "digits")
    common = (*(("--dataset", dataset) if flags.dataset else ()), *(("--data", flags.data) if flags.data else ()))
    jobs = flags.jobs or (1 if dataset == "folder" else min(2, os.cpu_count() or 1))
    runs = Runs(Path(flags.out), (*common, *for_trainer), jobs)
    try:
        for name in names:
            for run in grid(name, flags.seeds, dataset):
                runs.check(run)
        for name in names:
            wanted = grid(name, flags.seeds, dataset)
            print(f"{name}: {len(wanted)} runs, {sum(map(runs.finished, wanted))} of them already finished")
            runs.finish(wanted)
            report(name, runs, flags.seeds, dataset)
    except (ValueError, RuntimeError) as error:
        parser.exit(2 if isinstance(error, ValueError) else 1, f"{parser.prog}: error: {error}\n")
    return 0


def grid(name: str, seeds: int, dataset: str) -> list[Run]:
    """Return the runs of an experiment, ordered by variant."""
    if name in PICTURES:
        return [Run(("--keep-every", "10"), 0)]
    return [Run(flags, seed) for flags in EXPERIMENTS[name].variants(dataset).values() for seed in range(seeds)]


def report(name: str, runs: Runs, seeds: int, dataset: str) -> None:
    """Draw the figure, print the table, and write both with a record."""
    experiment = EXPERIMENTS[name]
    path = runs.folder / f"{name}.png"
    # What the runs recorded: they may be another machine's, or older.
    found_with = runs.found_with(grid(name, seeds, dataset)[0]) or environment(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    if name in PICTURES:
        title = f"{experiment.title}\n{in_words(found_with)}"
        PICTURES[name](runs.folder_of(grid(name, seeds, dataset)[0]), path, title)
        print(f"{path}: {experiment.title}; in the paper {experiment.paper}")
        return
    names = list(experiment.variants(dataset))
    of_them = f"{seeds} seeds" if seeds > 1 else "1 seed"
    where = "" if dataset == "folder" else f" on {dataset}"
    of_seeds = [Run(flags, seed) for flags in experiment.variants(dataset).values() for seed in range(seeds)]
    results = [runs.results(run) for run in of_seeds]
    columns = [key for key in COLUMNS if all(key in row for row in results)]
    values = {
        key: [[row[key] for row in results[first : first + seeds]] for first in range(0, len(results), seeds)]
        for key in (*columns, "spread", "rank")
    }
    lines = [
        f"{experiment.title}{where}: mean and standard deviation over {of_them}, in percent. "
        f"In the paper {experiment.paper}.",
        "",
        "| " + " | ".join(["", *(COLUMNS[key] for key in columns), "spread", "rank"]) + " |",
        "|" + " --- |" * (len(columns) + 3),
    ]
    for place, variant in enumerate(names):
        cells = [spread_of(values[key][place]) for key in columns]
        last = [f"{sum(values[key][place]) / seeds:.2f}" for key in ("spread", "rank")]
        lines.append("| " + " | ".join([variant, *cells, *last]) + " |")
    text = "\n".join(lines) + "\n"
    (runs.folder / f"{name}.md").write_text(text)
    record = {
        "experiment": name,
        "flags": runs.flags,
        "seeds": seeds,
        "variants": experiment.variants(dataset),
        "values": values,
        **found_with,
    }
    (runs.folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{text}")
    series = {COLUMNS[key]: values[key] for key in ("nn1", "nn20", "one_label") if key in columns}
    title = f"{experiment.title}{where}, {of_them}\n{in_words(found_with)}"
    if name == "purity":
        draw_purity(path, runs, experiment.variants(dataset), seeds, title)
    elif not series:
        return  # without labels, there is only the table
    elif experiment.x_label:
        draw_against(path, [float(x) for x in names], series, title, experiment.x_label, experiment.logarithmic)
    else:
        draw_bars(path, names, series, title)
    print(f"{path}, and {name}.md and {name}.json beside it")


def draw_purity(path: Path, runs: Runs, variants: Variants, seeds: int, title: str) -> None:
    """Draw the purity of every variant over the epochs."""
    curves = {
        variant: [[row["purity"] for row in runs.history(Run(flags, seed))] for seed in range(seeds)]
        for variant, flags in variants.items()
    }
    draw_over_epochs(path, curves, title, "share of neighbors 2 to k with the query's label")


def draw_tsne(folder: Path, path: Path, title: str) -> None:
    """Draw t-SNE of the test images of some classes after each kept epoch."""
    source = source_of(folder)
    labels = source.labels("val")
    classes = labels.unique()[:TSNE_CLASSES]
    places = torch.isin(labels, classes).nonzero().flatten().tolist()[:TSNE_IMAGES]
    panels = {}
    for epoch, features in kept_features(folder, source, "val", places):
        embedded = TSNE(init="pca", perplexity=min(30, (len(places) - 1) / 3), random_state=0).fit_transform(features)
        panels[f"epoch {epoch}"] = embedded
    names = [str(label) for label in range(int(labels.max()) + 1)]
    draw_points(path, panels, labels[places].numpy(), names, f"Test images of {len(classes)} classes: {title}")


def draw_fig_2(folder: Path, path: Path, title: str) -> None:
    """Draw a few test images with their nearest training images after each kept epoch."""
    source = source_of(folder)
    order = torch.randperm(source.size("val"), generator=torch.Generator().manual_seed(seed_of(0)))
    queries, gallery = order[:QUERIES].tolist(), list(range(min(GALLERY, source.size("train"))))
    labels, gallery_labels = source.labels("val")[queries], source.labels("train")[gallery]
    rows = []
    kept = zip(
        kept_features(folder, source, "val", queries), kept_features(folder, source, "train", gallery), strict=True
    )
    for (epoch, asked), (_, known) in kept:
        nearest = torch.from_numpy(asked @ known.T).topk(NEIGHBORS, dim=1).indices
        shown = torch.cat([images.cpu() for images, _ in source.images("train", nearest.flatten().tolist())])
        pictures = source.displayable(shown)
        rows.append(
            {
                "title": f"epoch {epoch}",
                "images": pictures.reshape(len(queries), NEIGHBORS, *pictures.shape[1:]),
                "right": (gallery_labels[nearest] == labels[:, None]).tolist(),
            }
        )
    images = torch.cat([images.cpu() for images, _ in source.images("val", queries)])
    chosen = rows if len(rows) <= 4 else [rows[round(place * (len(rows) - 1) / 3)] for place in range(4)]
    draw_neighbors(path, source.displayable(images), chosen, title)


def source_of(folder: Path) -> DataSource:
    """Return the data source of a run."""
    settings = json.loads((folder / "config.json").read_text())
    source = open_source(
        settings["dataset"],
        settings["data"],
        image_size=settings["image_size"],
        augmentation="w/w",
        share=Share(64),
        workers=settings["workers"],
        seed=0,
        device=torch.device("cpu"),
        val_split=settings.get("val_split", 0.0),
    )
    if not source.has_val:
        raise ValueError("this needs labeled test images")
    return source


def kept_features(folder: Path, source: DataSource, split: str, places: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, unit features [n, F]) of these images for each kept backbone of the run."""
    for path in sorted(folder.glob("backbone-epoch-*.safetensors")):
        backbone = load_encoder(str(path), Ranks()).backbone
        features = torch.cat([part for part, _ in features_of(backbone, source.images(split, places))])
        yield int(path.stem.rpartition("-")[2]), torch.nn.functional.normalize(features, dim=1).numpy()


PICTURES = {"tsne": draw_tsne, "neighbors": draw_fig_2}


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("experiment", nargs="*", help=f"{', '.join(EXPERIMENTS)} (default: quick)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--dataset", choices=DATASETS, help="data set (default: folder with --data, otherwise digits)")
    parser.add_argument("--data", default="", help="folder of the images (not for the digits)")
    parser.add_argument("--out", default="runs/experiments", help="output folder (default: runs/experiments)")
    parser.add_argument("--jobs", type=int, default=0, help="parallel runs (0: 2 for small images, 1 for a folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
