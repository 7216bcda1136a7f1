"""examples/imagenet_train.py under torchrun, as its users start it."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import imagenet_train

SCRIPT = imagenet_train.__file__
DIGITS = ["--steps", "24", "--eval-every", "0", "--checkpoint-every", "1"]


def torchrun(ranks: int, *arguments: object, options: Sequence[str] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=200
    )


def losses(folder: Path) -> list[float]:
    with (folder / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_another_layout(tmp_path: Path) -> None:
    """Stopped on two ranks with a sharded bank, and finished by one process with a replicated one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
    flags = ["--batchnorm", "sync", "--bank-layout", "sharded", "--steps", "2400", "--checkpoint-every", "1"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*command, *flags, "--out", str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 100
        while not (folder / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # torchrun hands it to the ranks
        process.communicate(timeout=60)
    finally:
        process.kill()
    stopped = len(losses(folder))
    assert 21 <= stopped < 2400
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == stopped
    assert len(state["sums"]) == 2
    before = losses(folder)

    state["settings"]["steps"] = stopped + 3
    torch.save(state, folder / "checkpoint.pt")
    assert imagenet_train.main(["--resume", str(folder), "--bank-layout", "replicated"]) == 0
    assert losses(folder)[:stopped] == before
    assert len(losses(folder)) == stopped + 3
    after = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert after["criterion"]["bank.rows"].shape == (1024, 64)
    assert int(after["criterion"]["bank.pushed"]) == 64 * (stopped + 3)
    assert not list(folder.glob("bank-*")), "the shards of the earlier checkpoint are not needed any more"


@pytest.mark.slow
def test_what_is_wrong_is_said_once_by_rank_0(tmp_path: Path) -> None:
    done = torchrun(2, "--batch-size", 33, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert (
        done.stderr.count("error: --batch-size must be at least 4 for BatchNorm, divided evenly by 2 ranks, got 33")
        == 1
    )
    assert not (tmp_path / "run").exists()
