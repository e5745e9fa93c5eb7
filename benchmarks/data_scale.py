"""The data engine at the size of GREW and at ten times that: start, memory, sampling, throughput.

    python -m benchmarks.data_scale --sequences 128671 --json FILE

Walks of synthetic people are rendered and compressed once, and repeated under new names until there are so many
sequences: the writer, the files and their bytes are those of `gaitfast prepare`, one shard for 1/128 of the sequences
(9 GB at GREW's size). The dataset of `--times` that has every shard under so many names (hard links), so its readers
map and read real bytes, which lie on the disk and in the page cache once; with `--links` the first dataset is made like
that too, of a tenth of the bytes, say. A small dataset stands beside them. Every figure is of a fresh process; the
folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.environment import envelope
from benchmarks.memory import in_child, status_kib
from gaitfast import files, randomness
from gaitfast.cli import user_errors
from gaitfast.config import ClipConfig, DataConfig
from gaitfast.data import codec, packed, packing, shards
from gaitfast.data.pipeline import build_loader
from gaitfast.data.sampling import PeopleSampler, Sampler
from gaitfast.data.walker_scene import CONDITIONS, render_walk, sample_walk

DRAWN = 96
"""Walks that are rendered."""
FRAMES = (60, 159)
"""Shortest and longest: 109 frames on average, as GREW has."""
PER_SUBJECT = 5
SMALL = 2_000
PAIRS, PEOPLE, EACH = 64, 32, 4
BATCHES = 12


def drawn_walks() -> list[codec.Chunks]:
    """Compressed walks of people who differ."""
    lengths = np.linspace(*FRAMES, DRAWN).astype(int)
    options = {"azimuth": 45, "height": 1.5, "nuisances": "mild"}
    walks = (
        sample_walk(0, i, 0, condition=CONDITIONS[i % 3], frames=int(length), **options)
        for i, length in enumerate(np.random.default_rng(0).permutation(lengths))
    )
    return [codec.compress(render_walk(walk)) for walk in walks]


def keys(sequences: int) -> list[tuple[str, str, str]]:
    """(id, type, view) in order; a view of its own for each sequence, as in GREW."""
    return [(f"{i // PER_SUBJECT:07d}train", "00", f"{i * 7919 % 10**8:08d}_{i:07d}") for i in range(sequences)]


def write(folder: Path, sequences: int, of: int, walks: list[codec.Chunks]) -> packed.PackedDataset:
    """A dataset of the walks in turn, in shards as `gaitfast prepare` would make them for `of` sequences."""
    folder.mkdir()
    size = max(packing.MIN_SEQUENCES, -(-of // packing.MAX_SHARDS))
    records = []
    for number, first in enumerate(range(0, sequences, size)):
        path = folder / f"shard-{number:05d}.safetensors"
        writer = shards.ShardWriter(path)
        count = min(size, sequences - first)
        for i in range(first, first + count):
            writer.append(walks[i % DRAWN])
        writer.close()
        frames = writer.num_frames
        records.append(packed.ShardRecord(path.name, path.stat().st_size, shards.checksum(path), count, frames))
    lengths = np.array([len(walk.size) for walk in walks])[np.arange(sequences) % DRAWN]
    return finish(folder, records, lengths)


def finish(folder: Path, records: list[packed.ShardRecord], lengths: np.ndarray) -> packed.PackedDataset:
    """Index and dataset.json."""
    count = len(lengths)
    index = packed.write_index(folder, keys(count), lengths, np.full(count, packed.TRAIN, np.uint8))
    partition = {"train": count, "test": 0, "probe": 0}
    packed.write_facts(folder, name="scale", protocol="none", index=index, records=records, partition=partition)
    return packed.PackedDataset.open(folder)


def repeat(source: packed.PackedDataset, folder: Path, times: int) -> packed.PackedDataset:
    """The dataset of all shards of `source`, `times` over."""
    folder.mkdir()
    records = []
    for number, record in enumerate(source.facts["shards"] * times):
        name = f"shard-{number:05d}.safetensors"
        os.link(source.path / record["file"], folder / name)
        records.append(packed.ShardRecord(**{**record, "file": name}))
    return finish(folder, records, np.tile(source.lengths, times))


# --- measurements, each in a process of its own -----------------------------------------------------------------------

START = """
import time
begun = time.perf_counter()
from gaitfast.config import DataConfig
from gaitfast.data.packed import PackedDataset
from gaitfast.data.pipeline import build_loader
import sys
imported = time.perf_counter()
dataset = PackedDataset.open(sys.argv[1])
opened = time.perf_counter()
loader = build_loader(dataset, DataConfig(path=sys.argv[1]), seed=0, batch=int(sys.argv[2]))
next(loader)
print(imported - begun, opened - imported, time.perf_counter() - opened)
loader.close()
"""


def start(path: Path) -> dict:
    """Seconds from the command line to the first batch, and its parts as the process sees them."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", START, str(path), str(PAIRS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        whole = time.perf_counter() - begun
        process.stdout.read()
    imports, opening, first = map(float, line.split())
    return {"imports": imports, "open": opening, "first_batch": first, "without_imports": opening + first, "all": whole}


def batches(path: str) -> dict:
    """Frames/s of the pretraining loader after the first batches; and MiB of the process then: all, of it mapped files,
    and what is neither mapped nor was there before the dataset was opened."""
    before = status_kib("RssAnon")
    dataset = packed.PackedDataset.open(path)
    loader = build_loader(dataset, DataConfig(path=path), seed=1, batch=PAIRS)
    for _ in range(4):
        next(loader)
    begun = time.perf_counter()
    for _ in range(BATCHES):
        batch = next(loader)
    taken = time.perf_counter() - begun
    found = {"resident": status_kib("VmRSS"), "mapped": status_kib("RssFile"), "beyond": status_kib("RssAnon") - before}
    loader.close()
    frames = BATCHES * PAIRS * (batch.clip_e.shape[1] + batch.clip_g.shape[1])
    return {"rate": frames / taken, "memory": {key: round(value / 1024, 1) for key, value in found.items()}}


def picking(path: str) -> dict:
    """Microseconds to read, check and inflate a frame, in batches drawn as above, and to draw a batch, with the
    compiled generator and with NumPy's: medians. In milliseconds: the first step of an epoch, whose order is drawn with
    it, and what balanced sampling prepares once."""
    dataset = packed.PackedDataset.open(path)
    numbers = dataset.split("train")
    plain = Sampler(dataset.starts, numbers, DataConfig(path=path), seed=3, batch=PAIRS)
    found = {"epoch_ms": timed(lambda: plain(0)) / 1e3}
    begun = time.perf_counter()
    people = PeopleSampler(
        dataset.starts, dataset.subject, numbers, ClipConfig(path=path), seed=3, batch=(PEOPLE, EACH)
    )
    found["people_made_ms"] = (time.perf_counter() - begun) * 1e3
    wanted = [np.concatenate([s.frames_e.ravel(), s.frames_g.ravel()]) for s in map(plain, range(4 * BATCHES))]
    reads = [timed(lambda frames=frames: dataset.frames(frames)) / len(frames) for frames in wanted]
    found["read_us"] = statistics.median(reads[4:])
    compiled = randomness.compiled
    try:
        for name, has in (("", compiled()), ("_numpy", False)):
            randomness.compiled = lambda has=has: has
            for kind, select in (("pairs", plain), ("people", people)):
                taken = [timed(lambda step=step, select=select: select(step)) for step in range(1, 201)]
                found[f"{kind}_us{name}"] = statistics.median(taken)
    finally:
        randomness.compiled = compiled
    return {key: round(value, 2) for key, value in found.items()}


def timed(call: Callable[[], object]) -> float:
    """Microseconds."""
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e6


def spread(values: list[float], digits: int | None = None) -> dict:
    ordered = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {key: round(value, digits) for key, value in ordered.items()}


def measured(folders: dict[str, Path], rounds: int) -> Iterator[dict]:
    """One row per dataset; they are measured in turn."""
    taken: dict[str, list[tuple[dict, dict, dict]]] = {name: [] for name in folders}
    for _ in range(rounds):
        for name, path in folders.items():
            taken[name].append((start(path), in_child(batches, str(path)), in_child(picking, str(path))))
    for name, path in folders.items():
        starts, loaded, picked = zip(*taken[name])
        dataset = packed.PackedDataset.open(path)
        yield {
            "dataset": name,
            "sequences": dataset.num_sequences,
            "frames": dataset.num_frames,
            "shards": len(dataset.facts["shards"]),
            "gib": round(sum(record["bytes"] for record in dataset.facts["shards"]) / 2**30, 2),
            "start_seconds": {key: spread([each[key] for each in starts], 3) for key in starts[0]},
            "memory_mib": loaded[-1]["memory"],
            "loader_frames_per_s": spread([each["rate"] for each in loaded]),
            "picking": {key: spread([each[key] for each in picked], 2) for key in picked[0]},
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sequences", type=int, default=128_671, help="of the larger dataset; default: GREW's")
    parser.add_argument("--times", type=int, default=10, help="the largest dataset has so many times that")
    parser.add_argument("--links", type=int, default=1, help="names under which a shard of the larger dataset lies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the datasets are written (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        place = Path(temporary)
        folders = {name: place / name for name in ("small", "grew", "times")}
        begun = time.perf_counter()
        walks = drawn_walks()
        write(folders["small"], SMALL, SMALL, walks)
        source = write(folders["grew"], arguments.sequences // arguments.links, arguments.sequences, walks)
        if arguments.links > 1:
            source = repeat(source, place / "linked", arguments.links)
            folders["grew"] = source.path
        repeat(source, folders["times"], arguments.times)
        print(f"written in {time.perf_counter() - begun:.0f} s", flush=True)
        rows = list(measured(folders, arguments.rounds))
    for row in rows:
        print(json.dumps(row))
    if arguments.json:
        small, large, larger = rows
        headline = {
            "first_batch_seconds": large["start_seconds"]["without_imports"]["median"],
            "first_batch_seconds_with_imports": large["start_seconds"]["all"]["median"],
            "beyond_mapped_mib": large["memory_mib"]["beyond"],
            "throughput_vs_small": round(
                large["loader_frames_per_s"]["median"] / small["loader_frames_per_s"]["median"], 3
            ),
            "throughput_of_times_vs_small": round(
                larger["loader_frames_per_s"]["median"] / small["loader_frames_per_s"]["median"], 3
            ),
        }
        files.write_json(arguments.json, envelope(headline, rows))
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
