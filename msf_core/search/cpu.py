"""What the choice of a search depends on: the CPU's instructions and its maker."""

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


@cache
def multiplies_int8_fast() -> bool:
    """Return whether int8 products are faster than float32 ones: on CPUs with AVX512-BF16 or AMX."""
    return has_avx512_bf16() or has_amx()


@cache
def multiplies_bfloat16_fast() -> bool:
    """Return whether bfloat16 products are faster than float32 ones.

    They are with AMX, and with AVX512-BF16 on AMD CPUs: 3.8 times as fast on an EPYC. On an Intel Xeon with AVX512-BF16
    but without AMX, they took 1.7 times as long (benchmarks/results/knn_cost_cpu.md and knn_cost_xeon.md).
    """
    return has_amx() or (has_avx512_bf16() and not is_intel())


@cache
def is_intel() -> bool:
    """Return whether this is an Intel CPU, where PyTorch's products use MKL at its full speed."""
    maker = platform.processor()  # on Windows, it ends with the maker
    with suppress(OSError):
        maker += Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return "GenuineIntel" in maker


def has_avx512_bf16() -> bool:
    """Return whether PyTorch reports AVX512-BF16."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def has_amx() -> bool:
    """Return whether PyTorch reports AMX."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
