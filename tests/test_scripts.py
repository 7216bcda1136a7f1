"""The benchmark scripts start from any folder, and exit with status 2 if they cannot run.

All run in one process, because each process would have to import PyTorch.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="an example that a script compares with needs scikit-learn")

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
STARTS = {  # script -> (arguments, expected message, required module)
    "knn_cost.py": (["--rows", "0"], "usage: knn_cost.py", "numpy"),
    "ema_cost.py": (["--repeats", "0"], "usage: ema_cost.py", "numpy"),
    "lightly_bank.py": (["--repeats", "0"], "usage: lightly_bank.py", "lightly"),
    "methods.py": (["--seeds", "0"], "usage: methods.py", "lightly"),
    "tune_triton.py": ([], "PyTorch sees no CUDA device here", "triton"),
}
ONE_AFTER_ANOTHER = """
import contextlib, io, json, runpy, sys
from pathlib import Path

path, found = sys.path[1:], {}
for script, arguments in json.loads(sys.argv[1]):
    sys.path[:] = [str(Path(script).parent), *path]  # as Python starts a script; it finds its checkout by itself
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    sys.argv = [script, *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
    found[Path(script).name] = status, said.getvalue()
print(json.dumps(found))
"""


def test_scripts_start_from_another_folder_and_exit_with_2() -> None:
    there = [name for name, (*_, needed) in STARTS.items() if find_spec(needed) is not None]
    if torch.cuda.is_available():
        there.remove("tune_triton.py")
    starts = json.dumps([(str(FOLDER / name), STARTS[name][0]) for name in there])
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, starts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == there
    for name, (status, said) in found.items():
        assert status == 2, (name, said)
        assert STARTS[name][1] in said
