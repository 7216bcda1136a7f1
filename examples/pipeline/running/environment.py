"""The device, versions and date that results were obtained with."""

import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

import msf_core


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device, the versions and the date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
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
