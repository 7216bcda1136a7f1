"""benchmarks/bank_latency.py: real ranks in network namespaces, separated by a delay, and figures computed by hand."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bank_latency
from benchmarks.bank_latency import Host, Often, Sizes
from msf_core import MeanShiftLoss, MemoryBank

APART = 0.02
SIZES, OFTEN = Sizes(rows=32, dim=8, batch=4, k=2), Often(turns=1, steps=2, warm=1)
ABOUT = {"device": "a CPU", "threads": 1, "versions": {"torch": "2.14.1"}, "date": "2026-11-24"}


def measured(times: dict[float, list[float]]) -> dict[str, Any]:
    """What a rank reports about one case, given the times of its steps at each round-trip time."""
    case = [{"seconds": seconds, "sent": [1000 * len(seconds), 2 * len(seconds)]} for seconds in times.values()]
    return {"echo": [[0.001 + rtt, 0.002 + rtt, 0.003 + rtt] for rtt in times], "replicated, none, step": case}


def test_round_trips_are_what_was_worked_out_by_hand() -> None:
    answers = [measured({0.0: [0.010, 0.012], 0.1: [0.250, 0.260]}), measured({0.0: [0.011, 0.013], 0.1: [0.255, 0.3]})]
    records = bank_latency.to_records(answers, [0.0, 0.1], SIZES, ABOUT)
    echo, echo_apart, near, apart = records
    assert [record.name for record in records] == ["echo", "echo", "step", "step"]
    assert (echo.median, echo_apart.median, echo.repeats) == pytest.approx((0.002, 0.102, 3))
    assert (near.median, apart.median, near.repeats) == pytest.approx((0.0115, 0.2575, 4))  # of both ranks together
    assert near.derived == {"sent_bytes": 1000, "sent_packets": 2}
    assert apart.derived["round_trips"] == pytest.approx((0.2575 - 0.0115) / 0.1)
    assert apart.derived["round_trips_of_q20"] == pytest.approx((0.253 - 0.0106) / 0.1)

    alone = bank_latency.to_records([measured({0.0: [0.005]})], [0.0], SIZES, ABOUT)
    row = bank_latency.table(alone + records).splitlines()[-1]
    assert row.startswith(
        "| 2 | replicated | none | step | 5.00 ms (5.00 ms–5.00 ms) | 11.5 ms (10.6 ms–12.4 ms) | 258 ms"
    )
    assert row.endswith("| 2.5 / 2.4 | 1 kB | 2 |")


def test_a_machine_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bank_latency.py"])
    monkeypatch.setattr(bank_latency.shutil, "which", lambda name: None)
    assert bank_latency.main() == 1
    assert capsys.readouterr().err == "bank_latency.py cannot measure: the command `ip` (iproute2) is not installed\n"


def fail(host: Host, layout: str) -> list[str]:
    """Make rank 1 fail in each call in which others wait for it; return what every call raised on this rank."""
    bank = MemoryBank(SIZES.rows, SIZES.dim, layout=layout, backend="torch")
    criterion = MeanShiftLoss(bank, SIZES.k)
    good = torch.randn(SIZES.batch, SIZES.dim, generator=torch.Generator().manual_seed(host.rank))
    given = good[:, 1:] if host.rank == 1 else good
    bank.push(good)
    said = []
    for call in (bank.push, lambda rows: bank.search(rows, 1), lambda rows: criterion(rows, rows)):
        try:
            call(given)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    bank.push(good)  # they can go on
    return [*said, str(len(bank))]


def time_and_fail(host: Host) -> dict[str, Any]:
    """Run on one rank everything that needs several ranks, because they take long to start."""
    cases = [("replicated", "none"), ("sharded", "limit")]
    timed = bank_latency.time_exchanges(host, cases, [0.0, APART], SIZES, OFTEN)
    host.set_round_trip(APART)
    return {
        "timed": timed,
        "said": {layout: fail(host, layout) for layout in bank_latency.LAYOUTS},
        "devices": [line.split()[0] for line in Path("/proc/net/dev").read_text().splitlines()[2:]],
    }


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    if (reason := bank_latency.why_not()) is not None:
        pytest.skip(reason)
    return bank_latency.run_apart(2, time_and_fail)


def test_hosts_that_are_apart_wait_for_each_other(answers: list[dict[str, Any]]) -> None:
    timed = [answer["timed"] for answer in answers]
    assert all(seconds >= APART for seconds in timed[0]["echo"][1])
    for name in ("replicated, none, step", "replicated, none, push", "sharded, limit, step", "sharded, limit, search"):
        for here in timed:
            # Two steps take at least a message to the other rank and its answer.
            assert sum(here[name][1]["seconds"]) >= 0.9 * OFTEN.steps * APART / 2, name
            assert here[name][1]["sent"][0] > 0
    assert all(here["replicated, none, search"][1]["sent"][0] < 1000 for here in timed)  # this talks to nobody


def test_records_tell_what_was_measured(answers: list[dict[str, Any]]) -> None:
    records = bank_latency.to_records([answer["timed"] for answer in answers], [0.0, APART], SIZES, ABOUT)
    names = [record.name for record in records[::2]]  # each at both round trips
    assert names == [record.name for record in records[1::2]] == ["echo", *["step", "push", "search"] * 2]
    for near, apart in zip(records[2::2], records[3::2], strict=True):
        assert near.parameters | {"round_trip": APART} == apart.parameters
        assert near.parameters.keys() == {"ranks", "network", "layout", "labels", "round_trip", *SIZES._fields}
        assert near.unit == "s"
        assert near.repeats == apart.repeats == 2 * OFTEN.turns * OFTEN.steps
        assert 0 < near.q20 <= near.median <= near.q80
        assert near.derived.keys() == {"sent_bytes", "sent_packets"}
        echoed, echoed_apart = records[:2]
        expected = (apart.median - near.median) / (echoed_apart.median - echoed.median)
        assert apart.derived["round_trips"] == expected
        expected = (apart.q20 - near.q20) / (echoed_apart.q20 - echoed.q20)
        assert apart.derived["round_trips_of_q20"] == expected
        assert math.isfinite(apart.derived["round_trips"])


def test_a_rank_that_fails_far_away_raises_on_all(answers: list[dict[str, Any]]) -> None:
    for layout in bank_latency.LAYOUTS:
        first, second = (answer["said"][layout] for answer in answers)
        together = [True, layout == "sharded", True]  # each rank searches a replicated bank by itself
        for shared, here, there in zip(together, first, second, strict=False):
            assert "got [4, 7]" in there
            assert here == (f"rank 1: {there}" if shared else "")
        assert first[-1] == second[-1] == "16"


def test_nothing_is_left_behind(answers: list[dict[str, Any]]) -> None:
    assert [answer["devices"] for answer in answers] == [["lo:", f"{bank_latency.DEVICE}:"]] * 2  # no other device
    assert not any(thread.name == bank_latency.RELAY for thread in threading.enumerate())
    assert bank_latency.DEVICE not in Path("/proc/net/dev").read_text()
