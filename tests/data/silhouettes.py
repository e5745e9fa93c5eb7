"""Small packed datasets of drawn figures, quick to make and different in every frame."""

import json
from pathlib import Path

import cv2
import numpy as np

from gaitfast.data import packed, shards


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


def write_dataset(path: Path, lengths: list[int], shard_files: int = 1) -> packed.PackedDataset:
    """One sequence of each length, the last two of them people of the test set."""
    names = [f"{i:03d}" for i in range(len(lengths))]
    sequences = [(name, "nm-01", "000", walk(i, n)) for i, (name, n) in enumerate(zip(names, lengths))]
    partition = {"TRAIN_SET": names[:-2], "TEST_SET": names[-2:]}
    dataset = packed.write(path, sequences, name="figures", partition=partition)
    return dataset if shard_files == 1 else _cut_shard(dataset, sequences, shard_files)


def _cut_shard(dataset: packed.PackedDataset, sequences: list, count: int) -> packed.PackedDataset:
    """The dataset anew, in `count` shards."""
    records = []
    for k, part in enumerate(np.array_split(np.arange(len(sequences)), count)):
        file = dataset.path / f"shard-{k:05d}.safetensors"
        writer = shards.ShardWriter(file)
        for i in part:
            writer.append(sequences[i][3])
        writer.close()
        size, digest = file.stat().st_size, shards.checksum(file)
        records.append(packed.ShardRecord(file.name, size, digest, len(part), writer.num_frames))
    facts = {**dataset.facts, "shards": [record._asdict() for record in records]}
    shards.write_text(dataset.path / "dataset.json", json.dumps(facts))
    return packed.PackedDataset.open(dataset.path)
