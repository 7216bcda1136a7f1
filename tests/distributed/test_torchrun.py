"""examples/imagenet_train.py under torchrun, as its users start it."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_ranks import Stop, prepared
from test_training import SMALL_NETWORK, blank_pictures, make_tree

import imagenet_train
from benchmarks import fault_drill

SCRIPT = imagenet_train.__file__


def losses(folder: Path) -> list[float]:
    with (folder / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def train_until(rank: int, folder: str, stop: int, flags: list[str]) -> list[float]:
    """Return the losses of the first steps of an undisturbed run."""
    trainer, _ = prepared(folder, *flags)
    request = Stop(stop)
    trainer._train_step = request.after(trainer._train_step)  # type: ignore[method-assign]
    trainer.train(request, lambda row: None)
    return trainer.average_losses()


@pytest.mark.slow
def test_ranks_that_are_killed_and_stopped_change_nothing_and_one_process_ends_their_run(
    two_ranks: Any, tmp_path: Path
) -> None:
    """All ranks are killed while a checkpoint is written; test_hosts.py loses a single rank, and the drill has both."""
    folder = tmp_path / "run"
    flags = ["--batchnorm", "sync", "--bank-layout", "sharded", "--steps", "2400", "--checkpoint-every", "1"]
    flags += ["--eval-every", "0", "--timeout", "60"]
    plan = {"0": {"name": fault_drill.WRITE, "rank": 0, "after": 22}}
    with fault_drill.start(folder, flags, plan) as process:
        try:
            until = time.monotonic() + 200
            while not [event for event in fault_drill.events_of(folder) if event.get("start")]:
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < until
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)  # torchrun forwards it to the ranks
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    events = fault_drill.events_of(folder)
    assert [event["start"] for event in events if "start" in event] == [0, 21], said
    assert [(event["fault"], event["step"]) for event in events if "fault" in event] == [(fault_drill.WRITE, 42)]
    stopped = len(losses(folder))
    assert 21 < stopped < 2400
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["step"], len(state["sums"])) == (stopped, 2)
    expected, _ = two_ranks.run(train_until, str(tmp_path / "undisturbed"), stopped, flags)
    assert losses(folder) == expected, "must be equal to the last bit"

    state["settings"]["steps"] = stopped + 3
    torch.save(state, folder / "checkpoint.pt")
    with blank_pictures():
        assert imagenet_train.main(["--resume", str(folder), "--bank-layout", "replicated"]) == 0
    assert losses(folder)[:stopped] == expected
    assert len(losses(folder)) == stopped + 3
    after = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert after["criterion"]["bank.rows"].shape == (1024, 64)
    assert int(after["criterion"]["bank.pushed"]) == 64 * (stopped + 3)
    assert not list(folder.glob("bank-shards-*")), "the shards of the earlier checkpoint are no longer needed"


@pytest.mark.slow
def test_ranks_whose_workers_meet_a_bad_file_end(tmp_path: Path) -> None:
    """Every rank still has a live worker when the worker of one rank fails."""
    tree = make_tree(tmp_path / "tree", train=8, val=1)
    (tree / "train" / "class0" / "0.jpg").write_bytes(b"")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = [*SMALL_NETWORK, "--batch-size", "4", "--epochs", "1", "--workers", "1"]
    done = subprocess.run(
        [*command, SCRIPT, "--data", str(tree), *flags, "--out", str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "class0/0.jpg: the file is empty; repair or replace the file" in error
    assert "Original Traceback" not in done.stderr
