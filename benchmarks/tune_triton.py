"""Find the fastest tiles and groups of the Triton search on this GPU, and compare them with msf_core's choice.

    python benchmarks/tune_triton.py         (some minutes; needs a CUDA device)

Every combination of tile sizes, stages and group size that fits the device is timed on the paper's sizes. The file
--out gets one record per combination. For every size, the three fastest are printed next to the choice of
`msf_core.search.triton_plan` (`tiles_for`, `choose_group`); use these figures to update that choice. Times are medians
of the whole search.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.cases import Problem, fill_bank, make_batches
from benchmarks.measuring.measure import Record, describe_environment, quantiles, time_once, write_jsonl
from benchmarks.measuring.peers import unit_queries
from benchmarks.measuring.tables import format_seconds
from msf_core.search import Queries, Rows
from msf_core.search.triton_plan import Plan, Tiles, plan_for

REPEATS = 15
PROBLEMS = [
    Problem(rows, 512, batch, 5, dtype, "cuda")
    for dtype, rows, batch in product(("bfloat16", "float32"), (128_000, 1_024_000), (64, 256))
]


def main() -> None:
    """Time every combination on every problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "tune_triton.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here")
    records: list[Record] = []
    for problem in PROBLEMS:
        records += tune(problem)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(records, args.out)  # after each problem, so that an interrupted run keeps its results
    print(f"written: {args.out}")


def tune(problem: Problem) -> list[Record]:
    """Time every combination on one problem; print the fastest ones and msf_core's choice."""
    rows = fill_bank(problem).rows
    ((_, u),) = make_batches(problem, 1)
    queries = unit_queries(u, rows.dtype)
    plan = plan_of(queries, rows, problem.k)
    chosen = plan.tiles, plan.group
    records = []
    for tiles, group in dict.fromkeys([chosen, *combinations(problem, rows.element_size())]):
        try:
            seconds = time_search(queries, rows, problem.k, tiles, group)
        except Exception as error:  # too much shared memory, or too much for the compiler
            print(f"left out {tiles}, G = {group}: {type(error).__name__}: {str(error)[:80]!r}")
            continue
        parameters = asdict(problem) | {"tiles": list(tiles), "group": group, "chosen": (tiles, group) == chosen}
        environment = describe_environment(rows.device)
        records.append(Record("tune_triton", parameters, *quantiles(seconds), "s", len(seconds), environment))
    print(f"N = {problem.rows:,}, batch {problem.batch}, {problem.dtype}")
    for record in sorted(records, key=lambda record: record.median)[:3]:
        print(f"  {format_seconds(record.median)}: {record.parameters['tiles']}, G = {record.parameters['group']}")
    for record in records:
        if record.parameters["chosen"]:
            print(f"  {format_seconds(record.median)}: chosen, {list(chosen[0])}, G = {chosen[1]}", flush=True)
    return records


def combinations(problem: Problem, value_bytes: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield tiles (as `triton_plan.Tiles`) and group sizes to try."""
    queries = sorted({min(problem.batch, 64), min(problem.batch, 128), min(problem.batch, 256)})
    for block_q, block_n, dims, stages, group in product(
        queries, (128, 256), (64 // value_bytes, 128 // value_bytes), (3, 4), (16, 32)
    ):
        if block_q * block_n <= 128 * 256 and group <= block_n:
            yield Tiles(block_q, block_n, dims, 8 if block_q * block_n > 128 * 128 else 4, stages), group


def plan_of(queries: Tensor, rows: Tensor, k: int, group: int | None = None) -> Plan:
    """Return the launch parameters that msf_core uses for this search."""
    from msf_core.search.triton_backend import device_limits

    (count, dim), n = queries.shape, rows.shape[0]
    return plan_for(count, n, dim, k, rows.dtype, 0, *device_limits(rows.device.type, rows.device.index), group)


def time_search(queries: Tensor, rows: Tensor, k: int, tiles: tuple[int, ...], group: int) -> list[float]:
    """Return the seconds of each search with these tiles and this group size."""
    from msf_core.search import triton_backend as backend

    plan = plan_of(queries, rows, k, group)._replace(tiles=Tiles(*tiles))
    maxima = queries.new_empty((queries.shape[0], plan.stride), dtype=torch.float32)
    similarity = queries.new_empty((queries.shape[0], k), dtype=torch.float32)
    index = queries.new_empty((queries.shape[0], k), dtype=torch.int64)
    search = partial(backend._launch, Queries(queries), Rows(rows), maxima, similarity, index, plan)
    for _ in range(2):
        search()
    return [time_once(search, rows.device) for _ in range(REPEATS)]


if __name__ == "__main__":
    main()
