#!/usr/bin/env bash
# Builds csrc/ with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary folder and runs the tests of what is
# compiled under them: `tests/sanitize.sh [pytest arguments]`. Exit code 0: the tests pass and neither found anything.
#
#   PYTHON=python3          the interpreter, with the packages of `make setup`
#   MAX_JOBS=2              files compiled at a time
#   GAITFAST_CPU=avx512     as everywhere: without it the tile unit runs, whose loads and stores no sanitizer sees
#   KEEP=FOLDER             build there and leave it: the next run compiles only what changed
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
folder=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/tree" "$folder/reports"
rm -f "$folder"/reports/*

# A copy of the checkout as it is, so that nothing is built in place.
(cd "$root" && git ls-files -co --exclude-standard -z |
  while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
  tar --null -T - -cf -) | tar -xf - -C "$folder/tree"
cd "$folder/tree"

# vptr needs the run-time type information of PyTorch's own objects. -g1: lines in reports.
checks="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fsanitize-recover=all"
checks="$checks -fno-omit-frame-pointer -g1"
CFLAGS="${CFLAGS:-} $checks" CXXFLAGS="${CXXFLAGS:-} $checks" LDFLAGS="${LDFLAGS:-} -fsanitize=address,undefined" \
  MAX_JOBS="${MAX_JOBS:-2}" "$python" setup.py --quiet build_ext --inplace --build-temp "$folder/build"

# Leaks are not looked for: an interpreter keeps much until it ends. Reports go to files, since pytest captures output.
if [ $# -eq 0 ]; then
  data=tests/data
  set -- tests/retrieval $data/test_codec.py $data/test_clips.py $data/test_parity.py $data/test_packed.py $data/test_fuzz.py
  # Neither Triton's interpreter nor NVIDIA's compiler, which does not start under a preloaded sanitizer.
  set -- "$@" tests/kernels tests/models/test_frame_norm.py -k "not triton and not aot and not spill_nothing and not bindings_compile"
fi
failed=0
env PYTHONPATH="$folder/tree" LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS="detect_leaks=0:halt_on_error=0:log_path=$folder/reports/found" \
  UBSAN_OPTIONS="print_stacktrace=1:log_path=$folder/reports/found" \
  "$python" -m pytest -m "not gpu" --timeout=3000 "$@" || failed=1

if grep -hE "runtime error|ERROR: AddressSanitizer" "$folder"/reports/* 2>/dev/null | sort | uniq -c; then
  cat "$folder"/reports/* | head -200
  echo "the sanitizers found the above"
  failed=1
fi
exit $failed
