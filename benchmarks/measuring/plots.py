"""The plots of knn_cost.py: time by number of rows in the bank, and the share of a training step."""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measuring.measure import Record
from benchmarks.measuring.tables import (
    PAPER_DIM,
    PAPER_TABLE_1,
    format_seconds,
    is_authors,
    is_ours,
    label,
    timed_searches,
)

COLORS = {
    "auto": "#117733",
    "torch": "#66ccee",
    "faiss": "#4477aa",
    "triton": "#aa3377",
    "authors": "#cc6677",
    "product and top-k": "#ddaa33",
    "bare faiss.knn": "#222255",
    "lightly bank": "#bb5566",
    "flashlib": "#997700",
    "cuVS": "#44aa99",
}
PAPER_COLOR, OTHER_COLOR = "#999999", "#777777"
LABEL_GAP = 1.35  # smallest ratio between the labels at the ends of the lines


def plot_times(records: list[Record], path: Path) -> None:
    """Plot time against N, both axes logarithmic, for the D, batch and k with the most sizes N, as a PNG."""
    groups = timed_searches(records)
    (chosen, _), *_ = Counter(sizes[1:] for sizes in groups).most_common(1)
    line = {sizes[0]: group for sizes, group in sorted(groups.items()) if sizes[1:] == chosen}
    figure, axes = plt.subplots(figsize=(10.5, 6.2))
    ends: list[tuple[float, float, str, str]] = []
    methods = dict.fromkeys(r.parameters["method"] for group in line.values() for r in group)
    for method in methods:
        found = [r for group in line.values() for r in group if r.parameters["method"] == method]
        x, y = [r.parameters["rows"] for r in found], [r.median for r in found]
        color = COLORS.get(method, OTHER_COLOR)
        style = "-" if is_ours(found[0]) else "--"
        axes.plot(x, y, style, marker="o", markersize=5, color=color, linewidth=2.4 if method == "auto" else 1.5)
        axes.vlines(x, [r.q20 for r in found], [r.q80 for r in found], color=color, linewidth=3, alpha=0.4)
        text = f"{label(found[0])}: {format_seconds(y[-1])}"
        if x[-1] == max(line):
            ends.append((x[-1], y[-1], text, color))
        else:
            slowest = max(line[x[-1]], key=lambda record: record.median) is found[-1]
            axes.annotate(
                text,
                (x[-1], y[-1]),
                xytext=(-8, 5) if slowest else (8, -3),
                textcoords="offset points",
                ha="right" if slowest else "left",
                va="bottom" if slowest else "top",
                color=color,
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},  # above the other lines
            )
    x = list(line)
    floor = [min(r.derived["floor"] for r in group if not is_authors(r)) for group in line.values()]
    axes.fill_between(x, floor, [min(floor) / 1e3] * len(x), color="#dddddd", zorder=0)
    axes.plot(x, floor, color="#888888", linewidth=1.2)
    ends.append((x[-1], floor[-1], f"floor of this machine: {format_seconds(floor[-1])}", "#666666"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(min(floor) / 2, 2.5 * max(r.q80 for group in line.values() for r in group))
    axes.set_xticks(x, [f"{rows:,}" for rows in x])
    axes.minorticks_off()
    axes.set_xlabel("rows of the bank, N")
    axes.set_ylabel("seconds per batch (log scale), median; bar: 20–80 %")
    _label_ends(axes, ends, max(x))
    first = next(iter(line.values()))[0]
    p, environment = first.parameters, first.environment
    axes.set_title(
        f"Search of a batch of {p['batch']}, D = {p['dim']}, k = {p['k']}, {p['dtype']} rows\n"
        f"{environment['device']}, {environment['threads']} threads, {environment['date'][:10]}",
        fontsize=12,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#eeeeee")
    _save(figure, path)


def plot_shares(records: list[Record], unmeasured: dict[str, str], path: Path) -> None:
    """Plot the search's share of a ResNet50 step next to the paper's figures, as a PNG."""
    groups = {
        sizes: [record for record in group if "share_of_resnet50_step" in record.derived]
        for sizes, group in timed_searches(records).items()
        if sizes[0] in PAPER_TABLE_1 and sizes[1:] == (PAPER_DIM, 256, 5)
    }
    figure, axes = plt.subplots(figsize=(11, 0.42 * sum(len(g) + 2 for g in groups.values()) + 2.2))
    bars: list[tuple[str, float, str]] = []
    places: list[float] = []
    place = 0.0
    for sizes, group in sorted(groups.items(), reverse=True):
        axes.text(0, place, f"N = {sizes[0]:,}", fontweight="bold", va="center", fontsize=11)
        of_paper = PAPER_TABLE_1[sizes[0]].percent_of_training_time
        shares = [
            (label(r), 100 * r.derived["share_of_resnet50_step"], COLORS.get(r.parameters["method"], OTHER_COLOR))
            for r in group
        ]
        for bar in [("the paper, Table 1", of_paper, PAPER_COLOR), *shares]:
            place += 1
            bars.append(bar)
            places.append(place)
        place += 1.6
    values = [value for _, value, _ in bars]
    axes.barh(places, values, color=[color for *_, color in bars], height=0.75)
    for at, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.3g} %", (value, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [name for name, *_ in bars], fontsize=9)
    axes.set_ylim(max(places, default=1) + 1, -0.9)
    axes.set_xlim(0, 1.12 * max(values, default=1))
    axes.set_xlabel("% of a ResNet50 training step of the same batch (online forward and backward, target forward)")
    environment = records[0].environment
    axes.set_title(
        "Share of the nearest-neighbor search in a training step (D = 512, batch 256, k = 5)\n"
        f"{environment['device']}, {environment['threads']} threads, {environment['date'][:10]}",
        fontsize=12,
    )
    note = f"ResNet50 step unmeasured: {unmeasured['resnet50_step']}" if "resnet50_step" in unmeasured else ""
    if not groups:
        note = "None of the paper's sizes was measured in this run."
    axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _label_ends(axes: Any, ends: list[tuple[float, float, str, str]], right: float) -> None:
    """Label each line at its right end; move labels apart if they are close."""
    last = 0.0
    for x, y, text, color in sorted(ends, key=lambda end: end[1]):
        at = max(y, last * LABEL_GAP)
        last = at
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6}
        axes.annotate(text, (x, y), xytext=(right * 1.25, at), fontsize=9, color=color, va="center", arrowprops=line)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
