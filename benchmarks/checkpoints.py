"""What a checkpoint costs: `python -m benchmarks.checkpoints --json FILE`.

The default networks (dim-64 denoiser, full-width SMPLGait) train on small clips, one process. Three sides take turns: a
few steps alone; the same with a checkpoint handed over before them, as training does it; and the same waiting until it
is on the disk. What a checkpoint costs is the difference of the medians to the first, all included: copying, and what
writing in the background takes from the steps. The share is that cost over the time of `checkpoint.every` steps (5,000
by default), at the speed measured here and at 33 steps per second, the goal on a fast GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.environment import envelope
from benchmarks.fault_runs import pack_walkers
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import PretrainConfig
from gaitfast.data.pipeline import build_loader
from gaitfast.engine import checkpoint, world
from gaitfast.pretrain import Pretraining

GOAL = 33.0
"""Steps per second."""


def sides(run: Pretraining, steps: int) -> dict[str, Callable[[], None]]:
    """The three things to time, each of `steps` steps on one batch."""
    loader = build_loader(
        run.dataset, run.config.data, sampling=run.sampling, seed=0, batch=run.config.train.batch, device="cpu"
    )
    batch = next(iter(loader))
    loader.close()
    number = 0

    def train() -> None:
        for step in range(steps):
            run.meters.step(run.train_step(batch, step), 0.0)
        run.meters.log({})

    def save() -> None:
        nonlocal number
        number += 1
        run.save(number)

    def in_background() -> None:
        save()
        train()
        run.writer.wait()  # so that none of it falls on the next side

    def waiting() -> None:
        save()
        run.writer.wait()
        train()

    return {"steps": train, "background": in_background, "waiting": waiting}


def timed(run: Pretraining, steps: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each side, taken in turn."""
    todo = sides(run, steps)
    for side in todo.values():
        side()
    taken: dict[str, list[float]] = {name: [] for name in todo}
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(taken["steps"]) < 3:
        for name, side in todo.items():
            started = time.perf_counter()
            side()
            taken[name].append(time.perf_counter() - started)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=4, help="of a side")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gaitfast-checkpoints-", dir=os.environ.get("TMPDIR")) as name:
        config = PretrainConfig(run=f"{name}/run")
        config.data.path, config.data.frames, config.data.threads = str(pack_walkers(Path(name))), 4, 1
        config.train.batch, config.train.precision = 2, "fp32"
        config.eval.condition_clips, config.eval.condition_timesteps = 2, 1
        run = Pretraining(config, world.start())
        taken = timed(run, arguments.steps, arguments.seconds)
        run.writer.close()
        size = checkpoint.listing(Path(config.run))[0].stat().st_size
        world.stop()
    medians = {side: statistics.median(values) for side, values in taken.items()}
    step, every = medians["steps"] / arguments.steps, config.checkpoint.every
    row = {
        "megabytes": size / 1e6,
        "seconds_per_step": step,
        "samples": len(taken["steps"]),
        "spread_of_steps": [min(taken["steps"]) / arguments.steps, max(taken["steps"]) / arguments.steps],
        "seconds_background": medians["background"] - medians["steps"],
        "seconds_waiting": medians["waiting"] - medians["steps"],
    }
    headline = {
        "percent_of_throughput": 100 * row["seconds_background"] / (every * step),
        "percent_at_the_goal": 100 * row["seconds_background"] / (every / GOAL),
        "every": every,
    }
    print(row, headline)
    if arguments.json:
        files.write_json(arguments.json, envelope(headline, [row]))
    return 0


if __name__ == "__main__":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with user_errors():
        sys.exit(main())
