"""Several hosts on one machine: network namespaces, each with a host name, joined by a bridge in another namespace.

    with hosts.joined(3) as (first, second, third):
        process = first.start(["torchrun", …], log=Path("first.log"))
        second.link("down")

The network of the machine itself is not changed. At the end of the block, all processes of the hosts are killed and the
namespaces removed. A slow link uses the kernel's token bucket filter (tbf), because many kernels lack netem. For
delays, see benchmarks/bank_latency.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

DEVICE = "eth0"
# Arguments: a host's name, the folder with the names of all hosts, and a command to run in the host's namespaces.
_RUN = """
echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1/hosts" /etc/hosts &&
    mount --bind "$1/none" /etc/resolv.conf && shift && exec "$@"
"""


class Host(NamedTuple):
    """A host: its name and address, the namespaces of the host and of the bridge, and the folder with all names."""

    name: str
    address: str
    space: str
    bridge: str
    names: Path

    def start(self, command: list[str], log: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start a command on the host, with additions to this process's environment; append its output to ``log``."""
        inside = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", _RUN, self.name, str(self.names)]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*inside, *command],
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def link(self, state: str) -> None:
        """Cut the host off ("down") or restore its link ("up"). Packets are lost silently."""
        _ip("-n", self.bridge, "link", "set", self.name, state)

    def slow_down(self, rate: str) -> None:
        """Limit the rate at which the host sends, for example to "20mbit"."""
        limits = ["rate", rate, "burst", "16kb", "latency", "2s"]
        subprocess.run(["tc", "-n", self.space, "qdisc", "add", "dev", DEVICE, "root", "tbf", *limits], check=True)

    def kill(self) -> None:
        """Kill every process of the host."""
        for pid in _ip("netns", "pids", self.space).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def why_not() -> str | None:
    """Return a sentence that says why such hosts cannot be made here, or None if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "hosts in network namespaces need root on Linux"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            return f"the command `{tool}` ({package}) is not installed"
    try:
        with joined(1) as (host,):
            host.slow_down("1gbit")
    except subprocess.CalledProcessError as error:
        return f"hosts in network namespaces cannot be made here: {' '.join(error.cmd)} failed"
    return None


@contextmanager
def joined(count: int) -> Iterator[list[Host]]:
    """Make hosts that can only reach each other; at the end, remove them with everything that runs on them.

    Raises:
        subprocess.CalledProcessError: the system does not allow it.
    """
    name = f"msf-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # SIGTERM must remove them, too
            before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            stack.callback(signal.signal, signal.SIGTERM, before)
        names = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        addresses = {f"host{number}": f"10.0.0.{number}" for number in range(1, count + 1)}
        lines = [f"{address} {host}\n" for host, address in ({"localhost": "127.0.0.1"} | addresses).items()]
        (names / "hosts").write_text("".join(lines))
        (names / "none").touch()  # no name servers
        bridge = _space(stack, f"{name}-bridge")
        _ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", bridge, "link", "set", "bridge", "up")
        hosts = []
        for of_host, address in addresses.items():
            host = Host(of_host, address, _space(stack, f"{name}-{of_host}"), bridge, names)
            stack.callback(host.kill)
            ends = ["link", "add", host.name, "type", "veth", "peer", "name", DEVICE, "netns", host.space]
            _ip("-n", bridge, *ends)
            _ip("-n", bridge, "link", "set", host.name, "master", "bridge", "up")
            _ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip("-n", host.space, "link", "set", device, "up")
            hosts.append(host)
        yield hosts


def _space(stack: ExitStack, name: str) -> str:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    return name


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
