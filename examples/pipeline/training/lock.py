"""A lock that allows one run per folder; the system releases it when the process ends."""

import contextlib
import errno
import os
import platform
import sys
import time
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
# Locks that this process holds: the system's locks do not exclude two runs of the same process.
_held: dict[str, "FolderLock"] = {}


class FolderLock:
    """Keeps other runs out of a folder while this process writes to it.

    It is a record lock (``fcntl.lockf``) on the file ``.lock`` in the folder, which names the holder. The system drops
    it when the process ends, however it ends, so a run that was killed can be resumed at once; worker processes do not
    inherit it. It works between hosts wherever the file system shares such locks: NFS, GPFS, CephFS, Lustre (mounted
    with ``flock``). There the server drops the lock of a host that has died, in NFS after 90 seconds by default.

    Some file systems have no locks, or keep them to one host (BeeGFS by default, ``localflock``, ``nolock``). A
    warning says so in the first case. In the second, a run that is still alive on another host cannot be distinguished
    from one that was killed, so a warning names it.

    Args:
        patience: seconds to wait for another run to end.
    """

    def __init__(self, patience: float = 0) -> None:
        self.patience = patience
        self._file: IO[str] | None = None
        self._key = ""

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # a full disk
            self._file.truncate(0)
            self._file.close()
        self._file = None
        del _held[self._key]

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return whether a run has used this folder; it may still be running."""
        return (folder / ".lock").exists()

    def take(self, folder: Path) -> None:
        """Lock the folder, which must exist. If this lock is already taken, do nothing.

        Raises:
            ValueError: another run uses the folder.
            OSError: the folder cannot be written to.
        """
        if self._file is not None:
            return
        path, until = folder / ".lock", time.monotonic() + self.patience
        self._key = str(path.resolve())
        if _held.setdefault(self._key, self) is not self:
            raise ValueError(f"{folder} is in use by another run of this process: choose another --out")
        try:
            file = path.open("a+", encoding="utf-8", errors="replace")
            try:
                while not _locked(file, folder):
                    if time.monotonic() >= until:
                        raise ValueError(
                            f"{folder} is in use by {_signature(file) or 'another run'}: choose another --out, or stop "
                            "that run first"
                        )
                    time.sleep(1)
            except BaseException:
                file.close()
                raise
        except BaseException:
            del _held[self._key]
            raise
        self._file = file
        before, host = _signature(file), platform.node()
        if before and f" on {host} " not in before:
            text = f"{folder} was in use by {before}, which did not end normally: if it still runs, stop it"
            print(f"warning: {text}", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {host} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
            file.flush()


def _signature(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip()


def _locked(file: IO[str], folder: Path) -> bool:
    """Lock the file and return True; return False if another process has locked it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "not on this system")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        print(f"warning: {folder} cannot be locked: make sure that no other run writes to it", file=sys.stderr)
    return True
