"""What benchmarks say about their rows, and that they refuse machines which cannot run them."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import gpu_report
from benchmarks.denoiser import AGAIN, headline_of, peak_bytes
from benchmarks.shapes import denoiser_calls, moved_elements, tensors
from benchmarks.timing import Timing, interleaved

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_calls_are_those_of_the_network():
    calls = denoiser_calls(64, 2)
    counts = {name: sum(c.count for c in calls if c.operation == name) for name in {c.operation for c in calls}}
    assert counts == {
        "film": 1,
        "group_norm_film_silu": 30,
        "layer_norm": 15,
        "linear_attention": 6,
        "spatial_attention": 1,
        "temporal_attention": 8,
    }
    modulated = [c for c in calls if c.operation == "group_norm_film_silu" and c.arguments[4] is not None]
    assert sum(c.count for c in modulated) == 14


def test_floors_are_the_counted_ones():
    """Elements per sample of all norms, counted by hand: 1,904,640 for GroupNorm, 952,320 for LayerNorm."""
    for operation, elements in (("group_norm_film_silu", 1_904_640), ("layer_norm", 952_320)):
        calls = [c for c in denoiser_calls(64, 1) if c.operation == operation]
        assert sum(c.count * moved_elements(c)[0] for c in calls) == 2 * elements
        assert sum(c.count * moved_elements(c)[1] for c in calls) == 3 * elements


def test_arguments_have_a_steps_types():
    for call in denoiser_calls(32, 1, frames=2):
        first, *rest = tensors(call, torch.bfloat16, "cpu")
        assert first.dtype == (torch.float32 if call.operation == "film" else torch.bfloat16)
        assert all(t.dtype == torch.float32 for t in rest if isinstance(t, torch.Tensor))


def test_sides_are_timed_in_turn():
    order = []
    sides = {name: [lambda name=name: order.append(name)] for name in ("a", "b")}
    timings = interleaved(sides, "cpu", seconds=0.0, least=3)
    assert order[-4:] == ["a", "b", "a", "b"] and set(timings) == {"a", "b"}
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)


def test_the_compiled_reference_is_held_against_our_faster_way():
    def took(**milliseconds: float) -> dict[str, Timing]:
        return {name: Timing(ms, ms, ms) for name, ms in milliseconds.items()}

    memory = {"ours": 30, "reference": 100}
    whole = took(**{"ours/eager": 5.0, "reference/eager": 15.0, AGAIN: 4.0, "ours/compiled": 8.0})
    whole |= took(**{"reference/compiled": 12.0})
    assert headline_of(whole, memory) == {"vs_eager": 3.0, "vs_compile": 3.0, "peak_memory_ratio": 0.3}
    stage = took(**{"ours/half stage": 2.0, "reference/compiled half stage": 5.0})
    assert headline_of(stage, memory) == {"vs_compile": 2.5, "peak_memory_ratio": 0.3}
    assert "vs_compile" not in headline_of(took(**{AGAIN: 4.0}), memory)


def test_peak_memory_is_what_lives_at_once():
    def step() -> torch.Tensor:
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        return (b + 1).sum()

    assert 8_000_000 <= peak_bytes(step, "cpu") < 8_001_000


def test_a_report_reads_as_a_table_whatever_is_missing():
    report = {
        "machine": {"gpus": ["NVIDIA H200"]},
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.11"},
        "headline": {"denoiser.vs_eager": 3.0},
        "parts": {
            "kernel tests": {"exit": 0, "seconds": 90.0, "said": "....\n280 passed, 12 deselected in 88.1s\n"},
            "kernels": {"exit": None, "seconds": 110.0, "said": ""},
        },
    }
    text = gpu_report.table(report)
    assert "| kernel tests | 90.0 | done: 280 passed, 12 deselected in 88.1s |" in text
    assert "| kernels | 110.0 | stopped |" in text and '"denoiser.vs_eager": 3.0' in text
    timing = {"ms": {"ours": [1.0, 0.9, 1.1]}, "share": 0.8, "vs_eager": 2.0}
    report["parts"]["kernels"]["result"] = {"rows": [{"call": "film 64x256", "direction": "forward", **timing}]}
    report["parts"]["denoiser"] = {"exit": 0, "seconds": 1.0, "said": ""}
    report["parts"]["denoiser"]["result"] = {"rows": [{"side": "ours/eager", "ms": [2.0, 1.0, 3.0], "tflops": 9.0}]}
    tried = [{"kernel": "k", "config": "default", "ms": 2.0}, {"kernel": "k", "config": {"num_warps": 2}, "ms": 1.0}]
    report["parts"]["sweep"] = {"exit": 0, "seconds": 1.0, "said": "", "result": {"rows": tried}}
    text = gpu_report.table(report)
    assert "| film 64x256 | forward | 1.0000 | 80% | 2.00x |  |  |" in text
    assert "| ours/eager | 2.000 | 1.000-3.000 | 9.0 |" in text and "| k | {'num_warps': 2} | 1.0000 |" in text


def test_parts_fit_the_time():
    assert gpu_report.SECONDS < 540
    assert sum(p.most for p in gpu_report.PARTS if p.name != "sweep") <= gpu_report.SECONDS


def test_a_part_that_takes_too_long_is_stopped_and_keeps_what_it_said(monkeypatch):
    part = gpu_report.Part("slow", 1, ("-c", "import time; print('begun'); time.sleep(60)"))
    result = gpu_report.run(part, 2.0)
    assert result["exit"] is None and "begun" in result["said"] and result["seconds"] < 10


def test_programs_say_what_they_need():
    for name in ("gpu_report", "sweep"):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert torch.cuda.is_available() or (done.returncode == 2 and "CUDA device" in done.stderr)


def test_the_committed_rows_are_envelopes():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert {"machine", "commit", "versions", "headline", "rows"} <= json.loads(path.read_text()).keys(), path.name
