"""Lets Ctrl-C end a script at any time, with one line and status 130. Import it before any slow imports."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT
LINE = "stopped by Ctrl-C"


def leave_on_interrupt() -> None:
    """Make Ctrl-C end the process at once: an exception during an import may be swallowed or replaced by another."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise ignored, as under nohup
        signal.signal(signal.SIGINT, _leave)


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's main function, in which Ctrl-C raises KeyboardInterrupt as usual, and exit with its status."""
    ours = signal.getsignal(signal.SIGINT) is _leave
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    if ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        sys.stdout.flush()
    except OSError:  # stdout was closed; without this, Python would print another error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 2
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # IPython's %run continues after the script
        atexit.register(signal.signal, signal.SIGINT, _leave)
    sys.exit(status)


def _leave(*_: Any) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, f"{os.path.basename(sys.argv[0])}: {LINE}\n".encode())
    os._exit(STATUS)
