"""How the scripts end: with an exit status and, for errors that users can fix, one line from one rank.

Ctrl-C is in `interrupts`, which has to be imported earlier.
"""

import builtins
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.distributed_c10d import _get_default_store

from msf_core.distributed import Ranks
from pipeline.running.interrupts import LINE, STATUS
from pipeline.running.peers import LostRank, lost_touch

WRONG_INPUT = (ValueError, ImportError, RuntimeError, OSError)  # raised before the work begins
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
LONGEST = 600  # longest message, in characters
PATIENCE = 60  # seconds; the first process of a machine may take this much longer to import its modules
_PLAIN = (ValueError, OSError, RuntimeError, ImportError)  # their names add nothing to their messages
_TRACEBACK = "Traceback (most recent call last):"


def status_of(program: str, work: Callable[[], int]) -> int:
    """Do the work of a script, and return its exit status.

    Args:
        program: the name that its messages begin with.
        work: returns a status, or raises SystemExit, as argparse and `telling` do.

    Returns:
        That status. If a rank was lost, 1; after Ctrl-C, 130. In both cases, one line says so.

    Raises:
        Exception: anything else that ``work`` raises. This is a bug, and its traceback should be seen.
    """
    try:
        return work()
    except SystemExit as end:
        return int(end.code or 0)
    except LostRank as error:
        print(file=sys.stderr)  # ends the line of a progress bar
        tell(program, error)
        return 1
    except KeyboardInterrupt:
        if not int(os.environ.get("RANK", 0)):
            print(f"\n{program}: {LINE}", file=sys.stderr, flush=True)
        return STATUS


@contextmanager
def telling(
    program: str,
    ranks: Ranks | None = None,
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
    status: int = 2,
) -> Iterator[None]:
    """Print an error of the block in one line, and end the script. Errors of a lost rank are left to `joined`.

    Args:
        program: the name that the line begins with.
        ranks: the ranks, of which only one prints the error; None before they have joined.
        kinds: the kinds of errors to print.
        status: the exit status of the script.

    Raises:
        SystemExit: with this status, instead of an error of these kinds.
    """
    try:
        yield
    except kinds as error:
        if ranks is None:
            let_the_first_speak()
        elif ranks.size > 1 and lost_touch(error):
            raise
        if ranks is None or ranks.size == 1 or _is_first():
            tell(program, error)
        raise SystemExit(status) from error


def let_the_first_speak() -> None:
    """Let the first process on this machine print its error: any other that torchrun has started waits for a minute.

    This is for errors before the ranks have joined. If all processes have the same error, the first prints it and ends,
    and torchrun then ends the others while they wait here. A process that is still there after the wait has an error of
    its own to print. Without the wait, a faster process could end before the first has printed its error, and torchrun
    would end the first.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["LOCAL_RANK"]):
        sys.stdout.flush()
        time.sleep(PATIENCE)


def tell(program: str, error: BaseException) -> None:
    """Print an error."""
    print(f"{program}: error: {in_one_line(error)}", file=sys.stderr, flush=True)


def _is_first() -> bool:
    """Return whether this is the first rank to call this."""
    try:
        return _get_default_store().add("errors told", 1) == 1
    except (RuntimeError, ValueError):  # the rank that hosted the store has ended, with an error of its own
        return False


def in_one_line(error: BaseException) -> str:
    """Return the message of an error in one line; if it contains another process's traceback, the last error there.

    >>> in_one_line(KeyError("x"))
    "KeyError: 'x'"
    >>> in_one_line(OSError(28, "No space left on device", "record.json"))
    'record.json: No space left on device'
    """
    text = str(error)
    if _TRACEBACK in text:
        text = _cause(text)
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, _PLAIN):
        text = f"{type(error).__name__}: {text}"
    text = text.partition("Exception raised from ")[0]  # PyTorch's C++ stack trace
    text = " ".join(text.split()).rstrip(": ") or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _cause(text: str) -> str:
    """Return the message below the last traceback in a text."""
    lines = text.rpartition(_TRACEBACK)[2].splitlines()
    begin = next((i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()), 0)
    kind, _, message = "\n".join(lines[begin:]).partition(": ")
    known = getattr(builtins, kind, None)
    if "." in kind or (isinstance(known, type) and issubclass(known, _PLAIN)):
        return message or kind.rpartition(".")[2]
    return f"{kind}: {message}"
