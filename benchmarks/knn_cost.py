"""What the nearest neighbours cost: the paper's Table 1 beside this machine's own figures.

    python benchmarks/knn_cost.py            (no arguments: N = 1,024,000 and 128,000, D = 512, batch 256, k = 5)

Measured, each as one record in OUT/knn_cost.jsonl, and shown in OUT/knn_cost.md (also printed) and OUT/knn_cost.png:

- search: time of ``MemoryBank.search`` for one batch by each backend, fetching the neighbours' rows included.
- authors: one step in the authors' formulation (msf_core.reference), in float32 whatever the bank's dtype: bank
  write, loss by two distance matrices, backward to the prediction.
- step: the same with msf_core: push, search, loss, backward; in turns with the authors' step, in one run.
- matmul_rate: the fastest matrix product that this machine was seen to do, the ceiling of the above.
- resnet50_step: forward and backward of the online ResNet50 and forward of the target, 224 x 224 images.
- extra_memory: the peak during one call above what was there before, in a fresh process (memory.py says how).

Formulas and units:

    GFLOP a query   = 2·N·D / 1e9 (search), 6·N·D / 1e9 (authors' step: two products forward, one backward);
                      a multiply-add is two operations. Counted: torch.utils.flop_counter on a real run, a query;
                      for every backend on the run of the torch backend, whose products are the ones it sees
    GFLOP/s         = counted GFLOP a query · batch / median time
    share of rate   = GFLOP/s / the machine's matrix-product rate
    share of step   = search time / ResNet50 step time, both for one batch
    MB, GB          = 1e6, 1e9 bytes

Times are medians with the 20 % and 80 % quantiles. On a CPU the ResNet50 step is measured on a few images and scaled
by their number. Recall is against a float64 brute force on eight queries.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks import stages, tables
from benchmarks.measure import write_jsonl
from msf_core import available_backends

DEFAULT_ROWS = (1_024_000, 128_000)
DEFAULT_STEP_ROWS = 131_072
CPU_REPEATS, CUDA_REPEATS = 7, 30


def main() -> None:
    """Run the benchmark as the command line asks."""
    args = parse_arguments()
    torch.manual_seed(0)
    run = stages.Run(args, torch.device(args.device))
    stages.measure_machine(run)
    for rows in args.rows:
        stages.measure_searches(run, rows)
    stages.measure_steps(run, args.step_rows)
    stages.measure_memory(run)
    run.say("writing the results")
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(run.records, args.out / "knn_cost.jsonl")
    report = tables.write_report(run.records, run.unmeasured)
    (args.out / "knn_cost.md").write_text(report, encoding="utf-8")
    print("\n" + report)
    plot_written = _plot(run)
    run.say(f"written: knn_cost.jsonl, knn_cost.md{plot_written} in {args.out}")


def _plot(run: stages.Run) -> str:
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no plot: it needs matplotlib: {error}")
        return ""
    plots.plot_knn_cost(run.records, run.unmeasured, run.args.out / "knn_cost.png")
    return ", knn_cost.png"


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ends with exit code 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=_positive, nargs="+", help=f"bank sizes N (default: {_listed(DEFAULT_ROWS)})")
    parser.add_argument(
        "--step-rows",
        type=_positive,
        help=f"bank size of the whole step (default: {DEFAULT_STEP_ROWS}, or the smallest of --rows where given)",
    )
    parser.add_argument("--dim", type=_positive, default=512, help="dimensions D (default: 512)")
    parser.add_argument("--batch", type=_positive, default=256, help="queries of a batch (default: 256)")
    parser.add_argument("--k", type=_positive, default=5, help="neighbours (default: 5)")
    parser.add_argument("--repeats", type=_positive, help=f"runs of each (default: {CPU_REPEATS}; CUDA {CUDA_REPEATS})")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that work here")
    parser.add_argument("--authors-at-1m", action="store_true", help="the authors' step at the largest sizes too")
    parser.add_argument("--no-resnet", action="store_true", help="leave the ResNet50 training step out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    args = parser.parse_args()
    _fill_in(parser, args)
    return args


def _fill_in(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the defaults that depend on other arguments, and refuse what cannot be run."""
    has_cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if has_cuda else "cpu")
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    args.step_rows = args.step_rows or (min(args.rows) if args.rows else DEFAULT_STEP_ROWS)
    args.rows = list(dict.fromkeys(args.rows or DEFAULT_ROWS))
    args.repeats = args.repeats or (CUDA_REPEATS if args.device == "cuda" else CPU_REPEATS)
    smallest = min(*args.rows, args.step_rows)
    for name in ("k", "batch"):
        if getattr(args, name) > smallest:
            parser.error(f"--{name} {getattr(args, name)}: it may be at most the rows of the bank, {smallest}")
    works = available_backends(args.device)
    args.missing_backends = {} if args.backends else {name: reason for name, reason in works.items() if reason}
    args.backends = list(dict.fromkeys(args.backends or [name for name, reason in works.items() if reason is None]))
    for name in args.backends:
        if name not in works:
            parser.error(f"--backends {name}: unknown; known: {', '.join(works)}")
        if works[name] is not None:
            parser.error(f"--backends {name}: it does not work here: {works[name]}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: that is a file, not a folder")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _listed(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


if __name__ == "__main__":
    main()
