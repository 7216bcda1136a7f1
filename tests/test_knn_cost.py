"""benchmarks/knn_cost.py from one end to the other at a tiny size, and the measuring functions it rests on."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cases, measure, memory, stages, tables
from msf_core import Neighbors

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "knn_cost.py"
TINY = ["--device", "cpu", "--rows", "2000", "--dim", "32", "--batch", "16", "--repeats", "3", "--backends", "torch"]
CPU = torch.device("cpu")
PROBLEM = cases.Problem(rows=300, dim=33, batch=7, k=5, dtype="float32", device="cpu")


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd="/", check=False)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run from another folder: where the results went, and what was printed."""
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    out = tmp_path_factory.mktemp("knn_cost") / "new" / "out"
    done = run_script(*TINY, "--no-resnet", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture
def records(tiny_run: tuple[Path, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tiny_run[0] / "knn_cost.jsonl").read_text(encoding="utf-8").splitlines()]


def of_name(records: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """The records of that name, by their method."""
    return {record["parameters"]["method"]: record for record in records if record["name"] == name}


def test_every_measurement_is_a_complete_record(records: list[dict[str, Any]]) -> None:
    names = [record["name"] for record in records]
    memories = names.count("extra_memory") if sys.platform.startswith("linux") else 0
    assert names == ["matmul_rate", "search", "authors", *["step"] * 3, *["extra_memory"] * memories]
    for record in records:
        assert 0 <= record["q20"] <= record["median"] <= record["q80"]
        assert record["repeats"] >= 1
        assert record["unit"] == {"matmul_rate": "GFLOP/s", "extra_memory": "bytes"}.get(record["name"], "s")
        environment = record["environment"]
        assert environment["device"]
        assert environment["threads"] == 1
        assert environment["versions"].keys() == {"python", "torch", "numpy", "faiss", "msf_core"}
        assert environment["versions"]["torch"] == torch.__version__
        date = datetime.fromisoformat(environment["date"])
        assert date.utcoffset() == timedelta(0)
        assert abs(datetime.now(date.tzinfo) - date) < timedelta(hours=1)


def test_search_records_hold_the_formula_the_count_and_a_perfect_recall(records: list[dict[str, Any]]) -> None:
    search, authors = of_name(records, "search")["torch"], of_name(records, "authors")["authors"]
    assert search["recall"] == 1.0
    assert search["repeats"] == authors["repeats"] == 3
    for record, products in ((search, 1), (authors, 3)):
        derived = record["derived"]
        assert derived["gflop_a_query_formula"] == pytest.approx(products * 2 * 2000 * 32 / 1e9)
        assert derived["gflop_a_query_counted"] == pytest.approx(derived["gflop_a_query_formula"])
        rate = derived["gflop_a_query_counted"] * 16 / record["median"]
        assert derived["gflop_a_second"] == pytest.approx(rate)
        assert derived["share_of_matmul_rate"] == pytest.approx(rate / records[0]["derived"]["best"])
        assert derived["bank_bytes"] == 2000 * 32 * 4
        assert "share_of_resnet50_step" not in derived


def test_our_step_gives_the_loss_of_the_authors_formulation(records: list[dict[str, Any]]) -> None:
    steps = of_name(records, "step")
    assert steps.keys() == {"authors", "auto", "torch"}
    for record in steps.values():
        assert record["derived"]["most_apart_from_authors_loss"] < 1e-5
        assert 0 < record["derived"]["loss"] < 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read on Linux only")
def test_memory_records_cover_what_was_timed(records: list[dict[str, Any]]) -> None:
    found = [r["parameters"] for r in records if r["name"] == "extra_memory"]
    assert {(p["what"], p["method"], p["rows"]) for p in found} == {
        ("search", "torch", 2000),
        ("authors", "authors", 2000),
        ("step", "auto", 2000),
        ("step", "torch", 2000),
    }


def test_table_and_plot_are_written(tiny_run: tuple[Path, str]) -> None:
    out, printed = tiny_run
    report = (out / "knn_cost.md").read_text(encoding="utf-8")
    assert report in printed
    assert "unmeasured: left out by --no-resnet" in report
    for line in (line for line in report.splitlines() if line.startswith("| 2,000")):
        assert line.count("|") == len(tables.HEADER) + 1
    plot = (out / "knn_cost.png").read_bytes()
    assert plot.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(plot[start : start + 4], "big") for start in (16, 20))
    assert width > 1000
    assert height > 400
    assert len(plot) > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows: must be a whole number of at least 1, got '0'"),
        (["--repeats", "many"], "--repeats: must be a whole number of at least 1, got 'many'"),
        (["--rows", "100", "--k", "101"], "--k 101: it may be at most the rows of the bank, 100"),
        (["--rows", "100"], "--batch 256: it may be at most the rows of the bank, 100"),
        (["--backends", "annoy"], "--backends annoy: unknown; known: torch, "),
        (["--dtype", "float64"], "--dtype: invalid choice: 'float64'"),
        (["--out", __file__], "that is a file, not a folder"),
    ],
)
def test_a_wrong_flag_ends_with_a_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import knn_cost

    monkeypatch.setattr(sys, "argv", ["knn_cost.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        knn_cost.parse_arguments()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_script_itself_exits_with_2() -> None:
    done = run_script("--rows", "0")
    assert done.returncode == 2
    assert "usage: knn_cost.py" in done.stderr


def test_quantiles_of_known_numbers() -> None:
    assert measure.quantiles([10.0, 0.0, 5.0, 2.0, 8.0, 1.0]) == (3.5, 1.0, 8.0)
    assert measure.quantiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one number"):
        measure.quantiles([])


def test_calls_are_timed_in_turns() -> None:
    calls: list[tuple[str, int]] = []
    timed = {name: lambda number, name=name: calls.append((name, number)) for name in ("a", "b")}
    seconds = measure.time_interleaved(timed, {"a": 3, "b": 2}, CPU)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert [len(seconds["a"]), len(seconds["b"])] == [3, 2]
    assert min(seconds["a"] + seconds["b"]) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read on Linux only")
def test_extra_memory_is_the_peak_also_of_what_was_freed() -> None:
    memory.extra_memory_cpu(lambda: torch.ones(16))
    result = memory.extra_memory_cpu(lambda: torch.ones(16 << 20).sum().item())  # 64 MiB, gone when the call ends
    assert 60e6 < result.bytes[0] < 80e6
    nothing = memory.extra_memory_cpu(lambda: None)
    assert nothing.bytes[0] < 2e6


def test_recall_sees_wrong_and_doubled_rows() -> None:
    bank = cases.fill_bank(PROBLEM)
    ((_, u),) = cases.make_batches(PROBLEM, 1)
    found = bank.search(u, k=5)
    assert cases.measure_recall(bank, u, found) == 1.0

    def recall_of(index: torch.Tensor) -> float:
        return cases.measure_recall(bank, u, Neighbors(found.similarity, index, found.embedding, found.label))

    farthest = bank.search(-u, k=1).index  # [Q, 1]
    assert recall_of(torch.cat([found.index[:, :4], farthest], dim=1)) == pytest.approx(0.8)
    assert recall_of(found.index[:, :1].expand(-1, 5)) == pytest.approx(0.2)
    assert recall_of(torch.full_like(found.index, -1)) == 0.0


def test_the_banks_contents_are_seeded_and_full() -> None:
    bank, again = cases.fill_bank(PROBLEM), cases.fill_bank(PROBLEM)
    assert bank.full
    assert torch.equal(bank.rows, again.rows)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(300))


def test_operations_are_counted_on_a_real_product() -> None:
    gflop, product = cases.count_gflop(lambda: torch.ones(4, 3) @ torch.ones(3, 5), queries=4)
    assert gflop == pytest.approx(2 * 3 * 5 / 1e9)
    assert torch.equal(product, torch.full((4, 5), 3.0))


def test_the_report_names_the_paper_and_what_is_missing() -> None:
    environment = measure.describe_environment(CPU)
    parameters = {"rows": 1_024_000, "dim": 512, "batch": 256, "k": 5, "dtype": "float32", "method": "torch"}
    derived = dict.fromkeys(("gflop_a_query_formula", "gflop_a_query_counted"), 1.048576)
    derived |= {"gflop_a_second": 134.2, "share_of_matmul_rate": 0.9, "bank_bytes": 2_097_152_000}
    derived |= {"share_of_resnet50_step": 0.05, "loss": 1.0, "most_apart_from_authors_loss": 1e-7}
    search = measure.Record("search", parameters, 2.0, 1.9, 2.1, "s", 3, environment, 1.0, derived)
    step = measure.Record("step", parameters | {"method": "authors"}, 8.0, 7.0, 9.0, "s", 3, environment, None, derived)
    missing = {"authors 1024000": stages.LEFT_OUT_AUTHORS, "memory torch 1024000": "no\nproc | file"}
    report = tables.write_report([search, step], missing)
    assert "| 1,024,000 | paper, Table 1 | — | 1.05 | — | — | — | — | — | 6.78 % | — |" in report
    assert "| 1,024,000 | msf_core, torch | 2.00 s (1.90 s–2.10 s) | 1.05 | 1.05 | 134 | 90.0 % |" in report
    assert "| unmeasured: no proc / file | 2.10 GB | 5.00 % | 1.000 |" in report
    assert "authors' step, with backward | unmeasured: left out; --authors-at-1m measures it |" in report
