"""Cost of a bank that ranks share: memory, received bytes and time per step, for 1, 2 and 4 gloo ranks.

    python benchmarks/bank_ranks.py        a minute on two CPU cores

A step pushes a batch that is divided among the ranks, and searches the k nearest neighbors of each of its rows. There
are W ranks, B rows in the batch of all ranks, D dimensions, N rows in the bank, and e bytes per stored value. Each
rank receives, in bytes:

    push                 (W − 1)/W · B · (e D + 8)                       everyone's rows and int64 labels
    search, sharded      (W − 1)/W · B · e D                             everyone's queries
                       + (W − 1)/W · B · k · (e D + 20)                  k candidates of every other shard, with
                                                                         similarity (4), slot and label (8 each)

and headers of 88 bytes from each other rank: one for a push, two for a sharded search. Each rank stores N rows of
e D + 8 bytes if the bank is replicated, and ⌈N/W⌉ rows if it is sharded. In both cases each rank computes
2 D · B · N/W operations.

"Measured" is what the loopback interface received (/proc/net/dev), including TCP's headers, divided by W. No other
program may use that interface meanwhile. All ranks share two cores, so the times show the cost of the exchange, not
the speedup from W machines. Run it on an otherwise idle machine. It writes bank_ranks.jsonl, one record per case, and
bank_ranks.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.measure import describe_environment
from msf_core import MemoryBank

SIZE, DIM, BATCH, K, STEPS, WARM_UP = 65_536, 256, 256, 5, 20, 8
E = {torch.float32: 4, torch.float16: 2}


def wire_bytes(ranks: int, layout: str, batch: int, dim: int, k: int, e: int) -> float:
    """Return the bytes that each rank receives in a step, by the formulas above."""
    others = (ranks - 1) / ranks * batch
    push = others * (e * dim + 8) + 88 * (ranks - 1)
    if layout == "replicated" or ranks == 1:
        return push
    return push + others * (e * dim + k * (e * dim + 20)) + 2 * 88 * (ranks - 1)


def received() -> int:
    """Return the bytes that the loopback interface has received."""
    lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()]
    return next(int(line[1]) for line in lines if line[0] == "lo:")


def rank_main(rank: int, ranks: int, store: str, layout: str, dtype: torch.dtype, results: Any) -> None:
    """Push and search as one of the ranks; send the neighbors and the measurements."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(SIZE, DIM, dtype=dtype, layout=layout, backend="torch")
    for _ in range(SIZE // 4096):
        rows = torch.randn(4096, DIM, generator=generator)
        bank.push(rows.chunk(ranks)[rank], torch.arange(4096).chunk(ranks)[rank])
    for _ in range(WARM_UP):  # at first, messages still have the size that the last, larger calls needed
        batch = torch.randn(BATCH, DIM, generator=generator).chunk(ranks)[rank]
        bank.push(batch)
        bank.search(batch, K)
    seconds, found = [], None
    dist.barrier()
    before = received()
    for _ in range(STEPS):
        batch = torch.randn(BATCH, DIM, generator=generator).chunk(ranks)[rank]
        started = time.perf_counter()
        bank.push(batch)
        found = bank.search(batch, K)
        seconds.append(time.perf_counter() - started)
    after = received()
    dist.barrier()
    assert found is not None
    answer = (found.index.tolist(), found.similarity.tolist(), bank.rows.nbytes + bank.labels.nbytes)
    results.put((rank, *answer, statistics.median(seconds), (after - before) / STEPS / ranks))
    dist.destroy_process_group()


def measure(ranks: int, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the neighbors that the ranks found, in rank order, and their cost."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/store", layout, dtype, results)
        processes = torch.multiprocessing.spawn(rank_main, args=arguments, nprocs=ranks, join=False)
        answers = sorted(results.get(timeout=600) for _ in range(ranks))
        processes.join()
    return {
        "ranks": ranks,
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_a_rank": max(answer[3] for answer in answers),
        "wire_bytes_worked_out": wire_bytes(ranks, layout, BATCH, DIM, K, E[dtype]),
        "wire_bytes_measured": statistics.median(answer[5] for answer in answers) if ranks > 1 else 0.0,
        "step_seconds": max(answer[4] for answer in answers),
        "index": [row for answer in answers for row in answer[1]],
        "similarity": [row for answer in answers for row in answer[2]],
    }


def equal(case: dict[str, Any], alone: dict[str, Any]) -> bool:
    """Return whether the same neighbors were found, with the same similarities up to the rounding of a product."""
    sets = all(set(mine) == set(theirs) for mine, theirs in zip(case["index"], alone["index"], strict=True))
    close = torch.allclose(torch.tensor(case["similarity"]), torch.tensor(alone["similarity"]), rtol=0, atol=2e-6)
    return sets and close


def table(records: list[dict[str, Any]]) -> str:
    """Return the records, and calculated figures for a bank of 100 million rows, in Markdown."""
    first = records[0]
    lines = [
        f"{first['device']}; PyTorch {first['versions']['torch']}; {first['date'][:10]}. {SIZE:,} rows of {DIM} "
        f"values, a batch of {BATCH} in total, k = {K}, median of {STEPS} steps; backend torch, one thread per rank.",
        "",
        "| layout | rows | ranks | bank per rank | received per rank, calculated | measured | step | equal to one |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        cells = [record["layout"], record["dtype"], record["ranks"], f"{record['bytes_a_rank'] / 1e6:.1f} MB"]
        cells += [f"{record[name] / 1e3:.0f} kB" for name in ("wire_bytes_worked_out", "wire_bytes_measured")]
        cells += [f"{record['step_seconds'] * 1e3:.1f} ms", "yes" if record["equal"] else "NO"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    size, ranks, dim, batch, e = 100_000_000, 64, 512, 4096, 2
    kept, wire = size / ranks * (e * dim + 8), wire_bytes(ranks, "sharded", batch, dim, K, e)
    lines += [
        "",
        f"Calculated, not measured: with {size:,} float16 rows of {dim} values on {ranks} ranks and {batch // ranks} "
        f"images per rank, a rank stores {kept / 1e9:.2f} GB (replicated: {kept * ranks / 1e9:.0f} GB), and per step "
        f"it computes {2 * dim * batch * size / ranks / 1e12:.1f} TFLOP and receives {wire / 1e6:.1f} MB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure; return 1 if ranks found other neighbors than one process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the records")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    about = describe_environment(torch.device("cpu")) | {"threads": 1}  # for each rank
    records = []
    for dtype in E:
        alone = measure(1, "replicated", dtype)
        cases = [alone, *(measure(ranks, layout, dtype) for layout in ("replicated", "sharded") for ranks in (2, 4))]
        for case in cases:
            case["equal"] = equal(case, alone)
        records += [{k: v for k, v in case.items() if k not in ("index", "similarity")} | about for case in cases]
    (given.out / "bank_ranks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = table(records)
    (given.out / "bank_ranks.md").write_text(text)
    print(text)
    return 0 if all(record["equal"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
