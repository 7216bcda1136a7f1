"""Cost of the CPU's bfloat16 screen if it can exclude only a few rows, as in the bank of a collapsed encoder.

    python benchmarks/collapsed.py           (on an otherwise idle machine: two CPU cores with fast bfloat16 products)

Each search is timed alternately with the screen and without it (`float32_search`), by calling internal functions of the
torch backend. "random" is the case that the screen is designed for. The other banks are:

- within 0.001, duplicates: rows that differ by that much, or not at all
- half: 60 % of the rows, and all queries, within 0.001
- half of the queries: 2 % of the rows, and half of the queries, within 0.001; the others random
- ten clusters: within 0.01 of ten rows
- drift: from random to within 0.001, row by row
- second half: random, then within 0.001

Writes collapsed.jsonl, one record per search, and collapsed.md to --out. "times as long" is the ratio of the medians.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import positive, settle_device_and_folder
from benchmarks.measuring.measure import (
    Record,
    describe_environment,
    in_words,
    quantiles,
    time_interleaved,
    write_jsonl,
)
from benchmarks.measuring.tables import format_spread
from msf_core.rows import packed
from msf_core.search import Queries, Rows
from msf_core.search.screen import screen_pays, screened_search
from msf_core.search.torch_backend import float32_search

KINDS = ("within 0.001", "duplicates", "half", "half of the queries", "ten clusters", "drift", "second half")
SIZES = ((16_384, 512, 256, 5), (65_536, 256, 8, 1), (131_072, 64, 512, 50), (131_072, 512, 256, 5))  # N, D, batch, k
DTYPES = ("float32", "float16", "bfloat16", "int8")
LIMITS = ("any", "same label", "other id")
CLASSES = 100


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(arguments)
    args.device = "cpu"
    settle_device_and_folder(parser, args)
    records: list[Record] = []
    for kind, size, dtype, limit in product(("random", *KINDS), SIZES, DTYPES, LIMITS):
        records += measure(kind, size, dtype, limit, args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "collapsed.jsonl")
    (args.out / "collapsed.md").write_text(table(records), encoding="utf-8")
    print(table(records))


def made(kind: str, n: int, count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return n rows of a kind and ``count`` queries for them, float32 unit vectors, from a seeded generator."""
    generator = torch.Generator().manual_seed(0)
    one, apart, queries = (
        F.normalize(torch.randn(number, dim, generator=generator), dim=1) for number in (1, n, count)
    )
    close, asked = (F.normalize(one + 1e-3 * x, dim=1) for x in (apart, queries))
    number, query = torch.arange(n)[:, None], torch.arange(count)[:, None]
    if kind == "random":
        return apart, queries
    if kind == "duplicates":
        return one.repeat(n, 1), one.repeat(count, 1)
    if kind == "half":
        return torch.where(number % 5 < 3, close, apart), asked
    if kind == "half of the queries":
        return torch.where(number % 50 == 0, close, apart), torch.where(query % 2 == 0, asked, queries)
    if kind == "ten clusters":
        centers = apart[:10]
        rows = centers[number[:, 0] % 10] + 0.01 * apart
        return F.normalize(rows, dim=1), F.normalize(centers[query[:, 0] % 10] + 0.01 * queries, dim=1)
    if kind == "drift":
        return F.normalize(one + 1e-3 ** (number / n) * apart, dim=1), asked
    if kind == "second half":
        return torch.where(number < n // 2, apart, close), asked
    return close, asked


def measure(kind: str, size: tuple[int, int, int, int], dtype: str, limit: str, repeats: int) -> list[Record]:
    """Time one search alternately with and without the screen; return no record if the backend would not use it."""
    n, dim, batch, k = size
    made_rows, made_queries = made(kind, n, batch, dim)
    values, scale = packed(made_rows, getattr(torch, dtype))
    queries, rows = Queries(made_queries if dtype == "int8" else made_queries.to(values.dtype)), Rows(values, scale)
    if limit == "same label":
        labels = torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(1))
        queries, rows = queries._replace(labels=labels[:batch]), rows._replace(labels=labels)
    if limit == "other id":
        queries, rows = queries._replace(ids=torch.arange(batch)), rows._replace(ids=torch.arange(n) // 2)
    if not screen_pays(queries.values, rows.values, k):
        return []
    left: list[int] = []

    def rest(queries: Queries, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        left.append(len(rows.values))
        return float32_search(queries, rows, k)

    searches: dict[str, Callable[[], object]] = {
        "screen": partial(screened_search, queries, rows, k, rest),
        "float32": partial(float32_search, queries, rows, k),
    }
    for search in searches.values():
        search()  # warm up
    given_up = sum(left) / n
    calls = {name: lambda _, search=search: search() for name, search in searches.items()}
    seconds = time_interleaved(calls, dict.fromkeys(calls, repeats), torch.device("cpu"))
    parameters = {"rows": n, "dim": dim, "batch": batch, "k": k, "dtype": dtype, "limit": limit, "kind": kind}
    environment = describe_environment(torch.device("cpu"))
    return [
        Record(
            name="search",
            parameters=parameters | {"method": name},
            **quantiles(times)._asdict(),
            unit="s",
            repeats=repeats,
            environment=environment,
            derived={"share_given_up": given_up} if name == "screen" else {},
        )
        for name, times in seconds.items()
    ]


def table(records: list[Record]) -> str:
    """Return the records in Markdown."""
    if not records:
        return "This CPU has no fast bfloat16 or int8 products, so no search uses the screen.\n"
    header = (
        "| bank | N | D | batch | k | dtype | which rows | with the screen (20–80 %) | without | times as long "
        "| rows given up |"
    )
    pairs = list(zip(records[::2], records[1::2], strict=True))
    most = max(screen.median / plain.median for screen, plain in pairs)
    lines = [
        "# What the screen costs where it can leave few rows out",
        "",
        in_words(records[0].environment),
        "",
        f"Medians of {records[0].repeats} runs, alternating (`python benchmarks/collapsed.py`). With the screen, a",
        f"search took at most {most:.2f} times as long as without. Rows given up are searched without the screen.",
        "",
        header,
        "| --- " * (header.count("|") - 1) + "|",
    ]
    for screen, plain in pairs:
        p = screen.parameters
        sizes = " | ".join(f"{p[name]:,}" for name in ("rows", "dim", "batch", "k"))
        times = f"{format_spread(screen)} | {format_spread(plain)} | {screen.median / plain.median:.2f}"
        share = f"{screen.derived['share_given_up']:.0%}"
        lines.append(f"| {p['kind']} | {sizes} | {p['dtype']} | {p['limit']} | {times} | {share} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
