"""Cost of the EMA update: ``EMATarget.update`` and the implementations of other libraries, timed in one run.

    python benchmarks/ema_cost.py            (no arguments: ResNet50 with the paper's projection head, momentum 0.99)

Each method has its own target, a copy of the same initial model, and follows the same online encoder. First, every
method makes one update. Its parameters are compared with those of `EMATarget`, and those of `EMATarget` with
m·f + (1 − m)·g in float64. A method with a different result is marked in the table. Then the updates are timed,
alternating between the methods. OUT/ema_cost.jsonl gets one record per method; OUT/ema_cost.md (also printed) and
OUT/ema_cost.png show all of them.

The methods treat buffers (BatchNorm's statistics) differently. The column "buffers" says what the method was observed
to do: keep the target's own, copy those of the online encoder, or average both. "Times ours" is the ratio of medians to
our default, which keeps them; "same buffers" is the ratio to `EMATarget` with the buffer policy of that method.

Formulas and units:

    bytes at least = 3 · bytes of the parameters (read g, read f, write f, once each); buffers are not counted
    GB/s           = bytes at least / median time, so two passes over f show as a lower rate
    MB, GB         = 1e6, 1e9 bytes

Times are medians with the 20 % and 80 % quantiles. Extra memory is the peak during one update minus
the memory in use before it; see memory.py. Figures below 0.3 MB mean "next to nothing". Launches, on CUDA only, are
the kernels and copies that the host starts for one update, counted by torch.profiler. If launching the kernels of an
update takes longer than running them on the GPU, the measured time is that of the launches.
"""

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from wherever the script is started

from benchmarks.measuring import memory
from benchmarks.measuring.arguments import positive, settle_device_and_folder
from benchmarks.measuring.measure import (
    Record,
    describe_environment,
    in_words,
    quantiles,
    time_interleaved,
    write_jsonl,
)
from benchmarks.measuring.tables import format_bytes, format_seconds, format_spread
from msf_core import EMATarget

CPU_REPEATS, CUDA_REPEATS = 50, 300
WARM_UP_ROUNDS = 3
HIDDEN, DIM = 4096, 512  # the paper's projection head (section 3.1)
# Relative to the largest parameter: about 8 float32 roundings. A missing update or another momentum differs far more.
TOLERANCE = 1e-6
STARTED = time.perf_counter()


class Contender(NamedTuple):
    """A target encoder, and the function that updates it from the online encoder."""

    target: nn.Module
    update: Callable[[nn.Module], object]


@dataclass(frozen=True)
class Method:
    """An implementation of the update; ``build`` creates its target from the initial model and a momentum."""

    name: str
    package: str
    build: Callable[[nn.Module, float], Contender]
    note: str


@dataclass(frozen=True)
class Task:
    """What to measure: the initial encoder, and how."""

    model: str
    encoder: nn.Module
    momentum: float
    repeats: int
    device: torch.device


def main() -> None:
    """Run the benchmark with the arguments of the command line."""
    torch.manual_seed(0)
    args = parse_arguments()
    device = torch.device(args.device)
    task = Task(args.model, args.encoder.to(device), args.momentum, args.repeats, device)
    records, unmeasured = measure(task, METHODS)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, args.out / "ema_cost.jsonl")
    report = write_report(records, unmeasured)
    (args.out / "ema_cost.md").write_text(report, encoding="utf-8")
    print("\n" + report)
    written = "ema_cost.jsonl, ema_cost.md"
    try:
        plot_ema_cost(records, unmeasured, args.out / "ema_cost.png")
        written += ", ema_cost.png"
    except ImportError as error:
        print(f"no plot, which needs matplotlib: {error}")
    say(f"written: {written} in {args.out}")


def say(message: str) -> None:
    """Print a message with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:5.1f} s] {message}", flush=True)


def build_ours(start: nn.Module, momentum: float, buffers: str) -> Contender:
    """Build `EMATarget` with one of its buffer policies."""
    ours = EMATarget(start, momentum, buffers=buffers)
    return Contender(ours.module, ours.update)


def build_loop(start: nn.Module, momentum: float) -> Contender:
    """Build a Python loop that multiplies and adds one parameter after the other."""
    target = copy.deepcopy(start).requires_grad_(False)

    @torch.no_grad()
    def update(online: nn.Module) -> None:
        for f, g in zip(target.parameters(), online.parameters(), strict=True):
            f.mul_(momentum).add_(g, alpha=1 - momentum)

    return Contender(target, update)


def build_torch(start: nn.Module, momentum: float) -> Contender:
    """Build PyTorch's AveragedModel after its first update, which only copies."""
    averaged = AveragedModel(start, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    averaged.update_parameters(start)
    return Contender(averaged.module, averaged.update_parameters)


def build_timm(start: nn.Module, momentum: float, foreach: bool) -> Contender:
    """Build timm's ModelEmaV3, with its default ``foreach=True`` or with ``foreach=False``."""
    from timm.utils import ModelEmaV3

    averaged = ModelEmaV3(start, decay=momentum, foreach=foreach)
    return Contender(averaged.module, averaged.update)


def build_lightly(start: nn.Module, momentum: float) -> Contender:
    """Build a copy of the model that is updated by update_momentum, as in lightly's examples."""
    from lightly.models.utils import update_momentum

    target = copy.deepcopy(start).requires_grad_(False)
    return Contender(target, lambda online: update_momentum(online, target, momentum))


METHODS = (
    Method(
        "EMATarget",
        "msf_core",
        lambda start, momentum: build_ours(start, momentum, "keep"),
        "ours, the default: one _foreach_lerp_",
    ),
    Method(
        "EMATarget, buffers='copy'",
        "msf_core",
        lambda start, momentum: build_ours(start, momentum, "copy"),
        "ours: copies the buffers one by one",
    ),
    Method(
        "EMATarget, buffers='ema'",
        "msf_core",
        lambda start, momentum: build_ours(start, momentum, "ema"),
        "ours: averages the floating buffers with the parameters, copies the counters one by one",
    ),
    Method(
        "Python loop",
        "torch",
        build_loop,
        "f.mul_(m).add_(g, alpha=1 − m) under no_grad, a parameter at a time: two passes over f",
    ),
    Method(
        "torch AveragedModel",
        "torch",
        build_torch,
        "get_ema_multi_avg_fn: one _foreach_lerp_; copies the buffers one by one; its first update, which copies all, "
        "is not timed",
    ),
    Method(
        "timm ModelEmaV3",
        "timm",
        lambda start, momentum: build_timm(start, momentum, foreach=True),
        "the default, foreach=True: one _foreach_lerp_ over the floating tensors of the state_dict, buffers among "
        "them; copies the counters one by one",
    ),
    Method(
        "timm ModelEmaV3, foreach=False",
        "timm",
        lambda start, momentum: build_timm(start, momentum, foreach=False),
        "the same tensors, one lerp_ each",
    ),
    Method(
        "lightly update_momentum",
        "lightly",
        build_lightly,
        "in 1.6 _foreach_mul_, then _foreach_add_: two passes over f",
    ),
)


def build_encoder(name: str) -> nn.Module:
    """Return a model of torchvision with the paper's projection head in place of its classifier's last layer.

    Raises:
        ImportError: if torchvision is not installed.
        ValueError: if it has no classification model of this name, or the model has no linear layer.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError("no classification model of torchvision (such as resnet18, resnet50 or vit_b_16)")
    encoder: nn.Module = models.get_model(name, weights=None)
    linear = [(path, module) for path, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("it has no linear classifier that the projection head could replace")
    path, last = linear[-1]
    head = [nn.Linear(last.in_features, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)]
    encoder.set_submodule(path, nn.Sequential(*head))
    return encoder


@torch.no_grad()
def make_online(start: nn.Module) -> nn.Module:
    """Return a copy of ``start`` in which every parameter and buffer is different."""
    online = copy.deepcopy(start)
    for tensor in (*online.parameters(), *online.buffers()):
        tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)
    return online


def measure(task: Task, methods: tuple[Method, ...]) -> tuple[list[Record], dict[str, str]]:
    """Check and time the methods, and compare them with the first one, which is `EMATarget` with its defaults.

    Returns:
        One record per method, and the methods that could not be measured, with the reasons.
    """
    say(f"{describe_environment(task.device)['device']}: {task.model}, a target for each method and one update of it")
    online = make_online(task.encoder)
    contenders, unmeasured = start_contenders(task, methods, online)
    say("comparing the results of the updates")
    ours = contenders[methods[0].name]
    found = {name: check(contender, ours, task, online) for name, contender in contenders.items()}
    calls = {name: _timed(contender, online) for name, contender in contenders.items()}
    say(f"timing {len(calls)} methods x {task.repeats}, in turns")
    time_interleaved(calls, dict.fromkeys(calls, WARM_UP_ROUNDS), task.device)
    seconds = time_interleaved(calls, dict.fromkeys(calls, task.repeats), task.device)
    say("extra memory")
    records = []
    for method in methods:
        if method.name in contenders:
            extra = measure_extra(calls[method.name], task.device)
            records.append(make_record(task, method, seconds[method.name], found[method.name] | extra))
    compare_with_ours(records)
    return records, unmeasured


def _timed(contender: Contender, online: nn.Module) -> Callable[[int], object]:
    return lambda _: contender.update(online)


def start_contenders(
    task: Task, methods: tuple[Method, ...], online: nn.Module
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Build every method and make one update; if a method of another library fails, return the reason."""
    contenders: dict[str, Contender] = {}
    unmeasured: dict[str, str] = {}
    for method in methods:
        try:
            contender = method.build(task.encoder, task.momentum)
            contender.update(online)
            contenders[method.name] = contender
        except ImportError as error:
            unmeasured[method.name] = f"{method.package} is not installed, or lacks this: {error}"
        except Exception as error:
            if method.package == "msf_core":
                raise
            unmeasured[method.name] = f"{method.package} cannot do this here: {type(error).__name__}: {error}"
    for name, reason in unmeasured.items():
        say(f"{name} is left out: {reason}")
    return contenders, unmeasured


def check(contender: Contender, ours: Contender, task: Task, online: nn.Module) -> dict[str, Any]:
    """Compare a target after one update with ours, and ours with float64; find out what happened to its buffers."""
    expected = dict(ours.target.named_parameters())
    tolerance = TOLERANCE * max(float(f.abs().max()) for f in expected.values())
    differences = {"largest_difference_to_ours": largest_difference(contender.target, expected)}
    if contender is ours:
        moving = dict(online.named_parameters())
        formula = {name: average(f, moving[name], task.momentum) for name, f in task.encoder.named_parameters()}
        differences["largest_difference_to_float64"] = largest_difference(contender.target, formula)
    return {
        **differences,
        "tolerance": tolerance,
        "agrees": all(difference <= tolerance for difference in differences.values()),
        "buffers": what_became_of_buffers(contender.target, task, online),
    }


def average(f: Tensor, g: Tensor, momentum: float) -> Tensor:
    """Return m·f + (1 − m)·g in float64."""
    return momentum * f.detach().double() + (1 - momentum) * g.detach().double()


def largest_difference(target: nn.Module, expected: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference between parameters; NaN if a parameter is NaN."""
    apart = [(f.detach() - expected[name].detach()).abs().max() for name, f in target.named_parameters()]
    return float(torch.stack(apart).max())


def what_became_of_buffers(target: nn.Module, task: Task, online: nn.Module) -> str:
    """Return whether one update kept, copied or averaged the floating-point buffers."""
    moving, now = dict(online.named_buffers()), dict(target.named_buffers())
    triples = [(now[name], f, moving[name]) for name, f in task.encoder.named_buffers() if f.is_floating_point()]
    if all(torch.equal(b, f) for b, f, _ in triples):
        return "kept"
    if all(torch.equal(b, g) for b, _, g in triples):
        return "copied"
    if all(torch.allclose(b.double(), average(f, g, task.momentum), atol=TOLERANCE) for b, f, g in triples):
        return "averaged"
    return "something else"


def measure_extra(call: Callable[[int], object], device: torch.device) -> dict[str, Any]:
    """Measure the extra memory of one update, and on CUDA the launches; leave out values that cannot be measured."""
    if device.type != "cuda":
        result = memory.extra_memory_cpu(lambda: call(0))
        return {"extra_memory_bytes": result.bytes[0]} if result.bytes else {}
    extra: dict[str, Any] = {"extra_memory_bytes": memory.extra_memory_cuda(lambda: call(0), device).bytes[0]}
    launches = count_launches(lambda: call(0), device)
    return extra | ({"launches": launches} if launches else {})


def count_launches(call: Callable[[], object], device: torch.device) -> int:
    """Return how many kernels and copies the host starts on a CUDA device during the call, as the profiler sees it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    names = [event.name for event in profile.events() or []]
    return sum("LaunchKernel" in name or name.startswith(("cudaMemcpy", "cudaMemset")) for name in names)


def make_record(task: Task, method: Method, seconds: list[float], derived: dict[str, Any]) -> Record:
    """Create the record of one method."""
    tensors = list(task.encoder.parameters())
    summary = quantiles(seconds)
    bytes_at_least = 3 * sum(f.numel() * f.element_size() for f in tensors)
    parameters = {
        "method": method.name,
        "package": method.package,
        "version": importlib.import_module(method.package).__version__,
        "model": task.model,
        "head": [HIDDEN, DIM],
        "parameters": sum(f.numel() for f in tensors),
        "tensors": len(tensors),
        "buffers": len(list(task.encoder.buffers())),
        "momentum": task.momentum,
    }
    derived = derived | {"bytes_at_least": bytes_at_least, "gb_a_second": 1e-9 * bytes_at_least / summary.median}
    environment = describe_environment(task.device)
    return Record("ema_update", parameters, *summary, "s", len(seconds), environment, derived=derived, note=method.note)


def compare_with_ours(records: list[Record]) -> None:
    """Add to each record the ratio of its median to our default's, and to ours with the same buffer policy."""
    ours = {r.derived["buffers"]: r.median for r in records if r.parameters["package"] == "msf_core"}
    for record in records:
        record.derived["times_ours"] = record.median / records[0].median
        if record.derived["buffers"] in ours:
            record.derived["times_ours_same_buffers"] = record.median / ours[record.derived["buffers"]]


def write_report(records: list[Record], unmeasured: dict[str, str]) -> str:
    """Return the whole report in Markdown."""
    first = records[0]
    p = first.parameters
    verdict = "as it should be" if first.derived["agrees"] else "WRONG, more than rounding explains"
    parts = [
        "# Cost of the EMA update",
        in_words(first.environment),
        f"{p['model']} of torchvision with the paper's projection head (linear {p['head'][0]}, BatchNorm, ReLU, linear "
        f"{p['head'][1]}) in place of its classifier's last layer: {p['parameters']:,} float32 parameters in "
        f"{p['tensors']} tensors ({format_bytes(first.derived['bytes_at_least'] / 3)}), {p['buffers']} buffers. "
        f"Momentum {p['momentum']}. {first.repeats} updates per method, alternating; ratios of medians.",
        _table(records, unmeasured),
        "Buffers: what one update did with BatchNorm's statistics. A method that copies or averages them does more "
        "than our default, which keeps the target's own; 'same buffers' compares it with `EMATarget` doing the same. "
        "`EMATarget` pairs tensors by name and checks shapes, devices and shared memory before changing anything; the "
        "others pair tensors by order.",
        "Bytes at least: read g, read f, write f, once each. Extra memory below 0.3 MB means next to nothing.",
        f"After one update from the same start, `EMATarget` is within "
        f"{first.derived['largest_difference_to_float64']:.0e} of m·f + (1 − m)·g in float64: {verdict} "
        f"(tolerance {first.derived['tolerance']:.0e}).",
    ]
    return "\n\n".join(parts) + "\n"


def _table(records: list[Record], unmeasured: dict[str, str]) -> str:
    cuda = any("launches" in record.derived for record in records)
    header = [
        "method",
        "version",
        "time an update (20–80 %)",
        "times ours",
        "same buffers",
        "bytes at least",
        "GB/s",
        "extra memory",
        *(["launches"] if cuda else []),
        "buffers",
        "largest difference to ours",
        "note",
    ]
    lines = [header, ["---"] * len(header), *(_row(record, cuda) for record in records)]
    for name, reason in unmeasured.items():
        lines.append([name, "—", f"unmeasured: {_cell(reason)}", *["—"] * (len(header) - 3)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(record: Record, cuda: bool) -> list[str]:
    p, derived = record.parameters, record.derived
    same = derived.get("times_ours_same_buffers")
    extra = derived.get("extra_memory_bytes")
    difference = f"{derived['largest_difference_to_ours']:.0e}"
    return [
        p["method"],
        f"{p['package']} {p['version']}",
        format_spread(record),
        f"{derived['times_ours']:.2f}",
        "—" if same is None else f"{same:.2f}",
        format_bytes(derived["bytes_at_least"]),
        f"{derived['gb_a_second']:.1f}",
        "unmeasured" if extra is None else format_bytes(extra),
        *([str(derived.get("launches", "unmeasured"))] if cuda else []),
        derived["buffers"],
        difference if derived["agrees"] else f"{difference}: DISAGREES",
        record.note,
    ]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def plot_ema_cost(records: list[Record], unmeasured: dict[str, str], path: Path) -> None:
    """Plot one horizontal bar per method, the fastest on top and ours in blue, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(records, key=lambda record: record.median)
    p, environment = records[0].parameters, records[0].environment
    unit, size = ("ms", 1e-3) if ordered[-1].median >= 1e-3 else ("µs", 1e-6)
    figure, axes = plt.subplots(figsize=(11, 1.8 + 0.55 * len(ordered)))
    for place, record in enumerate(ordered):
        ours = record.parameters["package"] == "msf_core"
        axes.barh(place, record.median / size, color="#4477aa" if ours else "#bbbbbb")
        axes.hlines(place, record.q20 / size, record.q80 / size, color="black", linewidth=1.5)
        wrong = "" if record.derived["agrees"] else ", different result"
        text = f"{format_seconds(record.median)}{wrong}"
        right = max(record.median, record.q80) / size
        axes.annotate(text, (right, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=10)
    labels = [f"{record.parameters['method']}\nbuffers {record.derived['buffers']}" for record in ordered]
    axes.set_yticks(range(len(ordered)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(record.q80 for record in records) / size)
    axes.set_xlabel(f"{unit} per update, median; line: 20–80 %; blue: msf_core")
    axes.spines[["top", "right"]].set_visible(False)
    title = f"EMA update of {p['model']} with projection head, {p['parameters'] / 1e6:.1f} M parameters"
    where = f"{environment['device']}, {environment['threads']} threads, {environment['date'][:10]}"
    axes.set_title(f"{title}\n{where}", fontsize=12)
    if unmeasured:
        figure.text(0.01, 0.01, f"Not measured in this run: {', '.join(unmeasured)}.", fontsize=9)
    figure.tight_layout(rect=(0, 0.04 if unmeasured else 0, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; if it is wrong, exit with code 2 and a message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--model", default="resnet50", help="a classification model of torchvision (default: resnet50)")
    parser.add_argument("--repeats", type=positive, help=f"updates (default: {CPU_REPEATS}; CUDA {CUDA_REPEATS})")
    parser.add_argument("--momentum", type=_momentum, default=0.99, help="above 0 and below 1 (default: 0.99)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    args = parser.parse_args()
    settle_device_and_folder(parser, args)
    args.repeats = args.repeats or (CUDA_REPEATS if args.device == "cuda" else CPU_REPEATS)
    try:
        args.encoder = build_encoder(args.model)
    except ValueError as error:
        parser.error(f"--model {args.model}: {error}")
    except ImportError as error:
        parser.exit(1, f"the models need torchvision; pip install -e '.[bench]': {error}\n")
    return args


def _momentum(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value < 1:  # with 0 or 1, nothing is averaged
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below 1, got {text!r}")
    return value


if __name__ == "__main__":
    main()
