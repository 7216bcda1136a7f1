"""Cost of the trial by which "auto" tests the Triton backend before its first use (`msf_core.search.trial`).

    python benchmarks/trial_cost.py          (under a minute; needs a CUDA device)

For each dtype, with D = 512, 256 queries and k = 5, it measures the first trial in this process, which compiles the
kernels or loads them from Triton's cache, and the median of the later trials. Times are wall-clock times; each trial
waits for the device at its end. Writes trial_cost.jsonl, one record per dtype, to --out, and prints the figures.
It has not been run on a GPU yet.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import settle_device_and_folder
from benchmarks.measuring.measure import Record, describe_environment, quantiles, write_jsonl
from benchmarks.measuring.tables import format_seconds, format_spread
from msf_core.rows import packed
from msf_core.search import Queries, Rows, load_backend
from msf_core.search.trial import try_out

DTYPES = ("float32", "float16", "bfloat16", "int8")
DIM, QUERIES, K, REPEATS = 512, 256, 5, 15


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda; cpu runs Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(arguments)
    settle_device_and_folder(parser, args)
    records = [measure(torch.device(args.device), dtype) for dtype in DTYPES]
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "trial_cost.jsonl")


def measure(device: torch.device, dtype: str) -> Record:
    """Time the trials of one dtype."""
    queries = torch.zeros(QUERIES, DIM, device=device)
    values, scale = packed(queries, getattr(torch, dtype))
    asked = queries if dtype == "int8" else values
    trial = partial(try_out, load_backend("triton", device), Queries(asked), Rows(values, scale), K)  # type: ignore[arg-type]
    seconds = []
    reason = None
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        reason = trial() or reason
        seconds.append(time.perf_counter() - begin)
    first, *later = seconds
    sizes = {"dim": DIM, "queries": QUERIES, "k": K, "dtype": dtype, "device": device.type}
    derived = {"first": first, "fault": reason}
    record = Record("trial", sizes, *quantiles(later), "s", REPEATS, describe_environment(device), derived=derived)
    outcome = "passed" if reason is None else f"failed: {reason}"
    print(f"{dtype}: {format_spread(record)}, the first trial {format_seconds(first)}; {outcome}", flush=True)
    return record


if __name__ == "__main__":
    main()
