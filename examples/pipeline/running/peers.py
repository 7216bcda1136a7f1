"""Finds out which rank is gone, and on which host, when other ranks wait for it in vain.

The errors of a communication backend only name sockets and time-outs. So a thread of each rank increments a counter in
the store through which torchrun's ranks found each other. A rank that waits in vain says so in the store, and looks
for ranks that neither wait nor continue to count.
"""

import os
import re
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BEATS_A_SECOND = 4
WORKS, WAITS, ENDS = "works", "waits", "ends"
_SIGNS = re.compile(r"gloo|caused pair closure|not all ranks came to|NCCL")


class LostRank(RuntimeError):
    """Ranks that this one waited for do not answer. The message names them and their hosts."""


def lost_touch(error: BaseException) -> bool:
    """Return whether an error can come from a lost rank or from the network."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, (LostRank, dist.DistError)) or bool(_SIGNS.search(str(error)))
    )


class Peers:
    """The ranks that started together, the hosts that they are on, and whether they are alive.

    Args:
        rank, size: this rank, and the number of ranks; all ranks must create their `Peers` at the same time.
        prefix: prefix of the keys in the store at MASTER_ADDR and MASTER_PORT; different for every start.
        silence: seconds without a sign of life after which a rank counts as lost.
    """

    def __init__(self, rank: int, size: int, prefix: str, silence: float) -> None:
        self.rank, self.size, self.silence = rank, size, silence
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=60)  # time for the slowest rank to get here
        # A separate connection, because one that waits for an answer blocks everything else.
        store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        self._store: Any = dist.PrefixStore(f"{prefix}/peers", store)
        keeps = rank == 0 if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else _is_here(address)
        self._store.set(f"host {rank}", f"{keeps:d}{socket.gethostname()}")
        self._tell(WORKS)
        told = self._store.multi_get([f"host {other}" for other in range(size)])
        self._store.multi_get(self._keys())  # wait for all ranks
        self.hosts = [one.decode()[1:] for one in told]
        self.keepers = [other for other, one in enumerate(told) if one[:1] == b"1"]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._count, name="sign of life", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop giving signs of life."""
        self._stopped.set()
        self._thread.join(timeout=self.silence)

    def find(self, error: BaseException) -> LostRank:
        """Return the error to raise instead of the backend's. This takes up to 2.5 times ``silence`` seconds."""
        self.stop()
        found: list[list[int]] = []

        def ask() -> None:
            with suppress(RuntimeError):
                found.append(self._ask())
                self._tell(ENDS)

        thread = threading.Thread(target=ask, daemon=True)  # a store whose host is gone may take long to fail
        thread.start()
        thread.join(timeout=2 * self.silence)
        if not found:
            if len(self.keepers) == self.size:
                return LostRank(f"lost torchrun's store on {self.hosts[self.rank]}")
            why = f"it hosts the store, and does not answer rank {self.rank} on {self.hosts[self.rank]}"
            return LostRank(f"lost {self._named(self.keepers)}: {why}")
        lost = found[0]
        self._let_others_ask(lost)
        if lost:
            return LostRank(f"lost {self._named(lost)}: no answer to rank {self.rank} on {self.hosts[self.rank]}")
        first = str(error).partition("\n")[0]
        return LostRank(f"the ranks lost contact, but all of them are alive; was the network cut? {first}")

    def _ask(self) -> list[int]:
        """Return the silent ranks; if there are none, the ranks that are alive but do not wait like the others."""
        self._tell(WAITS)
        began, before = time.monotonic(), self._states()
        while True:
            time.sleep(self.silence / 8)
            states, waited = self._states(), time.monotonic() - began
            working = [other for other, state in enumerate(states) if state.startswith(WORKS)]
            silent = [other for other in working if states[other] == before[other]]
            if not working or waited > 1.5 * self.silence or (silent and waited > self.silence):
                return silent or working

    def _let_others_ask(self, lost: list[int]) -> None:
        """If the store may end with this process, give the other ranks a little time to read it first."""
        until = time.monotonic() + self.silence / 2
        while self.rank in self.keepers and time.monotonic() < until:
            if all(state == ENDS or other in lost for other, state in enumerate(self._states())):
                return
            time.sleep(0.1)

    def _count(self) -> None:
        number = 0
        with suppress(RuntimeError):  # the store is gone, and this process will end too
            while not self._stopped.wait(1 / BEATS_A_SECOND):
                number += 1
                self._tell(f"{WORKS} {number}")

    def _tell(self, state: str) -> None:
        self._store.set(f"state {self.rank}", state)

    def _keys(self) -> list[str]:
        return [f"state {other}" for other in range(self.size)]

    def _states(self) -> list[str]:
        return [state.decode() for state in self._store.multi_get(self._keys())]

    def _named(self, ranks: list[int]) -> str:
        by_host: dict[str, list[str]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(str(rank))
        parts = [
            f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} on {host}" for host, numbers in by_host.items()
        ]
        return " and ".join(parts)


def _is_here(address: str) -> bool:
    """Return whether an address belongs to this host."""
    with suppress(OSError):
        for family, kind, protocol, _, where in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as attempt:
                attempt.bind(where)
                return True
    return False
