"""Compare the neighbors found in half-precision and int8 rows of trained encoders with those found in float32 rows.

    python examples/imagenet_train.py --dim 512 --out runs/wide        about a minute; then
    python benchmarks/int8_recall.py runs/wide

Each argument is the folder of a run of `examples/imagenet_train.py` with a bank of float32 rows. The embeddings are
those in its bank at the end of training. Each embedding is a query for its k nearest others, as in training. Recall is
the share of the k neighbors found in float32 rows that are also found in the rounded rows.

Writes int8_recall.jsonl, one record for each run and dtype, and int8_recall.md to --out.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import positive
from benchmarks.measuring.measure import Record, describe_environment, in_words, write_jsonl
from msf_core import MemoryBank, Neighbors

DTYPES = (torch.float16, torch.bfloat16, torch.int8)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a checkpoint.pt")
    parser.add_argument("--k", type=positive, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(arguments)
    records = []
    for run in args.runs:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["criterion"]
        embeddings = state["bank.rows"][: int(state["bank.pushed"])]
        records += measure(run.name, embeddings, args.k)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "int8_recall.jsonl")
    (args.out / "int8_recall.md").write_text(table(records), encoding="utf-8")
    print(table(records))


def measure(name: str, embeddings: Tensor, k: int) -> list[Record]:
    """Return a record for each dtype; its median is recall@k, with each of the embeddings [N, D] as a query."""
    truth = others_of(embeddings, torch.float32, k)[0]
    environment = describe_environment(embeddings.device)
    records = []
    for dtype in DTYPES:
        found, bank = others_of(embeddings, dtype, k)
        hits = (found.index[:, :, None] == truth.index[:, None]).any(dim=2).double().mean(dim=1)  # [N]
        off = (found.similarity - truth.similarity).abs().max()
        records.append(
            Record(
                name="recall",
                parameters={
                    "run": name,
                    "rows": len(embeddings),
                    "dim": embeddings.shape[1],
                    "k": k,
                    "dtype": str(dtype).removeprefix("torch."),
                },
                median=hits.mean().item(),
                q20=hits.quantile(0.2).item(),
                q80=hits.quantile(0.8).item(),
                unit="share, the mean over queries; its quantiles are those of single queries",
                repeats=len(embeddings),
                environment=environment,
                recall=hits.mean().item(),
                derived={"bytes": bank.nbytes, "largest_difference_of_similarity": off.item()},
            )
        )
    return records


def others_of(embeddings: Tensor, dtype: torch.dtype, k: int) -> tuple[Neighbors, MemoryBank]:
    """Return each embedding's k nearest others in a bank of this dtype, and the bank."""
    bank = MemoryBank(*embeddings.shape, dtype=dtype)
    slots = bank.push(embeddings)
    found = bank.search(embeddings, k + 1)
    others = found.similarity.masked_fill(found.index == slots[:, None], -torch.inf).topk(k, dim=1).indices  # [N, k]
    query = torch.arange(len(embeddings))[:, None]
    return Neighbors(*(part[query, others] for part in found)), bank


def table(records: list[Record]) -> str:
    """Describe the records in Markdown."""
    lines = [
        "# Neighbors among rounded rows",
        "",
        in_words(records[0].environment),
        "",
        "Share of the k nearest others in float32 rows that are also found in rounded rows. The rows are those of the",
        "bank after training; each is a query once (`python benchmarks/int8_recall.py`).",
        "",
        "| run | rows | dim | k | dtype | recall | similarity off by at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        p = record.parameters
        off = record.derived["largest_difference_of_similarity"]
        lines.append(
            f"| {p['run']} | {p['rows']:,} | {p['dim']} | {p['k']} | {p['dtype']} | {record.median:.4f} | {off:.1e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
