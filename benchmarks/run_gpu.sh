#!/usr/bin/env bash
# The GPU tests, then the benchmarks that measure a GPU. Their records and pictures go to benchmarks/results (or the folder
# that is the first argument), with a log beside them. benchmarks/methods.py, which takes hours, is not among them.
#
#     bash benchmarks/run_gpu.sh [FOLDER]
#
# PYTHON names the interpreter (default: python3), which has msf_core's extras test and bench. If a part fails, the others
# still run, and the end of the output names it.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower().replace("/", "_"))') || {
    echo "PyTorch sees no CUDA device here" >&2
    exit 1
}
out=${1:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
failed=()

part() {
    local title=$1
    shift
    echo "== $title: $*"
    "$@" || failed+=("$title")
}

# Keep what a benchmark wrote into a folder of $work, under names that begin with the third word, not the second.
keep() {
    for file in "$work/$1"/*; do
        [ -e "$file" ] && cp "$file" "$out/$(basename "$file" | sed "s/^$2/$3/")"
    done
}

{
    part "GPU tests" "$python" -m pytest tests/gpu -q -p no:cacheprovider
    for dtype in bfloat16 float32; do
        part "knn_cost $dtype" "$python" benchmarks/knn_cost.py --device cuda --dtype "$dtype" --out "$work/$dtype"
        keep "$dtype" knn_cost "knn_cost_${name}_$dtype"
    done
    part "ema_cost" "$python" benchmarks/ema_cost.py --device cuda --out "$work/ema"
    keep "ema" ema_cost "ema_cost_${name}"
    part "bank_options" "$python" benchmarks/bank_options.py --device cuda --repeats 30 --out "$work/options"
    keep "options" bank_options "bank_options_${name}"
    part "step_overhead" "$python" benchmarks/step_overhead.py --device cuda --out "$work/overhead"
    keep "overhead" step_overhead "step_overhead_${name}"
    part "lightly_bank" "$python" benchmarks/lightly_bank.py --device cuda --out "$work/lightly"
    keep "lightly" lightly_bank "lightly_bank_${name}"
    part "trial_cost" "$python" benchmarks/trial_cost.py --out "$work/trial"
    keep "trial" trial_cost "trial_cost_${name}"
    part "image_views" "$python" benchmarks/image_views.py --device cuda --out "$work/views"
    keep "views" image_views "image_views_${name}"
    part "tiles" "$python" benchmarks/tune_triton.py --out "$out/tune_triton_$name.jsonl"
    if [ ${#failed[@]} -gt 0 ]; then
        echo "failed: ${failed[*]}"
    else
        echo "all parts passed"
    fi
    [ ${#failed[@]} -eq 0 ]
} 2>&1 | tee "$out/run_gpu_$name.log"
