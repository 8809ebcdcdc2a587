#!/usr/bin/env bash
# Compiles every CUDA source for the architectures that we ship, as `make cu-check`, and prints what
# each kernel takes of a GPU. A kernel that spills registers to memory fails the check.
#
# No GPU and no CUDA build of torch are needed, only nvcc: this is how a machine without them
# notices that a kernel no longer compiles. Usage: csrc/check_cuda.sh PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1

mapfile -t sources < <(find csrc -name '*.cu' | sort)
if ! nvcc=$(command -v nvcc); then
  echo "cu-check skipped: no nvcc on PATH (${#sources[@]} .cu files)"
  exit 0
fi

# The flags of setup.py and of torch, by which the extension is built where torch has CUDA.
mapfile -t arguments < <("$python" -c '
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths
print(*COMMON_NVCC_FLAGS, *(f"-isystem={folder}" for folder in include_paths()), sep="\n")')
arguments+=(-std=c++20 -O3 -Icsrc -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000)
for architecture in 80 86 89 90; do
  arguments+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
done
arguments+=(-gencode arch=compute_90,code=compute_90 -Xptxas -v --threads 0)

objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
for source in "${sources[@]}"; do
  echo "cu-check: $source"
  if ! "$nvcc" "${arguments[@]}" -c "$source" -o "$objects/$(basename "$source").o" \
    >"$objects/log" 2>&1; then
    cat "$objects/log"
    exit 1
  fi
  grep -E 'warning|error' "$objects/log" || true
  cat "$objects/log" >>"$objects/all"
done
"$python" csrc/kernel_table.py "$objects/all"
echo "cu-check: ${#sources[@]} files compile for sm_80, sm_86, sm_89, sm_90 and PTX"
