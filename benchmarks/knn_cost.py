"""Cost of the nearest-neighbor search: an extended version of the paper's Table 1, measured on this machine.

    python benchmarks/knn_cost.py            (a selection of sizes; about 2 minutes on two CPU cores)
    python benchmarks/knn_cost.py --full     (all combinations of the N, D, batch sizes and k that --help lists)

Each of the following measurements is a record in OUT/knn_cost.jsonl. OUT/knn_cost.md (also printed) has the tables,
OUT/knn_cost.png plots time against N with the floor, and OUT/knn_cost_share.png the share of a training step.

- search: the search of one batch by ``MemoryBank.search`` with each backend, including the copy of the neighbors'
  rows, and by the other libraries that are installed (peers.py: product and top-k, faiss.knn or knn_gpu, lightly's
  bank, flashlib, cuVS). The calls alternate.
- authors: one step in the authors' formulation (msf_core.reference), at the paper's sizes, always in float32: write to
  the bank, compute the loss from two distance matrices, backward to the prediction.
- step: the same with msf_core (push, search, loss, backward). It alternates in one run with the authors' step, a bare
  faiss.knn, and lightly's k = 1 bank with the same rows.
- matmul_rate, memory_rate: the fastest matrix product and memory read observed on this machine.
- resnet50_step: forward and backward of the online ResNet50 and forward of the target, 224 x 224 images.
- extra_memory: the peak during one call minus the memory in use before it, in a fresh process (see memory.py).

Formulas and units:

    GFLOP per query    = 2·N·D / 1e9 (search), 6·N·D / 1e9 (authors' step: two products forward, one backward);
                         a multiply-add is two operations. "Counted" is the count of torch.utils.flop_counter in a
                         real run, per query. It cannot see the products of FAISS and Triton; for these, the table
                         has the count of the torch backend
    GFLOP/s            = GFLOP per query by the formula · batch / median time
    product ceiling    = the fastest product in any dtype that an exact search of these rows can use for its screen:
                         bfloat16 or float32 on a CPU, that of the rows on CUDA (TF32 for float32)
    floor              = the larger of 2·Q·N·D / product ceiling and N·D·(bytes per value) / memory ceiling
    share of step      = search time / ResNet50 step time, both for one batch
    MB, GB             = 1e6, 1e9 bytes

Times are medians with the 20 % and 80 % quantiles. On CUDA, each search and step is timed twice: as called, and
without the host's overhead (measure.time_hidden queues all kernels before the GPU starts). The difference is the time
of Python and of the launches. None of this has run on a GPU yet. On a CPU, the ResNet50 step is measured on a few
images and scaled to the batch. Recall is relative to float64 brute force, on eight queries.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring import stages, tables
from benchmarks.measuring.arguments import positive, settle_device_and_folder
from benchmarks.measuring.cases import Problem
from benchmarks.measuring.measure import write_jsonl
from msf_core import available_backends

ALL_ROWS = (16_000, 64_000, 128_000, 256_000, 1_024_000)
ALL_DIMS = (128, 256, 512, 1024)
ALL_BATCHES = (64, 256, 1024)
ALL_K = (1, 5, 10, 20, 50)
ROWS, DIM, BATCH, K = 128_000, 512, 256, 5  # the paper's values (section 3.1) are in the middle of each list
DEFAULT_STEP_ROWS = 131_072
CPU_REPEATS, CUDA_REPEATS = 5, 30


def main() -> None:
    """Run the benchmark with the arguments of the command line."""
    args = parse_arguments()
    torch.manual_seed(0)
    run = stages.Run(args, torch.device(args.device))
    stages.measure_machine(run)
    for (rows, dim), problems in stages.by_bank(args.problems).items():
        stages.measure_searches(run, rows, dim, problems)
    stages.measure_steps(run, args.step_problem)
    stages.measure_memory(run)
    run.say("writing the results")
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(run.records, args.out / "knn_cost.jsonl")
    report = tables.write_report(run.records, run.unmeasured)
    (args.out / "knn_cost.md").write_text(report, encoding="utf-8")
    print("\n" + report)
    run.say(f"written: knn_cost.jsonl, knn_cost.md{_plot(run)} in {args.out}")


def _plot(run: stages.Run) -> str:
    try:
        from benchmarks.measuring import plots
    except ImportError as error:
        print(f"no plot, which needs matplotlib: {error}")
        return ""
    plots.plot_times(run.records, run.args.out / "knn_cost.png")
    plots.plot_shares(run.records, run.unmeasured, run.args.out / "knn_cost_share.png")
    return ", knn_cost.png, knn_cost_share.png"


def parse_arguments() -> argparse.Namespace:
    """Read the command line; if it is wrong, exit with code 2 and a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="all combinations of all N, D, batch sizes and k")
    for flag, what, numbers, default in (
        ("--rows", "bank sizes N", ALL_ROWS, ROWS),
        ("--dim", "dimensions D", ALL_DIMS, DIM),
        ("--batch", "batch sizes", ALL_BATCHES, BATCH),
        ("--k", "neighbors", ALL_K, K),
    ):
        listed = " ".join(map(str, numbers))
        text = f"{what}; all combinations are run (default with --full: {listed}; with other size flags: {default})"
        parser.add_argument(flag, type=positive, nargs="+", help=text)
    parser.add_argument("--step-rows", type=positive, help=f"bank size of the step (default: {DEFAULT_STEP_ROWS})")
    parser.add_argument("--repeats", type=positive, help=f"repetitions (default: {CPU_REPEATS}; CUDA {CUDA_REPEATS})")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the rows (default: float32; CUDA bfloat16)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: auto and all that work on this machine")
    parser.add_argument("--no-peers", action="store_true", help="do not measure other libraries")
    parser.add_argument("--no-resnet", action="store_true", help="do not measure the ResNet50 training step")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    args = parser.parse_args()
    _fill_in(parser, args)
    return args


def _fill_in(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the defaults that depend on other arguments, and reject arguments that cannot be run."""
    settle_device_and_folder(parser, args)
    cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.repeats = args.repeats or (CUDA_REPEATS if cuda else CPU_REPEATS)
    sizes = _sizes(args)
    args.problems = [Problem(*size, args.dtype, args.device) for size in dict.fromkeys(sizes)]
    dim, batch, k = sizes[0][1:] if args.rows or args.dim or args.batch or args.k else (DIM, BATCH, K)
    step_rows = args.step_rows or (min(args.rows) if args.rows else DEFAULT_STEP_ROWS)
    args.step_problem = Problem(step_rows, dim, batch, k, args.dtype, args.device)
    for problem in (*args.problems, args.step_problem):
        for name in ("k", "batch"):
            if getattr(problem, name) > problem.rows:
                parser.error(f"--{name} {getattr(problem, name)}: must be at most the number of rows, {problem.rows}")
    works = available_backends(args.device)
    if "triton" in works and not cuda:
        works["triton"] = "Triton searches CUDA tensors"  # there is no point in timing its interpreter
    args.missing_backends = {} if args.backends else {name: reason for name, reason in works.items() if reason}
    works = {"auto": None, **works}
    args.backends = list(dict.fromkeys(args.backends or [name for name, reason in works.items() if reason is None]))
    for name in args.backends:
        if name not in works:
            parser.error(f"--backends {name}: unknown; known: {', '.join(works)}")
        if works[name] is not None:
            parser.error(f"--backends {name}: it does not work here: {works[name]}")


def _sizes(args: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """Return (N, D, batch, k) of every requested search."""
    if args.full or args.rows or args.dim or args.batch or args.k:
        every = (ALL_ROWS, ALL_DIMS, ALL_BATCHES, ALL_K) if args.full else ((ROWS,), (DIM,), (BATCH,), (K,))
        return list(product(args.rows or every[0], args.dim or every[1], args.batch or every[2], args.k or every[3]))
    return [
        *((rows, DIM, BATCH, K) for rows in ALL_ROWS),
        *((ROWS, DIM, BATCH, k) for k in (1, 50)),
        *((ROWS, DIM, batch, K) for batch in (64, 1024)),
        *((ROWS, dim, BATCH, K) for dim in (128, 1024)),
    ]


if __name__ == "__main__":
    main()
