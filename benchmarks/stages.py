"""The stages of knn_cost.py, in the order in which they run. Each adds its records to the `Run`."""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import cases, memory
from benchmarks.cases import Problem
from benchmarks.measure import Record, describe_environment, matmul_rate, quantiles, time_interleaved
from msf_core import MemoryBank

# Above this many rows the authors' step needs several times the bank's memory: it runs only when asked for.
AUTHORS_MOST_ROWS = 500_000
FEW_REPEATS = 3  # on a CPU, of what takes seconds a run
LEFT_OUT_AUTHORS = "left out; --authors-at-1m measures it"


@dataclass
class Run:
    """One run of the benchmark: what was asked, and what has come of it so far."""

    args: argparse.Namespace
    device: torch.device
    records: list[Record] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)
    """What was not measured -> why. Keys: "resnet50_step", "<method> <rows>", "memory <method> <rows>"."""
    memory_cases: list[memory.MemoryCase] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def say(self, message: str) -> None:
        """Print, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.started:5.1f} s] {message}", flush=True)

    def problem(self, rows: int) -> Problem:
        """Return the sizes for that many rows."""
        return Problem(rows, self.args.dim, self.args.batch, self.args.k, self.args.dtype, self.device.type)

    def rounds(self, rows: int, slow: bool = False) -> int:
        """Return how often a case runs: fewer times on a CPU where one run takes seconds."""
        slow = self.device.type == "cpu" and (slow or rows > AUTHORS_MOST_ROWS)
        return min(FEW_REPEATS, self.args.repeats) if slow else self.args.repeats

    def wants_authors(self, rows: int) -> bool:
        """Tell whether the authors' step is to be measured at that size."""
        return rows <= AUTHORS_MOST_ROWS or self.args.authors_at_1m

    def find(self, name: str) -> Record | None:
        """Return the first record of that name."""
        return next((record for record in self.records if record.name == name), None)

    def add(self, name: str, parameters: dict[str, Any], values: list[float], unit: str, **more: Any) -> Record:
        """Make a record of the measured values."""
        environment = describe_environment(self.device)
        record = Record(name, parameters, *quantiles(values), unit, len(values), environment, **more)
        self.records.append(record)
        return record


def measure_machine(run: Run) -> None:
    """Measure the matrix-product rate and the ResNet50 step."""
    run.say(f"{describe_environment(run.device)['device']}, {torch.get_num_threads()} threads: matrix products")
    rates, product = matmul_rate(run.device, getattr(torch, run.args.dtype))
    # The best single run is the ceiling; median and quantiles show how steady the machine is.
    run.add("matmul_rate", {"product": product}, rates, "GFLOP/s", derived={"best": max(rates)})
    run.say(f"best {max(rates):.0f} GFLOP/s: {product}")
    if run.device.type == "cpu":
        run.say(f"expect the whole run to take about {expected_seconds(run, max(rates)):.0f} s")
    for name, reason in run.args.missing_backends.items():
        run.unmeasured |= {f"{name} {rows}": reason for rows in {*run.args.rows, run.args.step_rows}}
        run.say(f"backend {name} left out: {reason}")
    if run.args.no_resnet:
        run.unmeasured["resnet50_step"] = "left out by --no-resnet"
        return
    run.say("ResNet50 training step")
    try:
        seconds, images, arithmetic = cases.time_resnet50_step(run.device, run.args.batch)
    except ImportError as error:
        run.unmeasured["resnet50_step"] = f"torchvision is needed: {error}"
        run.say(f"left out: {run.unmeasured['resnet50_step']}")
        return
    record = run.add("resnet50_step", {"images": images, "arithmetic": arithmetic}, seconds, "s")
    record.derived.update(batch=run.args.batch, seconds_a_batch=record.median * run.args.batch / images)


def expected_seconds(run: Run, gflops: float) -> float:
    """Return a rough forecast: the products to come at 0.8 of the rate, an authors' step as ten searches."""
    backends = len(run.args.backends)
    rows_searched = run.args.step_rows * (backends + 1 + 10) * (run.args.repeats + 1)
    for rows in run.args.rows:
        rows_searched += rows * backends * (run.rounds(rows) + 1)
        rows_searched += rows * 10 * (run.rounds(rows, slow=True) + 1) * run.wants_authors(rows)
    products = 2e-9 * rows_searched * run.args.dim * run.args.batch / (0.8 * gflops)
    filling_and_recall = 25e-9 * sum(run.args.rows) * run.args.dim
    return 15 + products + filling_and_recall + (0 if run.args.no_resnet else 8)


def measure_searches(run: Run, rows: int) -> None:
    """Time the search by every backend, and the authors' step, at one size."""
    problem = run.problem(rows)
    run.say(f"N = {rows:,}: filling the bank, counting operations, recall")
    bank = cases.fill_bank(problem)
    *batches, (v, u) = cases.make_batches(problem, run.args.repeats + 1)

    def search(backend: str) -> Callable[[int], object]:
        def call(number: int) -> object:
            bank.backend = backend
            return bank.search(batches[number][1], problem.k)

        return call

    counted: dict[str, float] = {}
    recall: dict[str, float] = {}
    for name in dict.fromkeys([*run.args.backends, "torch"]):  # these runs are the warm-up too
        bank.backend = name
        counted[name], found = cases.count_gflop(lambda: bank.search(u, problem.k), problem.batch)
        recall[name] = cases.measure_recall(bank, u, found)
    calls = {name: search(name) for name in run.args.backends}
    rounds = dict.fromkeys(calls, run.rounds(rows))
    if run.wants_authors(rows):
        step = cases.authors_step(bank, problem.k)
        counted["authors"], _ = cases.count_gflop(lambda: step(v, u), problem.batch)
        calls["authors"] = lambda number: step(*batches[number])
        rounds["authors"] = run.rounds(rows, slow=True)
    else:
        run.unmeasured[f"authors {rows}"] = LEFT_OUT_AUTHORS
    run.say(f"N = {rows:,}: timing {', '.join(f'{name} x {rounds[name]}' for name in calls)}, in turns")
    for name, seconds in time_interleaved(calls, rounds, run.device).items():
        _add_search(run, problem, name, seconds, counted["authors" if name == "authors" else "torch"], recall.get(name))


def _add_search(
    run: Run, problem: Problem, method: str, seconds: list[float], counted: float, recall: float | None
) -> None:
    """Make the record of one row of the table, and ask for its memory to be measured."""
    authors = method == "authors"
    name = "authors" if authors else "search"
    record = run.add(name, asdict(problem) | {"method": method}, seconds, "s", recall=recall)
    gflops = counted * problem.batch / record.median
    ceiling, resnet = run.find("matmul_rate"), run.find("resnet50_step")
    record.derived.update(
        gflop_a_query_formula=problem.authors_gflop if authors else problem.search_gflop,
        gflop_a_query_counted=counted,
        gflop_a_second=gflops,
        bank_bytes=problem.rows * problem.dim * (4 if authors else getattr(torch, problem.dtype).itemsize),
    )
    if ceiling is not None:
        record.derived["share_of_matmul_rate"] = gflops / ceiling.derived["best"]
    if resnet is not None:
        record.derived["share_of_resnet50_step"] = record.median / resnet.derived["seconds_a_batch"]
    run.memory_cases.append(memory.MemoryCase(name, method, problem))


def measure_steps(run: Run, rows: int) -> None:
    """Time one step of ours with each backend, and the authors', in turns; compare their losses."""
    problem = run.problem(rows)
    run.say(f"one step, N = {rows:,}: filling the banks")
    filled = cases.fill_bank(problem)
    *batches, warm_up = cases.make_batches(problem, run.args.repeats + 1)
    steps = {"authors": cases.authors_step(filled, problem.k)}
    for backend in ("auto", *run.args.backends):
        bank = MemoryBank(rows, problem.dim, dtype=filled.dtype, backend=backend).to(run.device)
        bank.load_state_dict(filled.state_dict())
        steps[backend] = cases.our_step(bank, problem.k)
    losses = {name: [step(*warm_up)] for name, step in steps.items()}

    def timed(name: str) -> Callable[[int], object]:
        return lambda number: losses[name].append(steps[name](*batches[number]))

    run.say(f"one step, N = {rows:,}: timing {', '.join(steps)} x {run.args.repeats}, in turns")
    calls = {name: timed(name) for name in steps}
    seconds = time_interleaved(calls, dict.fromkeys(calls, run.args.repeats), run.device)
    for name in steps:
        apart = [float(a - b) for a, b in zip(losses[name], losses["authors"], strict=True)]
        record = run.add("step", asdict(problem) | {"method": name}, seconds[name], "s")
        record.derived.update(loss=float(losses[name][-1]), most_apart_from_authors_loss=max(map(abs, apart)))
        run.memory_cases.append(memory.MemoryCase("authors" if name == "authors" else "step", name, problem))


def measure_memory(run: Run) -> None:
    """Measure the extra memory of everything that was timed."""
    wanted = list(dict.fromkeys(run.memory_cases))
    run.say(f"extra memory: {len(wanted)} cases, each in a fresh process")
    for case, result in memory.measure_cases(wanted).items():
        if not result.bytes:
            run.unmeasured[f"memory {case.method} {case.problem.rows}"] = result.reason
            run.say(f"extra memory of {case.method} at N = {case.problem.rows:,} unmeasured: {result.reason}")
            continue
        parameters = asdict(case.problem) | {"what": case.what, "method": case.method}
        run.add("extra_memory", parameters, [float(count) for count in result.bytes], "bytes")
