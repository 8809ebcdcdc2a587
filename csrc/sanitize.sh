#!/usr/bin/env bash
# Runs the operators' tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer,
# as `make sanitize`: whatever reads or writes outside its memory, or relies on undefined behaviour,
# ends the run.
#
# Everything happens in a copy of the package under build/sanitize, so that the kernels that users
# load are never replaced. Needs GCC and its sanitizer libraries. Usage: csrc/sanitize.sh PYTHON
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=build/sanitize
compiler=${CXX:-c++}

# Python itself is not instrumented, so the sanitizers must be there before it starts; and so must
# the C++ library, or the first exception finds no function to throw it.
preload=()
for library in libasan.so libubsan.so libstdc++.so; do
  path=$($compiler -print-file-name="$library")
  if [[ $path != /* ]]; then
    echo "error: $compiler has no $library: install GCC with its sanitizer libraries" >&2
    exit 1
  fi
  preload+=("$(readlink -f "$path")")
done

mkdir -p "$copy"
# What is compiled stays there, and is compiled anew where its sources have changed.
for folder in commvq_core cli tests csrc; do
  mkdir -p "$copy/$folder"
  find "$copy/$folder" -type f ! -name '_C.*' -delete
  tar -c --exclude='_C.*' --exclude=__pycache__ "$folder" | tar -x -C "$copy"
done
cp -p setup.py pyproject.toml README.md LICENSE "$copy"
cd "$copy"

flags="-g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
COMMVQ_BUILD=cpu CFLAGS=$flags LDFLAGS=-fsanitize=address,undefined \
  "$python" setup.py --quiet build_ext --inplace

export ASAN_OPTIONS=detect_leaks=0 # Python frees little at its end
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONDONTWRITEBYTECODE=1
unset COMMVQ_NO_NATIVE COMMVQ_SIMD

run() {
  LD_PRELOAD=$(IFS=:; echo "${preload[*]}") "$python" "$@"
}

best=$(run -c 'from commvq_core import ops; print(ops.native_info().path, ops.native_info().simd)')
if [[ ${best% *} != "$PWD"/* ]]; then
  echo "error: the sanitized kernels are not what loads, but ${best% *}" >&2
  exit 1
fi
# Capturing file descriptors would swallow the report.
for level in portable avx2 avx512; do
  echo "sanitize: $level"
  if [[ $level == "${best##* }" ]]; then
    run -m pytest -q -x --capture=sys tests/ops
    break
  fi
  # Only what differs: kernels, and not how they are loaded.
  COMMVQ_SIMD=$level run -m pytest -q -x --capture=sys tests/ops --ignore=tests/ops/test_loading.py -k 'not pytorch'
done
echo "sanitize: nothing found"
