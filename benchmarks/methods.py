"""Train self-supervised methods on the same images with one recipe, and compare them as in the MSF paper's Table 2.

Needs, in a clone: pip install -e '.[examples,bench,peers,faiss-cpu]'

    python benchmarks/methods.py                                            all methods on scikit-learn's digits
    python benchmarks/methods.py --dataset fashion-mnist --data DIR --jobs 2     hours on two cores
    python benchmarks/methods.py --data MY_IMAGES --methods msf simclr byol      one folder per class (a GPU is advised)
    python benchmarks/methods.py --dataset fashion-mnist --data DIR --cost       only the time and memory of a step

All methods get the same images, views, backbone, steps, optimizer and evaluation. First, each method is tried with the
same learning rates and evaluated on a held-out part of the training images. Then it is trained on all training images
at its best rate, with several seeds, and evaluated on the test images. Without val/, a fifth of each class of a folder
is used for testing.

Each run writes a record to OUT/runs. A run that has its record is not repeated, so the same command continues after a
stop, and more --methods or --seeds add to the existing runs. OUT/table.md has the table, OUT/records.jsonl all records.
To start from the records of another machine, put their records.jsonl into a new OUT.

With --budget passes, a method that sends both views through the encoder with gradient gets half the steps, because each
step takes about twice as long.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

try:
    from benchmarks.comparing.learners import BASELINES, METHODS, RAW_PIXELS
    from benchmarks.comparing.recipe import RECIPES, Recipe, new_backbone, open_images
    from benchmarks.comparing.runs import Place, Run, counted, finish, unpack
    from benchmarks.comparing.table import measure_cost, passes_of, saved_cost, table
    from benchmarks.measuring.arguments import positive, settle_device_and_folder
    from benchmarks.measuring.tables import format_seconds
except ModuleNotFoundError as missing:
    print(f"methods.py: error: {missing}: pip install -e '.[examples,bench,peers,faiss-cpu]'", file=sys.stderr)
    sys.exit(2)

FACTORS = (0.25, 0.5, 1.0, 2.0)  # the sweep: factors of the recipe's learning rate, the same for all methods
CHOSEN_BY = "nn20"
MOST_RAW_VALUES = 2 * 10**8  # limit for evaluating raw pixels, which takes 4 bytes for each value
COST_ROUNDS = 50
OWN_FLAGS = ("dataset", "k", "weak", "strong", "steps", "sweep_steps")  # fields of a recipe without a plain flag


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        recipe = recipe_of(args)
        args.out = args.out or Path("runs") / f"methods-{recipe.dataset}"
        settle_device_and_folder(parser, args)
        place, shape = prepare(args, recipe)
        if args.cost:
            return cost(args, recipe, place, shape)
        unpack(place)
        compare(args, recipe, place, shape)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except RuntimeError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped; the same command continues with the missing runs\n")
    return 0


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the data set's recipe, with the given flags in place of its values.

    Raises:
        ValueError: if flags contradict each other.
    """
    dataset = args.dataset or ("folder" if args.data else "digits")
    if dataset == "digits" and args.data:
        raise ValueError("--data goes with --dataset folder, fashion-mnist or cifar10; the digits need none")
    if dataset != "digits" and not args.data:
        raise ValueError(f"--dataset {dataset} needs --data DIR")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be above 0 and finite, got {args.lr}")
    given = {name: value for name, value in vars(args).items() if name in RECIPE_FLAGS and value is not None}
    recipe = replace(RECIPES[dataset], **given)
    if args.steps:
        recipe = replace(recipe, steps=args.steps, sweep_steps=max(1, args.steps // 5))
    return recipe


def prepare(args: argparse.Namespace, recipe: Recipe) -> tuple[Place, tuple[int, int, int]]:
    """Check the images and the backbone; return the place of the runs, and the shape of an image.

    Raises:
        ValueError: if there are too few images, the backbone does not accept them, or a method lacks a package.
    """
    options: dict[str, Any] = {"seed": 0, "device": torch.device(args.device), "workers": 0}
    if "deepcluster-v2" in args.methods and find_spec("faiss") is None:
        raise ValueError("deepcluster-v2 needs FAISS: pip install faiss-cpu, or leave it out of --methods")
    source = open_images(recipe, args.data, "w/s", validation=False, **options)
    if source.train_size < recipe.batch_size:
        raise ValueError(f"--batch-size {recipe.batch_size} is more than the {source.train_size} training images")
    shape = source.image_shape
    new_backbone(recipe, shape)
    workers = max(1, (os.cpu_count() or 1) // args.jobs)
    return Place(args.out, args.data, args.device, workers, counted(source)), shape


def compare(args: argparse.Namespace, recipe: Recipe, place: Place, shape: tuple[int, int, int]) -> None:
    """Sweep, train, and print the table."""
    names = list(dict.fromkeys(args.methods))
    if RAW_PIXELS in names and (values := place.images["train"] * math.prod(shape)) > MOST_RAW_VALUES:
        print(f"raw pixels are left out: the training images have {values:,} values\n")
        names.remove(RAW_PIXELS)
    trained = [name for name in names if name not in BASELINES]
    rates, how = dict.fromkeys(trained, args.lr), f"{args.lr:g} for all, as given." if args.lr else ""
    passes = {name: passes_of(name, recipe, shape) for name in names}  # raises if a method cannot handle these images
    if args.lr is None and trained:
        swept = {
            name: [Run(name, recipe.lr * factor, recipe.sweep_steps, 0, True, recipe) for factor in FACTORS]
            for name in trained
        }
        validation = replace_images(args, recipe, place)
        announce("sweep", [run for of_method in swept.values() for run in of_method], validation)
        finish([run for of_method in swept.values() for run in of_method], validation, args.jobs)
        print(sweep_table(swept, validation))
        rates, how = chosen(swept, validation)
        for name in [name for name in trained if name not in rates]:
            print(f"{METHODS[name].title} diverged at all of these learning rates: left out, give a lower --lr\n")
            names.remove(name)
    if args.sweep:
        return
    runs: dict[str, list[Run]] = {}
    for name in names:
        steps = recipe.steps
        if args.budget == "passes" and name in trained:
            steps = max(1, round(recipe.steps / passes[name][0]))
        lr, steps = (rates[name], steps) if name in trained else (0.0, 0)
        seeds = 1 if name == RAW_PIXELS else args.seeds  # not random
        runs[name] = [Run(name, lr, steps, seed, False, recipe) for seed in range(seeds)]
    wanted = [run for of_method in runs.values() for run in of_method]
    announce("comparison", wanted, place)
    finish(wanted, place, args.jobs)
    records = {name: [place.record_of(run) or {} for run in of_method] for name, of_method in runs.items()}
    text = table(runs, records, passes, saved_cost(place.folder, recipe), how)
    (place.folder / ("table.md" if args.budget == "steps" else "table-passes.md")).write_text(text)
    lines = [json.dumps(json.loads(path.read_text())) for path in sorted((place.folder / "runs").glob("*.json"))]
    (place.folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
    print(f"\n{text}")


def replace_images(args: argparse.Namespace, recipe: Recipe, place: Place) -> Place:
    """Return the place of the sweep, which has other training and test images."""
    options: dict[str, Any] = {"seed": 0, "device": torch.device(args.device), "workers": 0}
    return replace(place, images=counted(open_images(recipe, args.data, "w/s", validation=True, **options)))


def announce(what: str, runs: list[Run], place: Place) -> None:
    """Print how many runs there are, and how many are already finished."""
    before = sum(place.record_of(run) is not None for run in runs)
    print(f"{what}: {len(runs)} runs, {before} of them finished before", flush=True)


def chosen(swept: dict[str, list[Run]], place: Place) -> tuple[dict[str, float], str]:
    """Return the best learning rate of each method that did not always diverge, and a text on how it was found."""
    rates, edges = {}, []
    for name, runs in swept.items():
        scores = {run.lr: value for run in runs if (value := score_of(run, place)) is not None}
        if not scores:
            continue
        rates[name] = max(scores, key=lambda lr: scores[lr])
        edges += [METHODS[name].title] if rates[name] in (runs[0].lr, runs[-1].lr) else []
    first = next(iter(swept.values()))[0]
    how = (
        f"each method's best of {', '.join(f'{first.recipe.lr * factor:g}' for factor in FACTORS)} by 20-NN on "
        f"{place.images['val']:,} training images held out, one seed, {first.steps:,} steps."
    )
    return rates, how + (f" The best is at an end of these for {', '.join(edges)}." if edges else "")


def score_of(run: Run, place: Place) -> float | None:
    """Return the score by which a run of the sweep is chosen; None if it diverged."""
    found = place.record_of(run)
    value: float | None = found["results"].get(CHOSEN_BY) if found else None
    return value


def sweep_table(swept: dict[str, list[Run]], place: Place) -> str:
    """Return the sweep as Markdown."""
    first = next(iter(swept.values()))
    lines = ["| 20-NN, % | " + " | ".join(f"lr {run.lr:g}" for run in first) + " |", "|" + " --- |" * (len(first) + 1)]
    for name, runs in swept.items():
        scores = [score_of(run, place) for run in runs]
        cells = ["diverged" if score is None else f"{100 * score:.1f}" for score in scores]
        lines.append("| " + " | ".join([METHODS[name].title, *cells]) + " |")
    return "\n".join(lines) + "\n"


def cost(args: argparse.Namespace, recipe: Recipe, place: Place, shape: tuple[int, int, int]) -> int:
    """Measure the cost of a step of each method, print it, and save it for the table."""
    names = [name for name in dict.fromkeys(args.methods) if name not in BASELINES]
    found = measure_cost(names, recipe, shape, torch.device(args.device), COST_ROUNDS)
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, costs in found["methods"].items():
        print(f"{METHODS[name].title}: {format_seconds(costs['seconds']['median'])} a step")
    return 0


RECIPE_FLAGS = tuple(field.name for field in fields(Recipe) if field.name not in OWN_FLAGS and field.name != "lr")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--dataset", choices=tuple(RECIPES), help="data set (default: folder with --data, otherwise digits)"
    )
    parser.add_argument("--data", default="", help="folder of the images (not for the digits)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"methods to compare: {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument("--seeds", type=positive, default=3, help="runs per method (default: 3)")
    parser.add_argument("--steps", type=positive, help="steps per run; in the sweep, a fifth (default: the recipe's)")
    parser.add_argument(
        "--budget",
        choices=("steps", "passes"),
        default="steps",
        help="what is the same for all methods: steps, or passes through the encoder (default: steps)",
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, help="parallel runs; if more than one, each uses one thread (default: 1)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/methods-DATASET)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--lr", type=float, help="one learning rate for all methods, without a sweep")
    which.add_argument("--sweep", action="store_true", help="run only the sweep of learning rates")
    which.add_argument("--cost", action="store_true", help="only measure the time and memory of a step (idle machine)")
    settings = parser.add_argument_group("settings that replace the recipe's")
    for name in RECIPE_FLAGS:
        kind = {"arch": str, "stem": str, "momentum": float, "weight_decay": float}.get(name, positive)
        settings.add_argument("--" + name.replace("_", "-"), type=kind)
    return parser


if __name__ == "__main__":
    sys.exit(main())
