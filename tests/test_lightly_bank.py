"""benchmarks/lightly_bank.py: a complete run with a small bank, and what it says about a wrong module."""

import builtins
import gc
import json
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("lightly", reason="the benchmark compares with lightly: pip install lightly")
pytest.importorskip("sklearn", reason="the drop-in's example needs scikit-learn")

from benchmarks import lightly_bank
from benchmarks.lightly_bank import Method, Task
from benchmarks.measuring import memory
from msf_core import available_backends

ROWS, DIM, BATCH, REPEATS = 512, 16, 64, 3
CPU = torch.device("cpu")
TASK = Task(ROWS, DIM, BATCH, REPEATS, CPU)
WRAP_BATCH, LOST = 48, 16  # 512 = 10 · 48 + 32: 16 rows of the eleventh batch do not fit


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)  # collecting all of PyTorch for each forward would take seconds
        yield


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run: the folder of its results, and what it printed."""
    out = tmp_path_factory.mktemp("lightly_bank") / "new" / "out"
    sizes = ["--rows", str(ROWS), "--dim", str(DIM), "--batch", str(BATCH), "--repeats", str(REPEATS)]
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightly_bank.py", "--device", "cpu", *sizes, "--out", str(out)])
        patch.setattr(builtins, "print", lambda text, **_: printed.append(text))
        lightly_bank.main()
    return out, "\n".join(printed)


@pytest.fixture
def records(whole_run: tuple[Path, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (whole_run[0] / "lightly_bank.jsonl").read_text(encoding="utf-8").splitlines()]


def names() -> list[str]:
    working = [name for name, problem in available_backends(CPU).items() if problem is None and name != "triton"]
    return [*(f"drop-in, {name}" for name in ("auto", *working)), "NNMemoryBankModule"]


def test_every_forward_is_a_complete_record(records: list[dict[str, Any]]) -> None:
    made = [(record["parameters"]["method"], record["parameters"]["update"]) for record in records]
    assert made == [(name, update) for name in names() for update in (False, True)]
    for record in records:
        assert record["name"] == "nn_bank_forward"
        assert record["unit"] == "s"
        assert record["repeats"] == REPEATS
        assert 0 < record["q20"] <= record["median"] <= record["q80"] < 10
        sizes = {name: record["parameters"][name] for name in ("rows", "dim", "batch", "k")}
        assert sizes == {"rows": ROWS, "dim": DIM, "batch": BATCH, "k": 1}
        date = datetime.fromisoformat(record["environment"]["date"])
        assert abs(datetime.now(date.tzinfo) - date) < timedelta(hours=1)
    assert records[-1]["parameters"]["package"] == f"lightly {version('lightly')}"


def test_answers_are_the_nearest_before_and_after_the_timing(records: list[dict[str, Any]]) -> None:
    assert [record["recall"] for record in records] == [1.0] * len(records)


def test_ours_holds_every_row_after_the_wrap_around_and_lightlys_does_not(records: list[dict[str, Any]]) -> None:
    for record in records:
        derived = record["derived"]
        assert (derived["wrap_rows"], derived["wrap_batch"]) == (ROWS, WRAP_BATCH)
        assert derived["rows_missing"] == (LOST if record["parameters"]["method"] == "NNMemoryBankModule" else 0)


def test_ratios_are_to_our_default_with_the_same_update(records: list[dict[str, Any]]) -> None:
    for record in records:
        ours = records[int(record["parameters"]["update"])]
        assert record["derived"]["times_ours"] == pytest.approx(record["median"] / ours["median"])


def test_the_report_has_a_line_for_each(whole_run: tuple[Path, str], records: list[dict[str, Any]]) -> None:
    out, printed = whole_run
    report = (out / "lightly_bank.md").read_text(encoding="utf-8")
    assert report in printed
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(records)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[-1].startswith("| NNMemoryBankModule | lightly")
    assert lines[-1].endswith(f"| 1.000 | {LOST} |")
    assert f"newest {ROWS} rows" in report
    assert f"in batches of {WRAP_BATCH}" in report


class Wrong(nn.Module):
    """Always answers with its first row, and writes every batch over its first rows."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows.clone()
        self.seen: list[tuple[Tensor, bool]] = []

    def forward(self, output: Tensor, update: bool = False) -> Tensor:
        self.seen.append((output.clone(), update))
        if update:
            self.rows[: len(output)] = output
        return self.rows[:1].expand_as(output)


def test_a_module_that_is_wrong_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "extra_memory_cpu", lambda call: memory.MemoryResult([], "no /proc"))
    methods = lightly_bank.make_methods(CPU)
    wrong = Method("wrong", "none", Wrong, lambda module: module.rows)
    *_, record = lightly_bank.measure(TASK, [methods[0], wrong, methods[-1]])[:4]
    assert record.parameters["method"] == "wrong"
    assert record.recall is not None
    assert record.recall < 0.2
    assert record.derived["rows_missing"] > ROWS // 2
    assert "| unmeasured |" in lightly_bank.write_report([record])


def test_modules_get_the_same_batches_a_new_one_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "extra_memory_cpu", lambda call: memory.MemoryResult([], "no /proc"))
    made: list[Wrong] = []

    def build(rows: Tensor) -> nn.Module:
        made.append(Wrong(rows))
        return made[-1]

    lightly_bank.measure(TASK, [Method(name, "none", build, lambda module: module.rows) for name in ("a", "b")])
    a, b = made[:2]
    assert torch.equal(made[0].rows, made[1].rows)
    pushed = [[output for output, update in module.seen if update] for module in (a, b)]
    rounds = lightly_bank.WARM_UP_ROUNDS + REPEATS
    assert len(pushed[0]) == len(pushed[1]) == rounds
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pushed, strict=True))
    assert len(torch.stack(pushed[0])[:, 0].unique(dim=0)) == rounds


def test_true_similarity_is_of_the_nearest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightly_bank, "CHUNK", 3)
    rows, queries = (F.normalize(torch.randn(count, 4), dim=1) for count in (7, 5))
    found = lightly_bank.true_similarity(rows, queries)
    expected = [max(float(row.double() @ query.double()) for row in rows) for query in queries]
    assert found.tolist() == pytest.approx(expected)


def test_rows_that_cannot_be_told_apart_are_an_error() -> None:
    with pytest.raises(ValueError, match="dim must be at least 11 to distinguish 1536 rows"):
        lightly_bank.rows_missing(Task(ROWS, 8, BATCH, 1, CPU), lightly_bank.make_methods(CPU)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats: must be a whole number of at least 1, got '0'"),
        (["--rows", "100", "--batch", "64"], "--batch 64: lightly's bank loses rows"),
        (["--out", __file__], "that is a file, not a folder"),
    ],
)
def test_a_wrong_flag_ends_with_a_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightly_bank.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        lightly_bank.parse_arguments()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_lightly_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly.models.modules", None)
    monkeypatch.setattr(sys, "argv", ["lightly_bank.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="this needs lightly"):
        lightly_bank.main()
