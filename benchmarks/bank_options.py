"""Search time by the options of a bank: the dtype of its rows, and searches that exclude rows by label or id.

    python benchmarks/bank_options.py                 two and a half minutes on two CPU cores
    python benchmarks/bank_options.py --device cuda

It times ``MemoryBank.search`` for one batch. The search may find all rows ("any"), only those with the query's label
("same label"; each row has one of 1,000 labels at random), or all except those with the query's id ("other id"; each id
belongs to two rows). It alternates between the options, with "auto" and, on the smallest bank, with "faiss" if it is
installed. Rows and queries are random.

Writes bank_options.jsonl, one record per case, and bank_options.md to --out. "times float32" is the ratio of the
median to that of "auto" on the same number of float32 rows without exclusions. The bytes of the bank are those of rows,
scales, labels and ids.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import positive, settle_device_and_folder
from benchmarks.measuring.cases import FILL_CHUNK_ROWS
from benchmarks.measuring.measure import (
    Record,
    describe_environment,
    in_words,
    quantiles,
    time_interleaved,
    write_jsonl,
)
from benchmarks.measuring.tables import format_spread
from msf_core import MemoryBank, Neighbors, available_backends

ROWS = (131_072, 1_024_000)
DTYPES = ("float32", "float16", "bfloat16", "int8")
LIMITS = ("any", "same label", "other id")
CLASSES = 1000


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="bank sizes N")
    parser.add_argument("--dim", type=positive, default=512)
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--k", type=positive, default=5)
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(arguments)
    settle_device_and_folder(parser, args)
    if args.k > min(args.rows):
        parser.error(f"--k {args.k}: must be at most the number of rows, {min(args.rows)}")
    records: list[Record] = []
    for rows in args.rows:
        with_faiss = rows == min(args.rows) and available_backends(args.device)["faiss"] is None
        records += measure(rows, args, ("auto", "faiss") if with_faiss else ("auto",))
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "bank_options.jsonl")
    (args.out / "bank_options.md").write_text(table(records), encoding="utf-8")
    print(table(records))


def measure(rows: int, args: argparse.Namespace, backends: tuple[str, ...]) -> list[Record]:
    """Time every option on banks with this number of rows, alternating."""
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(0)
    classes = partial(torch.randint, CLASSES, generator=generator, device=device)
    queries = torch.randn(args.repeats + 1, args.batch, args.dim, generator=generator, device=device)
    labels, ids = classes(size=(args.batch,)), torch.arange(args.batch, device=device)
    given = {"any": {}, "same label": {"labels": labels}, "other id": {"exclude_ids": ids}}
    banks = [filled(rows, args.dim, dtype, device) for dtype in DTYPES]

    def search(bank: MemoryBank, backend: str, limits: dict[str, Tensor], number: int) -> Neighbors:
        bank.backend = backend
        return bank.search(queries[number + 1], args.k, **limits)

    calls: dict[str, Callable[[int], Neighbors]] = {}
    for dtype, bank in zip(DTYPES, banks, strict=True):
        for backend in backends:
            for limit, limits in given.items():
                calls[f"{dtype}, {backend}, {limit}"] = partial(search, bank, backend, limits)
    for call in calls.values():
        call(-1)  # warm up
    seconds = time_interleaved(calls, dict.fromkeys(calls, args.repeats), device)
    environment = describe_environment(device)
    size = {"rows": rows, "dim": args.dim, "batch": args.batch, "k": args.k, "device": args.device}
    records = []
    for name, times in seconds.items():
        dtype, backend, limit = name.split(", ")
        bank = banks[DTYPES.index(dtype)]
        records.append(
            Record(
                name="search",
                parameters=size | {"dtype": dtype, "backend": backend, "limit": limit},
                **quantiles(times)._asdict(),
                unit="s",
                repeats=len(times),
                environment=environment,
                derived={"bytes": bank.nbytes},
            )
        )
    return records


def filled(rows: int, dim: int, dtype: str, device: torch.device) -> MemoryBank:
    """Return a full bank with random rows and labels, in which every id belongs to two rows."""
    generator = torch.Generator(device).manual_seed(1)
    bank = MemoryBank(rows, dim, dtype=getattr(torch, dtype)).to(device)
    for start in range(0, rows, FILL_CHUNK_ROWS):
        numbers = torch.arange(start, min(start + FILL_CHUNK_ROWS, rows), device=device)
        chunk = torch.randn(len(numbers), dim, generator=generator, device=device)
        bank.push(chunk, torch.randint(CLASSES, numbers.shape, generator=generator, device=device), numbers // 2)
    return bank


def table(records: list[Record]) -> str:
    """Return the records in Markdown."""
    first = records[0]
    p = first.parameters
    lines = [
        "# What the options of a bank cost",
        "",
        in_words(first.environment),
        "",
        f"One search: D = {p['dim']}, batch {p['batch']}, k = {p['k']}; medians of {first.repeats} runs, alternating",
        "(`python benchmarks/bank_options.py`). Bytes of the bank: rows, scales, labels and ids.",
        "",
        "| rows | dtype | backend | which rows | time (20–80 %) | times float32 | bank |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    plain = {"dtype": "float32", "backend": "auto", "limit": "any"}
    for record in records:
        p = record.parameters
        base = next(r for r in records if r.parameters == p | plain)
        lines.append(
            f"| {p['rows']:,} | {p['dtype']} | {p['backend']} | {p['limit']} | {format_spread(record)} | "
            f"{record.median / base.median:.2f} | {record.derived['bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
