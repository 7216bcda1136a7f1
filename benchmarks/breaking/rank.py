"""A rank of the trainer that has a fault at a given step. `fault_drill.py --as-rank` runs it under torchrun."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import imagenet_train
from pipeline.models import checkpoint
from pipeline.training import trainer

STALL = 25  # seconds that a rank waits for another
EPOCH = 1347 // 64  # steps per epoch, at the default batch size of the digits
PLAN = "MSF_FAULT_PLAN"  # path of the file with the planned faults; what happened is written beside it
KILL, WRITE, DISK = "one rank killed", "all ranks killed while a checkpoint is written", "disk full for one checkpoint"
STALLS, OVERFLOW = "one rank stalls", "images overflow float16 on one rank"
HOLDS = "one rank waits until its host has had a fault"  # what host_faults.py does to it


def main(arguments: list[str]) -> int:
    """Run the trainer as a rank, with the fault that the plan has for this start."""
    plan, rank = Path(os.environ[PLAN]), int(os.environ["RANK"])
    fault = json.loads(plan.read_text()).get(
        os.environ["TORCHELASTIC_RESTART_COUNT"], {"name": "", "after": 0, "rank": 0}
    )
    plan.with_suffix(f".pid{rank}").write_text(str(os.getpid()))
    train_step, write, begin = trainer.Trainer._train_step, checkpoint._write, [-1]

    def note(**what: Any) -> None:
        with plan.with_suffix(".log").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def faulty_step(self: Any, views: Any) -> None:
        if begin[0] < 0:
            begin[0] = self.step
            if rank == 0:
                note(start=self.step)
        after = self.step - begin[0]
        if after == fault["after"] and rank == fault["rank"] and fault["name"] in (KILL, STALLS, OVERFLOW):
            note(fault=fault["name"], rank=rank, step=self.step)
            if fault["name"] == OVERFLOW:
                views = [((target.half() * 60_000).square().float(), *rest) for target, *rest in views]
            else:
                os.kill(os.getpid(), signal.SIGKILL if fault["name"] == KILL else signal.SIGSTOP)
        if fault["name"] == HOLDS and after == fault["after"] and rank == fault["rank"]:
            if not plan.with_suffix(".went_on").exists():
                note(fault=HOLDS, rank=rank, step=self.step)
            while not plan.with_suffix(".went_on").exists():
                time.sleep(0.05)
        if fault["name"] == DISK and after == fault["after"] + 2 * EPOCH and rank == fault["rank"]:
            os.kill(os.getpid(), signal.SIGKILL)  # so that the next fault comes
        train_step(self, views)

    def faulty_write(path: Path, state: dict[str, Any]) -> None:
        due = begin[0] >= 0 and state["step"] - begin[0] >= fault["after"]
        temporary = path.with_name(path.name + ".tmp")
        if due and fault["name"] == WRITE:
            note(fault=WRITE, rank=-1, step=state["step"])
            write(path.with_name("whole"), state)
            content = path.with_name("whole").read_bytes()
            path.with_name("whole").unlink()
            temporary.write_bytes(content[: len(content) // 2])
            for other in reversed(range(int(os.environ["WORLD_SIZE"]))):
                os.kill(int(plan.with_suffix(f".pid{other}").read_text()), signal.SIGKILL)
        if due and fault["name"] == DISK and not plan.with_suffix(f".full{begin[0]}").exists():
            plan.with_suffix(f".full{begin[0]}").touch()
            note(fault=DISK, rank=0, step=state["step"])
            temporary.unlink(missing_ok=True)
            temporary.symlink_to("/dev/full")
            try:
                write(path, state)
            finally:
                temporary.unlink()
        write(path, state)

    trainer.Trainer._train_step = faulty_step  # type: ignore[method-assign,assignment]
    checkpoint._write = faulty_write
    return imagenet_train.main(arguments)
