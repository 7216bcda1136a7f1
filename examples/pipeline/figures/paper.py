"""The paper's figures, drawn from our own measurements."""

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.figures.pictures import wrapped, write_picture

Series = dict[str, list[list[float]]]  # name -> values of all seeds, for each place on the x axis
STYLE: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
WIDTH = 4.2  # size of a panel, in inches
DPI = 110


def spread_of(values: list[float]) -> str:
    """Return the mean and standard deviation over the seeds as text, in percent."""
    finite = [100 * value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    return f"{mean(finite):.1f}" + (f" ± {stdev(finite):.1f}" if len(finite) > 1 else "")


def draw_against(path: Path, xs: list[float], series: Series, title: str, x_label: str, logarithmic: bool) -> Figure:
    """Draw accuracies against a number, each seed as a point and their mean as a line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * len(series), 4.5), layout="constrained")
        figure.suptitle(wrapped(title, WIDTH * len(series), 13))
        figure.supxlabel("dot: a seed; line: the mean of the seeds", fontsize=10, color="0.3")
        for axes, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(series))), series.items(), strict=True):
            for x, of_seeds in zip(xs, values, strict=True):
                axes.plot([x] * len(of_seeds), [100 * value for value in of_seeds], "o", color="C0", alpha=0.35, ms=5)
            axes.plot(xs, [100 * mean(of_seeds) for of_seeds in values], color="C0", lw=2)
            if logarithmic:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.set_xticks(xs)
            axes.tick_params(axis="x", labelrotation=90 if len(xs) > 6 or max(xs) >= 10_000 else 0)
            axes.minorticks_off()
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.set_title(name)
            axes.set_xlabel(x_label)
            axes.set_ylabel("accuracy, %")
            axes.grid(alpha=0.3)
        return write_picture(figure, path, DPI)


def draw_bars(path: Path, names: list[str], series: Series, title: str) -> Figure:
    """Draw accuracies of variants that have no order: a bar for the mean, a point for each seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * len(series), 2.2 + 0.5 * len(names)), layout="constrained")
        figure.suptitle(wrapped(title, WIDTH * len(series), 13))
        figure.supxlabel("dot: a seed; bar: the mean of the seeds", fontsize=10, color="0.3")
        columns = np.atleast_1d(figure.subplots(1, len(series), sharey=True))
        labels = [wrapped(name, WIDTH / 2, 11) for name in names]
        for axes, (name, values) in zip(columns, series.items(), strict=True):
            percent = [[100 * value for value in of_seeds] for of_seeds in values]
            axes.barh(range(len(names)), [mean(of_seeds) for of_seeds in percent], color="C0", alpha=0.45, height=0.6)
            for place, of_seeds in enumerate(percent):
                axes.plot(of_seeds, [place] * len(of_seeds), "o", color="C0", ms=5)
            lowest = min(min(of_seeds) for of_seeds in percent)
            axes.set_xlim(max(0.0, lowest - 0.25 * (100 - lowest) - 1), 100.5)
            axes.set_yticks(range(len(names)), labels)
            axes.xaxis.get_major_locator().set_params(nbins=5)
            axes.set_xlabel(f"{name}, %\n(the axis does not begin at 0)" if axes.get_xlim()[0] else f"{name}, %")
            axes.grid(axis="x", alpha=0.3)
        columns[0].invert_yaxis()
        return write_picture(figure, path, DPI)


def draw_over_epochs(path: Path, curves: dict[str, list[list[float]]], title: str, y_label: str) -> Figure:
    """Draw, for each name, a thin curve for each seed and a thick curve for their mean."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 4.8 + 0.3 * -(-len(curves) // 3)), layout="constrained")
        axes: Axes = figure.subplots()
        figure.suptitle(wrapped(title, 8.5, 13))
        lines = "line: the one seed"
        for number, (name, of_seeds) in enumerate(curves.items()):
            color, style = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
            marker = "o" if len(of_seeds[0]) == 1 else ""
            for curve in of_seeds if len(of_seeds) > 1 else []:
                lines = "thin line: a seed; thick line: the mean of the seeds"
                axes.plot(range(1, len(curve) + 1), curve, color=color, lw=0.7, alpha=0.4, ls=style)
            average = np.mean(np.array(of_seeds), axis=0)
            label = f"{wrapped(name, 2.4, 11)}: {average[-1]:.3f}"
            axes.plot(range(1, len(average) + 1), average, color=color, lw=2, ls=style, marker=marker, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # type: ignore[call-arg]
        axes.set_ylabel(wrapped(y_label, 3.5, 11))
        axes.grid(alpha=0.3)
        title = f"{lines}; number: value at the last epoch"
        figure.legend(title=title, title_fontsize=10, frameon=False, loc="outside lower center", ncols=3)
        return write_picture(figure, path, DPI)


def draw_points(path: Path, panels: dict[str, np.ndarray], labels: np.ndarray, names: list[str], title: str) -> Figure:
    """Draw points [n, 2] of every panel in the colors of their classes.

    Args:
        path: path of the picture.
        panels: heading -> points [n, 2].
        labels: the label [n] of each point.
        names: the names of the classes; a label is an index into them.
        title: title of the picture.
    """
    classes = np.unique(labels)
    with mpl.rc_context(STYLE):
        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        wide = 3.4 * max(columns, 1.6)
        legend_columns = int(wide // 2)
        below = 0.5 * -(-len(classes) // legend_columns)
        figure = Figure(figsize=(wide, 3.5 * rows + 1 + below), layout="constrained")
        heading = "one dot per image, in the color of its class; nearby dots have similar features"
        figure.suptitle(wrapped(f"{title}\n{heading}", wide, 13))
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        colors = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20"]
        for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
            for place, label in enumerate(classes):
                axes.scatter(*points[labels == label].T, color=colors(place % colors.N), s=7)
            axes.set_title(name)
        handles = grid.flat[0].collections
        figure.legend(
            handles,
            [wrapped(names[label], 1.5, 11) for label in classes],
            markerscale=2.5,
            frameon=False,
            loc="outside lower center",
            ncols=legend_columns,
        )
        return write_picture(figure, path, DPI)
