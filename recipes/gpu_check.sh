#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine with one: Python with torch, transformers, pytest,
# typer and rich, nvcc, no network and nothing installed. Builds the extension in place, runs the
# GPU tests, also under compute-sanitizer where that is there, then the benchmarks, and leaves
# gpu_check.json and gpu_check.md in runs/gpu_check. Without a GPU it says so and ends well.
#
# PYTHON names another interpreter; COMMVQ_GPU_CHECK_OUT another folder. COMMVQ_GPU_CHECK_STEPS names
# the steps to run, where time is short, and adds to what the folder holds: build, kernels, tests,
# memcheck, racecheck (these two take most of the time), decode-1, decode-8, encode, memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${COMMVQ_GPU_CHECK_OUT:-runs/gpu_check}

if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "error: $python has no torch: install it, or name another with PYTHON=..." >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check skipped: there is no CUDA GPU here (torch.cuda.is_available() is false)"
  exit 0
fi

if [[ -z ${COMMVQ_GPU_CHECK_STEPS:-} ]]; then
  rm -rf "$out"
fi
mkdir -p "$out/site"
out=$(cd "$out" && pwd)
ln -sfn "$PWD/cli" "$out/site/commvq_cli" # under the name that it is installed as
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}"
# Where torch finds nvcc, there are the other tools too.
cuda_home=$("$python" -c 'from torch.utils.cpp_extension import CUDA_HOME as found; print(found or "")')
if [[ -n $cuda_home ]]; then
  export PATH="$cuda_home/bin:$PATH"
fi
TORCH_CUDA_ARCH_LIST=$("$python" -c '
import torch
print("{}.{}".format(*torch.cuda.get_device_capability()))')
export TORCH_CUDA_ARCH_LIST

# A step that fails is noted, and the others still run.
failed=0
step() { # step NAME COMMAND...: what it prints goes to NAME.out and NAME.err
  local name=$1 status=0 begin=$SECONDS
  shift
  if [[ -n ${COMMVQ_GPU_CHECK_STEPS:-} && " $COMMVQ_GPU_CHECK_STEPS " != *" $name "* ]]; then
    return
  fi
  echo "gpu_check: $name"
  "$@" >"$out/$name.out" 2>"$out/$name.err" || status=$?
  echo "$name $status $((SECONDS - begin))" >>"$out/steps"
  if [[ $status -ne 0 ]]; then
    failed=1
    echo "gpu_check: $name failed with $status:"
    tail -n 30 "$out/$name.out" "$out/$name.err"
  fi
}
commvq() {
  "$python" -c 'from commvq_cli.main import main; main()' "$@" --json --quiet
}
tests=("$python" -m pytest -q -p no:cacheprovider --no-header)

# Away from pyproject.toml, which an older setuptools than its 77 can't read.
build_extension() {
  mkdir -p build/gpu_check
  ln -sfn "$PWD/csrc" "$PWD/cli" "$PWD/commvq_core" "$PWD/setup.py" build/gpu_check/
  (cd build/gpu_check && COMMVQ_BUILD=cuda "$python" setup.py --quiet build_ext --inplace)
}

step build build_extension
step kernels "$python" -c '
from commvq_core import ops
found = ops.native_info()
assert "cuda" in found.backends, found.summary'
step tests "${tests[@]}" tests/cuda
if command -v compute-sanitizer >/dev/null; then
  # Without torch's cache of memory every tensor is an allocation whose ends are watched.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "${tests[@]}" tests/cuda/test_gpu_ops.py -k small -x
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
step decode-1 commvq bench decode --device cuda
step decode-8 commvq bench decode --device cuda --batch 8 --context 32768 --context 131072
step encode commvq bench encode --device cuda --shape llama-3.1-8b
step memory commvq bench memory --device cuda --shape llama-3.1-8b --random-weights \
  --context 131072 --bits 1
"$python" recipes/gpu_report.py "$out"
exit "$failed"
