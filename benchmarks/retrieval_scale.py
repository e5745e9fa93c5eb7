"""A search through a gallery file that is mapped, not loaded.

    python -m benchmarks.retrieval_scale --items N --json FILE

The file (safetensors, one tensor `features`) is written in pieces and removed at the end. A sample of the answers is
compared with float64 distances to the whole gallery. The plan for a million items is in docs/retrieval.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import envelope
from benchmarks.memory import extra_memory
from benchmarks.retrieval import rates
from benchmarks.retrieval_check import float64_distances
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.retrieval import open_features, search

CHANNELS, PARTS = 256, 16
PIECE = 10_000  # rows written together
DRAWN = 10  # pieces of independent values
TYPES = {"float16": "F16", "float32": "F32"}


@lru_cache(maxsize=DRAWN)
def drawn(seed: int) -> Tensor:
    """Noise of a piece, int8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (PIECE, CHANNELS * PARTS), dtype=torch.int8, generator=generator)


def piece(number: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows of the gallery: a common feature plus noise; the same on every call.

    To draw millions of rows would take longer than to search them: few pieces are drawn, the others are these with
    their values moved along, which are as far from each other as drawn ones.
    """
    common = torch.randn(CHANNELS * PARTS, generator=torch.Generator().manual_seed(DRAWN)).to(dtype)
    noise = drawn(number % DRAWN)[:rows].roll(number // DRAWN * 37, dims=1)
    return noise.to(dtype).mul_(1 / 64).add_(common).view(rows, CHANNELS, PARTS)


def write_gallery(path: Path, items: int, kind: str) -> None:
    """A safetensors file without ever holding more than a piece of it."""
    dtype = getattr(torch, kind)
    size = items * CHANNELS * PARTS * dtype.itemsize
    entry = {"dtype": TYPES[kind], "shape": [items, CHANNELS, PARTS], "data_offsets": [0, size]}
    header = json.dumps({"features": entry}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, items, PIECE):
            piece(start // PIECE, min(PIECE, items - start), dtype).numpy().tofile(file)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval_scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--probes", type=int, default=1_000)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--type", choices=sorted(TYPES), default="float16")
    parser.add_argument("--folder", type=Path, help="where the gallery file is written (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    speed = rates()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "gallery.safetensors"
        started = time.perf_counter()
        write_gallery(path, arguments.items, arguments.type)
        written = time.perf_counter() - started
        gallery = open_features(path, "features")
        probes = piece(1007 * DRAWN + 7, arguments.probes, getattr(torch, arguments.type))
        search(probes[:40], gallery[:80], arguments.k)
        answers, taken = [], []

        def call() -> None:
            begun = time.perf_counter()
            answers.append(search(probes, gallery, arguments.k))
            taken.append(time.perf_counter() - begun)

        memory = extra_memory(call)
        distances, indices = answers[0]
        rows = torch.linspace(0, len(probes) - 1, 2).long()
        true = float64_distances(probes[rows], gallery, "cosine").sort(dim=1, stable=True)
        assert torch.equal(true.values[:, : arguments.k].float(), distances[rows]), "distances"
        assert torch.equal(true.indices[:, : arguments.k], indices[rows]), "neighbours"
        operations = 2 * arguments.items * arguments.probes * CHANNELS * PARTS
        row = {
            "items": arguments.items,
            "probes": arguments.probes,
            "k": arguments.k,
            "type": arguments.type,
            "file_gib": round(path.stat().st_size / 2**30, 2),
            "write_seconds": round(written, 1),
            "seconds": round(taken[0], 2),
            "tflops": round(operations / taken[0] / 1e12, 3),
            "read_gb_per_s": round(path.stat().st_size / taken[0] / 1e9, 2),
            "extra_mib": {key: round(value, 1) for key, value in memory._asdict().items()},
        }
    print(json.dumps(row))
    if arguments.json:
        headline = {"seconds": row["seconds"], "extra_mib": row["extra_mib"]["anonymous"]}
        files.write_json(arguments.json, {**envelope(headline, [row]), "rates": speed})
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
