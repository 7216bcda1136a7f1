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
        That status; 1 where a rank was lost, and 130 after Ctrl-C, each of which is told in a line.

    Raises:
        Exception: whatever else the work raises: it is a bug, and its traceback is wanted.
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
    """Print errors of the block in one line and end the script with a status. `joined` handles a lost rank.

    Args:
        program: the name that the line begins with.
        ranks: those that have found one another, of which one tells; None before they have.
        kinds: of errors that are told.
        status: of the script.

    Raises:
        SystemExit: with that status, in place of an error of these kinds.
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
    """Wait before the ranks have joined, unless this is the first process of this machine.

    An error that all of them have is told by the first, and once that has ended, torchrun ends the others here. Whoever
    is not ended has an error of its own to tell. Without waiting, torchrun would end the first if another were faster.
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
    except (RuntimeError, ValueError):  # the rank that kept the store ended, with an error of its own
        return False


def in_one_line(error: BaseException) -> str:
    """Return what happened, in one line: of an error that came with a traceback of another process, its cause.

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
