"""The kernels of the Triton backend compiled for GPUs that need not be here: what they use, and no spills.

Only a GPU can tell how fast they run. Everything is compiled once, in a separate process, because Triton may run its
interpreter in this one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton is not installed, or without its NVIDIA backend")
triton_plan = pytest.importorskip("msf_core.search.triton_plan")
triton_backend = pytest.importorskip("msf_core.search.triton_backend")
VERSION = triton_backend._version()
pytestmark = pytest.mark.skipif(
    VERSION < triton_backend.OLDEST_TRITON, reason="Triton 3.3 is the oldest that compiles the kernels"
)

# What Triton 3.8 makes. Older ones spill a few bytes and use more registers, and 3.3 cannot compile for sm_120.
NEWEST = VERSION >= (3, 8)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes of shared memory that a program may use
if VERSION < (3, 4):
    del SHARED[120]
DTYPES = ("float32", "bfloat16", "int8")
# capability, dtype, D, k, what limits the queries; the precise pass is compiled with the float32 and int8 ones
CASES = [(capability, dtype, 512, 5, "") for capability in SHARED for dtype in DTYPES]
CASES += [(90, "bfloat16", 520, 256, "own"), (90, "int8", 520, 50, "labels own"), (80, "float32", 520, 50, "ids own")]

COMPILE = """
import json, os, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from msf_core.search import triton_backend as backend, triton_kernels as kernels, triton_plan

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "int8": "*i8"}
BESIDE = dict.fromkeys(("q_labels", "labels", "q_ids", "ids", "own", "index"), "*i64") | {"unsettled": "*i32"}
BESIDE |= dict.fromkeys(("q_scale", "scale", "errors", "maxima", "similarity"), "*fp32")
BESIDE |= dict.fromkeys(("count", "n", "groups", "most"), "i32")

def compiled(kernel, types, constants, capability, **options):
    types = BESIDE | types
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = ""
    if os.path.exists(CUOBJDUMP):
        with open("kernel.cubin", "wb") as file:
            file.write(result.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", "kernel.cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"shared": result.metadata.shared, "ptx": result.asm["ptx"], "usage": usage}

for capability, dtype, dim, k, limits, shared in json.loads(sys.argv[1]):
    int8 = dtype == "int8"
    plan = triton_plan.plan_for(256, 1_024_000, dim, k, getattr(torch, dtype), 2 * ("own" in limits), shared, 100)
    rows, exact_queries = TYPES[dtype], "*fp32" if int8 else TYPES[dtype]
    flags = {"DIM": dim, "GROUP": plan.group, "INT8": int8, "BY_LABEL": "labels" in limits, "BY_ID": "ids" in limits}
    kernel_of = {}
    for precise in (False, True) if plan.precise else (False,):
        tiles = plan.precise if precise else plan.tiles
        kernel_of["precise maxima" if precise else "maxima"] = compiled(
            kernels.group_maxima,
            {"queries": exact_queries if precise else rows, "rows": rows},
            flags | {"BLOCK_Q": tiles.queries, "BLOCK_N": tiles.rows, "BLOCK_D": tiles.dims, "WIDEN": False,
                     "PRECISE": precise},
            capability, num_warps=tiles.warps, num_stages=tiles.stages,
        )
    kernel_of["select"] = compiled(
        kernels.select,
        {"queries": exact_queries, "rows": rows},
        flags | {"K": k, "K_LANES": triton.next_power_of_2(k), "BATCH": plan.batch, "BLOCK_D": plan.batch_dims,
                 "LANES": backend.LANES, "MEMBERS": backend.MEMBERS, "ERROR": backend.TF32_ERROR,
                 "EXACT": dtype == "bfloat16", "OWN": 2 * ("own" in limits), "PRECISE": False},
        capability, num_warps=triton_plan.SELECT_WARPS,
    )
    print(json.dumps(kernel_of))
"""


Kernels = dict[tuple[Any, ...], dict[str, dict[str, Any]]]


def test_the_kernels_compile_for_gpus_that_are_not_here_into_what_the_search_rests_on(tmp_path: Path) -> None:
    """All of it in one test, since compiling takes nearly all of its time."""
    kernels = compiled(tmp_path)
    check_that_shared_memory_is_within_what_the_gpu_has(kernels)
    check_that_the_first_pass_multiplies_on_tensor_cores(kernels)
    check_that_rows_come_in_pieces_of_16_bytes_without_passing_the_registers(kernels)
    check_that_the_maximum_of_a_group_drops_nan(kernels)
    check_that_nothing_spills_and_two_programs_of_select_fit_a_multiprocessor(kernels)


def compiled(folder: Path) -> Kernels:
    """Return shared memory, PTX and cuobjdump's output by case, of "maxima", "select" and, if any, "precise maxima"."""
    (folder / "compile_all.py").write_text(COMPILE)  # Triton reads the source of a kernel, so it has to be a file
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(triton_plan.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    cases = json.dumps([(*case, SHARED[case[0]]) for case in CASES])
    done = subprocess.run(
        [sys.executable, "compile_all.py", cases],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


def usage_of(kernel: dict[str, Any]) -> dict[str, int]:
    """Return the registers (REG) and bytes of the stack that a thread has; skip where Triton came without cuobjdump."""
    if not kernel["usage"]:
        pytest.skip("Triton came without cuobjdump, which reports registers and spills")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", kernel["usage"])}


def check_that_nothing_spills_and_two_programs_of_select_fit_a_multiprocessor(kernels: Kernels) -> None:
    for case, of_case in kernels.items():
        for name, kernel in of_case.items():
            usage = usage_of(kernel)
            assert usage["STACK"] + usage["LOCAL"] <= (0 if NEWEST else 128), (case, name, usage)
        registers = usage_of(of_case["select"])["REG"]
        assert not NEWEST or 2 * registers * 32 * triton_plan.SELECT_WARPS <= 65536, (case, registers)


def check_that_shared_memory_is_within_what_the_gpu_has(kernels: Kernels) -> None:
    for case, of_case in kernels.items():
        for name, kernel in of_case.items():
            assert 0 < kernel["shared"] <= SHARED[case[0]], (case, name, kernel["shared"])


def check_that_the_first_pass_multiplies_on_tensor_cores(kernels: Kernels) -> None:
    product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    kind = {
        "mma.sync": {"float32": ".tf32.tf32", "bfloat16": ".bf16.bf16", "int8": ".s8.s8"},
        "wgmma.mma_async": {"float32": ".tf32.tf32", "bfloat16": ".bf16.bf16", "int8": ".s8.s8"},
        "tcgen05.mma": {"float32": "kind::tf32", "bfloat16": "kind::f16", "int8": "kind::i8"},
    }
    for case, of_case in kernels.items():
        instruction = product[case[0]]
        lines = [line for line in of_case["maxima"]["ptx"].splitlines() if instruction in line]
        if NEWEST or case[:2] != (100, "int8"):
            assert any(kind[instruction][case[1]] in line for line in lines), case
        if "precise maxima" in of_case:
            ptx = of_case["precise maxima"]["ptx"]
            assert any(instruction in line and "tf32" in line for line in ptx.splitlines()), case


def check_that_rows_come_in_pieces_of_16_bytes_without_passing_the_registers(kernels: Kernels) -> None:
    for case, of_case in kernels.items():
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+)", of_case["maxima"]["ptx"])
        wanted = 8 if case[1] == "int8" and case[2] == 520 else 16  # every second row of 520 bytes is aligned to only 8
        assert copies, case
        assert {int(size, 16) for size in copies} == {wanted}, case
        words = "v4" if wanted == 16 else "v2"
        assert re.search(rf"ld\.global\S*\.{words}\.b32", of_case["select"]["ptx"]), case


def check_that_the_maximum_of_a_group_drops_nan(kernels: Kernels) -> None:
    """A row of NaN must not hide the others of its group, and a group of nothing else must have a maximum of NaN."""
    for case, of_case in kernels.items():
        for name in of_case.keys() & {"maxima", "precise maxima"}:
            maxima = re.findall(r"\bmax\.\S*f32", of_case[name]["ptx"])
            assert maxima, (case, name)
            assert set(maxima) == {"max.f32"}, (case, name)
