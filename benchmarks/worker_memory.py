"""Memory of the worker processes that read images, after each has accessed every path of a large data set.

    python benchmarks/worker_memory.py          a minute on two CPU cores (Linux)

Worker processes are forked, and share their parent's memory until one of them writes to it. Even reading a Python
string writes to memory, because it changes the reference count. The benchmark compares the list of (path, label) that
torchvision's ImageFolder stores with `pipeline.data.scanning.Paths`, which stores the paths as bytes in tensors and is
used by examples/imagenet_train.py. No files are needed: the paths are generated names like those of ImageNet. The
private memory (USS) of each DataLoader worker is read from /proc/PID/smaps_rollup, before the worker has accessed any
path and after it has accessed all of them.

Writes worker_memory.jsonl, one record for each way to store the paths, and worker_memory.md to --out. The figure is
the growth of a worker's private memory, with its spread over the workers. The table also has the total proportional
share of all workers and their parent at the end (PSS: a page that n processes share counts 1/n for each).
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import positive
from benchmarks.measuring.measure import Record, describe_environment, in_words, quantiles, write_jsonl
from benchmarks.measuring.tables import format_bytes
from pipeline.data.scanning import Paths

LIST, BYTES = "list of (path, label)", "Paths and a tensor of labels"
CLASSES, ROOT = 1000, Path("/data/imagenet/train")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--paths", type=positive, default=1_000_000)
    parser.add_argument("--workers", type=positive, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(arguments)
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("memory is read from /proc/PID/smaps_rollup, which this system does not have")
    records = [measured_alone(kept, args.paths, args.workers) for kept in (LIST, BYTES)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "worker_memory.jsonl")
    (args.out / "worker_memory.md").write_text(table(records), encoding="utf-8")
    print(table(records))


def measured_alone(kept: str, paths: int, workers: int) -> Record:
    """Measure in a fresh process, which has nothing else in memory."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(kept, paths, workers, theirs))
    process.start()
    theirs.close()  # so that recv fails, instead of waiting forever, if the process ends early
    record: Record = ours.recv()
    process.join()
    return record


def measure(kept: str, paths: int, workers: int, answer: Any) -> None:
    """Let every worker access every path, and send the record."""
    order = _Spans(workers)
    loader = DataLoader(
        _Looks(kept, paths),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    assert sum(loader) == 0
    children = [child.pid for child in multiprocessing.active_children() if child.pid]
    before = [private_and_share(pid)[0] for pid in children]
    order.end = paths
    letters = set(loader)
    assert len(letters) == 1
    assert letters != {0}
    after = [private_and_share(pid) for pid in children]
    parent = private_and_share("self")
    growth = [float(own - earlier) for (own, _), earlier in zip(after, before, strict=True)]
    derived = {"own before": before, "share of all": sum(share for _, share in after) + parent[1]}
    sizes = {"paths": paths, "workers": workers, "kept": kept}
    environment = describe_environment(torch.device("cpu"))
    answer.send(Record("worker memory", sizes, *quantiles(growth), "B", len(growth), environment, derived=derived))


class _Spans(Sampler[int]):
    """Yields the number of paths to access, once for each worker; the DataLoader assigns them in turn."""

    def __init__(self, workers: int) -> None:
        self.workers, self.end = workers, 0

    def __iter__(self) -> Iterator[int]:
        return iter([self.end] * self.workers)


class _Looks(Dataset[int]):
    """Accesses the first ``end`` paths and labels, and returns the sum of path lengths and labels."""

    def __init__(self, kept: str, paths: int) -> None:
        names = (f"n{i % CLASSES:08}/n{i % CLASSES:08}_{i}.JPEG" for i in range(paths))
        if kept == LIST:
            self.samples = [(f"{ROOT}/{name}", i % CLASSES) for i, name in enumerate(names)]
        else:
            self.paths, self.targets = Paths(ROOT, names), torch.arange(paths) % CLASSES
        self.kept = kept

    def __getitem__(self, end: int) -> int:
        if self.kept == LIST:
            return sum(len(path) + label for path, label in (self.samples[i] for i in range(end)))
        return sum(len(self.paths[i]) + int(self.targets[i]) for i in range(end))


def private_and_share(pid: int | str) -> tuple[int, int]:
    """Return the private memory of a process (USS) and its proportional share of all its memory (PSS), in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]), 1024 * kilobytes["Pss"]


def table(records: list[Record]) -> str:
    """Return the records in Markdown."""
    p = records[0].parameters
    lines = [
        "# Memory of the processes that read images",
        "",
        in_words(records[0].environment),
        "",
        f"{p['workers']} workers, each of which accesses all of {p['paths']:,} paths and their labels",
        "(`python benchmarks/worker_memory.py`): growth of a worker's private memory (USS), median and 20–80 % over",
        "the workers; and the sum of the proportional shares (PSS) of all workers and their parent.",
        "",
        "| paths kept as | growth of a worker | all processes |",
        "| --- | --- | --- |",
    ]
    for record in records:
        spread = f"{format_bytes(record.median)} ({format_bytes(record.q20)}–{format_bytes(record.q80)})"
        lines.append(f"| {record.parameters['kept']} | {spread} | {format_bytes(record.derived['share of all'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
