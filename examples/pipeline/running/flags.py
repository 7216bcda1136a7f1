"""Types and ranges of the scripts' flags, and errors in one line that names the flag.

`whole` and `finite` make types for ``add_argument``. The file checks (`existing_folder`, `existing_file`,
`writable_file`, `writable_folder`) are called later, with the flag's name, once the ranks can share an error: a file
that exists on one machine may be missing on another.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline.running.ending import let_the_first_speak

MOST = 2**31 - 1  # default maximum of whole numbers: larger than any flag needs, and too small to overflow


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, printed only once if torchrun has started several processes.

    It rejects empty values, so that an unset variable of a shell script does not become the folder ``.``.

    >>> Parser(prog="script", add_help=False).parse_args(["--data", ""])
    Traceback (most recent call last):
    SystemExit: 2
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse.ArgumentParser`."""
        words = list(sys.argv[1:] if args is None else args)
        for before, word in zip(["", *words], words, strict=False):
            flag, given, value = word.partition("=")
            if not word or (flag.startswith("--") and given and not value):
                self.error(f"argument {flag or before}: must not be empty")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        let_the_first_speak()
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (flags: --help)\n")


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number from ``least`` to ``most``.

    >>> whole(0)("12")
    12
    >>> whole()("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: must be at least 1, got 0
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    return parse


def finite(
    least: float | None = None, most: float | None = None, *, above: float | None = None, below: float | None = None
) -> Callable[[str], float]:
    """Return the type of a flag that takes a number, neither infinite nor NaN, within these bounds.

    >>> finite(0, 1)("0.5")
    0.5
    >>> finite(above=0, most=100)("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: must be above 0 and at most 100, got 0
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    wanted = " and ".join(f"{how} {bound:g}" for how, bound in bounds.items() if bound is not None)

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number{wanted and ', ' + wanted}, got {text}")
        inside = (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )
        if not inside:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


def existing_folder(flag: str, text: str) -> Path:
    """Return the folder that a flag names.

    Raises:
        ValueError: it does not exist, is a file, or cannot be accessed.
    """
    path = _existing(flag, text, "folder")
    if not path.is_dir():
        raise ValueError(f"{flag} must be a folder, got the file {text}")
    return path


def existing_file(flag: str, text: str) -> Path:
    """Return the file that a flag names.

    Raises:
        ValueError: it does not exist, is a folder, or cannot be accessed.
    """
    path = _existing(flag, text, "file")
    if path.is_dir():
        raise ValueError(f"{flag} must be a file, got the folder {text}")
    return path


def writable_file(flag: str, path: Path) -> Path:
    """Check, as far as possible without writing, that a file can be written; return its path.

    Raises:
        ValueError: it is a folder, or cannot be written.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{flag} must be a file, got the folder {path}")
        writable_folder(flag, path.parent)
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{flag}: {path} cannot be written: {error.strerror or error}") from None
    return path


def writable_folder(flag: str, path: Path) -> Path:
    """Check that a folder can be written to, or that it can be created, without creating it; return its path.

    Raises:
        ValueError: it is a file or below one, or cannot be written to.
    """
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise ValueError(f"{flag}: {there} is a file, not a folder")
        with tempfile.TemporaryFile(dir=there):  # permission bits alone do not tell
            pass
    except OSError as error:
        raise ValueError(f"{flag}: nothing can be written to {path}: {error.strerror or error}") from None
    return path


def _existing(flag: str, text: str, kind: str) -> Path:
    path = Path(text)
    try:
        if not path.exists():
            raise ValueError(f"{flag}: no such {kind}: {text}")
    except OSError as error:
        raise ValueError(f"{flag}: {text}: {error.strerror or error}") from None
    return path
