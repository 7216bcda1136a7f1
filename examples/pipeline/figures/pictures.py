"""The pictures of a run: its metrics over the epochs, and the nearest neighbors of some images."""

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

Row = dict[str, Any]
PANELS = (
    ("loss", "loss", "0 to 4; falls as views agree"),
    ("purity", "purity of neighbors 2 to k", "share with the query's label"),
    ("nn20", "20-NN accuracy", "on the test images"),
    ("spread", "spread of embeddings", "near 1: healthy, 0: collapsed"),
    ("rank", "effective rank of embeddings", "1: collapsed to a line"),
    ("similarity", "similarity of neighbors 2 to k", "mean cosine with the target"),
    ("age", "age of neighbors 2 to k", "mean, in steps"),
    ("difference", "difference of the two views", "in standard deviations of their pixels"),
)
LEGEND = (
    "Each point of a line is the mean over the steps of an epoch; 20-NN is measured after some epochs only. "
    "Few points are shown as dots. The number in a heading is that of the last point."
)
# frames: the query's class, another one, unknown
FRAMES: dict[bool | None, tuple[str, int, str]] = {
    True: ("tab:green", 3, "green: the query's class"),
    False: ("tab:red", 3, "red and crossed: another class"),
    None: ("0.6", 1, "gray: class unknown"),
}
MOST_DOTS = 25  # curves with fewer points than this get a dot at each


def wrapped(text: str, inches: float, size: float) -> str:
    """Return the text with its lines broken so that none is wider than ``inches`` at a font size in points."""
    columns = max(12, int(inches * 72 / (0.6 * size)))  # the mean character of the default font is narrower than 0.6 em
    return "\n".join(textwrap.fill(line, columns) for line in text.splitlines())


def write_picture(figure: Figure, path: Path, dpi: int) -> Figure:
    """Write a picture completely or not at all, and return its figure."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=dpi, format="png")
    temporary.replace(path)
    return figure


def draw_curves(path: Path, history: list[Row], title: str) -> Figure:
    """Draw the `PANELS` over the epochs."""
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(16, 7.6), layout=ConstrainedLayoutEngine(hspace=0.08, wspace=0.04))
        figure.suptitle(wrapped(title, 15.5, 13))
        figure.supxlabel(LEGEND, fontsize=11, color="0.3")
        for axes, (name, heading, meaning) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
            points = [(row["epoch"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
            last = f": {_rounded(points[-1][1])}" if points else ""
            axes.set_title(f"{heading}{last}", fontsize=12, pad=24)
            axes.text(0.5, 1.03, meaning, transform=axes.transAxes, ha="center", color="0.4", fontsize=10)
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            if not points:
                axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color="0.4")
                axes.set(xticks=[], yticks=[])
                continue
            axes.ticklabel_format(style="plain", useOffset=False)
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)
            axes.plot(*zip(*points, strict=True), color="C0", lw=2, marker="o" if len(points) < MOST_DOTS else "", ms=4)
            if points[0][0] == points[-1][0]:
                axes.set_xlim(points[0][0] - 0.9, points[0][0] + 0.9)  # a single tick, at the epoch
            if name == "spread":
                axes.set_ylim(0, 1.1)
                axes.axhline(1, color="0.5", ls=":", lw=1)
        return write_picture(figure, path, dpi=100)


def draw_neighbors(path: Path, queries: np.ndarray, rows: list[Row], title: str) -> Figure:
    """Draw queries with their nearest neighbors at some epochs, as in the paper's Fig. 2.

    Args:
        path: path of the picture.
        queries: images [Q, H, W, 3] in [0, 1].
        rows: for each epoch shown, "title", "images" [Q, n, H, W, 3], and "right" [Q, n]: whether the neighbor has the
            query's label, or None if a label is unknown.
        title: title of the picture.
    """
    count, n = rows[0]["images"].shape[:2]
    side, pitch, gap = 0.64, 1.12, 0.4  # in inches; the other sizes are in units of it
    headings = [wrapped(row["title"], max(1.3, n * pitch * side), 10) for row in rows]
    column = max(n * pitch, 2.2)  # a heading is wider than one picture
    wide = pitch + len(rows) * (gap + column)
    inches = max(side * wide, 5.2)
    seen = {right for row in rows for of_query in row["right"] for right in of_query}
    marks = "; ".join(words for right, (_, _, words) in FRAMES.items() if right in seen)
    heading = wrapped(f"{title}\n{marks}", inches, 11)
    lines = max(text.count("\n") for text in headings) + 1
    top = 0.35 + 0.4 * lines
    high = side * (count * pitch + top) + 0.2 * (heading.count("\n") + 2)
    figure = Figure(figsize=(inches, high), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    axes = figure.subplots()  # one axes for all pictures: one for each would take seconds
    for i in range(count):
        _show(axes, queries[i], 0, i * pitch, "0.2", 1)
    axes.text(0.5, -0.3, "query", ha="center", fontsize=10)
    for j, row in enumerate(rows):
        left = pitch + gap + j * (gap + column)
        axes.text(left + n * pitch / 2, -0.3, headings[j], ha="center", fontsize=10)
        for i, m in np.ndindex(count, n):
            right = row["right"][i][m]
            color, width, _ = FRAMES[right]
            x, y = left + m * pitch, i * pitch
            _show(axes, row["images"][i, m], x, y, color, width)
            if right is False:
                cross = axes.text(x + 0.08, y + 0.08, "✗", va="top", color=color, fontsize=15, weight="bold")
                cross.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set(xlim=(-0.1, wide), ylim=(count * pitch, -top), aspect="equal")
    axes.axis("off")
    return write_picture(figure, path, dpi=130)


def _show(axes: Any, image: np.ndarray, x: float, y: float, color: str, width: int) -> None:
    axes.imshow(image, extent=(x, x + 1, y + 1, y), interpolation="nearest")
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=width))


def _rounded(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
