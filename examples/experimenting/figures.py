"""The paper's figures, drawn from what was measured."""

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Series = dict[str, list[list[float]]]  # a name -> for each place on the x axis the values of all seeds
STYLE: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def spread_of(values: list[float]) -> str:
    """Return mean and deviation over the seeds, as percent."""
    finite = [100 * value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    return f"{mean(finite):.1f}" + (f" ± {stdev(finite):.1f}" if len(finite) > 1 else "")


def draw_against(path: Path, xs: list[float], series: Series, title: str, x_label: str, logarithmic: bool) -> None:
    """Draw accuracies against a number, each seed as a point and their mean as a line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(series), 4.2), layout="constrained")
        figure.suptitle(title)
        for axes, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(series))), series.items(), strict=True):
            for x, of_seeds in zip(xs, values, strict=True):
                axes.plot([x] * len(of_seeds), [100 * value for value in of_seeds], "o", color="C0", alpha=0.35, ms=5)
            axes.plot(xs, [100 * mean(of_seeds) for of_seeds in values], color="C0", lw=2)
            if logarithmic:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.set_xticks(xs)
            axes.minorticks_off()
            axes.set_title(name)
            axes.set_xlabel(x_label)
            axes.set_ylabel("accuracy, %")
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=110)


def draw_bars(path: Path, names: list[str], series: Series, title: str) -> None:
    """Draw accuracies of things that have no order: a bar for the mean, a point for each seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(series), 1.4 + 0.5 * len(names)), layout="constrained")
        figure.suptitle(title)
        columns = np.atleast_1d(figure.subplots(1, len(series), sharey=True))
        for axes, (name, values) in zip(columns, series.items(), strict=True):
            percent = [[100 * value for value in of_seeds] for of_seeds in values]
            axes.barh(names, [mean(of_seeds) for of_seeds in percent], color="C0", alpha=0.45, height=0.6)
            for place, of_seeds in enumerate(percent):
                axes.plot(of_seeds, [place] * len(of_seeds), "o", color="C0", ms=5)
            lowest = min(min(of_seeds) for of_seeds in percent)
            axes.set_xlim(max(0.0, lowest - 0.25 * (100 - lowest) - 1), 100)
            axes.set_xlabel(f"{name}, % (the axis does not begin at 0)" if axes.get_xlim()[0] else f"{name}, %")
            axes.grid(axis="x", alpha=0.3)
        columns[0].invert_yaxis()
        figure.savefig(path, dpi=110)


def draw_over_epochs(path: Path, curves: dict[str, list[list[float]]], title: str, y_label: str) -> None:
    """Draw for each name one curve a seed, thin, and their mean, thick."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes: Axes = figure.subplots()
        axes.set_title(title)
        for number, (name, of_seeds) in enumerate(curves.items()):
            colour = f"C{number}"
            for curve in of_seeds if len(of_seeds) > 1 else []:
                axes.plot(range(1, len(curve) + 1), curve, color=colour, lw=0.7, alpha=0.4)
            average = np.mean(np.array(of_seeds), axis=0)
            axes.plot(range(1, len(average) + 1), average, color=colour, lw=2, label=f"{name}: {average[-1]:.3f}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.legend(title="and in the last epoch", frameon=False)
        figure.savefig(path, dpi=110)


def draw_points(path: Path, panels: dict[str, np.ndarray], labels: np.ndarray, title: str) -> None:
    """Draw points [n, 2] of every panel in the colours of their classes."""
    with mpl.rc_context(STYLE):
        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.4 * columns, 3.5 * rows + 0.5), layout="constrained")
        figure.suptitle(title)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
            axes.scatter(points[:, 0], points[:, 1], c=labels, cmap="tab10", s=7)
            axes.set_title(name)
        figure.savefig(path, dpi=110)
