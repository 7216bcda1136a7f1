"""Overhead of a step: host time and kernel launches of the criterion, by batch size, bank size and options.

    python benchmarks/step_overhead.py                    a minute on one CPU core
    python benchmarks/step_overhead.py --device cuda

A step is forward and backward of the criterion: push u, search, loss, gradient of v. In the same run, it alternates
with the authors' formulation (`msf_core.reference`, with the queue that it needs) and, if lightly is installed, with
lightly's bank and its loss for k = 1. On a CPU, one thread and tiny sizes are used, so most of the time is spent in
Python and in PyTorch's dispatcher. On a GPU, it is the time until the last launch is queued.

Launches are the operations that would start a kernel on a GPU, counted on meta tensors. Views and allocations do not
count. The search counts as the launches of the Triton backend: 2, and for float32 and int8 rows 2 more, which end at
once unless almost all rows are alike. lightly's bank reads a number back and cannot run on meta tensors, so its
launches are counted in a run on the CPU, including its search.

Writes step_overhead.jsonl, one record per case, and step_overhead.md to --out. "times the authors'" is the ratio of
medians at the same size.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import positive, settle_device_and_folder
from benchmarks.measuring.cases import Problem, Step, authors_step, fill_bank, make_batches
from benchmarks.measuring.measure import Record, describe_environment, in_words, quantiles, write_jsonl
from benchmarks.measuring.tables import format_spread
from msf_core import MeanShiftLoss, ring
from msf_core.search import Queries, Rows, search_bank

SIZES = ((8, 64, 16), (64, 256, 64), (64, 1024, 128))  # batch, rows, dim
K = 5
WARM_UP = 50
SEARCH_LAUNCHES = {torch.float32: 4, torch.int8: 4, torch.float16: 2, torch.bfloat16: 2}  # for each dtype of the rows
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_local_scalar_dense"}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, labels": {"labels": True},
    "ours, neighbors returned": {"labels": True, "return_neighbors": True},
    "ours, exclude_same_id": {"ids": True, "criterion": {"exclude_same_id": True}},
    "ours, same_label": {"labels": True, "criterion": {"same_label": True}},
    "ours, bfloat16 rows": {"dtype": "bfloat16"},
    "ours, int8 rows": {"dtype": "int8"},
    "ours, k = 1": {"k": 1},
}
AUTHORS, LIGHTLY = "the authors' formulation", "lightly, k = 1"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=positive, default=400)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(arguments)
    settle_device_and_folder(parser, args)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = [record for size in SIZES for record in measure(*size, args.repeats, torch.device(args.device))]
    finally:
        torch.set_num_threads(threads)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "step_overhead.jsonl")
    (args.out / "step_overhead.md").write_text(table(records), encoding="utf-8")
    print(table(records))


def measure(batch: int, rows: int, dim: int, repeats: int, device: torch.device) -> list[Record]:
    """Time all steps of one size alternately, and count their launches."""
    problem = Problem(rows, dim, batch, K, "float32", device.type)
    steps = make_steps(problem)
    pairs = make_batches(problem, 8)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + repeats):
        for name in np.random.default_rng(number).permutation(list(steps)).tolist():
            seconds[name].append(_host_seconds(partial(steps[name], *pairs[number % 8]), device))
    launches = count_all_launches(problem)
    environment = describe_environment(device)
    return [
        Record(
            name="step",
            parameters={"what": name, "batch": batch, "rows": rows, "dim": dim, "k": K, "device": device.type},
            **quantiles(times[WARM_UP:])._asdict(),
            unit="s of host time",
            repeats=repeats,
            environment=environment,
            derived={"launches": launches[name]},
        )
        for name, times in seconds.items()
    ]


def make_steps(problem: Problem) -> dict[str, Step]:
    """Return every step by name, each with its own full bank."""
    steps: dict[str, Step] = {name: our_step(problem, **options) for name, options in OURS.items()}
    steps[AUTHORS] = authors_step(fill_bank(problem), problem.k)
    with suppress(ImportError):
        steps[LIGHTLY] = lightly_step(problem)
    return steps


def our_step(
    problem: Problem,
    *,
    dtype: str = "float32",
    k: int = K,
    labels: bool = False,
    ids: bool = False,
    return_neighbors: bool = False,
    criterion: dict[str, bool] | None = None,
    device: str | None = None,
) -> Step:
    """Return a step of `MeanShiftLoss` with these options, on ``device`` or else on the problem's device."""
    bank = fill_bank(Problem(problem.rows, problem.dim, problem.batch, k, dtype, problem.device))
    bank.to(device or problem.device)
    loss_of: Callable[..., Any] = MeanShiftLoss(bank, k, **(criterion or {}))
    numbers = torch.arange(problem.batch, device=bank.rows.device)
    given = {"labels": numbers if labels else None, "ids": numbers if ids else None}

    def step(v: Tensor, u: Tensor) -> Tensor:
        result = loss_of(v.detach().requires_grad_(), u, **given, return_neighbors=return_neighbors)
        loss: Tensor = result[0] if return_neighbors else result
        loss.backward()
        return loss.detach()

    return step


def lightly_step(problem: Problem) -> Step:
    """Return a step of lightly's bank and its loss for the nearest row of u; it supports only k = 1.

    Raises:
        ImportError: if lightly is not installed.
    """
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import NNMemoryBankModule

    bank = NNMemoryBankModule(size=(problem.rows, problem.dim)).to(problem.device)
    loss_of = NegativeCosineSimilarity()

    def step(v: Tensor, u: Tensor) -> Tensor:
        loss: Tensor = loss_of(v.detach().requires_grad_(), bank(u, update=True))
        loss.backward()
        return loss.detach()

    return step


def count_all_launches(problem: Problem) -> dict[str, int]:
    """Return the launches of every step by name."""
    v, u = torch.randn(2, problem.batch, problem.dim, device="meta")
    counts = {
        name: count_launches(partial(our_step(problem, device="meta", **options), v, u), "meta")
        for name, options in OURS.items()
    }
    queue: Any = SimpleNamespace(rows=fill_bank(problem).rows.to("meta"), pushed=0)
    counts[AUTHORS] = count_launches(partial(authors_step(queue, problem.k), v, u), "meta")
    with suppress(ImportError):
        step = lightly_step(Problem(problem.rows, problem.dim, problem.batch, 1, "float32", "cpu"))
        counts[LIGHTLY] = count_launches(partial(step, *torch.randn(2, problem.batch, problem.dim)), "cpu")
    return counts


def count_launches(step: Callable[[], object], device_type: str) -> int:
    """Return how many kernels a step would start on a GPU; the search of a bank counts as in `SEARCH_LAUNCHES`."""
    step()  # so that tensors that are created only once are not counted
    counter = _Launches(device_type)

    def search(queries: Queries, rows: Rows, *arguments: Any) -> Any:
        with counter.paused(SEARCH_LAUNCHES[rows.values.dtype]):
            return search_bank(queries, rows, *arguments)

    with patch.object(ring, "search_bank", search), counter:
        step()
    return counter.count


class _Launches(TorchDispatchMode):
    """Counts the operations that create or change tensors on a type of device."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.count = device_type, 0

    @contextmanager
    def paused(self, launches: int) -> Iterator[None]:
        """Count the operations inside this context as ``launches`` launches."""
        before = self.count
        yield
        self.count = before + launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) and result else result
        on_device = isinstance(first, Tensor) and first.device.type == self.device_type
        if on_device and not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL:
            self.count += 1
        return result


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until a call returns; a CUDA device is idle at the start, and may still work at the end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(records: list[Record]) -> str:
    """Return the records in Markdown."""
    first = records[0]
    lines = [
        "# What a step costs beside its arithmetic",
        "",
        in_words(first.environment),
        "",
        f"Forward and backward of the criterion, k = {K} unless stated; medians of {first.repeats} runs, alternating",
        "(`python benchmarks/step_overhead.py`). Launches: kernels that a GPU would start.",
        "",
        "| batch | rows | dim | what | host time (20–80 %) | times the authors' | launches |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        p = record.parameters
        base = next(r for r in records if r.parameters == p | {"what": AUTHORS})
        lines.append(
            f"| {p['batch']} | {p['rows']:,} | {p['dim']} | {p['what']} | {format_spread(record)} | "
            f"{record.median / base.median:.2f} | {record.derived['launches']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
