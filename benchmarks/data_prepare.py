"""`gaitfast prepare`: frames a second, by layout and number of workers, and where the time of a core goes.

    python -m benchmarks.data_prepare --against CHECKOUT --json FILE

Walks of synthetic people are written as a tree of pickles and one of pictures. Each measurement is a fresh process,
timed from the listing of the tree to the finished dataset, without the interpreter's imports; CHECKOUT, another
checkout of this project (git worktree), takes turns with this one and must pack the same frames.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.environment import envelope
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.data import codec, packed, safe_pickle, shards, sources
from gaitfast.data.walker_scene import CONDITIONS, render_walk, sample_walk

ROOT = Path(__file__).resolve().parent.parent
WALKS, LENGTH = 48, 109
LINKS = {"opengait": 16, "png": 2}
"""Every walk lies in the tree under so many names (hard links)."""
CHILD = """
import argparse, sys, time
from gaitfast.data import prepare
try:
    from gaitfast.data import codec
    codec.compiled()  # imports PyTorch, here and not within what is timed
except ImportError:
    pass
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    prepare.configure(parser)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    code = prepare.main(arguments)
    print("seconds", time.perf_counter() - begun)
    sys.exit(code)
"""


def write_trees(folder: Path) -> list[np.ndarray]:
    """Both trees; returns the walks."""
    options = {"azimuth": 45, "height": 1.5, "nuisances": "mild", "frames": LENGTH}
    walks = [render_walk(sample_walk(0, i, 0, condition=CONDITIONS[i % 3], **options)) for i in range(WALKS)]
    for i, frames in enumerate(walks):
        place = [folder / layout / f"{i:03d}" / "nm" / "000" for layout in LINKS]
        for each in place:
            each.mkdir(parents=True)
        (place[0] / "000.pkl").write_bytes(pickle.dumps(frames))
        for t, frame in enumerate(frames):
            raw = cv2.resize(frame, (160, 160), interpolation=cv2.INTER_NEAREST)  # about what a detector cuts out
            cv2.imwrite(str(place[1] / f"{t:03d}.png"), raw)
        for layout, each in zip(LINKS, place):
            for copy in range(1, LINKS[layout]):
                other = folder / layout / f"{i:03d}" / "nm" / f"{copy:03d}"
                other.mkdir()
                for file in each.iterdir():
                    os.link(file, other / file.name)
    return walks


def packing_seconds(checkout: Path, folder: Path, layout: str, workers: int) -> tuple[float, packed.PackedDataset]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    (folder / "child.py").write_text(CHILD)
    options = ["--layout", layout, "--workers", str(workers)]
    done = subprocess.run(
        [sys.executable, str(folder / "child.py"), str(folder / layout), str(out), *options],
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split("seconds")[-1]), packed.PackedDataset.open(out)


def stages(folder: Path, walks: list[np.ndarray]) -> dict[str, float]:
    """Microseconds a frame of one core, medians."""
    paths = sorted((folder / "opengait").rglob("000.pkl"))[:WALKS]
    pictures = sorted((folder / "png").rglob("*.png"))[: 5 * LENGTH]
    data = [path.read_bytes() for path in paths]
    chunks = [codec.compress(frames) for frames in walks]

    def write() -> None:
        writer = shards.ShardWriter(folder / "shard")
        for each in chunks:
            writer.append(each)
        writer.close()

    bodies: dict[str, tuple[Callable[[], object], int]] = {
        "read pickle": (lambda: [path.read_bytes() for path in paths], WALKS * LENGTH),
        "interpret pickle": (lambda: [safe_pickle.loads(each) for each in data], WALKS * LENGTH),
        "compress": (lambda: [codec.compress(frames) for frames in walks], WALKS * LENGTH),
        "compress with lz4": (lambda: [codec.compress(frames, "plain") for frames in walks], WALKS * LENGTH),
        "write and sync": (write, WALKS * LENGTH),
        "checksum of the shard": (lambda: shards.checksum(folder / "shard"), WALKS * LENGTH),
        "decode and normalise picture": (
            lambda: sources.read_pictures(folder / "png", ("000/nm/000",), False),
            LENGTH,
        ),
        "read picture": (lambda: [path.read_bytes() for path in pictures], len(pictures)),
    }
    taken: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(5):
        for name, (body, frames) in bodies.items():
            begun = time.perf_counter()
            body()
            taken[name].append((time.perf_counter() - begun) / frames * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--layouts", nargs="+", choices=sorted(LINKS), default=list(LINKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    sides = {"this": ROOT, **({"before": arguments.against.resolve()} if arguments.against else {})}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        walks = write_trees(folder)
        for layout in arguments.layouts:
            for workers in arguments.workers:
                seconds: dict[str, list[float]] = {side: [] for side in sides}
                row: dict = {"layout": layout, "workers": workers}
                for _ in range(arguments.rounds):
                    for side, checkout in sides.items():
                        taken, dataset = packing_seconds(checkout, folder, layout, workers)
                        seconds[side].append(taken)
                        row["frames"] = dataset.num_frames
                        row[f"bytes_per_frame_{side}"] = round(
                            sum(record["bytes"] for record in dataset.facts["shards"]) / dataset.num_frames, 1
                        )
                        same = hash(dataset.sequence(7).tobytes())
                        assert same == row.setdefault("content", same), "the checkouts pack different frames"
                del row["content"]
                for side, values in seconds.items():
                    row[f"frames_per_s_{side}"] = round(row["frames"] / statistics.median(values))
                    row[f"seconds_{side}"] = [round(value, 2) for value in sorted(values)]
                rows.append(row)
                print(json.dumps(row), flush=True)
        rows.append({"stages_us_per_frame": stages(folder, walks)})
        print(json.dumps(rows[-1]))
    if arguments.json:
        headline = {f"frames_per_s_{row['layout']}_{row['workers']}": row["frames_per_s_this"] for row in rows[:-1]}
        files.write_json(arguments.json, envelope(headline, rows))
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
