"""Extra memory: the peak during a call minus the memory in use before it.

CPU (Linux): the growth of the process's resident memory up to its peak (VmHWM in /proc/self/status). Before the call,
writing "5" to /proc/self/clear_refs resets the peak to the current value. Each case runs in its own process. There,
glibc returns every block of 64 KiB or more to the system as soon as it is freed (mallopt M_MMAP_THRESHOLD), so the call
cannot reuse freed memory unnoticed. A call on at most 8,192 rows comes first, so that the buffers that BLAS and the
thread pools keep are part of the baseline of every method. The kernel counts pages per processor and in batches, so
figures are accurate to about 0.3 MB; figures below that mean "next to nothing".

CUDA: torch.cuda.max_memory_allocated minus the memory allocated before the call. FAISS allocates outside of PyTorch, so
its permanent scratch memory is added: the growth of the device memory used outside of PyTorch's pool (mem_get_info)
since before the first call. This misses short-lived allocations of FAISS, and includes code loaded by the first call.

On other systems, the result says that memory is unmeasured.
"""

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.measuring.cases import Problem, authors_step, fill_bank, make_batches, our_step

M_MMAP_THRESHOLD = -3  # malloc.h
MMAP_THRESHOLD_BYTES = 64 << 10
WARM_UP_ROWS = 8192
STEP_CALLS = 5  # on a CPU, the extra memory of our step is small and varies by some MB from call to call


@dataclass(frozen=True)
class MemoryCase:
    """What to measure: a "search" or a "step" with a backend, or the "authors" formulation of the step."""

    what: str
    method: str
    problem: Problem


@dataclass(frozen=True)
class MemoryResult:
    """Extra bytes at the peak of each measured call; if they could not be measured, an empty list and the reason."""

    bytes: list[int]
    reason: str = ""


def measure_cases(cases: list[MemoryCase]) -> dict[MemoryCase, MemoryResult]:
    """Measure every case, each in a fresh process."""
    return {case: _in_fresh_process(case) for case in dict.fromkeys(cases)}


def extra_memory_cpu(call: Callable[[], object]) -> MemoryResult:
    """Return how many bytes one call adds to this process's resident memory at the peak."""
    if not sys.platform.startswith("linux"):
        return MemoryResult([], f"resident memory is read on Linux only, not on {sys.platform}")
    gc.collect()
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident_peak()
        call()
        return MemoryResult([max(0, _resident_peak() - before)])
    except (OSError, KeyError) as error:
        return MemoryResult([], f"this system does not report the peak of resident memory: {error!r}")


def extra_memory_cuda(call: Callable[[], object], device: torch.device) -> MemoryResult:
    """Return how many bytes one call adds to PyTorch's allocations on the device at the peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return MemoryResult([torch.cuda.max_memory_allocated(device) - before])


def _in_fresh_process(case: MemoryCase) -> MemoryResult:
    """Run one case in a fresh process, which is forked, if possible, from a server that has only imported modules."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch", "torch.utils.flop_counter"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, sender))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        result: MemoryResult = receiver.recv()
        return result
    except EOFError:
        process.join()
        return MemoryResult([], f"its process ended with exit code {process.exitcode}")
    finally:
        process.join()


def _child(case: MemoryCase, sender: Connection) -> None:
    try:
        sender.send(measure_here(case))
    except Exception as error:
        sender.send(MemoryResult([], f"{type(error).__name__}: {error}"))


def measure_here(case: MemoryCase) -> MemoryResult:
    """Measure a case in this process, which should be fresh."""
    _return_freed_blocks()
    device = torch.device(case.problem.device)
    small = replace(case.problem, rows=min(case.problem.rows, max(WARM_UP_ROWS, case.problem.k)))
    if device.type != "cuda":
        prepare(MemoryCase(case.what, case.method, small))()
        call = prepare(case)
        results = [extra_memory_cpu(call) for _ in range(STEP_CALLS if case.what == "step" else 1)]
        return MemoryResult([count for result in results for count in result.bytes], results[0].reason)
    torch.randn(8, 8, device=device).mm(torch.randn(8, 8, device=device))
    outside = _outside_of_torch(device)
    prepare(MemoryCase(case.what, case.method, small))()
    result = extra_memory_cuda(prepare(case), device)
    if "faiss" not in case.method:
        return result
    scratch = max(0, _outside_of_torch(device) - outside)
    return MemoryResult([count + scratch for count in result.bytes])


def prepare(case: MemoryCase) -> Callable[[], object]:
    """Build the bank and the batch of a case, and return the call to measure."""
    backend = "auto" if case.what == "authors" else case.method
    bank = fill_bank(case.problem, backend)
    ((v, u),) = make_batches(case.problem, 1)
    if case.what == "search":
        return lambda: bank.search(u, case.problem.k)
    step = our_step(bank, case.problem.k) if case.what == "step" else authors_step(bank, case.problem.k)
    return lambda: step(v, u)


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(fields["VmHWM"].split()[0])


def _return_freed_blocks() -> None:
    _call_libc("mallopt", M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def _trim() -> None:
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *args: int) -> None:
    """Call a function of glibc; do nothing if the C library does not have it."""
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*args)


def _outside_of_torch(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
