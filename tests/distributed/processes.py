"""Real processes that communicate through gloo. They start once, and then run one function after another."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120  # time limit of a function; a hang is a failure

# All are forked from one process that has already imported these modules, if they are installed. That saves seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torchvision.transforms.v2",
        "sklearn.linear_model",
        "torch.utils.tensorboard",
        "matplotlib.pyplot",
    ]
)


class Workers:
    """Processes that serve as the ranks of worlds of various sizes, one world at a time."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._worlds = 0
        self._size = 0

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` returns on each rank; raise an error if any rank raises one."""
        while len(self._workers) < size:
            self._start()
        if size != self._size:
            self._worlds, self._size = self._worlds + 1, size
        task = pickle.dumps((self._worlds, size, function, arguments))
        answers: dict[int, tuple[Any, str]] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:size])}
        for connection in waiting:
            connection.send_bytes(task)
        while waiting:
            failed = [f"rank {rank}: {trace}" for rank, (_, trace) in answers.items() if trace]
            ready = wait(list(waiting), 5 if failed else SECONDS)
            if not ready:
                self.stop()
                silent = f"no answer from ranks {sorted(waiting.values())} of {size}"
                raise AssertionError("\n".join([*failed, silent]))
            for connection in ready:
                answers[waiting.pop(connection)] = pickle.loads(connection.recv_bytes())
        if failed := [f"rank {rank}: {trace}" for rank, (_, trace) in answers.items() if trace]:
            raise AssertionError("\n".join(failed))
        return [answers[rank][0] for rank in range(size)]

    def stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers, self._size = [], 0

    def _start(self) -> None:
        if not self._workers:
            self._stores = tempfile.mkdtemp()
        ours, theirs = CONTEXT.Pipe()
        arguments = (len(self._workers), self._stores, theirs)
        process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        self._workers.append((process, ours))


class Processes:
    """A world of the first ``size`` workers."""

    def __init__(self, size: int, workers: Workers) -> None:
        self.size = size
        self._workers = workers

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` returns on each rank; raise an error if any rank raises one."""
        return self._workers.run(self.size, function, *arguments)


def _serve(rank: int, stores: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    joined = 0
    while True:
        try:
            world, size, function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if world != joined:
            _join(rank, size, Path(stores, str(world)))
            joined = world
        torch.manual_seed(0)
        try:
            answer = (function(rank, *arguments), "")
        except Exception:
            answer = (None, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


def _join(rank: int, size: int, store: Path) -> None:
    """Join another world."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
