"""How else frames could lie on the disk: `python -m benchmarks.data_alternatives [--device cuda] --json FILE`.

Clips of 30 frames, decoded to uint8 on the device: film strips (the frames of a clip one below the other) as PNG and as
lossless JPEG 2000 through DALI's fn.decoders.image, whole clips as .npy files through fn.readers.numpy (on a GPU with
GPUDirect Storage where the system has it), and the packed dataset's LZ4 chunks: through fn.decoders.inflate on a GPU,
through the compiled operator on a CPU. A strip or a file holds consecutive frames only; s_G takes any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import pipeline_def, types

from benchmarks.environment import envelope
from benchmarks.timing import Timing
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import AugmentConfig, DataConfig, UserError
from gaitfast.data import compiled, dali, packed, walkers
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import make_plan
from gaitfast.data.residency import MappedChunks

FRAMES, BATCH = 30, 64
DRAIN, CALLS = 3, 5
"""DALI reads ahead: so many calls are made before so many are timed."""
LOSSLESS = {".png": [], ".jp2": [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]}


def make_clips(folder: Path) -> tuple[PackedDataset, np.ndarray]:
    """A packed dataset of BATCH walks of FRAMES frames, and its frames uint8 (BATCH, FRAMES, 64, 64)."""
    walkers.generate(folder / "tree", BATCH // 4, 0, 4, (FRAMES, FRAMES), seed=1, nuisances="mild")
    found = sorted((folder / "tree" / "sequences").rglob("*.pkl"))
    sequences = [(*file.parts[-4:-1], np.load(file, allow_pickle=True)) for file in found]
    return packed.write(folder / "packed", sequences), np.stack([frames for *_, frames in sequences])


def film_strips(folder: Path, clips: np.ndarray, suffix: str, device: str, threads: int) -> tuple[Callable, int]:
    """A call that decodes all clips, and the bytes that they take."""
    strips = []
    for clip in clips:
        encoded = cv2.imencode(suffix, clip.reshape(-1, 64), LOSSLESS[suffix])[1]
        assert (cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE) == clip.reshape(-1, 64)).all(), f"{suffix} is not lossless"
        strips.append(encoded.ravel())

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=0 if device == "cuda" else None)
    def strips_of():
        data = fn.external_source(lambda: [strips], num_outputs=1, no_copy=True)[0]
        where = "mixed" if device == "cuda" else "cpu"
        return fn.decoders.image(data, device=where, output_type=types.GRAY)

    pipeline = strips_of()
    return pipeline.run, sum(map(len, strips))


def numpy_files(folder: Path, clips: np.ndarray, device: str, threads: int) -> tuple[Callable, int]:
    names = [f"{i}.npy" for i in range(BATCH)]
    for name, clip in zip(names, clips):
        np.save(folder / name, clip)

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=0 if device == "cuda" else None)
    def arrays():
        return fn.readers.numpy(device="gpu" if device == "cuda" else "cpu", file_root=str(folder), files=names)

    pipeline = arrays()
    return pipeline.run, clips.nbytes


def chunks(dataset: PackedDataset, device: str, threads: int) -> tuple[Callable, int]:
    names = ("affine", "perspective", "flip", "part_dilate", "part_blur")
    config = DataConfig(frames=FRAMES, augment=AugmentConfig(**dict.fromkeys(names, 0.0)))
    (clip, _) = make_plan(dataset, config, seed=0, batch=BATCH).clips(
        make_plan(dataset, config, seed=0, batch=BATCH).select(0)
    )
    store = MappedChunks(dataset)
    size = int(store.gather(clip.frames.ravel())[1].sum())
    if device == "cpu":
        return lambda: compiled.augment(dataset, clip, threads), size

    def read() -> tuple:
        data, sizes = store.gather(clip.frames.ravel())
        sizes = sizes.reshape(clip.frames.shape)
        return list(data.split(sizes.sum(axis=1).tolist())), sizes.astype(np.int32)

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=0)
    def inflated():
        data, sizes = fn.external_source(read, num_outputs=2)
        return dali.inflate(data.gpu(), sizes)

    pipeline = inflated()
    return pipeline.run, size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_alternatives", description=__doc__.split(":")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device, threads = arguments.device, len(os.sched_getaffinity(0))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset, clips = make_clips(folder)
        sides: dict[str, tuple[Callable, int]] = {"LZ4 chunks": chunks(dataset, device, threads)}
        for suffix in LOSSLESS:
            sides[f"film strips {suffix}"] = film_strips(folder, clips, suffix, device, threads)
        sides["readers.numpy"] = numpy_files(folder, clips, device, threads)
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, (call, _) in sides.items():
                for _ in range(DRAIN):
                    call()
                started = time.perf_counter()
                for _ in range(CALLS):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
                taken[name].append((time.perf_counter() - started) / (CALLS * BATCH * FRAMES) * 1e6)
                time.sleep(0.1)  # what DALI makes ahead is made now, not during the next side's turn
    rows = [
        {
            "storage": name,
            "us_per_frame": [round(value, 3) for value in Timing.of(taken[name])],
            "bytes_per_frame": round(size / (BATCH * FRAMES)),
        }
        for name, (_, size) in sides.items()
    ]
    for row in rows:
        print(
            f"{row['storage']:<20} {row['us_per_frame'][0]:8.2f} us a frame  {row['bytes_per_frame']:6} bytes a frame"
        )
    headline = {
        f"lz4_vs_{row['storage'].split()[-1].strip('.')}": round(row["us_per_frame"][0] / rows[0]["us_per_frame"][0], 2)
        for row in rows[1:]
    }
    if arguments.json:
        files.write_json(arguments.json, {**envelope(headline, rows), "device": device, "threads": threads})
    print(json.dumps(headline))
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
