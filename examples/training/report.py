"""What a run leaves behind: metrics as CSV and TensorBoard, and two pictures."""

import csv
import io
import math
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import msf_core
from training.evaluation import COLUMNS

Row = dict[str, Any]
CURVES = (
    ("loss", "loss", "0 to 4; falls as views agree"),
    ("purity", "purity of neighbors 2 to k", "share with the query's label"),
    ("nn20", "20-NN accuracy", "on the test images"),
    ("spread", "spread of embeddings", "near 1: healthy, 0: collapsed"),
)


def write_csv(path: Path, history: list[Row]) -> None:
    """Write one line an epoch, nothing before the first; a cell that was not measured stays empty."""
    if not history:
        return
    names = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in history)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text.getvalue())
    temporary.replace(path)


def write_losses(path: Path, losses: list[float], last_step: int) -> None:
    """Append the losses of the steps up to ``last_step``, one line each, all of them or none."""
    lines = [f"{step},{loss!r}\n" for step, loss in enumerate(losses, last_step - len(losses) + 1)]
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.writelines(lines if before else ["step,loss\n", *lines])
    except OSError:
        os.truncate(path, before)
        raise


def keep_losses(path: Path, last_step: int) -> None:
    """Drop what was written after ``last_step``, of which a resumed run knows nothing."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[1:]
        kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= last_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(["step,loss\n", *kept]))
        temporary.replace(path)


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the numbers were obtained with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "msf_core": msf_core.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def in_words(found_with: dict[str, Any]) -> str:
    """Return what `environment` told, for the title of a picture.

    >>> in_words({"device": "CPU, 2 cores", "versions": {"torch": "2.15.0+cu132"}, "date": "2026-11-25T02:30:00+00:00"})
    'CPU, 2 cores; PyTorch 2.15.0; 2026-11-25'
    """
    version = found_with["versions"]["torch"].partition("+")[0]
    return f"{found_with['device']}; PyTorch {version}; {found_with['date'][:10]}"


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the rows as Markdown, with a column for each of `COLUMNS` that any of them has."""
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    width = max(map(len, rows))
    lines = [
        f"| {'':{width}} | " + " | ".join(COLUMNS[name] for name in columns) + " |",
        "|" + " --- |" * (len(columns) + 1),
    ]
    for title, row in rows.items():
        cells = [f"{row[name]:.3f}" if name in row else "–" for name in columns]
        padded = [f"{cell:>{len(COLUMNS[name])}}" for cell, name in zip(cells, columns, strict=True)]
        lines.append(f"| {title:{width}} | " + " | ".join(padded) + " |")
    return "\n".join(lines)


def draw_curves(path: Path, history: list[Row], title: str) -> None:
    """Draw loss, purity, 20-NN accuracy and spread over the epochs."""
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        figure.suptitle(title)
        for axes, (name, heading, meaning) in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
            points = [(row["epoch"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
            axes.set_title(f"{heading}\n", fontsize=12)
            axes.text(0.5, 1.02, meaning, transform=axes.transAxes, ha="center", color="0.4", fontsize=10)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if not points:
                axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color="0.4")
                continue
            axes.plot(*zip(*points, strict=True), color="C0", lw=2, marker="o" if len(points) < 25 else "", ms=4)
            axes.annotate(
                f"{points[-1][1]:.3f}", points[-1], (0, 8), textcoords="offset points", ha="right", weight="bold"
            )
            if name == "spread":
                axes.set_ylim(0, 1.1)
                axes.axhline(1, color="0.5", ls=":", lw=1)
        figure.savefig(path, dpi=110)


def draw_neighbors(path: Path, queries: np.ndarray, rows: list[Row], title: str) -> None:
    """Draw queries with their nearest neighbours at some epochs, as the paper's Fig. 2.

    Args:
        path: of the picture.
        queries: [Q, H, W, 3] in [0, 1].
        rows: for each epoch shown, "title", "images" [Q, n, H, W, 3] and "right" [Q, n]: True, False, or None
            where labels are unknown.
        title: of the whole.
    """
    count, n = rows[0]["images"].shape[:2]
    pitch, gap = 1.12, 0.4  # of the pictures, whose side is 1
    wide = pitch + len(rows) * (gap + n * pitch)
    figure = Figure(figsize=(0.64 * wide, 0.64 * count * pitch + 1.1), layout="constrained")
    figure.suptitle(f"{title}\ngreen: the query's class; red and crossed: another", fontsize=11)
    axes = figure.subplots()  # one for all pictures: one each would take seconds
    for i in range(count):
        _show(axes, queries[i], 0, i * pitch, "0.2", 1)
    axes.text(0.5, -0.3, "query", ha="center", fontsize=10)
    for j, row in enumerate(rows):
        left = pitch + gap + j * (gap + n * pitch)
        axes.text(left + n * pitch / 2, -0.3, row["title"], ha="center", fontsize=10)
        for i, m in np.ndindex(count, n):
            right = row["right"][i][m]
            colour, width = {True: ("tab:green", 3), False: ("tab:red", 3), None: ("0.6", 1)}[right]
            x, y = left + m * pitch, i * pitch
            _show(axes, row["images"][i, m], x, y, colour, width)
            if right is False:
                axes.text(x + 0.08, y + 0.08, "✗", va="top", color=colour, fontsize=15, weight="bold")
    axes.set(xlim=(-0.1, wide), ylim=(count * pitch, -0.6), aspect="equal")
    axes.axis("off")
    figure.savefig(path, dpi=130)


def _show(axes: Any, image: np.ndarray, x: float, y: float, colour: str, width: int) -> None:
    axes.imshow(image, extent=(x, x + 1, y + 1, y), interpolation="nearest")
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=width))


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value
