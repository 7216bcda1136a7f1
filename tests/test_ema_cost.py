"""benchmarks/ema_cost.py: a complete run with a small model, and what it says about a wrong method."""

import builtins
import copy
import gc
import json
import math
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ema_cost
from benchmarks.ema_cost import METHODS, Contender, Method, Task
from benchmarks.measuring import memory
from benchmarks.measuring.measure import Record
from msf_core import EMATarget

OURS = METHODS[0]
REPEATS = 3
# ResNet18 (11,689,512 with its classifier of 512 x 1000) with linear 512 x 4096, BatchNorm, linear 4096 x 512.
RESNET18_PARAMETERS = 11_689_512 - 513 * 1000 + 513 * 4096 + 2 * 4096 + 4097 * 512
BUFFERS = {
    "EMATarget": "kept",
    "EMATarget, buffers='copy'": "copied",
    "EMATarget, buffers='ema'": "averaged",
    "Python loop": "kept",
    "torch AveragedModel": "copied",
    "timm ModelEmaV3": "averaged",
    "timm ModelEmaV3, foreach=False": "averaged",
    "lightly update_momentum": "kept",
}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    """A tiny encoder with BatchNorm. Its updates take no time, and its extra memory is not measured but set."""
    monkeypatch.setattr(memory, "extra_memory_cpu", lambda call: memory.MemoryResult([7_000_000]))
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return Task("tiny", encoder, 0.9, REPEATS, torch.device("cpu"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run: the folder of its results, and what it printed."""
    pytest.importorskip("torchvision", reason="the models are torchvision's")
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    out = tmp_path_factory.mktemp("ema_cost") / "new" / "out"
    command = ["ema_cost.py", "--device", "cpu", "--model", "resnet18", "--repeats", str(REPEATS), "--out", str(out)]
    printed: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads would wait for each other on a busy machine
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            patch.setattr(builtins, "print", lambda text, **_: printed.append(text))
            patch.setattr(gc, "collect", lambda: 0)  # collecting all of PyTorch for each method would take seconds
            ema_cost.main()
    finally:
        torch.set_num_threads(threads)
    return out, "\n".join(printed)


@pytest.fixture
def records(whole_run: tuple[Path, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (whole_run[0] / "ema_cost.jsonl").read_text(encoding="utf-8").splitlines()]


def installed() -> list[str]:
    """Return the names of the methods whose library is installed."""
    here = {"msf_core", "torch"}
    for package, module in (("timm", "timm.utils"), ("lightly", "lightly.models.utils")):
        try:
            __import__(module)
        except ImportError:
            continue
        here.add(package)
    return [method.name for method in METHODS if method.package in here]


def measure_with(task: Task, *methods: Method) -> tuple[Record, ...]:
    """Measure our method and these, and return their records."""
    return tuple(ema_cost.measure(task, (OURS, *methods))[0])


def wrong_method(change: Callable[[nn.Module, nn.Module], None]) -> Method:
    """A method of another library whose update does ``change(target, online)``."""

    def build(start: nn.Module, momentum: float) -> Contender:
        target = copy.deepcopy(start).requires_grad_(False)
        return Contender(target, torch.no_grad()(lambda online: change(target, online)))

    return Method("wrong", "torch", build, "")


def test_every_method_is_a_complete_record(records: list[dict[str, Any]]) -> None:
    assert [record["parameters"]["method"] for record in records] == installed()
    for record in records:
        assert record["name"] == "ema_update"
        assert record["unit"] == "s"
        assert record["repeats"] == REPEATS
        assert 0 < record["q20"] <= record["median"] <= record["q80"] < 10
        assert record["note"]
        p, environment = record["parameters"], record["environment"]
        assert p["version"] == sys.modules[p["package"]].__version__
        assert p["model"] == "resnet18"
        assert p["momentum"] == 0.99
        assert p["parameters"] == RESNET18_PARAMETERS
        assert p["tensors"] == 66  # 60 of ResNet18 without its classifier, 6 of the head
        assert environment["device"]
        assert environment["threads"] == 1
        assert environment["versions"]["torch"] == torch.__version__
        date = datetime.fromisoformat(environment["date"])
        assert abs(datetime.now(date.tzinfo) - date) < timedelta(hours=1)


def test_figures_follow_from_the_times(records: list[dict[str, Any]]) -> None:
    median = {record["parameters"]["method"]: record["median"] for record in records}
    ours = {"kept": "EMATarget", "copied": "EMATarget, buffers='copy'", "averaged": "EMATarget, buffers='ema'"}
    for record in records:
        derived = record["derived"]
        assert derived["bytes_at_least"] == 3 * 4 * RESNET18_PARAMETERS
        assert derived["gb_a_second"] == pytest.approx(12e-9 * RESNET18_PARAMETERS / record["median"])
        assert derived["times_ours"] == pytest.approx(record["median"] / median["EMATarget"])
        same = record["median"] / median[ours[derived["buffers"]]]
        assert derived["times_ours_same_buffers"] == pytest.approx(same)


def test_every_method_gets_what_ours_gets(records: list[dict[str, Any]]) -> None:
    for record in records:
        derived = record["derived"]
        assert derived["agrees"] is True
        assert derived["largest_difference_to_ours"] <= derived["tolerance"] < 1e-5
        assert derived["buffers"] == BUFFERS[record["parameters"]["method"]]
    assert 0 < records[0]["derived"]["largest_difference_to_float64"] < 1e-6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read on Linux only")
def test_no_method_needs_a_second_copy(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert 0 <= record["derived"]["extra_memory_bytes"] < RESNET18_PARAMETERS


def test_table_and_plot_are_written(whole_run: tuple[Path, str], records: list[dict[str, Any]]) -> None:
    out, printed = whole_run
    report = (out / "ema_cost.md").read_text(encoding="utf-8")
    assert report in printed
    assert f"{RESNET18_PARAMETERS:,} float32 parameters" in report
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]][: len(records)] == installed()
    assert len(lines) == 2 + len(METHODS)
    assert len({line.count("|") for line in lines}) == 1
    assert "DISAGREES" not in report
    assert "in float64: as it should be" in report
    plot = (out / "ema_cost.png").read_bytes()
    assert plot.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(plot[start : start + 4], "big") for start in (16, 20))
    assert width > 1000
    assert height > 400
    assert len(plot) > 10_000


@pytest.mark.parametrize(
    "change",
    [
        lambda target, online: None,
        lambda target, online: target.load_state_dict(online.state_dict()),
        lambda target, online: [
            f.lerp_(g, 0.11) for f, g in zip(target.parameters(), online.parameters(), strict=True)
        ],
        lambda target, online: target[3].bias.lerp_(online[3].bias, 0.1),
        lambda target, online: [f.fill_(math.nan) for f in target.parameters()],
    ],
    ids=["nothing", "copy", "momentum", "one tensor only", "NaN"],
)
def test_a_method_that_gets_something_else_is_marked(
    change: Callable[[nn.Module, nn.Module], None], task: Task
) -> None:
    ours, wrong = measure_with(task, wrong_method(change))
    assert ours.derived["agrees"] is True
    assert wrong.derived["agrees"] is False
    assert not wrong.derived["largest_difference_to_ours"] <= 1e-3
    report = ema_cost.write_report([ours, wrong], {})
    assert [line.split(" | ")[0] for line in report.splitlines() if "DISAGREES" in line] == ["| wrong"]


def test_ours_is_marked_too_where_it_is_wrong(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    right = EMATarget.update
    monkeypatch.setattr(EMATarget, "update", lambda self, online: (right(self, online), right(self, online)))
    loop = next(method for method in METHODS if method.name == "Python loop")
    ours, other = measure_with(task, loop)
    assert ours.derived["largest_difference_to_ours"] == 0
    assert ours.derived["largest_difference_to_float64"] > 1e-3
    assert ours.derived["agrees"] is False
    assert other.derived["agrees"] is False
    assert "in float64: WRONG" in ema_cost.write_report([ours, other], {})


def test_buffers_that_no_policy_explains_have_no_counterpart(task: Task) -> None:
    def change(target: nn.Module, online: nn.Module) -> None:
        target[1].running_mean.add_(1)  # type: ignore[index, operator, union-attr]

    ours, wrong = measure_with(task, wrong_method(change))
    assert wrong.derived["buffers"] == "something else"
    assert "times_ours_same_buffers" not in wrong.derived
    assert ours.derived["times_ours_same_buffers"] == 1


def test_missing_libraries_are_listed_with_the_reason(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("timm", "timm.utils", "lightly", "lightly.models.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    records, unmeasured = ema_cost.measure(task, METHODS)
    missing = [method for method in METHODS if method.package in ("timm", "lightly")]
    assert len(missing) == 3
    assert list(unmeasured) == [method.name for method in missing]
    assert len(records) == len(METHODS) - 3
    report = ema_cost.write_report(records, unmeasured)
    for method in missing:
        assert f"| {method.name} | — | unmeasured: {method.package} is not installed" in report


def test_a_peer_that_fails_is_listed_and_ours_is_not_hidden(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: nn.Module, online: nn.Module) -> None:
        raise TypeError("no | such\nargument")

    records, unmeasured = ema_cost.measure(task, (OURS, wrong_method(fail)))
    assert unmeasured == {"wrong": "torch cannot do this here: TypeError: no | such\nargument"}
    report = ema_cost.write_report(records, unmeasured)
    assert "| wrong | — | unmeasured: torch cannot do this here: TypeError: no / such argument | — |" in report
    monkeypatch.setattr(EMATarget, "update", fail)
    with pytest.raises(TypeError, match="argument"):
        ema_cost.measure(task, METHODS)


def test_methods_are_timed_in_turns_with_targets_of_their_own(task: Task) -> None:
    calls: list[tuple[str, int]] = []

    def counting(name: str) -> Method:
        def change(target: nn.Module, online: nn.Module) -> None:
            calls.append((name, id(target)))

        return Method(name, "torch", wrong_method(change).build, "")

    measure_with(task, counting("a"), counting("b"))
    names = [name for name, _ in calls]
    updates = 1 + ema_cost.WARM_UP_ROUNDS + REPEATS
    assert [set(names[at : at + 2]) for at in range(0, 2 * updates, 2)] == [{"a", "b"}] * updates
    assert names.count("a") == names.count("b") == updates
    assert len(set(calls)) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read on Linux only")
def test_extra_memory_shows_a_temporary_copy() -> None:
    device = torch.device("cpu")
    memory.extra_memory_cpu(lambda: torch.ones(16))
    extra = ema_cost.measure_extra(lambda _: torch.ones(8 << 20).sum().item(), device)  # 32 MiB
    assert 30e6 < extra["extra_memory_bytes"] < 45e6


def test_memory_that_cannot_be_measured_is_said_so(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "extra_memory_cpu", lambda call: memory.MemoryResult([], "no /proc"))
    records = measure_with(task)
    assert records[0].derived.keys() >= {"agrees", "times_ours"}
    assert "extra_memory_bytes" not in records[0].derived
    assert "| unmeasured | kept |" in ema_cost.write_report(list(records), {})


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_launches_are_counted_and_shown(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def call() -> None:
        for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemcpyAsync", "cudaEventRecord"):
            with torch.profiler.record_function(name):
                torch.ones(2).add_(1)

    launches = ema_cost.count_launches(call, torch.device("cpu"))
    assert launches == 3
    (record,) = measure_with(task)
    assert "launches" not in ema_cost.write_report([record], {})
    record.derived["launches"] = launches
    report = ema_cost.write_report([record], {})
    assert "| extra memory | launches | buffers |" in report
    assert "| 7.00 MB | 3 | kept |" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--momentum", "1"], "--momentum: must be a number above 0 and below 1, got '1'"),
        (["--momentum", "0"], "--momentum: must be a number above 0 and below 1, got '0'"),
        (["--momentum", "nan"], "--momentum: must be a number above 0 and below 1, got 'nan'"),
        (["--momentum", "much"], "--momentum: must be a number above 0 and below 1, got 'much'"),
        (["--repeats", "0"], "--repeats: must be a whole number of at least 1, got '0'"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--out", __file__], "that is a file, not a folder"),
        (["--model", "resnet51"], "--model resnet51: no classification model of torchvision"),
        (["--model", "squeezenet1_1"], "--model squeezenet1_1: it has no linear classifier"),
        (["--modell", "resnet18"], "unrecognized arguments: --modell"),
    ],
)
def test_a_wrong_flag_ends_with_a_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0].startswith("--model"):
        pytest.importorskip("torchvision", reason="the models are torchvision's")
    monkeypatch.setattr(sys, "argv", ["ema_cost.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        ema_cost.parse_arguments()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ema_cost.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        ema_cost.parse_arguments()
    assert ended.value.code == 2
    assert "--device cuda: PyTorch sees no CUDA device here" in capsys.readouterr().err
