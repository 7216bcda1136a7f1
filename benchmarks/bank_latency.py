"""Network round trips that a step waits for if ranks on distant hosts share a bank, for 2 and 4 gloo ranks.

    python benchmarks/bank_latency.py        as root on Linux, with /dev/net/tun and `ip`; some minutes on two CPU cores

Each rank runs in its own network namespace, whose only connection is a TUN device: a point-to-point IP link with an
MTU of 9,000. A thread of the parent process, the relay, forwards each IP packet to its device after a delay of RTT/2
(RTT: round-trip time). The delay is added in user space, because many kernels lack netem. Therefore each packet also
costs the relay's time, even at an RTT of 0, and the bandwidth is that of the relay. The namespaces have no names and
no other link, and disappear with their processes.

It times the following calls for each layout of a bank, without labels, with stored labels, and with labels that limit
the search:

    step      forward and backward of MeanShiftLoss(bank, k), which communicates in a push and a search
    push      bank.push
    search    bank.search, which does not communicate if the bank is replicated

Each call runs many times in a row on all ranks at once, alternating between the RTTs. From the times of all ranks, the
script computes

    round trips    (median time at RTT − median time at 0) / (echo at RTT − echo at 0)

and the same from the 20 % quantiles. Other programs on these cores can only increase a time, most of all at an RTT of
0, where the ranks hardly wait. On a machine that is not idle, trust the 20 % quantiles at the longest RTT.

The echo, a message of 72 bytes from rank 0 to rank 1 and back, measures the actual RTT. A message in one direction
takes half a round trip. "Alone" is one process without a network, with as many rows as a rank has. The ranks share
the cores of this machine, so the additional time at an RTT of 0 is not due to the network alone. Sent bytes and
packets are those of one rank's TUN device per step, including TCP headers and acknowledgments. Run it on an
otherwise idle machine. It writes bank_latency.jsonl, one record per case and RTT, and bank_latency.md.
"""

import argparse
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring.arguments import positive
from benchmarks.measuring.measure import (
    Record,
    Summary,
    describe_environment,
    in_words,
    quantiles,
    time_once,
    write_jsonl,
)
from benchmarks.measuring.tables import format_spread
from msf_core import MeanShiftLoss, MemoryBank

RANKS = (2, 4)
ROUND_TRIPS = (0.0, 0.2e-3, 1e-3, 10e-3)  # the longest one gives the most reliable figure
LAYOUTS = ("replicated", "sharded")
LABELS = ("none", "kept", "limit")  # no labels; labels are stored; only rows with the query's label are searched
NETWORK = "one network namespace a rank, a user-space relay between TUN devices"
CLASSES, RELAY = 10, "relay of packets"
# Linux constants for unshare(2), prctl(2) and /dev/net/tun.
CLONE_NEWNET, PR_SET_PDEATHSIG, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 1, 0x400454CA, 0x0001, 0x1000
DEVICE, MTU, QUEUED_PACKETS, READ_AT_ONCE = "apart0", 9000, 10_000, 64
HANG_SECONDS = 60  # gloo gives up after this


class Sizes(NamedTuple):
    """The sizes of a problem: rows of the bank, dimensions, rows per rank in a batch, neighbors."""

    rows: int = 512
    dim: int = 512
    batch: int = 64
    k: int = 5


class Often(NamedTuple):
    """How often each case is timed: turns, steps per turn, and untimed steps before those, in which TCP settles."""

    turns: int = 6
    steps: int = 10
    warm: int = 4


class Host(NamedTuple):
    """One rank, in its own network namespace."""

    rank: int
    ranks: int
    delay: Any  # seconds one way, in shared memory that the relay reads

    def set_round_trip(self, seconds: float) -> None:
        """Set the round-trip time between all hosts; all ranks call this together."""
        dist.barrier()
        if self.rank == 0:
            self.delay.value = seconds / 2
        dist.barrier()

    def sent(self) -> tuple[int, int]:
        """Return the bytes and packets that this host has sent."""
        lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()]
        return next((int(line[9]), int(line[10])) for line in lines if line[0] == f"{DEVICE}:")


def why_not() -> str | None:
    """Return why this system cannot emulate distant hosts, or None if it can."""
    said = None

    def attempt() -> None:
        nonlocal said
        try:
            os.close(_enter_namespace(0))
        except (OSError, subprocess.CalledProcessError) as error:
            said = f"cannot create network namespaces with TUN devices, which needs root on Linux: {error}"

    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is not installed"
    thread = threading.Thread(target=attempt)  # only this thread enters the new namespace, and then it ends
    thread.start()
    thread.join()
    return said


def run_apart(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the results of ``work(host, *arguments)`` on all ranks, in rank order; raise an error that one raises.

    Each rank is a process in its own network namespace, and a member of the default process group, which uses gloo. At
    first, the relay adds no delay. Results of ``work`` must be serializable as JSON.
    """
    context = torch.multiprocessing.get_context("spawn")
    delay = context.Value("d", 0.0, lock=False)
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listener:
        folder = Path(name)
        listener.bind(str(folder / "relay"))
        listener.listen(ranks)
        stopped, stop = socket.socketpair()
        relay = threading.Thread(target=_relay, args=(listener, ranks, delay, stopped), name=RELAY)
        relay.start()
        processes = None
        try:
            settings = (ranks, folder, delay, work, arguments)
            processes = torch.multiprocessing.spawn(_rank_main, args=settings, nprocs=ranks, join=False)
            while not processes.join():
                pass
        finally:
            for process in processes.processes if processes else ():
                process.kill()
                process.join()
            stop.close()
            relay.join()
            stopped.close()
        return [json.loads((folder / f"answer{rank}").read_text()) for rank in range(ranks)]


def _rank_main(
    rank: int, ranks: int, folder: Path, delay: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the parent, even while waiting for other ranks
    device = _enter_namespace(rank)
    with socket.socket(socket.AF_UNIX) as relay:
        relay.connect(str(folder / "relay"))
        socket.send_fds(relay, [bytes([rank])], [device])
        relay.recv(1)  # returns when all ranks have connected
    os.close(device)  # the relay uses it
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    store, limit = f"file://{folder}/store", timedelta(seconds=HANG_SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)
    (folder / f"answer{rank}").write_text(json.dumps(work(Host(rank, ranks, delay), *arguments)))
    dist.barrier()  # no rank closes its connections while another one still works
    dist.destroy_process_group()


def _enter_namespace(rank: int) -> int:
    """Move the calling thread, and its children, to a new namespace; return the other end of its only device."""
    if not sys.platform.startswith("linux"):
        raise OSError("this is not Linux")
    libc = _libc()
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
        for command in (
            "link set lo up",
            f"addr add {_address(rank)}/24 dev {DEVICE}",
            f"link set {DEVICE} mtu {MTU} txqueuelen {QUEUED_PACKETS} up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
    except BaseException:
        os.close(device)
        raise
    return device


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _address(rank: int) -> str:
    return f"10.0.0.{rank + 1}"


def _relay(listener: socket.socket, ranks: int, delay: Any, stopped: socket.socket) -> None:
    """Receive a device from each rank, and forward packets between them, ``delay.value`` seconds after arrival."""
    with suppress(OSError):  # highest priority, if the system allows it
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    devices: dict[int, int] = {}  # last byte of the address -> file
    callers: list[socket.socket] = []
    try:
        while len(devices) < ranks:
            if stopped in select.select([listener, stopped], [], [])[0]:
                return
            caller = listener.accept()[0]
            callers.append(caller)
            rank, files, _, _ = socket.recv_fds(caller, 1, 1)
            devices[rank[0] + 1] = files[0]
        for caller in callers:
            caller.close()  # all ranks have connected
        _pass_packets(devices, delay, stopped)
    finally:
        for caller in callers:
            caller.close()
        for device in devices.values():
            os.close(device)


def _pass_packets(devices: dict[int, int], delay: Any, stopped: socket.socket) -> None:
    waiting: deque[tuple[float, int, bytes]] = deque()  # due, device, packet
    sources: list[Any] = [stopped, *devices.values()]
    while True:
        wait = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        ready = select.select(sources, [], [], wait)[0]
        if stopped in ready:
            return
        for source in ready:
            try:
                for _ in range(READ_AT_ONCE):
                    packet = os.read(source, MTU)
                    if packet[0] >> 4 == 4 and packet[19] in devices:  # IPv4, last byte of the destination address
                        due = time.perf_counter() + delay.value
                        due = max(due, waiting[-1][0] if waiting else due)  # keeps the order
                        waiting.append((due, devices[packet[19]], packet))
            except BlockingIOError:
                pass
            except OSError:  # its namespace has ended
                sources.remove(source)
        while waiting and waiting[0][0] <= time.perf_counter():
            _, device, packet = waiting.popleft()
            with suppress(OSError):
                os.write(device, packet)


def echo(host: Host) -> None:
    """Send 72 bytes from rank 0 to rank 1 and back; the others do nothing."""
    message = torch.zeros(9, dtype=torch.int64)
    if host.rank == 0:
        dist.send(message, 1)
        dist.recv(message, 1)
    elif host.rank == 1:
        dist.recv(message, 0)
        dist.send(message, 0)


def exchanges(host: Host, layout: str, labels: str, sizes: Sizes) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name, for a full bank."""
    generator = torch.Generator().manual_seed(host.rank)
    bank = MemoryBank(sizes.rows, sizes.dim, backend="torch", layout=layout)
    target = torch.randn(sizes.batch, sizes.dim, generator=generator)
    prediction = torch.randn(sizes.batch, sizes.dim, generator=generator).requires_grad_()
    classes = torch.arange(sizes.batch) % CLASSES if labels != "none" else None
    limit = classes if labels == "limit" else None
    criterion = MeanShiftLoss(bank, sizes.k, same_label=labels == "limit")
    while not bank.full:
        bank.push(target, classes)

    def step() -> Tensor:
        loss: Tensor = criterion(prediction, target, classes)
        loss.backward()
        return loss

    return {
        "step": step,
        "push": partial(bank.push, target, classes),
        "search": partial(bank.search, target, sizes.k, labels=limit),
    }


def time_exchanges(
    host: Host, cases: list[tuple[str, str]], round_trips: list[float], sizes: Sizes, often: Often
) -> dict[str, Any]:
    """Time all cases as one of the ranks.

    Returns:
        "echo" -> a list of seconds for each RTT; and "layout, labels, what" -> for each RTT, the seconds of each call,
        and the bytes and packets sent in all of them.
    """
    cpu = torch.device("cpu")
    echoes: list[list[float]] = [[] for _ in round_trips]
    found: dict[str, Any] = {"echo": echoes}
    for layout, labels in cases:
        calls = exchanges(host, layout, labels, sizes)
        for what in calls:
            found[f"{layout}, {labels}, {what}"] = [{"seconds": [], "sent": [0, 0]} for _ in round_trips]
        for turn in range(often.turns):
            for place in np.random.default_rng(turn).permutation(len(round_trips)).tolist():
                host.set_round_trip(round_trips[place])
                if host.ranks > 1:
                    times = [time_once(partial(echo, host), cpu) for _ in range(often.warm + often.steps)]
                    echoes[place] += times[often.warm :]
                for what, call in calls.items():
                    into = found[f"{layout}, {labels}, {what}"][place]
                    dist.barrier()
                    for _ in range(often.warm):
                        call()
                    before = host.sent()
                    into["seconds"] += [time_once(call, cpu) for _ in range(often.steps)]
                    into["sent"] = [n + b - a for n, b, a in zip(into["sent"], host.sent(), before, strict=True)]
    return found


def to_records(
    answers: list[dict[str, Any]], round_trips: list[float], sizes: Sizes, environment: dict[str, Any]
) -> list[Record]:
    """Convert the results of `time_exchanges` on each rank to records; the first round-trip time must be 0."""
    ranks = len(answers)
    about = {"ranks": ranks, "network": NETWORK if ranks > 1 else None}
    echoes = [quantiles(times) for times in answers[0]["echo"]] if ranks > 1 else []
    records = [
        Record("echo", about | {"round_trip": rtt}, *echoed, "s", len(answers[0]["echo"][place]), environment)
        for place, (rtt, echoed) in enumerate(zip(round_trips, echoes, strict=False))
    ]
    for name in [name for name in answers[0] if name != "echo"]:
        layout, labels, what = name.split(", ")
        times: list[Summary] = []
        for place, rtt in enumerate(round_trips):
            own = [answer[name][place] for answer in answers]
            seconds = [value for each in own for value in each["seconds"]]
            times.append(quantiles(seconds))
            sent_bytes, packets = (sum(each["sent"][i] for each in own) / len(seconds) for i in (0, 1))
            derived: dict[str, Any] = {"sent_bytes": sent_bytes, "sent_packets": packets}
            if place:
                derived["round_trips"] = round_trips_of(times, echoes, place, "median")
                derived["round_trips_of_q20"] = round_trips_of(times, echoes, place, "q20")
            parameters = about | {"layout": layout, "labels": labels, "round_trip": rtt} | sizes._asdict()
            records.append(Record(what, parameters, *times[place], "s", len(seconds), environment, derived=derived))
    return records


def round_trips_of(times: list[Summary], echoes: list[Summary], place: int, which: str) -> float:
    """Return how many round trips a step waits for: its additional time at an RTT divided by that of an echo."""
    longer, echo_longer = (getattr(each[place], which) - getattr(each[0], which) for each in (times, echoes))
    return float(longer / echo_longer)


def table(records: list[Record]) -> str:
    """Return the records in Markdown."""
    echoes = [record for record in records if record.name == "echo"]
    timed = [record for record in records if record.name != "echo"]
    p = timed[-1].parameters
    rtts = list(dict.fromkeys(record.parameters["round_trip"] for record in echoes))
    at = [f"at {1e3 * rtt:g} ms" for rtt in rtts]
    heads = ["ranks", "layout", "labels", "what", "alone", *at, *(f"round trips {head}" for head in at[1:])]
    heads += ["sent a rank", "packets"]
    lines = [
        "# Round trips of a shared bank",
        "",
        in_words(records[0].environment),
        "",
        f"{p['rows']:,} rows of {p['dim']} float32 values, {p['batch']} rows per rank, k = {p['k']}; medians "
        f"(20–80 %) of all ranks' times, {timed[-1].repeats // p['ranks']} each (`python benchmarks/bank_latency.py`, "
        f"which explains the columns). The network: {p['network']}, not netem. "
        "Round trips: by the medians / by the 20 % quantiles.",
        "",
        *(
            f"- {e.parameters['ranks']} ranks, {1e3 * e.parameters['round_trip']:g} ms apart: echo {format_spread(e)}."
            for e in echoes
        ),
        "",
        "| " + " | ".join(heads) + " |",
        "| " + " | ".join(["---"] * len(heads)) + " |",
    ]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in timed:
        p = record.parameters
        groups.setdefault((p["ranks"], p["layout"], p["labels"], record.name), []).append(record)
    for (ranks, layout, labels, what), group in groups.items():
        if ranks > 1:
            cells = [str(ranks), layout, labels, what, format_spread(groups[1, "replicated", labels, what][0])]
            cells += map(format_spread, group)
            both = [(record.derived["round_trips"], record.derived["round_trips_of_q20"]) for record in group[1:]]
            cells += [f"{by_median:.1f} / {by_q20:.1f}" for by_median, by_q20 in both]
            cells += [f"{group[-1].derived['sent_bytes'] / 1e3:.0f} kB", f"{group[-1].derived['sent_packets']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure; return 1 if this is not possible here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--turns", type=positive, default=6, help="turns of ten steps per case and RTT (default: 6)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the records")
    given = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"bank_latency.py cannot measure: {reason}", file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(torch.device("cpu")) | {"threads": 1}  # for each rank
    sizes, often = Sizes(), Often(given.turns)
    records = []
    for ranks in (1, *RANKS):
        round_trips = list(ROUND_TRIPS) if ranks > 1 else [0.0]
        cases = [(layout, labels) for layout in LAYOUTS[: None if ranks > 1 else 1] for labels in LABELS]
        answers = run_apart(ranks, time_exchanges, cases, round_trips, sizes, often)
        records += to_records(answers, round_trips, sizes, environment)
    write_jsonl(records, given.out / "bank_latency.jsonl")
    text = table(records)
    (given.out / "bank_latency.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
