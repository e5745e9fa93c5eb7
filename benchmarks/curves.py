"""Loss curves that are compared: `python -m benchmarks.curves --steps 2000 --json FILE`.

The same run twice, in float32 and under autocast to bfloat16: same weights, batches, noise and timesteps. A row holds
both curves as means of a hundred steps; the headline is the largest relative distance between two such means.
`--golden FILE` writes a short curve to compare with later.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import envelope
from benchmarks.step import make_dataset
from gaitfast import files, kernels
from gaitfast.config import PretrainConfig, load
from gaitfast.data.pipeline import build_loader
from gaitfast.engine import world
from gaitfast.pretrain import Pretraining

GOLDEN_STEPS, GOLDEN_MEAN = 200, 20
SIZE = {
    **{"data.frames": 4, "data.threads": 1, "backbone.width": 0.125, "denoiser.dim": 32, "train.batch": 4},
    **{"optimizer.lr_denoiser": 1e-3, "optimizer.lr_backbone": 1e-3, "optimizer.warmup": 50},
    **{"eval.condition_clips": 4, "eval.condition_timesteps": 1},
}


def losses(dataset: Path, process: world.World, steps: int, **settings: object) -> list[float]:
    """The loss of every step of a pretraining run of SIZE, whose schedule is `steps` long."""
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
    parser.add_argument("--precision", default="fp32", help="of the golden curve")
    arguments = parser.parse_args()
    process = world.start()
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder))
        if arguments.golden:
            curve = means(
                losses(dataset, process, GOLDEN_STEPS, **{"train.precision": arguments.precision}), GOLDEN_MEAN
            )
            files.write_json(arguments.golden, {"steps": GOLDEN_STEPS, "mean_of": GOLDEN_MEAN, "loss": curve})
            return 0
        rows = []
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
