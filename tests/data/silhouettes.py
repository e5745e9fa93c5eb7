"""Small packed datasets of drawn figures, quick to make and different in every frame."""

import json
from pathlib import Path

import cv2
import numpy as np

from gaitfast.data import codec, packed, shards


def figure(person: int, phase: float) -> np.ndarray:
    """One anti-aliased figure, uint8 (64, 64), off the centre and with both legs apart, so that no flip is a no-op."""
    frame = np.zeros((64, 64), np.uint8)
    swing = np.sin(phase)
    x = 29 + person % 5
    cv2.ellipse(frame, (x, 7), (4 + person % 3, 6), 0, 0, 360, 255, -1, cv2.LINE_AA)
    cv2.ellipse(frame, (x, 26), (6 + person % 4, 14), 0, 0, 360, 255, -1, cv2.LINE_AA)
    for side in (1, -1):
        cv2.line(frame, (x, 36), (round(x + side * 12 * swing), 62), 255, 5, cv2.LINE_AA)
    cv2.line(frame, (x, 18), (round(x + 16 * swing), 34), 255, 3, cv2.LINE_AA)
    return frame


def walk(person: int, frames: int) -> np.ndarray:
    """uint8 (frames, 64, 64)."""
    return np.stack([figure(person, 0.4 * t + person) for t in range(frames)])


def write_in_shards(path, sequences, size, **options):
    """As `packed.write`, in shards of `size` sequences, as `gaitfast prepare` would."""
    dataset = packed.write(path, sequences, **options)
    ordered = sorted(sequences, key=lambda s: s[:3])
    facts = json.loads((path / "dataset.json").read_text())
    facts["shards"] = []
    (path / "shard-00000.safetensors").unlink()
    for number, begin in enumerate(range(0, len(ordered), size)):
        file = path / f"shard-{number:05d}.safetensors"
        writer = shards.ShardWriter(file)
        group = ordered[begin : begin + size]
        for *_, frames in group:
            writer.append(codec.compress(frames))
        writer.close()
        record = (file.name, file.stat().st_size, shards.checksum(file), len(group), sum(len(s[3]) for s in group))
        facts["shards"].append(packed.ShardRecord(*record)._asdict())
    (path / "dataset.json").write_text(json.dumps(facts))
    assert dataset.num_frames == sum(shard["frames"] for shard in facts["shards"])
    return path


def write_dataset(path: Path, lengths: list[int], shard_files: int = 1) -> packed.PackedDataset:
    """One sequence of each length, the last two of them people of the test set."""
    names = [f"{i:03d}" for i in range(len(lengths))]
    sequences = [(name, "nm-01", "000", walk(i, n)) for i, (name, n) in enumerate(zip(names, lengths))]
    partition = {"TRAIN_SET": names[:-2], "TEST_SET": names[-2:]}
    each = -(-len(lengths) // shard_files)
    write_in_shards(path, sequences, each, name="figures", partition=partition)
    return packed.PackedDataset.open(path)
