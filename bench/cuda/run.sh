#!/usr/bin/env bash
# What only a GPU can show, in one command and within ten minutes: the tests and the known bits on the device,
# compute-sanitizer, CUDA graphs, two streams, and the benchmark with its table of goals.
#
#   bench/cuda/run.sh [--out DIR]     default: bench/cuda/results
#
# Needs one NVIDIA GPU with its driver, a C++ compiler, and a Python environment with torch (CUDA), cupy, numpy, pytest,
# hypothesis, ml_dtypes, scikit-build-core and pybind11. nvcc and compute-sanitizer are used where they are found. Changes nothing in
# that environment: bnfast is built into DIR/site. Each step's output is in DIR; the last lines say what passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=bench/cuda/results
while [ $# -gt 0 ]; do
    case $1 in
    --out) [ $# -ge 2 ] || { echo "--out needs a folder" >&2; exit 2; }; out=$2; shift 2 ;;
    *) echo "unknown argument: $1 (bench/cuda/run.sh [--out DIR])" >&2; exit 2 ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
summary=()
failed=0

# step NAME COMMAND...: runs it with its output in DIR/NAME.txt.
step() {
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    if "$@" >"$out/$name.txt" 2>&1; then
        summary+=("$(printf '%4d s  passed   %s' $((SECONDS - begin)) "$name")")
    else
        summary+=("$(printf '%4d s  FAILED   %s (%s)' $((SECONDS - begin)) "$name" "$out/$name.txt")")
        failed=1
        tail -n 20 "$out/$name.txt"
    fi
}
left_out() { summary+=("$(printf '%6s  left out %s: %s' '' "$1" "$2")"); }

build() {
    rm -rf "$out/site" &&
        python -m pip install --quiet --no-deps --no-build-isolation --target "$out/site" . &&
        cd "$out" && python -c 'import bnfast.cuda; print(bnfast.cuda.__file__); print(bnfast.cuda.status())'
}
fatbins() {
    cmake -S . -B "$out/fatbins" -DBNFAST_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)-real" &&
        cmake --build "$out/fatbins" --target bnfast_cuda
}

export PYTHONPATH=$out/site BNFAST_CUDA_DEVICE=1 XDG_CACHE_HOME=$out/cache
export PYTEST_ADDOPTS="-o pythonpath=$PWD/tests/helpers -p no:xdist -o addopts=--import-mode=importlib"

step machine nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
step build build
if [ "$failed" -ne 0 ]; then
    printf '%s\n' "${summary[@]}"
    exit 1
fi
if command -v nvcc >/dev/null; then step fatbins fatbins; else left_out fatbins "nvcc is not on the path"; fi
# In every form: the bits don't depend on it.
step golden python -m pytest -q tests/cuda/test_golden.py
step tests python -m pytest -q tests/cuda --ignore tests/cuda/test_golden.py
step graphs_and_streams python bench/cuda/checks.py graphs streams
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python bench/cuda/checks.py small
    done
else
    left_out compute-sanitizer "it is not on the path"
fi
step measure python bench/cuda/measure.py --json "$out/results.json"
step goals python bench/cuda/goals.py "$out/results.json"
cat "$out/goals.txt" 2>/dev/null
printf '\n== steps\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
