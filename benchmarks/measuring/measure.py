"""Code that all measurements share: timing, quantiles, records, and a description of the machine.

On a CPU, times are wall-clock seconds. On a GPU, they are seconds between CUDA events: either as called, which includes
the time that the GPU waits for the host, or without this overhead (`time_hidden`, which has not run on a GPU yet).
Units: s, bytes, GFLOP = 1e9 operations; a multiply-add counts as two operations.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import msf_core
from pipeline.running.environment import environment

# Sizes [M, K, N] of the products that are tried to find the fastest rate of the machine.
CPU_PRODUCTS = ((256, 512, 1024), (256, 512, 8192), (2048, 2048, 2048))
CUDA_PRODUCTS = ((256, 512, 131072), (4096, 4096, 4096), (8192, 8192, 8192))
PRODUCT_SECONDS, PRODUCT_MOST_REPEATS = 0.15, 300
MEMORY_REPEATS = 20
WAIT_CYCLES = (20_000_000, 80_000_000, 320_000_000)  # cycles of the GPU's clock: about 10, 40 and 160 ms


class Summary(NamedTuple):
    """Median, 20 % quantile and 80 % quantile of some numbers."""

    median: float
    q20: float
    q80: float


@dataclass(frozen=True)
class Record:
    """One measurement: a line of the JSON lines file.

    ``derived`` contains values computed from the measured figure, such as operations per second, and other figures of
    the same case; ``environment`` says on which machine, with which versions and when it was measured.
    """

    name: str
    parameters: dict[str, Any]
    median: float
    q20: float
    q80: float
    unit: str
    repeats: int
    environment: dict[str, Any]
    recall: float | None = None
    derived: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def quantiles(values: list[float]) -> Summary:
    """Return the median, the 20 % and the 80 % quantile, interpolated linearly; ``values`` must not be empty.

    >>> quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    Summary(median=3.5, q20=2.0, q80=5.0)
    """
    if not values:
        raise ValueError("values must contain at least one number, got none")
    return Summary(*(float(q) for q in np.quantile(values, (0.5, 0.2, 0.8))))


def time_once(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes; on CUDA, the time between two events around it."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000


def time_hidden(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a CUDA device works on one call, with the host's part of the call hidden.

    The device first gets a kernel that only waits; the call queues its kernels behind it. If the wait ends before the
    host has queued all of them, the call is repeated with a longer wait. The result is NaN if the host never finishes
    first, because the call itself waits for the device (as FAISS may) or launches more kernels than fit into the queue.
    This needs no graph capture, so it works for any library that uses PyTorch's current stream.
    """
    for cycles in WAIT_CYCLES:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(cycles)
        begin.record()
        call()
        hidden = not begin.query()
        end.record()
        torch.cuda.synchronize(device)
        if hidden:
            milliseconds: float = begin.elapsed_time(end)
            return milliseconds / 1000
    return math.nan


def hidden_summary(
    calls: Mapping[str, Callable[[int], object]], rounds: Mapping[str, int], device: torch.device
) -> dict[str, Summary]:
    """Time the calls alternately with `time_hidden`; leave out those that it cannot time (on a CPU, all of them)."""
    if device.type != "cuda":
        return {}
    times = time_interleaved(calls, rounds, device, time_hidden)
    return {name: quantiles(seconds) for name, seconds in times.items() if not math.isnan(sum(seconds))}


def time_interleaved(
    calls: Mapping[str, Callable[[int], object]],
    rounds: Mapping[str, int],
    device: torch.device,
    timer: Callable[[Callable[[], object], torch.device], float] = time_once,
) -> dict[str, list[float]]:
    """Time the calls alternately, so that a slowdown of the machine affects all of them.

    Each round has its own random order from a seed, so that no call always runs after the same other call, with the
    caches as that one left them.

    Args:
        calls: name -> call to time; it gets the number of the round.
        rounds: name -> number of rounds that the call takes part in, from the first on.
        device: device on which the calls run.
        timer: function that returns the seconds of one call.

    Returns:
        name -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(max(rounds.values())):
        for name in np.random.default_rng(number).permutation(list(calls)).tolist():
            if number < rounds[name]:
                seconds[name].append(timer(partial(calls[name], number), device))
    return seconds


def matmul_rates(device: torch.device) -> dict[str, tuple[list[float], str]]:
    """Measure how fast this machine multiplies matrices, which bounds the speed of a search.

    On a CPU, this tries float32 and bfloat16 products with torch.mm, and float32 products with NumPy. On CUDA, it tries
    float32 (with TF32), float16 and bfloat16 products with torch.mm.

    Returns:
        dtype -> GFLOP/s of each run of the product with the fastest single run, and a description of that product.
    """
    dtypes = ("float32", "bfloat16") if device.type == "cpu" else ("float32", "float16", "bfloat16")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    try:
        return {dtype: _matmul_rate(device, getattr(torch, dtype)) for dtype in dtypes}
    finally:
        torch.set_float32_matmul_precision(before)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> tuple[list[float], str]:
    cpu = device.type == "cpu"
    best: tuple[list[float], str] = ([0.0], "")
    for m, n, p in CPU_PRODUCTS if cpu else CUDA_PRODUCTS:
        a = torch.randn(m, n, device=device).to(dtype)
        b = torch.randn(p, n, device=device).to(dtype)
        products: dict[str, Callable[[], object]] = {"torch.mm": partial(torch.mm, a, b.T)}
        if cpu and dtype == torch.float32:
            products["numpy.matmul"] = partial(np.matmul, a.numpy(), b.numpy().T)
        for name, product in products.items():
            repeats = 5 + min(PRODUCT_MOST_REPEATS, int(PRODUCT_SECONDS / min(_time_three(product, device))))
            rates = [2e-9 * m * n * p / time_once(product, device) for _ in range(repeats)]
            if max(rates) > max(best[0]):
                dtype_name = str(dtype).removeprefix("torch.")
                best = rates, f"{name}, [{m}, {n}] x [{n}, {p}] {dtype_name}"
    return best


def memory_rate(device: torch.device) -> tuple[list[float], str]:
    """Measure how fast this machine reads memory: GB/s of each sum over an array far larger than its caches."""
    count = (1 << 28 if device.type == "cuda" else 1 << 26) * 2  # 2 GiB on CUDA, 512 MiB on a CPU
    values = torch.ones(count, device=device)
    for _ in range(2):
        values.sum()
    rates = [1e-9 * values.nbytes / time_once(values.sum, device) for _ in range(MEMORY_REPEATS)]
    return rates, f"torch.sum over {values.nbytes / 1e9:.1f} GB of float32"


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return `environment` with the versions of further libraries, for the records."""
    found = environment(device)
    found["versions"] |= {"numpy": np.__version__, "faiss": _faiss_version(), "triton": _triton_version()}
    return found


def in_words(found_with: Mapping[str, Any]) -> str:
    """Return the result of `describe_environment` as one line, for the top of a report.

    >>> found = {"device": "a CPU", "instructions": "AVX2", "threads": 2, "date": "2026-11-24"}
    >>> in_words(found | {"versions": {"torch": "2.15.0", "faiss": None}})
    'a CPU, AVX2, 2 threads; 2026-11-24; torch 2.15.0, faiss absent.'
    """
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in found_with["versions"].items())
    return f"{machine_of(found_with)}; {found_with['date']}; {versions}."


def machine_of(found_with: Mapping[str, Any]) -> str:
    """Return device, instruction sets (older records have none) and threads as text."""
    threads = f"{found_with['threads']} thread{'s' * (found_with['threads'] > 1)}"
    return ", ".join(filter(None, [found_with["device"], found_with.get("instructions"), threads]))


def write_jsonl(records: list[Record], path: Path) -> None:
    """Write one record per line."""
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")


def _time_three(call: Callable[[], object], device: torch.device) -> list[float]:
    return [time_once(call, device) for _ in range(3)]


def _faiss_version() -> str | None:
    if msf_core.available_backends("cpu")["faiss"] is not None:
        return None
    import faiss

    return str(faiss.__version__)


def _triton_version() -> str | None:
    return version("triton") if find_spec("triton") is not None else None
