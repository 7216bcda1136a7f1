"""Compare the replacement in examples/integrations/lightly_nnclr.py with lightly's own NNMemoryBankModule.

    python benchmarks/lightly_bank.py            (no arguments: 65,536 rows of 256 dimensions, batches of 256, k = 1)

Both modules start with the same full bank of random unit rows and get the same batches, a new one in each round. The
forwards with update=False and with update=True are timed, alternating between the modules. OUT/lightly_bank.jsonl gets
one record per module and value of update; OUT/lightly_bank.md (also printed) has the table.

Recall is the share of queries whose result is as near as the nearest row by float64 brute force. It is measured before
and after the timing, which also shows that both banks still have the same contents; the table has the lower value. The
batch size must divide the number of rows, because otherwise lightly's bank drops rows.

"Rows missing": a bank of at most 4,096 rows is filled three times over, with batches whose size does not divide its
size. Then its rows are compared with those of collections.deque(maxlen=rows). Each row is identified by a number that
is encoded in the signs of its values.

"Times ours" is the ratio of medians to our default backend with the same update. Times are medians with the 20 % and
80 % quantiles. Extra memory is the peak during one forward minus the memory in use before it (see memory.py).
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring import memory
from benchmarks.measuring.arguments import positive, settle_device_and_folder
from benchmarks.measuring.measure import (
    Record,
    describe_environment,
    in_words,
    quantiles,
    time_interleaved,
    write_jsonl,
)
from benchmarks.measuring.tables import format_bytes, format_spread
from msf_core import __version__, available_backends

CPU_REPEATS, CUDA_REPEATS = 51, 301
WARM_UP_ROUNDS = 3
WRAP_MOST_ROWS, WRAP_TURNS = 4096, 3
CHUNK = 16384
TOLERANCE = 2e-6  # similarities of unit vectors in float32 that differ by less are a tie


@dataclass(frozen=True)
class Task:
    """What to measure."""

    rows: int
    dim: int
    batch: int
    repeats: int
    device: torch.device


@dataclass(frozen=True)
class Method:
    """A module: ``build`` creates it with a bank full of the given rows [N, D]; ``contents`` returns them."""

    name: str
    package: str
    build: Callable[[Tensor], nn.Module]
    contents: Callable[[Any], Tensor]


def main() -> None:
    """Run the benchmark with the arguments of the command line."""
    args = parse_arguments()
    task = Task(args.rows, args.dim, args.batch, args.repeats, torch.device(args.device))
    try:
        methods = make_methods(task.device)
    except ImportError as error:
        sys.exit(f"this needs lightly and the examples: pip install -e '.[peers,examples]': {error}")
    records = measure(task, methods)
    report = write_report(records)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "lightly_bank.jsonl")
    (args.out / "lightly_bank.md").write_text(report, encoding="utf-8")
    print(report)
    print(f"written: lightly_bank.jsonl, lightly_bank.md in {args.out}")


def make_methods(device: torch.device) -> list[Method]:
    """Return our module with each backend, the default first, and lightly's.

    Raises:
        ImportError: if lightly, or a package that the example needs, is not installed.
    """
    from lightly.models.modules import NNMemoryBankModule

    from integrations.lightly_nnclr import MSFMemoryBankModule

    def build_ours(rows: Tensor, backend: str) -> nn.Module:
        module = MSFMemoryBankModule(rows.shape, backend=backend).to(rows.device)
        module.bank.push(rows)
        return module

    def build_lightly(rows: Tensor) -> nn.Module:
        module: nn.Module = NNMemoryBankModule(size=tuple(rows.shape)).to(rows.device)
        module.bank.copy_(rows)  # type: ignore[operator]
        return module

    working = [name for name, problem in available_backends(device).items() if problem is None]
    if device.type == "cpu" and "triton" in working:
        working.remove("triton")  # on a CPU, it runs only in the interpreter, for tests
    backends = ["auto", *working]
    ours = [
        Method(f"drop-in, {name}", f"msf_core {__version__}", partial(build_ours, backend=name), lambda m: m.bank.rows)
        for name in backends
    ]
    return [*ours, Method("NNMemoryBankModule", f"lightly {version('lightly')}", build_lightly, lambda m: m.bank)]


def measure(task: Task, methods: list[Method]) -> list[Record]:
    """Time the methods alternately, check their results and contents, and compare them with the first method."""
    generator = torch.Generator(task.device).manual_seed(0)
    rows = F.normalize(torch.randn(task.rows, task.dim, generator=generator, device=task.device), dim=1)
    shape = (1 + WARM_UP_ROUNDS + task.repeats + 1, task.batch, task.dim)
    batches = F.normalize(torch.randn(shape, generator=generator, device=task.device), dim=2)
    modules = {method.name: method.build(rows) for method in methods}
    truth = true_similarity(rows, batches[0])
    recalls = {name: [recall(module, batches[0], truth)] for name, module in modules.items()}

    calls = {
        (name, update): partial(forward, module, batches[1:-1], update)
        for name, module in modules.items()
        for update in (False, True)
    }
    labels = {f"{name} {update}": call for (name, update), call in calls.items()}
    time_interleaved(labels, dict.fromkeys(labels, WARM_UP_ROUNDS), task.device)
    timed = {label: _later(call) for label, call in labels.items()}
    seconds = time_interleaved(timed, dict.fromkeys(timed, task.repeats), task.device)

    held = methods[-1].contents(modules[methods[-1].name])
    truth = true_similarity(held, batches[-1])
    for name, module in modules.items():
        recalls[name].append(recall(module, batches[-1], truth))
    missing = {method.name: rows_missing(task, method) for method in methods}

    environment = describe_environment(task.device)
    records = []
    for method in methods:
        for update in (False, True):
            times = seconds[f"{method.name} {update}"]
            parameters = {
                "method": method.name,
                "package": method.package,
                "update": update,
                "rows": task.rows,
                "dim": task.dim,
                "batch": task.batch,
                "k": 1,
            }
            derived = missing[method.name] | measure_extra(calls[method.name, update], task.device)
            record = Record(
                "nn_bank_forward",
                parameters,
                *quantiles(times),
                "s",
                len(times),
                environment,
                recall=min(recalls[method.name]),
                derived=derived,
            )
            records.append(record)
    for record in records:
        ours = next(other for other in records if other.parameters["update"] == record.parameters["update"])
        record.derived["times_ours"] = record.median / ours.median
    return records


def forward(module: nn.Module, batches: Tensor, update: bool, number: int) -> Tensor:
    """Call a module with the batch [B, D] of a round."""
    nearest: Tensor = module(batches[number], update=update)
    return nearest


def _later(call: Callable[[int], object]) -> Callable[[int], object]:
    return lambda number: call(WARM_UP_ROUNDS + number)


def true_similarity(rows: Tensor, queries: Tensor) -> Tensor:
    """Return the similarity [B] of each unit query's nearest row, by brute force in float64."""
    best = [(queries.double() @ chunk.double().T).amax(dim=1) for chunk in rows.split(CHUNK)]
    return torch.stack(best).amax(dim=0)


def recall(module: nn.Module, queries: Tensor, truth: Tensor) -> float:
    """Return the share of queries [B, D] whose result is as similar as ``truth`` [B] up to rounding."""
    answers = F.normalize(module(queries, update=False).double(), dim=1)
    similarity = (answers * queries.double()).sum(dim=1)  # [B]
    return float((similarity >= truth - TOLERANCE).double().mean())


def rows_missing(task: Task, method: Method) -> dict[str, int]:
    """Push batches whose size does not divide the bank's, and count the rows of a deque that the bank lacks."""
    size = min(task.rows, WRAP_MOST_ROWS)
    batch = max(2, min(task.batch, size) * 3 // 4)
    batch += size % batch == 0
    total = WRAP_TURNS * size
    bits = total.bit_length()
    if bits > task.dim:
        raise ValueError(f"dim must be at least {bits} to distinguish {total} rows, got {task.dim}")
    powers = 2 ** torch.arange(bits, device=task.device)

    def spell(numbers: Tensor) -> Tensor:
        """Encode each number in the signs of the first values of a unit row."""
        rows = torch.ones(len(numbers), task.dim, device=task.device)
        rows[:, :bits] -= 2.0 * ((numbers[:, None] & powers) > 0)
        return F.normalize(rows, dim=1)

    numbers = torch.arange(total, device=task.device)
    module = method.build(spell(numbers[:size]))
    for some in numbers[size:].split(batch):
        module(spell(some), update=True)
    there = ((method.contents(module)[:, :bits] < 0) * powers).sum(dim=1)
    expected = set(deque(range(total), maxlen=size))
    return {"wrap_rows": size, "wrap_batch": batch, "rows_missing": len(expected - set(there.tolist()))}


def measure_extra(call: Callable[[int], object], device: torch.device) -> dict[str, int]:
    """Measure the extra memory of one forward; return an empty dict if the system does not report it."""
    if device.type == "cuda":
        return {"extra_memory_bytes": memory.extra_memory_cuda(lambda: call(0), device).bytes[0]}
    result = memory.extra_memory_cpu(lambda: call(0))
    return {"extra_memory_bytes": result.bytes[0]} if result.bytes else {}


def write_report(records: list[Record]) -> str:
    """Return the whole report in Markdown."""
    p = records[0].parameters
    derived = records[0].derived
    header = ("module", "version", "update", "time a forward (20–80 %)", "times ours", "extra memory", "recall")
    lines = [[*header, "rows missing"], ["---"] * (len(header) + 1), *(_row(record) for record in records)]
    parts = [
        "# The drop-in for lightly's NNMemoryBankModule",
        in_words(records[0].environment),
        f"{p['rows']:,} rows of {p['dim']} dimensions, batches of {p['batch']}, one neighbor, random unit rows; "
        f"{records[0].repeats} forwards per module, alternating; ratios of medians.",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        f"Rows missing: of the newest {derived['wrap_rows']:,} rows, after a bank of this size was filled {WRAP_TURNS} "
        f"times, from the second time on in batches of {derived['wrap_batch']}. Recall: share of results as near as "
        "the nearest row by float64 brute force, the lower value of before and after the timing.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(record: Record) -> list[str]:
    p, derived = record.parameters, record.derived
    extra = derived.get("extra_memory_bytes")
    return [
        p["method"],
        p["package"],
        str(p["update"]),
        format_spread(record),
        f"{derived['times_ours']:.2f}",
        "unmeasured" if extra is None else format_bytes(extra),
        f"{record.recall:.3f}",
        f"{derived['rows_missing']:,}",
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line; if it is wrong, exit with code 2 and a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--rows", type=positive, default=65536, help="rows of the bank (default: 65536)")
    parser.add_argument("--dim", type=positive, default=256, help="dimensions (default: 256)")
    parser.add_argument("--batch", type=positive, default=256, help="queries, must divide --rows (default: 256)")
    parser.add_argument("--repeats", type=positive, help=f"forwards (default: {CPU_REPEATS}; CUDA {CUDA_REPEATS})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    args = parser.parse_args()
    settle_device_and_folder(parser, args)
    if args.rows % args.batch:
        parser.error(f"--batch {args.batch}: lightly's bank loses rows unless it divides --rows {args.rows}")
    args.repeats = args.repeats or (CUDA_REPEATS if args.device == "cuda" else CPU_REPEATS)
    return args


if __name__ == "__main__":
    main()
