"""Loss curves that are compared: `python -m benchmarks.curves --steps 2000 --json FILE`.

The same run twice, in float32 and under autocast to bfloat16: same weights, batches, noise and timesteps. A row holds
both curves as means of a hundred steps; the headline is the largest relative distance between two such means.
`--golden FILE` writes a short curve in float32 with each backend of the denoiser that runs on a CPU; the tests compare
the beginning of a fresh one with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import envelope
from benchmarks.memory import in_child
from benchmarks.step import make_dataset
from gaitfast import files, kernels
from gaitfast.config import PretrainConfig, load
from gaitfast.data.pipeline import build_loader
from gaitfast.engine import world
from gaitfast.pretrain import Pretraining

GOLDEN_STEPS, GOLDEN_MEAN = 200, 10
GOLDEN_BACKENDS = ("reference", "compiled")
SIZE = {
    **{"data.frames": 4, "data.threads": 1, "backbone.width": 0.125, "denoiser.dim": 32, "train.batch": 4},
    **{"optimizer.lr_denoiser": 1e-3, "optimizer.lr_backbone": 1e-3, "optimizer.warmup": 50},
    **{"eval.condition_clips": 4, "eval.condition_timesteps": 1},
}


def losses(dataset: Path, process: world.World, steps: int, **settings: object) -> list[float]:
    """The loss of each of the first `steps` steps of a pretraining run of SIZE, whose schedule is as long unless
    `settings` have its train.iterations."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text("log_every: 50\n")
        chosen = {"data.path": dataset, "run": Path(folder) / "run", "train.iterations": steps, **SIZE, **settings}
        config = load(PretrainConfig, file, [f"{key}={value}" for key, value in chosen.items()])
        run = Pretraining(config, process)
        loader = build_loader(
            run.dataset, config.data, sampling=run.sampling, seed=config.seed, batch=config.train.batch
        )
        found = []
        try:
            for step in range(steps):
                run.engine.set_learning_rate(step)
                found.append(run.train_step(next(loader), step).item())
        finally:
            loader.close()
            run.meters.close()
    return found


def golden_losses(dataset: str, backend: str, steps: int, threads: int) -> list[float]:
    """The first `steps` losses of the golden run, in a process of its own (benchmarks.memory.in_child)."""
    os.environ["GAITFAST_BACKEND"] = backend
    torch.set_num_threads(threads)
    process = world.start()
    settings = {"train.precision": "fp32", "train.iterations": GOLDEN_STEPS}
    found = losses(Path(dataset), process, steps, **settings)
    world.stop()
    return found


def means(values: list[float], count: int) -> list[float]:
    """Of every `count` values."""
    return [sum(values[i : i + count]) / count for i in range(0, len(values), count)]


def band(one: list[float], other: list[float]) -> float:
    """The largest relative distance between two curves."""
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.split(":")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--golden", type=Path, metavar="FILE", help="write the golden curves instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder))
        if arguments.golden:
            curves = {}
            for backend in GOLDEN_BACKENDS:
                found = in_child(golden_losses, str(dataset), backend, GOLDEN_STEPS, 1)
                curves[backend] = [round(value, 7) for value in means(found, GOLDEN_MEAN)]
            files.write_json(arguments.golden, {"steps": GOLDEN_STEPS, "mean_of": GOLDEN_MEAN, "loss": curves})
            return 0
        process, rows = world.start(), []
        for precision in ("fp32", "bf16"):
            started = time.perf_counter()
            curve = losses(dataset, process, arguments.steps, **{"train.precision": precision})
            seconds = round(time.perf_counter() - started, 1)
            rows.append({"precision": precision, "seconds": seconds, "loss": means(curve, 100), "size": SIZE})
            print(f"{precision}: {seconds} s, {rows[-1]['loss']}", flush=True)
    headline = {"steps": arguments.steps, "band": round(band(rows[1]["loss"], rows[0]["loss"]), 5)}
    print(json.dumps(headline))
    if arguments.json:
        backends = {operation: kernels.backend_of(operation)[0] for operation in kernels.OPERATIONS}
        files.write_json(arguments.json, {**envelope(headline, rows), "backends": backends})
    world.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
