"""Runs of the trainer, each in a folder named after its flags and seed. Finished runs are not repeated."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.training.settings import build_parser, complete

FOUND_WITH = ("device", "threads", "instructions", "versions", "date")  # older runs recorded less
TRAINER = Path(__file__).resolve().parents[2] / "imagenet_train.py"


@dataclass(frozen=True)
class Run:
    """One run: its seed, and the trainer's flags without --seed and --out."""

    flags: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = "-".join(flag.removeprefix("--").replace("/", "") for flag in self.flags)
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{words or 'default'}-seed-{self.seed}").strip("-")


class Runs:
    """The runs below a folder."""

    def __init__(self, folder: Path, flags: tuple[str, ...], jobs: int) -> None:
        self.folder, self.flags, self.jobs = folder, flags, jobs

    def folder_of(self, run: Run) -> Path:
        """Return the folder of a run, which may not exist yet."""
        return self.folder / "runs" / run.name

    def check(self, run: Run) -> None:
        """Raise ValueError, or exit as argparse does, for flags that the trainer would refuse."""
        complete(vars(build_parser("").parse_args(self._command(run))))

    def finished(self, run: Run) -> bool:
        """Return whether the run is finished, with exactly the flags that it would have now."""
        folder = self.folder_of(run)
        return (folder / "neighbors.png").exists() and self._command(run) == _read(folder / "command.json")

    def finish(self, wanted: Iterable[Run]) -> None:
        """Start or resume the runs that are not finished.

        Raises:
            RuntimeError: at least one run failed. All other runs have been carried out before.
        """
        missing = [run for run in dict.fromkeys(wanted) if not self.finished(run)]
        if not missing:
            return
        with (
            tqdm(total=len(missing), unit="run", disable=not sys.stderr.isatty()) as bar,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            problems = []
            done = pool.map(self._finish, missing) if self.jobs > 1 else map(self._finish, missing)
            for run, problem in zip(missing, done, strict=True):
                bar.update()
                tqdm.write(f"{run.name}: {'failed' if problem else 'finished'}")
                sys.stdout.flush()
                problems += [problem] if problem else []
        if problems:
            raise RuntimeError("\n".join(problems))

    def _command(self, run: Run) -> list[str]:
        return [*self.flags, *run.flags, "--seed", str(run.seed)]

    def _finish(self, run: Run) -> str:
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        command = self._command(run)
        before = _read(folder / "command.json")
        if before is not None and before != command:
            return f"{folder} holds a run with other flags, {' '.join(before)}: choose another --out"
        (folder / "command.json").write_text(json.dumps(command) + "\n")
        environment = dict(os.environ)
        if self.jobs > 1:  # they share the cores
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with (folder / "log.txt").open("a") as log:
            status = subprocess.run(
                [sys.executable, str(TRAINER), *command, "--out", str(folder), "--resume", "auto"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            ).returncode
        if status == 0:
            return ""
        last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
        return f"{run.name} ended with status {status}: {''.join(last)} ({folder / 'log.txt'})"

    def results(self, run: Run) -> dict[str, float]:
        """Return the results of a finished run: the row of its table, and the last epoch's averages."""
        folder = self.folder_of(run)
        last = {name: value for name, value in self.history(run)[-1].items() if name in ("loss", "spread", "rank")}
        record = _read(folder / "results.json")
        if record is None:
            return last
        rows: dict[str, dict[str, float]] = record["rows"]
        *_, row = rows.values()
        return last | row

    def found_with(self, run: Run) -> dict[str, Any] | None:
        """Return the device, versions and date that a finished run recorded; None if it recorded none."""
        record = _read(self.folder_of(run) / "results.json")
        return record and {key: record[key] for key in FOUND_WITH if key in record}

    def history(self, run: Run) -> list[dict[str, float]]:
        """Return the averages of every epoch."""
        with (self.folder_of(run) / "metrics.csv").open() as file:
            return [{name: float(value) for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
