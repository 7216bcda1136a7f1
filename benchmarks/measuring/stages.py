"""The stages of knn_cost.py, in the order in which they run. Each adds its records to the `Run`."""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import cases, memory, peers
from benchmarks.measuring.cases import Problem
from benchmarks.measuring.measure import (
    Record,
    Summary,
    describe_environment,
    hidden_summary,
    matmul_rates,
    memory_rate,
    quantiles,
    time_interleaved,
)
from benchmarks.measuring.tables import PAPER_TABLE_1
from msf_core import MemoryBank
from msf_core.search import load_backend

LONG_GFLOP, FEW_REPEATS = 40, 3  # on a CPU, searches with more GFLOP per batch than this are repeated only this often
AUTHORS_MOST_ROWS = 500_000  # on a CPU, the authors' step is not measured with more rows


@dataclass
class Run:
    """One run of the benchmark: its arguments, and its results so far."""

    args: argparse.Namespace
    device: torch.device
    records: list[Record] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)
    """What was not measured -> why. Keys: "resnet50_step", a method, "<method> at <sizes>", "memory of …"."""
    memory_cases: list[memory.MemoryCase] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def say(self, message: str) -> None:
        """Print a message with the seconds since the start."""
        print(f"[{time.perf_counter() - self.started:5.1f} s] {message}", flush=True)

    def rounds(self, problem: Problem, slow: bool = False) -> int:
        """Return how often a case runs; on a CPU, long cases run less often."""
        slow = problem.device == "cpu" and (slow or problem.search_gflop * problem.batch > LONG_GFLOP)
        repeats: int = self.args.repeats
        return min(FEW_REPEATS, repeats) if slow else repeats

    def find(self, name: str, **parameters: object) -> Record | None:
        """Return the first record with this name and these parameters, or None."""
        for record in self.records:
            if record.name == name and parameters.items() <= record.parameters.items():
                return record
        return None

    def add(self, name: str, parameters: dict[str, Any], values: list[float], unit: str, **more: Any) -> Record:
        """Create and store a record of the measured values."""
        environment = describe_environment(self.device)
        environment["versions"] |= {} if self.args.no_peers else peers.versions()
        record = Record(name, parameters, *quantiles(values), unit, len(values), environment, **more)
        self.records.append(record)
        return record


def by_bank(problems: list[Problem]) -> dict[tuple[int, int], list[Problem]]:
    """Group the problems by the bank that they search, (N, D)."""
    groups: dict[tuple[int, int], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.rows, problem.dim), []).append(problem)
    return dict(sorted(groups.items()))


def is_papers(problem: Problem) -> bool:
    """Return whether the paper's Table 1 has a row for this problem: D = 512, batch 256, k = 5, and one of two N."""
    return problem.rows in PAPER_TABLE_1 and on_the_line(problem)


def on_the_line(problem: Problem) -> bool:
    """Return whether a problem has the paper's D, batch and k, with any N."""
    return (problem.dim, problem.batch, problem.k) == (512, 256, 5)


def measure_machine(run: Run) -> None:
    """Measure the rates of matrix products and of memory, and the ResNet50 step."""
    environment = describe_environment(run.device)
    run.say(f"{environment['device']}, {environment['threads']} threads: matrix products and memory")
    for dtype, (rates, product) in matmul_rates(run.device).items():
        # The best single run is the ceiling; the median and the quantiles show how stable the machine is.
        run.add("matmul_rate", {"dtype": dtype, "product": product}, rates, "GFLOP/s", derived={"best": max(rates)})
        run.say(f"best {max(rates):,.0f} GFLOP/s: {product}")
    rates, what = memory_rate(run.device)
    run.add("memory_rate", {"what": what}, rates, "GB/s", derived={"best": max(rates)})
    run.say(f"best {max(rates):,.0f} GB/s: {what}")
    for name, reason in run.args.missing_backends.items():
        run.unmeasured[f"msf_core, {name}"] = reason
        run.say(f"backend {name} is left out: {reason}")
    if run.args.no_resnet:
        run.unmeasured["resnet50_step"] = "left out by --no-resnet"
        return
    run.say("ResNet50 training step")
    batch = run.args.step_problem.batch
    try:
        seconds, images, arithmetic = cases.time_resnet50_step(run.device, batch)
    except ImportError as error:
        run.unmeasured["resnet50_step"] = f"torchvision is needed: {error}"
        run.say(f"left out: {run.unmeasured['resnet50_step']}")
        return
    record = run.add("resnet50_step", {"images": images, "arithmetic": arithmetic}, seconds, "s")
    record.derived.update(batch=batch, seconds_an_image=record.median / images)


def ceilings(run: Run, problem: Problem) -> tuple[float, float]:
    """Return the measured GFLOP/s and GB/s that bound the speed of a search on this machine."""
    dtypes = ("float32", "bfloat16") if problem.device == "cpu" else (problem.dtype,)
    products = [record for dtype in dtypes if (record := run.find("matmul_rate", dtype=dtype)) is not None]
    (memory_read,) = (record for record in run.records if record.name == "memory_rate")
    return max(record.derived["best"] for record in products), memory_read.derived["best"]


def measure_searches(run: Run, rows: int, dim: int, problems: list[Problem]) -> None:
    """Time the searches of one bank, alternating between all backends and peers."""
    run.say(f"N = {rows:,}, D = {dim}: filling the bank, float64 brute force")
    bank = cases.fill_bank(problems[0])
    most = max(problem.k for problem in problems)
    check = cases.make_batches(replace(problems[0], batch=cases.RECALL_QUERIES), 1)[0][1]
    truth = cases.Truth(bank, check, most)
    for problem in problems:
        _measure_search(run, problem, bank, truth, check)
    for problem in problems:
        if is_papers(problem):
            _measure_authors(run, problem, bank)


def _measure_search(run: Run, problem: Problem, bank: MemoryBank, truth: cases.Truth, check: Tensor) -> None:
    rounds = run.rounds(problem)
    batches = [u for _, u in cases.make_batches(problem, rounds + 1)]
    batches[0][: len(check)] = check[: len(batches[0])]  # the first batch (the warm-up) is checked
    prepared = [peers.unit_queries(u, bank.dtype) for u in batches]
    others: dict[str, peers.Search] = {}
    if not run.args.no_peers:
        others, reasons = peers.build_all(bank.rows, problem)
        if problem.device == "cpu" and not (on_the_line(problem) and problem.rows < AUTHORS_MOST_ROWS):
            others.pop("bare faiss.knn", None)  # it costs the same as msf_core's faiss, so save the time
        run.unmeasured |= {f"{name} at {describe(problem)}": reason for name, reason in reasons.items()}

    def ours(backend: str) -> Callable[[int], Tensor]:
        def call(number: int) -> Tensor:
            bank.backend = backend
            return bank.search(batches[number + 1], problem.k).index

        return call

    def theirs(name: str) -> Callable[[int], Tensor]:
        return lambda number: others[name](prepared[number + 1])

    calls = {name: ours(name) for name in run.args.backends} | {name: theirs(name) for name in others}
    # The operator of a bank hides its products from the counter, so count those of the torch backend.
    counted, _ = cases.count_gflop(lambda: load_backend("torch").topk(prepared[0], bank.rows, problem.k), problem.batch)
    recall: dict[str, float | None] = {}
    for name in list(calls):
        try:
            index = calls[name](-1)
        except Exception as error:
            if name in run.args.backends:
                raise
            del calls[name]  # a peer that was built but fails in the search
            run.unmeasured[f"{name} at {describe(problem)}"] = f"{type(error).__name__}: {error}"
            continue
        recall[name] = None if name == "lightly bank" else truth.recall(index)
    run.say(f"{describe(problem)}: {', '.join(calls)} x {rounds}, in turns")
    times = time_interleaved(calls, dict.fromkeys(calls, rounds), run.device)
    hidden = hidden_summary(calls, dict.fromkeys(calls, rounds), run.device)
    for name, seconds in times.items():
        _note_hidden(_add_search(run, problem, name, seconds, counted, recall[name]), hidden.get(name))


def _measure_authors(run: Run, problem: Problem, bank: MemoryBank) -> None:
    if problem.device == "cpu" and problem.rows > AUTHORS_MOST_ROWS:
        run.unmeasured[f"authors' step at {describe(problem)}"] = "left out on a CPU: it takes much time and memory"
        return
    rounds = run.rounds(problem, slow=True)
    batches = cases.make_batches(problem, rounds + 1)
    step = cases.authors_step(bank, problem.k)
    counted, _ = cases.count_gflop(lambda: step(*batches[-1]), problem.batch)
    run.say(f"{describe(problem)}: authors' step x {rounds}")
    calls: dict[str, Callable[[int], object]] = {"authors": lambda number: step(*batches[number])}
    seconds = time_interleaved(calls, {"authors": rounds}, run.device)["authors"]
    hidden = hidden_summary(calls, {"authors": rounds}, run.device)
    _note_hidden(_add_search(run, problem, "authors", seconds, counted, None), hidden.get("authors"))


def _note_hidden(record: Record, hidden: Summary | None) -> None:
    """Add the GPU's time with the host hidden to a record, if there is one (never on a CPU)."""
    if hidden is not None:
        record.derived["host_hidden"] = hidden._asdict()


def _add_search(
    run: Run, problem: Problem, method: str, seconds: list[float], counted: float, recall: float | None
) -> Record:
    """Add the record of one search; for a backend at the paper's largest size, also request its extra memory."""
    authors, ours = method == "authors", method in run.args.backends
    name = "authors" if authors else "search" if ours else "peer"
    record = run.add(name, asdict(problem) | {"method": method}, seconds, "s", recall=recall)
    formula = problem.authors_gflop if authors else problem.search_gflop
    gflops = formula * problem.batch / record.median
    products, reads = ceilings(run, problem)
    value_bytes = 4 if authors else getattr(torch, problem.dtype).itemsize
    bank_bytes = problem.rows * problem.dim * value_bytes
    floor = max(problem.search_gflop * problem.batch / products, 1e-9 * bank_bytes / reads)
    record.derived.update(
        gflop_a_query_formula=formula,
        gflop_a_query_counted=counted,
        gflop_a_second=gflops,
        bank_bytes=bank_bytes,
        share_of_products=gflops / products,
        share_of_memory=1e-9 * bank_bytes / record.median / reads,
        floor=floor,
        times_the_floor=record.median / floor,
    )
    resnet = run.find("resnet50_step")
    if resnet is not None:
        record.derived["share_of_resnet50_step"] = record.median / (resnet.derived["seconds_an_image"] * problem.batch)
    if ours and method != "auto" and is_papers(problem) and problem.rows == max(PAPER_TABLE_1):
        run.memory_cases.append(memory.MemoryCase(name, method, problem))
    return record


def describe(problem: Problem) -> str:
    """Return the sizes in words.

    >>> describe(Problem(128_000, 512, 256, 5, "float32", "cpu"))
    'N = 128,000, D = 512, batch 256, k = 5'
    """
    return f"N = {problem.rows:,}, D = {problem.dim}, batch {problem.batch}, k = {problem.k}"


def measure_steps(run: Run, problem: Problem) -> None:
    """Time a step of msf_core by backend, the authors' step, and two peers' searches alternately; compare losses."""
    run.say(f"one step, {describe(problem)}: filling the banks")
    filled = cases.fill_bank(problem)
    *batches, warm_up = cases.make_batches(problem, run.args.repeats + 1)
    steps: dict[str, cases.Step] = {}
    for backend in dict.fromkeys(("auto", *run.args.backends)):
        bank = MemoryBank(problem.rows, problem.dim, dtype=filled.dtype, backend=backend).to(run.device)
        bank.load_state_dict(filled.state_dict())
        steps[backend] = cases.our_step(bank, problem.k)
    if not run.args.no_peers:
        steps |= _peer_steps(run, problem, filled)
    steps["authors"] = cases.authors_step(filled, problem.k)
    losses = {name: [step(*warm_up)] for name, step in steps.items()}

    def timed(name: str) -> Callable[[int], object]:
        return lambda number: losses[name].append(steps[name](*batches[number]))

    run.say(f"one step, {describe(problem)}: {', '.join(steps)} x {run.args.repeats}, in turns")
    calls = {name: timed(name) for name in steps}
    seconds = time_interleaved(calls, dict.fromkeys(calls, run.args.repeats), run.device)
    again = {name: partial(_run_step, step, batches) for name, step in steps.items()}  # their losses are not compared
    hidden = hidden_summary(again, dict.fromkeys(again, run.args.repeats), run.device)
    for name in steps:
        record = run.add("step", asdict(problem) | {"method": name}, seconds[name], "s")
        _note_hidden(record, hidden.get(name))
        if name in run.args.backends or name in ("auto", "authors"):
            apart = [float(a - b) for a, b in zip(losses[name], losses["authors"], strict=True)]
            record.derived.update(loss=float(losses[name][-1]), most_apart_from_authors_loss=max(map(abs, apart)))
            if name in ("auto", "authors"):
                run.memory_cases.append(memory.MemoryCase("authors" if name == "authors" else "step", name, problem))


def _run_step(step: cases.Step, batches: list[tuple[Tensor, Tensor]], number: int) -> Tensor:
    return step(*batches[number])


def _peer_steps(run: Run, problem: Problem, bank: MemoryBank) -> dict[str, cases.Step]:
    """Return the searches to compare a step with: a bare faiss.knn, and lightly's bank with its update, k = 1."""
    wanted = {"bare faiss.knn": (bank.rows, problem), "lightly bank": (bank.rows.clone(), replace(problem, k=1))}
    found: dict[str, cases.Step] = {}
    for name, (rows, of) in wanted.items():
        built, reasons = peers.build_all(rows, of, only=name)
        found |= {peer: _as_step(search, bank.dtype) for peer, search in built.items()}
        run.unmeasured |= {f"{peer}, as a step": reason for peer, reason in reasons.items()}
    return found


def _as_step(search: peers.Search, dtype: torch.dtype) -> cases.Step:
    def step(v: Tensor, u: Tensor) -> Tensor:
        search(peers.unit_queries(u, dtype))
        return v.new_tensor(torch.nan)  # a search alone has no loss

    return step


def measure_memory(run: Run) -> None:
    """Measure the extra memory of all requested cases."""
    wanted = list(dict.fromkeys(run.memory_cases))
    run.say(f"extra memory: {len(wanted)} cases, each in a fresh process")
    for case, result in memory.measure_cases(wanted).items():
        if not result.bytes:
            run.unmeasured[f"memory of {case.what} by {case.method} at {describe(case.problem)}"] = result.reason
            run.say(f"extra memory of {case.what} by {case.method} unmeasured: {result.reason}")
            continue
        parameters = asdict(case.problem) | {"what": case.what, "method": case.method}
        run.add("extra_memory", parameters, [float(count) for count in result.bytes], "bytes")
