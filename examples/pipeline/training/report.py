"""The files and the table that a run writes: metrics as CSV, the losses, and the results."""

import csv
import io
import math
import os
from pathlib import Path
from typing import Any

from pipeline.data.bad_images import LIST
from pipeline.evaluation.scores import COLUMNS

Row = dict[str, Any]


def write_csv(path: Path, history: list[Row]) -> None:
    """Write one line per epoch, or no file before the first; values that were not measured are empty."""
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
    """Drop the losses after ``last_step``, which a resumed run computes again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[1:]
        kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= last_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(["step,loss\n", *kept]))
        temporary.replace(path)


def read_losses(path: Path) -> list[float]:
    """Return the losses that `write_losses` wrote, in the order of the steps; [] if there is no such file."""
    if not path.exists():
        return []
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


FILES = (
    "checkpoint.pt",
    "bank-shards-*",
    "backbone.safetensors",
    "backbone-epoch-*.safetensors",
    "config.json",
    "results.json",
    "metrics.csv",
    "losses.csv",
    "tensorboard",
    "wandb",
    "curves.png",
    "neighbors.png",
    LIST,
)


def written(folder: Path) -> list[str]:
    """Return the files of a run that are in its folder; several files of a kind as their pattern and number."""
    names = []
    for pattern in FILES:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            names.append(found[0].name + "/" * found[0].is_dir())
        elif found:
            names.append(f"{pattern} ({len(found)} of them)")
    return names


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


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value
