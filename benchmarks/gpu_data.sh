#!/usr/bin/env bash
# The data engine on a machine with a GPU: its tests, frames per second into GPU memory, and the other storages.
# usage: benchmarks/gpu_data.sh RESULTS
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:?usage: benchmarks/gpu_data.sh RESULTS}
mkdir -p "$results"
python -m pytest -q -m gpu tests/data tests/benchmarks/test_data.py
python -m benchmarks.data --full --device cuda --json "$results/data-gpu.json"
python -m benchmarks.data_alternatives --device cuda --json "$results/data-alternatives-gpu.json"
