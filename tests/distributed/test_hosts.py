"""Hosts in network namespaces: one of the drills of breaking/host_faults.py, and how hosts are removed."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_torchrun import losses
from test_trainer_ranks import train

from benchmarks.breaking import host_faults, hosts


@pytest.fixture(scope="module")
def possible() -> None:
    if (reason := hosts.why_not()) is not None:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.usefixtures("possible")
def test_a_host_vanishes_and_returns_and_the_losses_are_those_of_a_quiet_run(two_ranks: Any, tmp_path: Path) -> None:
    with hosts.joined(2) as machines:
        record = host_faults.befall(host_faults.VANISHES, machines, tmp_path / "run", "")
    told = {"ranks_left": 1, "named": 1, "lost_steps": 9, "started_again": ["host2"]}
    assert told.items() <= record.items(), (tmp_path / "run-host1.log").read_text()
    flags = ["--steps", str(host_faults.STEPS), "--eval-every", "0"]
    expected, _ = two_ranks.run(train, str(tmp_path / "undisturbed"), *flags)[0]
    assert losses(tmp_path / "run") == expected, "must be equal to the last bit"


APART = """
import sys, time
from pathlib import Path
from benchmarks.breaking import hosts
with hosts.joined(2) as (first, second):
    log = Path(sys.argv[1])
    say = "import socket; print(socket.gethostname(), socket.gethostbyname('host2'), flush=True)"
    first.start([sys.executable, "-c", say], log, {}).wait()
    second.start(["sleep", "1000"], log, {})
    print(first.space.rpartition("-")[0], flush=True)
    time.sleep(1000)
"""


@pytest.mark.usefixtures("possible")
def test_hosts_know_each_other_by_name_and_are_gone_when_the_process_is_told_to_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", APART, str(log)]
    with subprocess.Popen(command, cwd=Path(hosts.__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        name = process.stdout.readline().strip()
        assert name in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        process.terminate()
        assert process.wait() == 128 + 15
    assert log.read_text() == "host1 10.0.0.2\n"
    assert name not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


def test_a_machine_without_ip_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts.sys, "platform", "linux")
    monkeypatch.setattr(hosts.shutil, "which", lambda name: None)
    assert host_faults.run(Path("nowhere")) == 1
    said = "fault_drill.py --hosts cannot run: the command `ip` (iproute2) is not installed\n"
    assert capsys.readouterr().err == said
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("change", "holds"),
    [({}, True), ({"bit_equal": False}, False), ({"named": 1}, False), ({"named_after": 26.0}, False)],
)
def test_what_does_not_hold_is_noticed(change: dict[str, Any], holds: bool) -> None:
    record = {"bit_equal": True, "named": 2, "ranks_left": 2, "named_after": 20.0, "timeout": 25}
    assert host_faults.sound(record | change) == holds


def test_the_committed_record_has_all_faults_on_two_and_three_hosts_and_all_of_it_holds() -> None:
    file = Path(host_faults.__file__).parents[1] / "results" / "host_faults.jsonl"
    if not file.exists():
        pytest.skip("benchmarks/results has no record of the drill")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    faults = (host_faults.CUT, host_faults.VANISHES, host_faults.FIRST, host_faults.SLOW)
    assert [(record["hosts"], record["fault"]) for record in records] == [*product((2, 3), faults)]
    assert all(host_faults.sound(record) for record in records)
