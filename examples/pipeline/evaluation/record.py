"""The output of an evaluation: a table, with the paper's rows where they are comparable, and a JSON record."""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.evaluation.commands import Evaluation, Subject
from pipeline.evaluation.paper import HEADINGS, Rows, comparable, table
from pipeline.running.environment import environment
from pipeline.running.flags import writable_file


def record_path(flags: argparse.Namespace, subject: Subject | None = None) -> Path | None:
    """Return the path of the record: --out, or a default that depends on the subject; None without either.

    Raises:
        ValueError: the record cannot be written there, or would overwrite a file of another kind.
    """
    if flags.out:
        path = Path(flags.out)
    elif subject is None:
        return None
    elif subject.encoder.folder is not None:
        path = subject.encoder.folder / f"eval_{flags.command}.json"
    else:
        path = Path(f"eval_{flags.command}_{subject.encoder.arch}.json")
    writable_file("--out", path)
    if path.is_file() and path.stat().st_size and not _is_record(path):
        raise ValueError(f"--out: {path} exists and is not a record of an evaluation: choose another name")
    return path


def report(subject: Subject, protocol: dict[str, Any], row: dict[str, float], path: Path, seconds: float) -> None:
    """Write the record and print the table; a record that cannot be written is printed too.

    Raises:
        OSError: the record could not be written.
    """
    record = describe(subject, protocol, row, seconds)
    text, problem = json.dumps(record, indent=2) + "\n", None
    try:
        write_whole(path, text)
    except OSError as error:
        problem = error
    if row:
        name = Path(subject.flags.encoder).resolve().name if subject.encoder.folder else subject.encoder.arch
        where = record.get("data", {}).get("dataset", "transfer sets")
        print("\n" + tables(f"{name} on {where}", row, comparable(record)))
    for what, why in protocol.get("not measured", {}).items():
        print(f"not measured: {HEADINGS.get(what, what)}: {why}")
    if problem is None:
        print(f"\n{path}: the record, with the whole protocol")
        return
    print(f"\nthe record, which could not be written:\n{text}", flush=True)
    raise OSError(f"--out: {path} could not be written ({problem.strerror or problem}): the record is printed instead")


def describe(subject: Subject, protocol: dict[str, Any], row: dict[str, float], seconds: float) -> dict[str, Any]:
    """Return the record."""
    record = {"command": subject.flags.command, "encoder": {"arch": subject.encoder.arch, **subject.encoder.source}}
    if isinstance(subject, Evaluation):
        record["data"] = {
            "dataset": subject.dataset,
            "path": "" if subject.dataset == "digits" else subject.data,
            "training_images": subject.source.size("train"),
            "test_images": subject.source.size("val"),
            "classes": subject.classes,
        }
    return record | {
        "protocol": protocol,
        "results": row,
        "ranks": subject.ranks.size,
        "seconds": round(seconds, 1),
        **environment(subject.device),
    }


def tables(name: str, row: dict[str, float], paper: Rows) -> str:
    """Return the results as a table, with the paper's rows in it or, if these have fewer columns, in a table below."""
    percent = {key: 100 * value for key, value in row.items()}
    shared = [key for key in row if any(key in other for other in paper.values())]
    theirs = {f"paper, ImageNet: {title}": other for title, other in paper.items()}
    if not shared:
        return table({name: percent}, list(row))
    if shared == list(row):
        return table({name: percent, **theirs}, shared)
    return f"{table({name: percent}, list(row))}\n\n{table({name: percent, **theirs}, shared)}"


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or keep the old one. A device such as /dev/stdout is written to directly."""
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _is_record(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() >= {"command", "results"}
