"""How many steps per second on N processes? A model on paper, and what it says against what runs here.

    python -m benchmarks.scaling --json FILE

The model. A step of N processes lasts

    seconds(N) = (fixed + per_sample * batch / N) * max(1, N / processors)
                 + exposed * bytes(N) / bandwidth + messages * latency * rounds(N)

with `fixed` what a step costs however few its samples are; processes beyond the processors take turns; bytes(N) what a
ring moves per process and step for P trained float32 parameters,

    stage 0-2   2 (N-1)/N * 4P   all-reduce, or reduce-scatter of gradients and all-gather of weights
    stage 3     3 (N-1)/N * 4P   weights once more for the backward pass

and messages the collectives of a step: buckets of gradients and weights, and the sums of every batch norm (two forward,
one backward). Each takes rounds(N) hops: 2 (N-1) in the ring of gloo, 2 log2(N) in the trees of NCCL. `exposed` is the
part of the transfer that no computing hides; here it is 1, the worst case.

Measured here: `fixed` and `per_sample` by one process at two batches, bandwidth and latency of gloo between processes,
and the steps per second of 1, 2 and 4 processes, of which those of 2 and 4 put the prediction to the test. The one for
A100s takes per_sample from the FLOPs and the rest from stated assumptions; no GPU was used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.environment import envelope
from benchmarks.fault_runs import ROOT, pack_walkers
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import PretrainConfig
from gaitfast.engine import world
from gaitfast.models import build_denoiser, build_recognizer

CONFIG = """
data: {{path: {dataset}, frames: 4, threads: 1}}
backbone: {{name: smplgait, variant: gait3d, width: 0.5}}
denoiser: {{dim: 32}}
train: {{iterations: 10, batch: {batch}, precision: fp32, zero_stage: {stage}}}
eval: {{every: 0, condition_clips: 2, condition_timesteps: 1}}
log_every: 1
"""
BATCH = 8
WARM_UP = 2
"""Steps left out of the median."""


@dataclass(frozen=True)
class Links:
    """What joins the processes."""

    bandwidth: float
    """Bytes per second that a process sends in a ring."""
    latency: float
    """Seconds of one hop."""
    tree: bool = False
    """Whether small messages travel along a tree."""

    def rounds(self, processes: int) -> float:
        """Hops of a small message to everybody and back."""
        return 2 * (math.log2(processes) if self.tree else processes - 1)


def ring_bytes(parameters: int, stage: int, processes: int) -> float:
    """Bytes that a process sends per step."""
    return (3 if stage == 3 else 2) * (processes - 1) / processes * 4 * parameters


@dataclass(frozen=True)
class Compute:
    """Seconds of one process's step without any exchange."""

    fixed: float
    per_sample: float


def predicted_seconds(
    compute: Compute,
    processes: int,
    links: Links,
    *,
    batch: int,
    parameters: int,
    stage: int,
    messages: int,
    processors: int,
    exposed: float = 1.0,
) -> float:
    """Seconds of a step whose batch is cut into `processes` parts."""
    computing = (compute.fixed + compute.per_sample * batch / processes) * max(1, processes / processors)
    sent = ring_bytes(parameters, stage, processes) / links.bandwidth
    return computing + exposed * sent + messages * links.latency * links.rounds(processes)


def size_of(config: PretrainConfig) -> tuple[int, int]:
    """(trained parameters, batch norms) of a run."""
    recognizer = build_recognizer(config.backbone.name, config.backbone.variant, width=config.backbone.width)
    denoiser = build_denoiser(config.denoiser.dim, cond_dim=recognizer.feature_channels)
    modules = (recognizer.backbone, denoiser)
    norms = [m for module in modules for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return sum(p.numel() for module in modules for p in module.parameters()), len(norms)


# --- measured here ----------------------------------------------------------------------------------------------------


def environments(processes: int) -> list[dict[str, str]]:
    common = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(random.SystemRandom().randint(20_000, 60_000))
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def launch(command: list[str], processes: int) -> str:
    """Run a command as that many ranks; what the first one printed."""
    started = [
        subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            text=True,
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for rank, environment in enumerate(environments(processes))
    ]
    output = started[0].communicate(timeout=300)[0]
    assert [process.wait(60) for process in started] == [0] * processes, command
    return output


def exchange(parameters: int) -> None:
    """A rank of the measurement of the links: the median time of an all-reduce of one value and of a gradient."""
    process = world.start()
    times = {}
    for name, count, repeats in (("latency", 1, 200), ("bandwidth", parameters, 8)):
        value = torch.zeros(count)
        samples = []
        for _ in range(repeats):
            started = time.perf_counter()
            dist.all_reduce(value)
            samples.append(time.perf_counter() - started)
        times[name] = statistics.median(samples)
    if process.is_main:
        print(json.dumps(times))
    world.stop()


def measured_links(parameters: int, processes: int) -> Links:
    times = json.loads(launch([sys.executable, "-m", "benchmarks.scaling", "--exchange", str(parameters)], processes))
    latency = times["latency"] / Links(1.0, 0.0).rounds(processes)
    seconds = max(1e-9, times["bandwidth"] - times["latency"])
    return Links(ring_bytes(parameters, 0, processes) / seconds, latency)


def measured_seconds(config: Path, folder: Path, processes: int) -> float:
    """Median seconds of a training step."""
    command = [sys.executable, "gaitfast/pretrain.py", "--config", str(config), "--set", f"run={folder}"]
    launch(command, processes)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [b["seconds"] - a["seconds"] for a, b in zip(rows[WARM_UP:], rows[WARM_UP + 1 :], strict=False)]
    return statistics.median(seconds)


# --- on paper ---------------------------------------------------------------------------------------------------------

A100 = {
    "peak_tflops_bf16": 312,
    "utilisation": 0.35,
    "tflop_per_sample": (57.3 + 3 * 6.5 + 3 * 10.0) / 1000,
    "fixed": 0.002,
    "node": 8,
    "inside": Links(2.0e11, 1e-5, tree=True),
    "between": Links(2.0e10, 3e-5, tree=True),
}
"""Assumptions: 35 % of the bf16 peak; per sample of 30 frames TAESD's encoder once, denoiser (dim 64) and backbone (10
GFLOP forward) three times; 2 ms of a step that do not shrink with the batch; 8 GPUs to a node, 200 GB/s inside it and
20 GB/s per process between nodes, 10 and 30 microseconds per hop; nothing hidden behind computing.
"""


def on_a100s(batch: int, stage: int, parameters: int, messages: int) -> list[dict]:
    """Predicted steps per second of the paper's pretraining on 1 to 64 A100s."""
    per_sample = A100["tflop_per_sample"] / (A100["peak_tflops_bf16"] * A100["utilisation"])
    compute = Compute(A100["fixed"], per_sample)
    alone = compute.fixed + compute.per_sample * batch
    rows = []
    for processes in (1, 2, 4, 8, 16, 32, 64):
        links = A100["inside"] if processes <= A100["node"] else A100["between"]
        seconds = predicted_seconds(
            compute,
            processes,
            links,
            batch=batch,
            parameters=parameters,
            stage=stage,
            messages=messages,
            processors=processes,
        )
        rows.append(
            {
                "kind": "predicted",
                "device": "A100",
                "processes": processes,
                "batch": batch,
                "zero_stage": stage,
                "megabytes_per_step": ring_bytes(parameters, stage, processes) / 1e6,
                "steps_per_s": 1 / seconds,
                "efficiency": alone / processes / seconds,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="of ZeRO (default: 2)")
    parser.add_argument("--exchange", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.exchange:
        exchange(arguments.exchange)
        return 0
    stage, cores, rows = arguments.stage, len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory(prefix="gaitfast-scaling-") as name:
        folder = Path(name)
        dataset = pack_walkers(folder)

        def seconds_of(processes: int, batch: int) -> float:
            config = folder / f"{processes}-{batch}.yaml"
            config.write_text(CONFIG.format(dataset=dataset, stage=stage, batch=batch))
            return measured_seconds(config, config.with_suffix(""), processes)

        half = seconds_of(1, BATCH // 2)
        small = PretrainConfig()
        small.backbone.width, small.denoiser.dim = 0.5, 32
        parameters, norms = size_of(small)
        messages = 3 * norms + 4
        for processes in (1, 2, 4):
            seconds = seconds_of(processes, BATCH)
            own = 0 if processes == 1 and stage < 3 else stage  # gaitfast.config.zero_stage
            row = {"kind": "measured", "device": "cpu", "processes": processes, "zero_stage": own}
            if processes == 1:
                compute = Compute(2 * half - seconds, (seconds - half) / (BATCH / 2))
                row |= {"fixed_ms": 1e3 * compute.fixed, "ms_per_sample": 1e3 * compute.per_sample}
            else:
                links = measured_links(parameters, processes)
                guess = predicted_seconds(
                    compute,
                    processes,
                    links,
                    batch=BATCH,
                    parameters=parameters,
                    stage=stage,
                    messages=messages,
                    processors=cores,
                )
                row |= {
                    "gigabytes_per_s": links.bandwidth / 1e9,
                    "microseconds_per_hop": links.latency * 1e6,
                    "megabytes_per_step": ring_bytes(parameters, stage, processes) / 1e6,
                    "predicted_steps_per_s": 1 / guess,
                    "predicted_over_measured": seconds / guess,
                }
            rows.append({**row, "steps_per_s": 1 / seconds})
            print(rows[-1], flush=True)
    parameters, norms = size_of(PretrainConfig())
    rows += on_a100s(64, stage, parameters, 3 * norms + 4)
    for row in rows[3:]:
        print(row)
    headline = {f"predicted_over_measured_{row['processes']}": row["predicted_over_measured"] for row in rows[1:3]}
    headline |= {f"a100_steps_per_s_{row['processes']}": row["steps_per_s"] for row in rows[3:]}
    if arguments.json:
        files.write_json(arguments.json, envelope(headline, rows))
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
