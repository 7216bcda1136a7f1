"""The device, versions and date that results were obtained with."""

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import msf_core
from msf_core.search.cpu import has_amx, has_avx512_bf16


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device, the CPU's instruction sets, the number of threads, the versions and the date."""
    on_cpu = f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "threads": torch.get_num_threads(),
        "instructions": instruction_sets(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "msf_core": msf_core.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def in_words(found_with: dict[str, Any]) -> str:
    """Return the result of `environment` as text, for the title of a picture.

    >>> in_words({"device": "CPU, 2 cores", "versions": {"torch": "2.15.0+cu132"}, "date": "2026-11-25T02:30:00+00:00"})
    'CPU, 2 cores; PyTorch 2.15.0; 2026-11-25'
    """
    version = found_with["versions"]["torch"].partition("+")[0]
    return f"{found_with['device']}; PyTorch {version}; {found_with['date'][:10]}"


def cpu_name() -> str:
    """Return the CPU's model name if the system reports it, else the name of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def instruction_sets() -> str:
    """Return the CPU's instruction sets that PyTorch uses, such as "AVX2" or "AVX512, AVX512-BF16, AMX"."""
    further = {"AVX512-BF16": has_avx512_bf16(), "AMX": has_amx()}
    found = [name for name, there in further.items() if there]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *found])
