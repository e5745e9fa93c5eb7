#!/usr/bin/env bash
# On a machine with a GPU, nvcc and PyTorch for CUDA: builds the operators in place, asks them what the CPU is asked,
# and asks again under compute-sanitizer where there is one. PYTHON: the interpreter. Ends with 0 when all is well.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" setup.py --quiet build_ext --inplace
gpu_cases() { "$@" "$python" -m pytest --noconftest -m gpu tests/retrieval/test_cuda.py; }
gpu_cases env
if command -v compute-sanitizer >/dev/null; then
  # Every tensor its own allocation: PyTorch's pool would hide a step beyond the end.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 gpu_cases compute-sanitizer --tool memcheck --error-exitcode 9
else
  echo "compute-sanitizer: not found, so memory accesses were not checked" >&2
fi
