"""benchmarks/worker_memory.py on few paths: workers look at all of them, and the record says what it should."""

import json
from pathlib import Path

import pytest

from benchmarks import worker_memory


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_workers_copy_lists_of_paths_and_share_their_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    worker_memory.main(["--paths", "40000", "--workers", "1", "--out", str(tmp_path)])
    lists, shared = (json.loads(line) for line in (tmp_path / "worker_memory.jsonl").read_text().splitlines())
    assert lists["median"] > 4e6 > 2e6 > shared["median"] > 0, "40,000 strings of at least 60 bytes, and their tuples"
    assert lists["derived"]["share of all"] > lists["derived"]["own before"][0] > 0
    assert capsys.readouterr().out == (tmp_path / "worker_memory.md").read_text() + "\n"
