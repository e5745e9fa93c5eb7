"""The data engine against a loader in OpenGait's manner, end to end and operation by operation.

    python -m benchmarks.data --quick|--full [--device cuda] --json FILE

The work is the pair pipeline of pretraining: of each of 64 sequences two augmented clips of 30 frames. First the
answers are compared, same frames and same parameters. Then all loaders run in turn in one process: in every round each
first gives away the batches that it had ready, then is timed. The contender (opengait_loader.py) runs with 0, 1 and 2
workers, and the fastest counts. The headline compares what the loaders hand over: float64 in 0..1 there, uint8 here.
The sides `as float32` go on to what a network takes, on the device where the clips end.

Processor seconds are those of all threads and workers during the timed batches. docs/data.md has the floor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from benchmarks import data_stages
from benchmarks.environment import envelope
from benchmarks.opengait_loader import pairs
from benchmarks.timing import Timing
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import DataConfig, UserError
from gaitfast.data import codec, packed, walkers
from gaitfast.data.packed import PackedDataset
from gaitfast.data.pipeline import build_loader

SEED = 1
AS_FLOAT = ", as float32"
DRAIN = 6
"""Batches that are thrown away before the timed ones: more than any loader has ready."""


class Case(NamedTuple):
    """How much is run."""

    batch: int
    frames: int
    rounds: int
    batches: int
    """Timed batches of a round, at least."""
    seconds: float
    """Least length of a round."""


QUICK, FULL = Case(64, 30, 3, 5, 0.3), Case(64, 30, 4, 5, 0.4)
PEOPLE = {False: 16, True: 24}
"""Walkers of --quick and of --full; each walks four times, at least once for each sample of a batch."""


class Tree(NamedTuple):
    """The same sequences in OpenGait's layout and packed."""

    root: Path
    subjects: list[str]
    dataset: PackedDataset


def make_tree(folder: Path, people: int) -> Tree:
    """Walkers in `folder`, all of them to train on, 100 to 140 frames a walk."""
    walkers.generate(folder / "tree", people, 0, 4, (100, 140), seed=SEED, nuisances="mild")
    root = folder / "tree" / "sequences"
    sequences = [(*file.parts[-4:-1], np.load(file, allow_pickle=True)) for file in sorted(root.rglob("*.pkl"))]
    return Tree(root, sorted(p.name for p in root.iterdir()), packed.write(folder / "packed", sequences))


# --- loaders ----------------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process, its threads and its living children."""
    children = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        children += int(fields[11]) + int(fields[12])
    return time.process_time() + children / os.sysconf("SC_CLK_TCK")


class Side:
    """A loader under test. `batches` is advanced in this thread; `close` frees what it holds."""

    def __init__(self, name: str, batches: Iterator, close: Callable[[], None], device: str) -> None:
        self.name, self._batches, self.close, self._device = name, batches, close, device
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def round(self, case: Case) -> None:
        """One round: microseconds per frame are noted."""
        for _ in range(DRAIN):
            next(self._batches)
        self._wait()
        done = 0
        wall, cpu = time.perf_counter(), cpu_seconds()
        while done < case.batches or time.perf_counter() - wall < case.seconds:
            next(self._batches)
            done += 1
        self._wait()
        frames = done * case.batch * case.frames * 2
        self.wall.append((time.perf_counter() - wall) / frames * 1e6)
        self.cpu.append((cpu_seconds() - cpu) / frames * 1e6)
        time.sleep(0.2)  # what it makes ready beyond is made now, not during the next side's turn

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def row(self) -> dict:
        wall, cpu = Timing.of(self.wall), Timing.of(self.cpu)
        return {
            "side": self.name,
            "frames_per_s": round(1e6 / wall.median),
            "frames_per_s_low_high": [round(1e6 / wall.high), round(1e6 / wall.low)],
            "cpu_us_per_frame": [round(value, 3) for value in cpu],
        }


def ours(tree: Tree, case: Case, device: str, config: DataConfig, as_float: bool = False) -> Side:
    """The engine; with `as_float` every batch is also divided to float32, on `device`."""
    config = replace(config, frames=case.frames)
    loader = build_loader(tree.dataset, config, seed=SEED, batch=case.batch, device=device)

    def batches() -> Iterator:
        for batch in loader:
            clips = (batch.clip_e, batch.clip_g)
            yield tuple(clip.float().div_(255) for clip in clips) if as_float else clips

    name = f"ours {config.engine} {config.residency} {config.threads or 'all'} threads{AS_FLOAT * as_float}"
    return Side(name, batches(), loader.close, device)


def opengait(tree: Tree, case: Case, device: str, workers: int, as_float: bool = False) -> Side:
    found = pairs(
        tree.root,
        tree.subjects,
        DataConfig().augment,
        batch=case.batch,
        frames=case.frames,
        workers=workers,
        device=device,
    )
    batches = (tuple(clip.float() for clip in clips) for clips in found) if as_float else found
    return Side(f"opengait {workers} workers{AS_FLOAT * as_float}", batches, found.close, device)


def sides(tree: Tree, case: Case, device: str, full: bool) -> list[Side]:
    """The contenders first: their workers are forked, which is best done before there are threads."""
    found = [opengait(tree, case, device, workers) for workers in (0, 1, 2)]
    found.append(opengait(tree, case, device, 0, as_float=True))
    for side in found:
        side.round(case._replace(batches=1, seconds=0.0))
        side.wall, side.cpu = [], []
    found += [ours(tree, case, device, DataConfig(), as_float) for as_float in (False, True)]
    if device == "cpu":
        found.append(ours(tree, case, device, DataConfig(engine="dali")))
    for residency in ("host", "device") if device == "cuda" else ("host",):
        if full or device == "cuda":
            found.append(ours(tree, case, device, DataConfig(residency=residency)))
    if full:
        found.append(ours(tree, case, device, DataConfig(threads=1)))
    return found


def measure(tree: Tree, case: Case, device: str, full: bool) -> list[dict]:
    contenders = sides(tree, case, device, full)
    try:
        for _ in range(case.rounds):
            for side in contenders:
                side.round(case)
    finally:
        for side in contenders:
            side.close()
    return [side.row() for side in contenders]


def headline_of(rows: list[dict]) -> dict[str, float]:
    """Frames per second, and over the fastest of the contender's settings."""
    speed = {row["side"]: row["frames_per_s"] for row in rows if "side" in row}
    found = {}
    for suffix in ("", AS_FLOAT):
        own = speed[f"ours auto mapped all threads{suffix}"]
        best = max(
            value
            for side, value in speed.items()
            if side.startswith("opengait") and side.endswith(AS_FLOAT) == bool(suffix)
        )
        key = "_as_float32" if suffix else ""
        found[f"pairs_vs_opengait_loader{key}"] = round(own / best, 2)
        found[f"frames_per_s{key}"] = own
        found[f"opengait_frames_per_s{key}"] = best
    return found


def show(row: dict) -> None:
    if "side" in row:
        low, high = row["frames_per_s_low_high"]
        cpu = row["cpu_us_per_frame"][0]
        print(f"{row['side']:<40} {row['frames_per_s']:>8,} frames/s ({low:,}-{high:,})  {cpu:7.2f} us CPU", flush=True)
    else:
        times = "  ".join(f"{key} {value[0]:.2f}" for key, value in row["us_per_frame"].items())
        print(f"{row['stage']:<40} us a frame, one thread: {times}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.split("\n\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="within a minute; the default")
    size.add_argument("--full", action="store_true", help="more rounds, more people, every setting: a minute or two")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the clips end (%(default)s)")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="keep the walkers here, or find them from last time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if not codec.compiled():
        raise UserError("benchmarks.data: the compiled extension is not there; run `make setup`")
    cv2.setNumThreads(1)  # OpenGait's arrays are small: with more threads its OpenCV is slower
    case = FULL if arguments.full else QUICK
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.tree or Path(temporary)
        if (folder / "packed").exists():
            root = folder / "tree" / "sequences"
            tree = Tree(root, sorted(p.name for p in root.iterdir()), PackedDataset.open(folder / "packed"))
        else:
            tree = make_tree(folder, PEOPLE[arguments.full])
        agreement = data_stages.compare(tree.dataset, case.batch, case.frames)
        print(json.dumps(agreement), flush=True)
        rows = measure(tree, case, arguments.device, arguments.full)
        rows += data_stages.stages(tree.dataset, case.batch, case.frames, rounds=5 if arguments.full else 3)
    for row in rows:
        show(row)
    headline = headline_of(rows)
    if arguments.json:
        result = {
            **envelope(headline, rows),
            "agreement": agreement,
            "device": arguments.device,
            "case": case._asdict(),
        }
        files.write_json(arguments.json, result)
    print(json.dumps(headline))
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
