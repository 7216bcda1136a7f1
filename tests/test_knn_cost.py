"""benchmarks/knn_cost.py: a complete run at a tiny size, and the measuring functions that it uses."""

import builtins
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import cases, measure, memory, peers, tables

TINY = ["--device", "cpu", "--rows", "2000", "3000", "--dim", "32", "--batch", "16", "--repeats", "3"]
TINY += ["--backends", "auto", "torch"]
CPU = torch.device("cpu")
PROBLEM = cases.Problem(rows=300, dim=33, batch=7, k=5, dtype="float32", device="cpu")


@contextlib.contextmanager
def quick_rates() -> Iterator[pytest.MonkeyPatch]:
    """Measure the rates of the machine with small products, timed only briefly, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads would wait for each other on a busy machine
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "CPU_PRODUCTS", ((16, 64, 128), (64, 64, 256)))
            patch.setattr(measure, "PRODUCT_SECONDS", 0.01)
            patch.setattr(measure, "MEMORY_REPEATS", 3)
            yield patch
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run: the folder of its results, and what it printed."""
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    from benchmarks import knn_cost

    out = tmp_path_factory.mktemp("knn_cost") / "new" / "out"
    printed: list[str] = []
    with quick_rates() as patch:
        patch.setattr(sys, "argv", ["knn_cost.py", *TINY, "--no-resnet", "--out", str(out)])
        patch.setattr(builtins, "print", lambda text, **_: printed.append(text))
        knn_cost.main()
    return out, "\n".join(printed)


@pytest.fixture
def records(tiny_run: tuple[Path, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tiny_run[0] / "knn_cost.jsonl").read_text(encoding="utf-8").splitlines()]


def of_name(records: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """The records of that name, by their method."""
    return {record["parameters"]["method"]: record for record in records if record["name"] == name}


def test_every_measurement_is_a_complete_record(records: list[dict[str, Any]]) -> None:
    names = [record["name"] for record in records]
    counts = {name: names.count(name) for name in names}
    memories = 2 if sys.platform.startswith("linux") else 0
    expected = {"matmul_rate": 2, "memory_rate": 1, "search": 2 * 2, "peer": 2}
    assert {name: count for name, count in counts.items() if name != "step"} == expected | {"extra_memory": memories}
    assert 3 <= counts["step"] <= 5  # with faiss and lightly's bank, where they are installed
    for record in records:
        assert 0 <= record["q20"] <= record["median"] <= record["q80"]
        assert record["repeats"] >= 1
        units = {"matmul_rate": "GFLOP/s", "memory_rate": "GB/s", "extra_memory": "bytes"}
        assert record["unit"] == units.get(record["name"], "s")
        environment = record["environment"]
        assert environment["device"]
        assert environment["threads"] == 1
        assert environment["versions"].keys() >= {"python", "torch", "numpy", "faiss", "triton", "msf_core", "lightly"}
        assert environment["versions"]["torch"] == torch.__version__
        date = datetime.fromisoformat(environment["date"])
        assert date.utcoffset() == timedelta(0)
        assert abs(datetime.now(date.tzinfo) - date) < timedelta(hours=1)


def test_search_records_hold_the_formula_the_count_the_shares_and_a_perfect_recall(
    records: list[dict[str, Any]],
) -> None:
    best = {r["parameters"].get("dtype", "memory"): r["derived"]["best"] for r in records[:3]}
    products = max(best["float32"], best["bfloat16"])
    searches = [record for record in records if record["name"] in ("search", "peer")]
    assert {record["parameters"]["rows"] for record in searches} == {2000, 3000}
    for record in searches:
        derived, rows = record["derived"], record["parameters"]["rows"]
        assert record["recall"] == 1.0
        assert record["repeats"] == 3
        assert derived["gflop_a_query_formula"] == pytest.approx(2 * rows * 32 / 1e9)
        assert derived["gflop_a_query_counted"] == pytest.approx(derived["gflop_a_query_formula"])
        rate = derived["gflop_a_query_formula"] * 16 / record["median"]
        assert derived["gflop_a_second"] == pytest.approx(rate)
        assert derived["share_of_products"] == pytest.approx(rate / products)
        assert derived["bank_bytes"] == rows * 32 * 4
        assert derived["share_of_memory"] == pytest.approx(rows * 32 * 4 / 1e9 / record["median"] / best["memory"])
        floor = max(2 * rows * 32 * 16 / 1e9 / products, rows * 32 * 4 / 1e9 / best["memory"])
        assert derived["times_the_floor"] == pytest.approx(record["median"] / floor)
        assert "share_of_resnet50_step" not in derived
        assert "host_hidden" not in derived


def test_our_step_gives_the_loss_of_the_authors_formulation(records: list[dict[str, Any]]) -> None:
    steps = of_name(records, "step")
    assert steps.keys() >= {"authors", "auto", "torch"}
    for name in ("authors", "auto", "torch"):
        assert steps[name]["parameters"]["rows"] == 2000  # the smallest of --rows
        assert steps[name]["derived"]["most_apart_from_authors_loss"] < 1e-5
        assert 0 < steps[name]["derived"]["loss"] < 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read on Linux only")
def test_memory_records_cover_the_step(records: list[dict[str, Any]]) -> None:
    found = [r["parameters"] for r in records if r["name"] == "extra_memory"]
    assert {(p["what"], p["method"], p["rows"]) for p in found} == {
        ("authors", "authors", 2000),
        ("step", "auto", 2000),
    }


def test_tables_and_pictures_are_written(tiny_run: tuple[Path, str]) -> None:
    out, printed = tiny_run
    report = (out / "knn_cost.md").read_text(encoding="utf-8")
    assert report in printed
    assert "unmeasured: left out by --no-resnet" in report
    in_detail = report[report.index("## Searches in detail") :]
    lines = [line for line in in_detail.splitlines() if line.startswith(("| 2,000", "| 3,000"))]
    assert len(lines) >= 6
    for line in lines:
        assert line.count("|") == len(tables.HEADER) + 1
    missing = report[report.index("## Not measured") :]
    assert "cuVS at N = 2,000" in missing
    assert "it searches only CUDA arrays" in missing
    for name in ("knn_cost.png", "knn_cost_share.png"):
        plot = (out / name).read_bytes()
        assert plot.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(plot) > 10_000


def sizes_of_arguments(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> set[tuple[int, int, int, int]]:
    from benchmarks import knn_cost

    monkeypatch.setattr(sys, "argv", ["knn_cost.py", "--device", "cpu", *arguments])
    return {(p.rows, p.dim, p.batch, p.k) for p in knn_cost.parse_arguments().problems}


def test_the_sizes_are_a_selection_the_whole_or_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = sizes_of_arguments(monkeypatch)
    full = sizes_of_arguments(monkeypatch, "--full")
    assert len(full) == 5 * 4 * 3 * 5
    assert selection < full
    assert {(128_000, 512, 256, 5), (1_024_000, 512, 256, 5)} < selection
    assert sizes_of_arguments(monkeypatch, "--rows", "300", "400", "--k", "1") == {
        (300, 512, 256, 1),
        (400, 512, 256, 1),
    }
    assert len(sizes_of_arguments(monkeypatch, "--full", "--rows", "5000")) == 4 * 3 * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows: must be a whole number of at least 1, got '0'"),
        (["--repeats", "many"], "--repeats: must be a whole number of at least 1, got 'many'"),
        (["--rows", "100", "--k", "101"], "--k 101: must be at most the number of rows, 100"),
        (["--rows", "100"], "--batch 256: must be at most the number of rows, 100"),
        (["--backends", "annoy"], "--backends annoy: unknown; known: auto, torch, "),
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


def test_quantiles_of_known_numbers() -> None:
    assert measure.quantiles([10.0, 0.0, 5.0, 2.0, 8.0, 1.0]) == (3.5, 1.0, 8.0)
    assert measure.quantiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one number"):
        measure.quantiles([])


def test_calls_are_timed_in_turns() -> None:
    calls: list[tuple[str, int]] = []
    timed = {name: lambda number, name=name: calls.append((name, number)) for name in ("a", "b")}
    seconds = measure.time_interleaved(timed, {"a": 30, "b": 20}, CPU)
    assert [number for _, number in calls] == sorted([*range(30), *range(20)])  # round after round
    assert {name for name, number in calls if number < 20} == {"a", "b"}
    firsts = [calls[2 * number][0] for number in range(20)]
    assert 5 < firsts.count("a") < 15  # each round has its own order
    assert [len(seconds["a"]), len(seconds["b"])] == [30, 20]
    assert min(seconds["a"] + seconds["b"]) > 0


class FakeEvent:
    """An event of a device whose waits end according to the test's own clock."""

    now, waits, over = 0.0, [], 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = max(FakeEvent.now, FakeEvent.over)

    def query(self) -> bool:
        return FakeEvent.now >= FakeEvent.over

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at + 3.0


def test_the_host_is_hidden_behind_a_wait_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(cycles: int) -> None:
        FakeEvent.waits.append(cycles)
        FakeEvent.over = FakeEvent.now + cycles

    def host_takes(cycles: float) -> None:
        FakeEvent.now += cycles

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    short, longer, longest = measure.WAIT_CYCLES
    calls = {"quick": 1, "slow": longer - 1, "waits itself": 2 * longest}
    cuda = torch.device("cuda")
    assert measure.time_hidden(lambda: host_takes(calls["quick"]), cuda) == 3e-3
    assert FakeEvent.waits == [short]
    timed = {name: lambda number, cycles=cycles: host_takes(cycles) for name, cycles in calls.items()}
    found = measure.hidden_summary(timed, dict.fromkeys(timed, 2), cuda)
    assert found == {"quick": (3e-3,) * 3, "slow": (3e-3,) * 3}
    assert measure.hidden_summary(timed, dict.fromkeys(timed, 2), CPU) == {}


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
    index = bank.search(u, k=5).index
    truth = cases.Truth(bank, u, most=7)
    assert truth.recall(index) == 1.0
    assert truth.recall(index[:, :2]) == 1.0
    assert truth.recall(index[:, 1:3]) == pytest.approx(0.5)
    farthest = bank.search(-u, k=1).index  # [Q, 1]
    assert truth.recall(torch.cat([index[:, :4], farthest], dim=1)) == pytest.approx(0.8)
    assert truth.recall(index[:, :1].expand(-1, 5)) == pytest.approx(0.2)
    assert truth.recall(torch.full_like(index, -1)) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_find_what_we_find_and_the_others_say_why_not(dtype: str) -> None:
    problem = dataclasses.replace(PROBLEM, dtype=dtype)
    bank = cases.fill_bank(problem)
    ((_, u),) = cases.make_batches(problem, 1)
    built, reasons = peers.build_all(bank.rows, problem)
    assert built.keys() | reasons.keys() == {peer.name for peer in peers.PEERS}
    assert "product and top-k" in built
    assert "one neighbor" in reasons["lightly bank"] or "not installed" in reasons["lightly bank"]
    truth = cases.Truth(bank, u, most=5)
    for search in built.values():
        # Products in bfloat16 are rounded, which can change their order.
        assert truth.recall(search(peers.unit_queries(u, bank.dtype))) >= (1.0 if dtype == "float32" else 0.7)


def test_a_peer_whose_matrix_is_too_large_is_left_out() -> None:
    huge = cases.Problem(rows=1_024_000, dim=4, batch=1024, k=5, dtype="float32", device="cpu")
    with pytest.raises(peers.Unfit, match=r"would take 4\.2 GB"):
        peers.build_product_topk(torch.empty(1, 4), huge)


def test_lightlys_bank_is_filled_with_the_rows_and_updated() -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    problem = dataclasses.replace(PROBLEM, k=1)
    rows = cases.fill_bank(problem).rows
    search = peers.build_lightly(rows, problem)
    bank = search.__closure__[0].cell_contents
    assert torch.equal(bank.bank, rows)
    assert search(rows[:7].clone()).shape == (7, 1)
    assert int(bank.bank_ptr) == 7


def test_the_banks_contents_are_seeded_and_full() -> None:
    bank, again = cases.fill_bank(PROBLEM), cases.fill_bank(PROBLEM)
    assert bank.full
    assert torch.equal(bank.rows, again.rows)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(300))
    large = cases.fill_bank(dataclasses.replace(PROBLEM, rows=cases.FILL_CHUNK_ROWS + 300))
    assert large.search(large.rows[-300:], k=2).similarity[:, 1].max() < 0.99  # no row occurs twice


def test_operations_are_counted_on_a_real_product() -> None:
    gflop, product = cases.count_gflop(lambda: torch.ones(4, 3) @ torch.ones(3, 5), queries=4)
    assert gflop == pytest.approx(2 * 3 * 5 / 1e9)
    assert torch.equal(product, torch.full((4, 5), 3.0))


def test_the_report_names_the_paper_and_what_is_missing() -> None:
    environment = measure.describe_environment(CPU)
    parameters = {"rows": 1_024_000, "dim": 512, "batch": 256, "k": 5, "dtype": "float32", "device": "cpu"}
    derived = dict.fromkeys(("gflop_a_query_formula", "gflop_a_query_counted"), 1.048576)
    derived |= {"gflop_a_second": 134.2, "share_of_products": 0.9, "share_of_memory": 0.03, "bank_bytes": 2_097_152_000}
    derived |= {"times_the_floor": 1.11, "share_of_resnet50_step": 0.05}
    whole = {"loss": 1.0, "most_apart_from_authors_loss": 1e-7}

    def record(name: str, method: str, median: float, derived: dict[str, Any]) -> measure.Record:
        all_parameters = parameters | {"method": method}
        return measure.Record(name, all_parameters, median, median, median, "s", 3, environment, 1.0, derived)

    records = [
        record("search", "auto", 2.1, derived),
        record("search", "torch", 2.0, derived),
        record("peer", "bare faiss.knn", 3.0, derived),
        record("step", "auto", 2.0, whole),
        record("step", "bare faiss.knn", 3.0, {}),
        record("step", "authors", 8.0, whole),
    ]
    memory_record = record("extra_memory", "torch", 3e6, {})
    memory_record.parameters["what"] = "search"
    report = tables.write_report([*records, memory_record], {"msf_core, faiss": "no\nproc | file"})
    assert (
        "| 1,024,000 | 512 | 256 | 5 | the paper, Table 1 | — | 1.05 | — | — | — | — | — | — | — | 6.78 % | — |"
        in report
    )
    size = "| 1,024,000 | 512 | 256 | 5 |"
    assert (
        f"{size} msf_core, torch | 2.00 s (2.00 s–2.00 s) | 1.05 | 1.05 | 134 | 90.0 % | 3.00 % | 1.11 | 3.00 MB"
        in report
    )
    assert f"{size} bare faiss.knn | 3.00 s (3.00 s–3.00 s) | 1.05 | — | 134 |" in report
    assert f"{size} 2.10 s | 2.00 s | 3.00 s | 1.05 |" in report  # at a glance: auto over the fastest of ours
    assert "| msf_core, auto | 2.00 s (2.00 s–2.00 s) | 4.0 x | 1.00 x |" in report
    assert "| bare faiss.knn, no loss | 3.00 s (3.00 s–3.00 s) | 2.7 x | 1.50 x |" in report
    assert "- msf_core, faiss: no proc / file" in report
    assert "host hidden" not in report
    for place in (1, 3):
        hidden = {"host_hidden": {"median": 1.5, "q20": 1.0, "q80": 2.0}}
        records[place] = dataclasses.replace(records[place], derived=records[place].derived | hidden)
    report = tables.write_report([*records, memory_record], {})
    assert report.count(", as called | GPU time, host hidden |") == 2
    assert f"{size} msf_core, torch | 2.00 s (2.00 s–2.00 s) | 1.50 s | 1.05 | 1.05 | 134 |" in report
    assert f"{size} bare faiss.knn | 3.00 s (3.00 s–3.00 s) | — | 1.05 | — | 134 |" in report
    assert "| msf_core, auto | 2.00 s (2.00 s–2.00 s) | 1.50 s | 4.0 x |" in report


def test_the_rates_of_the_machine_are_those_of_real_work() -> None:
    with quick_rates():
        rates = measure.matmul_rates(CPU)
        reads, _ = measure.memory_rate(CPU)
    assert rates.keys() == {"float32", "bfloat16"}
    for values, product in rates.values():
        assert min(values) > 0
        assert " x " in product
    assert 1 < max(reads) < 2000  # GB/s
