"""The lock of a run's folder, between real processes."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.training import lock
from pipeline.training.lock import FolderLock

HOLDER = """
import os, sys, time
from pathlib import Path
from pipeline.training.lock import FolderLock

FolderLock().take(Path(sys.argv[1]))
if os.fork():
    print("locked", flush=True)
time.sleep(100)  # in the process, and in one that it has forked, as workers are
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        assert process.stdout.readline() == b"locked\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_folder_is_one_processs_until_that_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with held_elsewhere(tmp_path) as holder, FolderLock() as ours:
        with pytest.raises(
            ValueError, match=rf"is in use by process {holder.pid} on .* since 20.*: choose another --out"
        ):
            ours.take(tmp_path)
        holder.kill()
        holder.wait()
        ours.take(tmp_path)  # although the forked process lives on
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert (tmp_path / ".lock").read_text() == ""
    assert capsys.readouterr().err == ""


def test_a_lock_with_patience_waits_for_the_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    with held_elsewhere(tmp_path) as holder, FolderLock(patience=60) as ours:

        def kill_instead_of_sleeping(seconds: float) -> None:
            waits.append(seconds)
            holder.kill()
            holder.wait()

        monkeypatch.setattr(lock.time, "sleep", kill_instead_of_sleeping)
        ours.take(tmp_path)
    assert waits == [1]


def test_within_a_process_too_a_folder_is_one_runs(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with FolderLock() as one:
        one.take(tmp_path)
        one.take(tmp_path)
        with FolderLock() as other, pytest.raises(ValueError, match="in use by another run of this process"):
            other.take(tmp_path / "link")
    with FolderLock() as other:
        other.take(tmp_path)


def test_what_a_lock_cannot_know_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").write_text("process 7 on elsewhere since yesterday\n")
    with FolderLock() as ours:
        ours.take(tmp_path)
    said = f"warning: {tmp_path} was in use by process 7 on elsewhere since yesterday, which did not end normally"
    assert said in capsys.readouterr().err

    def not_here(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "lockf", not_here)
    with FolderLock() as ours:
        ours.take(tmp_path)
    assert f"warning: {tmp_path} cannot be locked" in capsys.readouterr().err
