"""The kernels compile for GPUs that need not be here, without spills; the committed table says so of all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from gaitfast.kernels import triton_ops

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "benchmarks" / "results" / "aot-sm80-sm90.json"


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A program in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_training_steps_kernels_compile_without_spills(tmp_path):
    chosen = ("--dims", "64", "--frames", "30", "--types", "bf16", "--architectures", "90")
    few = ("temporal_attention", "linear_attention", "layer_norm")
    done = run("-m", "benchmarks.aot", *chosen, "--operations", *few, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {r["kernel"] for r in rows} == {f"{name}_{way}_kernel" for name in few for way in ("fwd", "bwd")}
    assert all(r["stack"] == 0 and 0 < r["registers"] <= 255 for r in rows)


def test_unusual_sizes_compile():
    done = run("-m", "tests.kernels.compile_cases")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_table_covers_every_kernel_and_knows_no_spill():
    rows = json.loads(TABLE.read_text())["rows"]
    covered = {(r["kernel"], r["architecture"]) for r in rows}
    for name in triton_ops.MODULES:
        for way in ("fwd", "bwd") if name != "film" else ("fwd",):
            assert {(f"{name}_{way}_kernel", f"sm_{a}") for a in (80, 90)} <= covered
    assert all(r["stack"] == 0 for r in rows)
