"""Whatever befalls an evaluation, in one line: without a traceback, and from one of the ranks alone."""

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import _get_default_store

from msf_core.distributed import Ranks

LONGEST = 600  # characters of a message
_PLAIN = (ValueError, OSError, RuntimeError, ImportError)  # their names say no more than their messages
_TRACEBACK = "Traceback (most recent call last):"


class Told(Exception):
    """An error of which somebody has been told already."""


def tell(program: str, error: BaseException) -> None:
    """Print an error."""
    print(f"{program}: error: {in_one_line(error)}", file=sys.stderr, flush=True)


@contextmanager
def telling_once(program: str, ranks: Ranks) -> Iterator[None]:
    """Print an error of the block, on the rank that is the first to have one, and raise `Told` on all that have."""
    try:
        yield
    except Exception as error:
        if ranks.size == 1 or _first():
            tell(program, error)
        raise Told from error


def _first() -> bool:
    """Tell whether no other rank has asked before."""
    try:
        return _get_default_store().add("errors told", 1) == 1
    except (RuntimeError, ValueError):  # the rank that kept the store has gone, and not without an error
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
    text = text.partition("Exception raised from ")[0]  # the stack of PyTorch's C++
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
