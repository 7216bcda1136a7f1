"""Inject the faults that occur in long training runs on several GPUs, and check that the run recovers.

    python benchmarks/fault_drill.py              all faults, 50 kills: about half an hour on two CPU cores
    python benchmarks/fault_drill.py --kills 2    a short drill
    python benchmarks/fault_drill.py --hosts      faults of several hosts instead: see breaking/host_faults.py

Each fault is injected into `examples/imagenet_train.py`, which trains on the digits on two gloo ranks of this machine
under torchrun. torchrun restarts the ranks (``--max-restarts``). Three conditions must hold: the run finishes without
help; the losses of all steps are bit-equal to those of an undisturbed run; after every fault, the last complete
checkpoint loads. Steps after the last checkpoint (written once per epoch, every 21 steps) are lost and run again.

Needs, in a clone: pip install -e '.[examples]'. Writes fault_drill.jsonl, one record per fault, and fault_drill.md.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.breaking import rank
from benchmarks.breaking.rank import DISK, EPOCH, KILL, OVERFLOW, PLAN, STALL, STALLS, WRITE
from benchmarks.measuring.arguments import positive
from pipeline.running.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
LAYOUTS = ("replicated", "sharded")


def torchrun(folder: Path, flags: list[str], plan: dict[str, Any]) -> tuple[int, str, list[dict[str, Any]], float]:
    """Train to the end; return the exit status, the output, the events (starts and faults), and the seconds."""
    started = time.perf_counter()
    with start(folder, flags, plan) as process:
        said, _ = process.communicate()
    return process.returncode, said, events_of(folder), time.perf_counter() - started


def start(folder: Path, flags: list[str], plan: dict[str, Any]) -> "subprocess.Popen[str]":
    """Start a run under torchrun with the faults of a plan."""
    file = folder.with_suffix(".plan")
    file.write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [f"--max-restarts={len(plan) + 3}", __file__, "--as-rank", *flags, "--out", str(folder)]
    environment = os.environ | {PLAN: str(file), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the starts and faults of a run so far."""
    log = folder.with_suffix(".log")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def make_plan(kills: int, seed: int) -> dict[str, Any]:
    """Return the fault of each start, by its number: ``kills`` kills of one rank, and some of each other kind."""
    draw = random.Random(seed)
    few = max(1, kills // 10)
    names = [KILL] * kills + [WRITE] * few + [DISK] * few + [STALLS, OVERFLOW]
    draw.shuffle(names)
    # Rank 1 stalls, never rank 0; the other ranks would notice a stall of rank 0 in the same way.
    return {
        str(number): {
            "name": name,
            "rank": draw.randrange(RANKS) if name == KILL else 1,
            "after": draw.randrange(2 * EPOCH),
        }
        for number, name in enumerate(names)
    }


def drill(work: Path, layout: str, kills: int, seed: int) -> list[dict[str, Any]]:
    """Run the trainer with faults, for one layout of the bank; return a record for each fault that occurred."""
    plan = make_plan(kills, seed)
    steps = EPOCH * (len(plan) + 3)
    flags = ["--steps", str(steps), "--eval-every", "0", "--checkpoint-every", "1", "--bank-layout", layout]
    flags += ["--timeout", str(STALL)]
    status, said, _, seconds = torchrun(work / f"{layout}-undisturbed", flags, {})
    if status:
        raise SystemExit(f"the undisturbed run failed:\n{said}")
    expected = (work / f"{layout}-undisturbed" / "losses.csv").read_text()
    status, said, events, seconds = torchrun(work / f"{layout}-faulty", flags, plan)
    ended = status == 0
    found = (work / f"{layout}-faulty" / "losses.csv").read_text() if ended else ""
    if not ended:
        print(said[-3000:], file=sys.stderr)
    print(f"{layout}: {len(plan)} faults planned, {steps} steps, {seconds:.0f} s; bit-equal: {found == expected}")
    records = []
    for number, event in enumerate(events):
        if "fault" not in event:
            continue
        later = [other["start"] for other in events[number + 1 :] if "start" in other]
        record = {"fault": event["fault"], "layout": layout, "ranks": RANKS, "step": event["step"]}
        # A full disk does not stop the run; its cost shows at the next kill.
        record["resumed_at"] = later[0] if later else None
        record["lost_steps"] = max(0, event["step"] - later[0]) if later and event["fault"] != DISK else 0
        record["bit_equal"] = found == expected
        records.append(record)
    return records


def damage(work: Path) -> list[dict[str, Any]]:
    """Damage checkpoints in several ways, with a record for each: it must not load, and the error must name it."""
    records = []
    for layout in LAYOUTS:
        folder = work / f"{layout}-undisturbed"
        shards = sorted(folder.glob("bank-shards-*/*.safetensors"))
        for file in [folder / "checkpoint.pt", *shards[:1]]:
            whole = file.read_bytes()
            middle = len(whole) // 2
            ways = {
                "truncated": whole[:middle],
                "one byte flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
                "replaced by a pickle that runs a command": pickled_command(work / "ran"),
                "empty": b"",
            }
            for way, content in ways.items():
                file.write_bytes(content)
                refused, said = resume(folder)
                named = file.name in said and "Traceback" not in said
                fault = f"{'checkpoint.pt' if file.suffix == '.pt' else 'shard'}: {way}"
                outcome = {"refused": refused == 2, "error_names_the_file": named, "ran_code": (work / "ran").exists()}
                records.append({"fault": fault, "layout": layout, **outcome})
            file.write_bytes(whole)
        status, said = resume(folder)
        records.append({"fault": "none: the checkpoint put back", "layout": layout, "loads": status == 0})
    return records


def pickled_command(marker: Path) -> bytes:
    """Return the bytes of a torch.save file that creates ``marker`` if it is unpickled without restrictions."""

    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    buffer = io.BytesIO()
    torch.save({"format": 2, "weights": Command()}, buffer)
    return buffer.getvalue()


def resume(folder: Path) -> tuple[int, str]:
    """Resume a finished run in one process; return the exit status and the error output."""
    command = [sys.executable, str(ROOT / "examples" / "imagenet_train.py"), "--resume", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def summary(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the records as a table in Markdown."""
    lines = [
        f"{about['device']}; PyTorch {about['versions']['torch']}; {about['date'][:10]}. {RANKS} gloo ranks, digits, "
        f"a checkpoint every {EPOCH} steps.",
        "",
        "| fault | times | steps done again: median, most | losses bit-equal to an undisturbed run |",
        "| --- | --- | --- | --- |",
    ]
    for layout in LAYOUTS:
        for name in (KILL, WRITE, DISK, STALLS, OVERFLOW):
            those = [record for record in records if record["fault"] == name and record["layout"] == layout]
            if those:
                lost = [record["lost_steps"] for record in those]
                equal = sum(record["bit_equal"] for record in those)
                cost = "none" if name == DISK else f"{statistics.median(lost):.0f}, {max(lost)}"
                lines.append(f"| {name} ({layout} bank) | {len(those)} | {cost} | {equal} of {len(those)} |")
    lines += ["", "| checkpoint | refused | error names the file | code run |", "| --- | --- | --- | --- |"]
    for fault in dict.fromkeys(record["fault"] for record in records if "refused" in record):
        those = [record for record in records if record["fault"] == fault]
        counts = [sum(record[key] for record in those) for key in ("refused", "error_names_the_file", "ran_code")]
        lines.append(f"| {fault} | " + " | ".join(f"{count} of {len(those)}" for count in counts) + " |")
    whole = [record["loads"] for record in records if "loads" in record]
    lines.append(f"\nRestored, the checkpoint loads: {sum(whole)} of {len(whole)}.")
    return "\n".join(lines) + "\n"


def sound(record: dict[str, Any]) -> bool:
    """Return whether everything holds that must hold after a fault."""
    if "refused" in record:
        return record["refused"] and record["error_names_the_file"] and not record["ran_code"]
    return bool(record.get("bit_equal", record.get("loads")))


def main() -> int:
    """Run the drill; return 1 if a condition did not hold."""
    if sys.argv[1:2] == ["--as-rank"]:
        return rank.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--kills", type=positive, default=50, help="kills of one rank at a random step, over both layouts (default: 50)"
    )
    parser.add_argument("--hosts", action="store_true", help="faults of hosts and their links instead; needs root")
    parser.add_argument("--seed", type=int, default=0, help="seed of the ranks, steps and order of faults (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the records")
    given = parser.parse_args()
    if given.hosts:
        from benchmarks.breaking import host_faults

        return host_faults.run(given.out)
    given.out.mkdir(parents=True, exist_ok=True)
    about = environment(torch.device("cpu"))
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate(LAYOUTS):
            kills = given.kills // 2 if number else given.kills - given.kills // 2
            records += drill(Path(folder), layout, max(1, kills), given.seed + number)
        records += damage(Path(folder))
    lines = [json.dumps({**record, **about}) + "\n" for record in records]
    (given.out / "fault_drill.jsonl").write_text("".join(lines))
    text = summary(records, about)
    (given.out / "fault_drill.md").write_text(text)
    print(text)
    failed = [record for record in records if not sound(record)]
    for record in failed:
        print(f"did not hold: {record}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
