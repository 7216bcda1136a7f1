"""Break the network between hosts that train together, and the hosts themselves, and check what happens.

    python benchmarks/fault_drill.py --hosts      as root on Linux, with iproute2; about twenty minutes on two CPU cores

Two and three hosts (benchmarks/breaking/hosts.py), each with its own host name, address and torchrun
(``--nnodes --max-restarts``), run `examples/imagenet_train.py` on the digits with gloo and ``--timeout 25``. In the
middle of the second epoch, one of them has a fault. Three things must hold: within the timeout, every remaining rank
ends with an error that names the missing rank and its host; after the restart, the run continues from the last complete
checkpoint; its losses are bit-equal to those of an undisturbed run.

A host that is cut off loses all others, and can only name rank 0, which keeps the store. torchrun is started again on
the host that had the fault. If that was the first host, which has torchrun's rendezvous, it is started again on all
hosts. Writes host_faults.jsonl, with one record per fault, and host_faults.md.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.breaking import hosts
from benchmarks.breaking.hosts import Host
from benchmarks.breaking.rank import EPOCH, HOLDS, PLAN, STALL
from pipeline.running.environment import environment

RATE = "20mbit"
SLOW, CUT = f"all links slow ({RATE} a second)", "the link of a host is cut, and mended"
VANISHES, FIRST = "a host vanishes, and returns", "the first host vanishes; all are started again"
STEPS, AFTER = 2 * EPOCH, EPOCH + 9  # the fault comes after AFTER steps
BATCH = 64  # the default for the digits
LONGEST = 400  # seconds that a run may take


class Run:
    """A run of the trainer on several hosts, with one torchrun on each."""

    def __init__(self, machines: list[Host], folder: Path, plan: dict[str, Any]) -> None:
        self.machines, self.folder = machines, folder
        self.plan = folder.with_suffix(".plan")
        self.plan.write_text(json.dumps(plan))
        self.torchruns: dict[str, subprocess.Popen[bytes]] = {}
        self.again: list[str] = []  # hosts on which torchrun was started again
        for host in machines:
            self.start(host)

    def start(self, host: Host) -> None:
        """Start torchrun on a host."""
        first = self.machines[0]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(self.machines)}"]
        command += ["--nproc-per-node=1", "--max-restarts=9", "--rdzv-id=drill"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={first.name}:29500", f"--local-addr={host.name}"]
        command += ["--rdzv-conf", f"is_host={int(host is first)}"]
        command += [str(Path(__file__).parents[1] / "fault_drill.py"), "--as-rank", "--steps", str(STEPS)]
        batch = BATCH - BATCH % len(self.machines)  # the same number of steps per epoch
        command += ["--batch-size", str(batch), "--eval-every", "0", "--checkpoint-every", "1"]
        command += ["--timeout", str(STALL), "--resume", "auto"]
        settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", PLAN: str(self.plan), "OMP_NUM_THREADS": "1"}
        self.torchruns[host.name] = host.start([*command, "--out", str(self.folder)], self.log(host), settings)

    def log(self, host: Host) -> Path:
        """The file with the output of a host."""
        return self.folder.with_name(f"{self.folder.name}-{host.name}.log")

    def events(self) -> list[dict[str, Any]]:
        """What the ranks have written so far."""
        log = self.plan.with_suffix(".log")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def process(self, rank: int) -> int:
        """The process ID of a rank."""
        return int(self.plan.with_suffix(f".pid{rank}").read_text())

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Wait until ``until()`` is true; ``what`` says in the error what for.

        Raises:
            RuntimeError: it took longer than `LONGEST`.
        """
        deadline = time.monotonic() + LONGEST
        while not until():
            if time.monotonic() > deadline:
                said = "\n".join(f"{host.name}:\n{self.log(host).read_text()[-3000:]}" for host in self.machines)
                raise RuntimeError(f"waited {LONGEST} s in vain {what}:\n{said}")
            time.sleep(0.05)

    def finish(self) -> None:
        """Wait for the end of the run; restart each torchrun that gives up."""

        def ended() -> bool:
            for host in self.machines:
                if self.torchruns[host.name].poll() not in (None, 0):
                    self.again.append(host.name)
                    self.start(host)
            return all(torchrun.poll() == 0 for torchrun in self.torchruns.values())

        self.wait(ended, "for the end of the run")

    def losses(self) -> str:
        """The losses of all steps, as written."""
        return (self.folder / "losses.csv").read_text()


def undisturbed(machines: list[Host], folder: Path) -> str:
    """Return the losses of a run without a fault."""
    run = Run(machines, folder, {})
    run.finish()
    return run.losses()


def befall(fault: str, machines: list[Host], folder: Path, expected: str) -> dict[str, Any]:
    """Train with a fault; return its record. ``expected`` are the losses without it."""
    record = {"fault": fault, "hosts": len(machines), "timeout": STALL}
    if fault == SLOW:
        for host in machines:
            host.slow_down(RATE)
        run = Run(machines, folder, {})
        run.finish()
        return record | {"lost_steps": 0, "started_again": run.again, "bit_equal": run.losses() == expected}
    doomed = 0 if fault == FIRST else len(machines) - 1
    victim = machines[doomed]
    run = Run(machines, folder, {"0": {"name": HOLDS, "rank": doomed, "after": AFTER}})
    run.wait(lambda: any(event.get("fault") == HOLDS for event in run.events()), f"for step {AFTER}")
    left = [rank for rank in range(len(machines)) if fault == CUT or rank != doomed]
    processes = [run.process(rank) for rank in left]
    victim.link("down")
    if fault != CUT:
        victim.kill()
    began = time.monotonic()
    run.plan.with_suffix(".went_on").touch()
    told: dict[int, float] = {}  # rank -> seconds until it named the missing rank

    def all_ended() -> bool:
        ended = not any(map(lives, processes))
        for rank in left:
            if rank not in told and names_the_missing(run, rank, doomed):
                told[rank] = time.monotonic() - began
        return ended

    run.wait(all_ended, "for the end of the ranks left")
    ended_after = time.monotonic() - began
    victim.link("up")
    # Without the first host there is no rendezvous; on a host that was cut off, torchrun would wait for minutes.
    for host in machines if fault == FIRST else [victim]:
        host.kill()
        run.torchruns[host.name].wait()
        run.again.append(host.name)
        run.start(host)
    run.finish()
    events = run.events()
    step = next(event["step"] for event in events if event.get("fault") == HOLDS)
    resumed_at = [event["start"] for event in events if "start" in event][1]
    return record | {
        "step": step,
        "ranks_left": len(left),
        "named": len(told),
        "named_after": round(max(told.values(), default=0.0), 1),
        "ended_after": round(ended_after, 1),
        "resumed_at": resumed_at,
        "lost_steps": step - resumed_at,
        "started_again": list(dict.fromkeys(run.again)),
        "bit_equal": run.losses() == expected,
    }


def lives(process: int) -> bool:
    """Return whether a process has not ended yet; torchrun may notice its end late."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def names_the_missing(run: Run, rank: int, gone: int) -> bool:
    """Return whether a rank ended with an error that names the missing rank and its host (for itself: rank 0)."""
    missing = 0 if rank == gone else gone
    name, host = run.machines[rank].name, run.machines[missing].name
    line = rf"error: lost rank {missing} on {host}: .* rank {rank} on {name}$"
    return re.search(line, run.log(run.machines[rank]).read_text(), re.MULTILINE) is not None


def sound(record: dict[str, Any]) -> bool:
    """Return whether everything holds that must hold after a fault."""
    told = record.get("named") == record.get("ranks_left")
    return bool(record["bit_equal"]) and told and record.get("named_after", 0) <= record["timeout"]


def summary(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        f"{about['device']}; PyTorch {about['versions']['torch']}; {about['date'][:10]}. Hosts in network namespaces, "
        f"one torchrun and one rank each, gloo, digits, {STEPS} steps, a checkpoint every {EPOCH}, --timeout {STALL}.",
        "",
        "| fault | hosts | ranks left that name a missing rank and its host | the last does after | "
        "steps done again | torchrun started again on | losses bit-equal to an undisturbed run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        cells = [record["fault"], str(record["hosts"])]
        stopped = "named" in record
        cells += [f"{record['named']} of {record['ranks_left']}" if stopped else "no rank ends"]
        cells += [f"{record['named_after']:.0f} s" if stopped else "", str(record["lost_steps"])]
        again = record["started_again"]
        cells += ["all hosts" if len(again) == record["hosts"] else ", ".join(again) or "none"]
        cells += ["yes" if record["bit_equal"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(out: Path) -> int:
    """Run the drill; return 1 if it cannot run here or if something did not hold."""
    if (reason := hosts.why_not()) is not None:
        print(f"fault_drill.py --hosts cannot run: {reason}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    about = environment(torch.device("cpu"))
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (2, 3):
            with hosts.joined(count) as machines:
                expected = undisturbed(machines, Path(folder) / f"{count}-undisturbed")
            for number, fault in enumerate((CUT, VANISHES, FIRST, SLOW)):
                with hosts.joined(count) as machines:
                    records.append(befall(fault, machines, Path(folder) / f"{count}-{number}", expected))
                print(json.dumps(records[-1]), flush=True)
                lines = [json.dumps({**record, **about}) + "\n" for record in records]
                (out / "host_faults.jsonl").write_text("".join(lines))
                text = summary(records, about)
                (out / "host_faults.md").write_text(text)
    print(text)
    failed = [record for record in records if not sound(record)]
    for record in failed:
        print(f"did not hold: {record}", file=sys.stderr)
    return 1 if failed else 0
