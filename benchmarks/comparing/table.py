"""What `methods.py` prints: the table of a comparison, with the paper's results and the cost of a step."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import ttest_rel
from torch import Tensor, nn

from benchmarks.comparing.core import Method
from benchmarks.comparing.learners import BASELINES, METHODS, UNTRAINED
from benchmarks.comparing.recipe import Recipe, new_backbone
from benchmarks.comparing.runs import Run, optimizer_of, step_of
from benchmarks.measuring.measure import describe_environment, in_words, machine_of, quantiles, time_interleaved
from benchmarks.measuring.memory import extra_memory_cpu, extra_memory_cuda
from benchmarks.measuring.tables import format_seconds
from pipeline.evaluation.scores import COLUMNS
from pipeline.figures.paper import spread_of

# Table 2 of the MSF paper: ResNet50 on ImageNet, 200 epochs where given; linear, 1-NN and 20-NN, percent.
PAPER: dict[str, tuple[float | None, float | None, float | None]] = {
    "msf": (72.4, 62.0, 64.9),
    "msf-ss": (71.4, 60.6, 64.0),
    "msf-ww": (66.3, 54.6, 57.4),
    "byol": (70.6, None, None),
    "byol-asym": (69.3, 55.0, 59.2),
    "simclr": (68.3, None, None),
    "moco-v2": (67.5, 50.9, 54.3),
    "simsiam": (70.0, None, None),
    "swav": (69.1, None, None),
    "deepcluster-v2": (70.2, None, None),
    "isd": (69.8, 59.2, 62.0),
    "co2": (68.0, None, None),
    UNTRAINED: (5.1, 1.5, 2.0),
}
ORDER = ("linear", "nn1", "nn20", "one_label", "ten_labels", "purity")
PAIRS = (("msf", "byol-asym-ws"), ("msf-ss", "byol-asym"))  # k = 5 and k = 1 on the same views
OTHER_BUDGETS = {"deepcluster-v2": "400 epochs"}
NOT_HERE = {
    "SeLa-v2": (
        "67.2 linear after 400 epochs",
        "it assigns the whole data set by optimal transport; SwAV does the same batch by batch",
    ),
    "CompRess": (
        "71.9 linear, 63.3 and 66.8 NN after 1000 + 130 epochs",
        "it distills a larger network that was trained before",
    ),
    "InvP": (
        "71.3 linear after 800 epochs",
        "it keeps a bank of all images and walks a graph of their neighbors; its code is the authors' alone",
    ),
    "PIRL": (
        "57.2 top-5 with 1 % of the labels after 800 epochs",
        "it needs jigsaw puzzles of each image in addition to views",
    ),
}
PAPER_NOTE = (
    "The paper's columns are its Table 2: ResNet50 on ImageNet, 200 epochs, in percent. There SimCLR, SwAV, "
    "DeepCluster-v2 and BYOL had batches of 4096, the others 256. Its Table 3 trains a linear layer with 1 % and 10 % "
    "of the labels; the columns here are 1-NN from 1 and 10 labels per class, so the two are not set side by side."
)


def table(
    runs: dict[str, list[Run]],
    records: dict[str, list[dict[str, Any]]],
    passes: dict[str, tuple[int, int]],
    cost: dict[str, Any] | None,
    rates: str,
) -> str:
    """Return a comparison as Markdown.

    Args:
        runs: the runs of each method, one per seed.
        records: their records.
        passes: how often each method sends an image through an encoder in a step, with and without gradient.
        cost: the result of `measure_cost`, or None.
        rates: a sentence that says how the learning rates were chosen.
    """
    measured = [key for key in ORDER if any(key in record["results"] for of in records.values() for record in of)]
    headings = ["", "views", "lr", "steps", *(COLUMNS[key] for key in measured), "passes", "step", "extra memory"]
    headings += ["paper: linear", "paper: 1-NN", "paper: 20-NN"]
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    for name, of_method in runs.items():
        first, entry = of_method[0], METHODS[name]
        trained = name not in BASELINES
        cells = [entry.title, *([entry.augmentation, f"{first.lr:g}", f"{first.steps:,}"] if trained else ["–"] * 3)]
        found = [record["results"] for record in records[name] if record["results"]]
        cells += [spread_of([row[key] for row in found if key in row]) for key in measured]
        cells.append("{} + {}".format(*passes[name]) if trained else "–")
        costs = (cost or {}).get("methods", {}).get(name)
        cells += [format_seconds(costs["seconds"]["median"]), _in_mb(costs["bytes"])] if costs else ["–", "–"]
        cells += ["–" if value is None else f"{value:.1f}" for value in PAPER.get(name, (None,) * 3)]
        lines.append("| " + " | ".join(cells) + " |")
    parts = ["\n".join(lines), "\n".join(_notes(runs, records, cost, rates))]
    return "\n\n".join([*parts, *paired(records)]) + "\n"


def _notes(
    runs: dict[str, list[Run]], records: dict[str, list[dict[str, Any]]], cost: dict[str, Any] | None, rates: str
) -> list[str]:
    (first, *_), all_records = next(iter(runs.values())), [record for of in records.values() for record in of]
    recipe, images = first.recipe, all_records[0]["images"]
    seeds = max(len(of_method) for of_method in runs.values())
    steps = sorted({run.steps for of in runs.values() for run in of if run.steps})
    minutes = [record["training_seconds"] / 60 for record in all_records if record["run"]["steps"]]
    between = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}" if steps else "no"
    lines = [
        f"Highest means: {_best(records)}. Differences within the standard deviations say nothing.",
        f"Percent, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}, on {images['val']:,} test images. "
        f"{recipe.dataset}: {images['train']:,} training images of {images['classes']} classes, {recipe.image_size} "
        f"pixels, {recipe.arch}; {between} steps of {recipe.batch_size} images"
        + (f", {steps[-1] * recipe.batch_size:,} images seen at most" if steps else "")
        + (f"; {min(minutes):.1f} to {max(minutes):.1f} minutes of training per run." if minutes else "."),
        f"Trained on {trained_on(all_records)}.",
        f"Learning rates: {rates}",
        "Passes: how often a step sends each image through an encoder, with gradient + without. The paper counts a "
        "method with two of the former as 2x FLOPS.",
        "linear: logistic regression on frozen features; 1-NN and 20-NN: cosine similarity; labels per class: 1-NN "
        "with this many labeled images per class, mean of 10 draws; purity: share of the "
        f"{recipe.k - 1} nearest training images with the same label.",
        PAPER_NOTE,
    ]
    if cost is not None:
        lines.append(
            f"Step and extra memory: {in_words(cost['environment'])} Views and work between epochs are not included."
        )
    lines += [
        f"{METHODS[name].title}: {count} of {len(of)} runs diverged and {'is' if count == 1 else 'are'} left out."
        for name, of in records.items()
        if (count := sum(record["diverged"] for record in of))
    ]
    lines += [f"Not here: {name} (in the paper {found}): {why}." for name, (found, why) in NOT_HERE.items()]
    lines += [
        f"{METHODS[name].title}: the paper's row had {budget}."
        for name, budget in OTHER_BUDGETS.items()
        if name in runs
    ]
    return [f"- {line}" for line in lines]


def trained_on(records: list[dict[str, Any]]) -> str:
    """Return the machines that runs were trained on, with the number of runs, most runs first."""
    counts = Counter(
        f"{machine_of(found)}, PyTorch {found['versions']['torch']}"
        for found in (record["environment"] for record in records)
    )
    return "; ".join(f"{machine} ({count} run{'s' * (count > 1)})" for machine, count in counts.most_common())


def paired(records: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Compare k = 5 with k = 1 on the same views, seed by seed. Return a sentence and a table, or [] without pairs.

    Runs with the same seed start from the same weights and see the same views in the same order, so the difference is
    free of the variation between seeds. The p-value is that of a two-sided paired t-test.
    """
    lines = []
    for one, other in PAIRS:
        both = [
            (first["results"], second["results"])
            for first, second in zip(records.get(one, []), records.get(other, []), strict=False)
            if first["results"] and second["results"]
        ]
        if len(both) < 2:
            continue
        cells = []
        for key in ORDER:
            first, second = ([results[key] for results in column] for column in zip(*both, strict=True))
            differences = [100 * (a - b) for a, b in zip(first, second, strict=True)]
            p = float(ttest_rel(first, second).pvalue)
            ahead = f"{sum(difference > 0 for difference in differences)} of {len(both)}"
            cells.append(f"{mean(differences):+.1f} ± {stdev(differences):.1f}, {ahead}, p = {p:.2g}")
        lines.append("| " + " | ".join([f"{METHODS[one].title} − {METHODS[other].title}", *cells]) + " |")
    if not lines:
        return []
    heading = "| | " + " | ".join(COLUMNS[key] for key in ORDER) + " |\n|" + " --- |" * (len(ORDER) + 1)
    sentence = (
        "Difference between k = 5 and k = 1 on the same views, in points, paired by seed: mean ± standard deviation, "
        "the number of seeds in which k = 5 is ahead, and the p-value of a two-sided paired t-test. Each method uses "
        "its own best learning rate."
    )
    return [sentence, "\n".join([heading, *lines])]


def _best(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return which method has the highest mean in each column but purity."""
    said = []
    for key in ORDER[:-1]:
        values = {
            name: [record["results"][key] for record in of if key in record["results"]] for name, of in records.items()
        }
        means = {name: mean(found) for name, found in values.items() if found}
        if means:
            name = max(means, key=lambda name: means[name])
            said.append(f"{METHODS[name].title} by {COLUMNS[key]} ({spread_of(values[name])})")
    return ", ".join(said) or "none, all runs diverged"


def _in_mb(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:.0f} MB"


def passes_of(name: str, recipe: Recipe, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Count how often one step sends an image through an encoder, with and without gradient, on a batch of noise."""
    if name in BASELINES:
        return 0, 0
    torch.manual_seed(0)
    backbone, features = new_backbone(recipe, image_shape)
    method = METHODS[name].build(backbone, features, recipe)
    counts = [0, 0]

    def counted(module: nn.Module, inputs: Any, output: Any) -> None:
        counts[0 if torch.is_grad_enabled() else 1] += 1

    encoders = [method.encoder] + ([method.target.module] if method.target is not None else [])
    for encoder in encoders:
        encoder.get_submodule("backbone").register_forward_hook(counted)
    first, second = torch.randn(2, 8, *image_shape)
    method.train().loss(first, second, torch.arange(8))
    return counts[0], counts[1]


def measure_cost(
    names: list[str], recipe: Recipe, image_shape: tuple[int, int, int], device: torch.device, rounds: int
) -> dict[str, Any]:
    """Time a step of each method, one after another in turns, and measure its extra memory.

    The views are noise made in advance, because drawing views costs the same for all methods.
    """
    calls: dict[str, Callable[[int], object]] = {name: _stepping(name, recipe, image_shape, device) for name in names}
    for call in calls.values():
        for _ in range(3):
            call(0)
    times = time_interleaved(calls, dict.fromkeys(calls, rounds), device)
    found: dict[str, Any] = {}
    for name, call in calls.items():
        extra = (
            extra_memory_cuda(partial(call, 0), device) if device.type == "cuda" else extra_memory_cpu(partial(call, 0))
        )
        found[name] = {
            "seconds": quantiles(times[name])._asdict(),
            "bytes": mean(extra.bytes) if extra.bytes else None,
            "rounds": rounds,
        }
    return {"methods": found, "recipe": asdict(recipe), "environment": describe_environment(device)}


def _stepping(
    name: str, recipe: Recipe, image_shape: tuple[int, int, int], device: torch.device
) -> Callable[[int], object]:
    torch.manual_seed(0)
    backbone, features = new_backbone(recipe, image_shape)
    method: Method = METHODS[name].build(backbone, features, recipe).train()
    method = method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Run(name, recipe.lr / 100, 1, 0, False, recipe)
    optimizer = optimizer_of(method, run)
    first, second = torch.randn(2, recipe.batch_size, *image_shape).to(device)
    ids = torch.arange(recipe.batch_size, device=device)
    batches: Callable[[], tuple[Tensor, Tensor, Tensor]] = lambda: (first, second, ids)  # noqa: E731
    return lambda number: step_of(method, optimizer, *batches())


def saved_cost(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the saved result of `measure_cost`, unless it is for another recipe."""
    path = folder / "cost.json"
    if not path.exists():
        return None
    cost: dict[str, Any] = json.loads(path.read_text())
    return cost if cost["recipe"] == json.loads(json.dumps(asdict(recipe))) else None
