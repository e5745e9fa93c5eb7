"""The data engine at the size of GREW and at ten times that: start, memory, sampling, throughput.

    python -m benchmarks.data_scale --sequences 128671 --json FILE

Walks of synthetic people are rendered and compressed once, and repeated under new names until there are so many
sequences: the writer, the files and their bytes are those of `gaitfast prepare`, one shard for 1/128 of the sequences
(9 GB at GREW's size). The dataset of `--times` that has every shard under so many names (hard links), so its readers
map and read real bytes, which lie on the disk and in the page cache once. A small dataset stands beside them. Every
figure is of a fresh process; the folder is removed at the end.
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

DRAWN = 192
"""Walks that are rendered."""
FRAMES = (60, 159)
"""Shortest and longest: 109 frames on average, as GREW has."""
PER_SUBJECT = 5
SMALL = 2_000
PAIRS, PEOPLE, EACH = 64, 32, 4
ROUNDS, BATCHES = 5, 12


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


def write(folder: Path, sequences: int, walks: list[codec.Chunks]) -> packed.PackedDataset:
    """A dataset of the walks in turn, in the shards that `gaitfast prepare` would make."""
    folder.mkdir()
    size = max(packing.MIN_SEQUENCES, -(-sequences // packing.MAX_SHARDS))
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


def memory(path: str) -> dict:
    """MiB of this process after some batches: all, of it mapped files, and the rest beyond what it began with."""
    before = status_kib("RssAnon")
    dataset = packed.PackedDataset.open(path)
    loader = build_loader(dataset, DataConfig(path=path), seed=0, batch=PAIRS)
    for _ in range(BATCHES):
        next(loader)
    found = {"resident": status_kib("VmRSS"), "mapped": status_kib("RssFile"), "beyond": status_kib("RssAnon") - before}
    loader.close()
    return {key: round(value / 1024, 1) for key, value in found.items()}


def batches(path: str) -> float:
    """Frames/s of the pretraining loader, after the first batches."""
    dataset = packed.PackedDataset.open(path)
    loader = build_loader(dataset, DataConfig(path=path), seed=1, batch=PAIRS)
    for _ in range(4):
        next(loader)
    begun = time.perf_counter()
    for _ in range(BATCHES):
        batch = next(loader)
    taken = time.perf_counter() - begun
    loader.close()
    return BATCHES * PAIRS * (batch.clip_e.shape[1] + batch.clip_g.shape[1]) / taken


def reading(path: str) -> float:
    """Microseconds to read, check and inflate a frame, in batches drawn as above."""
    dataset = packed.PackedDataset.open(path)
    select = Sampler(dataset.starts, dataset.split("train"), DataConfig(path=path), seed=2, batch=PAIRS)
    wanted = [np.concatenate([s.frames_e.ravel(), s.frames_g.ravel()]) for s in map(select, range(4 * BATCHES))]
    for numbers in wanted[:4]:
        dataset.frames(numbers)
    return statistics.median(
        timed(lambda numbers=numbers: dataset.frames(numbers)) / len(numbers) for numbers in wanted
    )


def timed(call: Callable[[], object]) -> float:
    """Microseconds."""
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e6


def sampling(path: str) -> dict:
    """Microseconds a step, median over 400; NumPy's without the compiled generator; and of the first step of an epoch,
    in milliseconds, whose order is drawn with it."""
    dataset = packed.PackedDataset.open(path)
    numbers, config = dataset.split("train"), ClipConfig(path=path)
    plain = Sampler(dataset.starts, numbers, DataConfig(path=path), seed=3, batch=PAIRS)
    begun = time.perf_counter()
    people = PeopleSampler(dataset.starts, dataset.subject, numbers, config, seed=3, batch=(PEOPLE, EACH))
    made = (time.perf_counter() - begun) * 1e3
    found = {"people_made_ms": round(made, 1), "epoch_ms": round(timed(lambda: plain(0)) / 1e3, 1)}
    compiled = randomness.compiled
    try:
        for name, has in (("", compiled()), ("_numpy", False)):
            randomness.compiled = lambda has=has: has
            for kind, select in (("pairs", plain), ("people", people)):
                taken = sorted(timed(lambda step=step, select=select: select(step)) for step in range(1, 401))
                found[f"{kind}_us{name}"] = round(statistics.median(taken), 1)
    finally:
        randomness.compiled = compiled
    return found


def measured(folders: dict[str, Path]) -> Iterator[dict]:
    """One row per dataset; what is compared is measured in turn."""
    starts: dict[str, list] = {name: [] for name in folders}
    rates: dict[str, list] = {name: [] for name in folders}
    reads: dict[str, list] = {name: [] for name in folders}
    for _ in range(ROUNDS):
        for name, path in folders.items():
            starts[name].append(start(path))
            rates[name].append(in_child(batches, str(path)))
            reads[name].append(in_child(reading, str(path)))
    for name, path in folders.items():
        dataset = packed.PackedDataset.open(path)
        yield {
            "dataset": name,
            "sequences": dataset.num_sequences,
            "frames": dataset.num_frames,
            "shards": len(dataset.facts["shards"]),
            "gib": round(sum(record["bytes"] for record in dataset.facts["shards"]) / 2**30, 2),
            "start_seconds": {
                key: round(statistics.median(taken[key] for taken in starts[name]), 3) for key in starts[name][0]
            },
            "first_batch_worst": round(max(taken["without_imports"] for taken in starts[name]), 3),
            "memory_mib": in_child(memory, str(path)),
            "loader_frames_per_s": {
                key: round(choose(rates[name]))
                for key, choose in (("median", statistics.median), ("low", min), ("high", max))
            },
            "read_us_per_frame": {
                key: round(choose(reads[name]), 3)
                for key, choose in (("median", statistics.median), ("low", min), ("high", max))
            },
            "sampling": in_child(sampling, str(path)),
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sequences", type=int, default=128_671, help="of the larger dataset; default: GREW's")
    parser.add_argument("--times", type=int, default=10, help="the largest dataset has so many times that")
    parser.add_argument("--folder", type=Path, help="where the datasets are written (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="write the datasets to --folder, or take what lies there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        place = arguments.folder if arguments.keep else Path(temporary)
        folders = {name: place / name for name in ("small", "grew", "times")}
        if not folders["times"].is_dir():
            begun = time.perf_counter()
            walks = drawn_walks()
            write(folders["small"], SMALL, walks)
            repeat(write(folders["grew"], arguments.sequences, walks), folders["times"], arguments.times)
            print(f"written in {time.perf_counter() - begun:.0f} s", flush=True)
        if arguments.keep and not arguments.json:
            return 0
        rows = list(measured(folders))
    for row in rows:
        print(json.dumps(row))
    if arguments.json:
        small, large, larger = rows
        headline = {
            "first_batch_seconds": large["start_seconds"]["without_imports"],
            "first_batch_seconds_with_imports": large["start_seconds"]["all"],
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
