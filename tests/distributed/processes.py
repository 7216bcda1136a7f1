"""Real processes that talk by gloo: started once, and then handed one function after another."""

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

SECONDS = 120  # that a function may take; a hang is a failure


class Processes:
    """A world of ``size`` ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` gives on every rank; raise what it raises on one of them."""
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send_bytes(pickle.dumps((function, arguments)))
        answers: dict[int, tuple[Any, str]] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        while waiting:
            failed = [f"rank {rank}: {trace}" for rank, (_, trace) in answers.items() if trace]
            ready = wait(list(waiting), 5 if failed else SECONDS)
            if not ready:
                self.stop()
                silent = f"no answer from ranks {sorted(waiting.values())} of {self.size}"
                raise AssertionError("\n".join([*failed, silent]))
            for connection in ready:
                answers[waiting.pop(connection)] = pickle.loads(connection.recv_bytes())
        if failed := [f"rank {rank}: {trace}" for rank, (_, trace) in answers.items() if trace]:
            raise AssertionError("\n".join(failed))
        return [answers[rank][0] for rank in range(self.size)]

    def stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = (function(rank, *arguments), "")
        except Exception:
            answer = (None, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
