"""The plot of knn_cost.py: time of the search at left, its share of a training step beside the paper's at right."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measure import Record
from benchmarks.tables import PAPER_DIM, PAPER_TABLE_1, format_seconds

COLOURS = {"faiss": "#4477aa", "torch": "#66ccee", "triton": "#228833", "authors": "#cc6677", "paper": "#999999"}
LABELS = {"authors": "authors' step,\nwith backward", "paper": "paper's\nTable 1"}
BAR_WIDTH, GAP = 0.8, 0.7


class Bar(NamedTuple):
    """One bar: whose, how high, its 20–80 % line, and the number above it."""

    method: str
    value: float
    spread: tuple[float, float] | None
    text: str


def plot_knn_cost(records: list[Record], unmeasured: dict[str, str], path: Path) -> None:
    """Draw both panels from the records, and write a PNG."""
    timed = [record for record in records if record.name in ("search", "authors")]
    sizes = sorted({record.parameters["rows"] for record in timed})
    sizes_timed = {size: [r for r in timed if r.parameters["rows"] == size] for size in sizes}
    bars = sum(len(group) + 1 for group in sizes_timed.values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(max(11.0, 2.0 * bars + 1), 5.6))
    p, environment = timed[0].parameters, timed[0].environment
    _draw_times(left, sizes_timed)
    _draw_shares(right, sizes_timed, unmeasured)
    left.set_title(f"Search of a batch of {p['batch']} (D = {p['dim']}, k = {p['k']}, {p['dtype']} rows)", fontsize=11)
    right.set_title("Search / ResNet50 training step of the same batch", fontsize=11)
    figure.suptitle(
        f"Cost of the nearest neighbours: {environment['device']}, {environment['threads']} threads, "
        f"{environment['date'][:10]}",
        fontsize=13,
    )
    keys = [key.rpartition(" ") for key in unmeasured if not key.startswith("memory")]
    missing = [f"{method} at N = {int(size):,}" for method, _, size in keys if size in map(str, sizes)]
    if missing:
        figure.text(0.01, 0.01, f"Not measured in this run: {', '.join(missing)}.", fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_times(axes: Any, sizes_timed: dict[int, list[Record]]) -> None:
    groups = {
        size: [Bar(r.parameters["method"], r.median, (r.q20, r.q80), format_seconds(r.median)) for r in group]
        for size, group in sizes_timed.items()
    }
    values = [value for group in groups.values() for _, value, *_ in group]
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 4, max(values) * 3)
    axes.set_ylabel("seconds (log scale), median; line: 20–80 %")
    _draw_groups(axes, groups)


def _draw_shares(axes: Any, sizes_timed: dict[int, list[Record]], unmeasured: dict[str, str]) -> None:
    groups: dict[int, list[Bar]] = {}
    for size, group in sizes_timed.items():
        bars: list[Bar] = []
        if size in PAPER_TABLE_1 and group[0].parameters["dim"] == PAPER_DIM:
            percent = PAPER_TABLE_1[size].percent_of_training_time
            bars.append(Bar("paper", percent, None, f"{percent:.2f} %"))
        for record in group:
            if "share_of_resnet50_step" in record.derived:
                percent = 100 * record.derived["share_of_resnet50_step"]
                bars.append(Bar(record.parameters["method"], percent, None, f"{percent:.2f} %"))
        groups[size] = bars
    values = [value for group in groups.values() for _, value, *_ in group]
    axes.set_ylabel("% of the step")
    if values:
        axes.set_ylim(0, 1.18 * max(values))
        _draw_groups(axes, groups)
    else:
        axes.set_xticks([])
    if "resnet50_step" in unmeasured:
        reason = f"ResNet50 step unmeasured:\n{unmeasured['resnet50_step']}"
        axes.text(0.5, 0.9, reason, transform=axes.transAxes, ha="center", va="top", fontsize=9)


def _draw_groups(axes: Any, groups: dict[int, list[Bar]]) -> None:
    """Draw one group of labelled bars a size, the size below it."""
    places, names = [], []
    x = 0.0
    for size, group in groups.items():
        first = x
        for method, value, spread, text in group:
            axes.bar(x, value, BAR_WIDTH, color=COLOURS.get(method, "#aa3377"))
            if spread is not None:
                axes.vlines(x, *spread, color="black", linewidth=1.2)
            top = value if spread is None else max(value, spread[1])
            axes.annotate(text, (x, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9)
            places.append(x)
            names.append(LABELS.get(method, f"msf_core,\n{method}"))
            x += 1
        if group:
            middle = (first + x - 1) / 2
            text = f"N = {size:,}"
            axes.text(
                middle, -0.17, text, transform=axes.get_xaxis_transform(), ha="center", va="top", fontweight="bold"
            )
        x += GAP
    axes.set_xticks(places, names, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
