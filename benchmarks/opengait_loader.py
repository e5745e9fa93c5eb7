"""The contender of benchmarks/data.py: pairs of augmented clips as OpenGait's loader would make them, in plain PyTorch.

Own writing after OpenGait's behaviour (its DA4GaitSSB recipe): one pickle per sequence, unpickled whole; DataLoader
workers that unpickle and pick frames; random parameters and OpenCV, frame by frame, on the training process's thread;
grey levels divided to float64, and so handed over.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gaitfast import randomness
from gaitfast.config import AugmentConfig
from gaitfast.data import augment
from gaitfast.data.augment import KERNELS

SIZE, CUT = 64, 10


class Drawn(NamedTuple):
    """The random parameters of one clip; None: not drawn."""

    affine: tuple[np.ndarray, np.ndarray] | None
    """Source and target points, float64 (3, 2) each."""
    perspective: tuple[np.ndarray, np.ndarray] | None
    """Ends (left, right) of the top and of the bottom side, float64 (2,) each."""
    flip: bool
    dilate: tuple[int, int, int] | None
    """Number in KERNELS, first row, row behind the last."""
    blur: tuple[int, int] | None


def draw(config: AugmentConfig) -> Drawn:
    """By Python's random numbers, as OpenGait draws."""

    def rows() -> tuple[int, int]:
        return random.randint(*config.part_top), random.randint(*config.part_bottom)

    affine = perspective = dilate = None
    if random.random() < config.affine:
        affine = tuple(points[0] for points in augment.affine_points(np.array([[random.random() for _ in range(12)]])))
    if random.random() < config.perspective:
        sides = augment.perspective_sides(np.array([[random.random() for _ in range(4)]]))
        perspective = tuple(side[0] for side in sides)
    flip = random.random() < config.flip
    if random.random() < config.part_dilate:
        dilate = random.randrange(len(KERNELS)), *rows()
    return Drawn(affine, perspective, flip, dilate, rows() if random.random() < config.part_blur else None)


def drawn_by_engine(config: AugmentConfig, *, seed: int, purpose: str, step: int, sample: np.ndarray) -> list[Drawn]:
    """What augment.draw_parameters draws, before it composes the geometry."""
    draws = randomness.uniform(seed, purpose, step, sample, 28)
    parameters = augment.draw_parameters(config, seed=seed, purpose=purpose, step=step, sample=sample, width=SIZE)
    source, target = augment.affine_points(draws[:, 5:17])
    top, bottom = augment.perspective_sides(draws[:, 17:21])
    found = []
    for i, row in enumerate(draws):
        dilate, blur = parameters.dilate_rows[i].tolist(), parameters.blur_rows[i].tolist()
        found.append(
            Drawn(
                (source[i], target[i]) if row[0] < config.affine else None,
                (top[i], bottom[i]) if row[1] < config.perspective else None,
                bool(parameters.flip[i]),
                (int(parameters.kernel[i]), *dilate) if any(dilate) else None,
                tuple(blur) if any(blur) else None,
            )
        )
    return found


# --- the transforms, of frames (T, 64, 64 or 44) ----------------------------------------------------------------------


def warp_affine(frames: np.ndarray, points: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    matrix = cv2.getAffineTransform(*(np.float32(p) for p in points))
    return np.stack([cv2.warpAffine(frame, matrix, (SIZE, SIZE)) for frame in frames])


def warp_perspective(frames: np.ndarray, sides: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    (top_left, top_right), (bottom_left, bottom_right) = sides
    corners = np.float32([[top_left, 0], [top_right, 0], [bottom_right, SIZE], [bottom_left, SIZE]])
    matrix = cv2.getPerspectiveTransform(corners, np.float32([[0, 0], [SIZE, 0], [SIZE, SIZE], [0, SIZE]]))
    return np.stack([cv2.warpPerspective(frame, matrix, (SIZE, SIZE)) for frame in frames])


def scale(frames: np.ndarray, cut: bool) -> np.ndarray:
    """The middle 44 columns if `cut`; grey levels to float64 in 0..1."""
    return (frames[..., CUT:-CUT] if cut else frames) / 255.0


def flip(frames: np.ndarray) -> np.ndarray:
    return frames[..., ::-1]


def dilate(frames: np.ndarray, drawn: tuple[int, int, int]) -> np.ndarray:
    """Frames in OpenCV's channel axis."""
    number, top, bottom = drawn
    kernel = KERNELS[number]
    element = cv2.getStructuringElement(getattr(cv2, f"MORPH_{kernel.shape}"), (kernel.width, kernel.height))
    result = np.ascontiguousarray(frames.transpose(1, 2, 0))
    strip = result[top:bottom]
    result[top:bottom] = cv2.dilate(strip, element).reshape(strip.shape)
    return result.transpose(2, 0, 1)


def blur(frames: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
    top, bottom = rows
    result = np.ascontiguousarray(frames.transpose(1, 2, 0))
    strip = result[top:bottom]
    result[top:bottom] = (cv2.GaussianBlur(strip, (3, 3), 0).reshape(strip.shape) > 0.2).astype(np.float64)
    return result.transpose(2, 0, 1)


def transform(frames: np.ndarray, drawn: Drawn, cut: bool) -> np.ndarray:
    """Frames uint8 (T, 64, 64) -> float64 (T, 64, 64 or 44) in 0..1."""
    if drawn.affine is not None:
        frames = warp_affine(frames, drawn.affine)
    if drawn.perspective is not None:
        frames = warp_perspective(frames, drawn.perspective)
    frames = scale(frames, cut)
    if drawn.flip:
        frames = flip(frames)
    if drawn.dilate is not None:
        frames = dilate(frames, drawn.dilate)
    return frames if drawn.blur is None else blur(frames, drawn.blur)


def hand_over(clips: list[np.ndarray], device: str) -> torch.Tensor:
    """Clips float64 (T, 64, W) -> float64 (B, T, 64, W) on `device`."""
    return torch.from_numpy(np.stack(clips)).to(device)


# --- the loader -------------------------------------------------------------------------------------------------------


class Pickles(Dataset):
    """Sequences of a tree id/type/view/*.pkl."""

    def __init__(self, root: Path, subjects: list[str]) -> None:
        self.files = sorted(file for subject in subjects for file in (root / subject).rglob("*.pkl"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        with open(self.files[i], "rb") as file:
            return pickle.load(file)  # the benchmark's own files


class RandomBatches(Sampler):
    """Numbers of `batch` sequences, without end."""

    def __init__(self, length: int, batch: int) -> None:
        self._length, self._batch = length, batch

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield torch.randperm(self._length)[: self._batch].tolist()


def pick_frames(sequences: list[np.ndarray], count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each sequence `count` consecutive frames, and `count` in random order (fixed_ordered, fixed_unordered)."""
    ordered, unordered = [], []
    for frames in sequences:
        length = len(frames)
        tiled = np.tile(np.arange(length), -(-count // length))
        start = random.randint(0, len(tiled) - count)
        ordered.append(frames[tiled[start : start + count]])
        picked = np.random.choice(length, count, replace=length < count)  # noqa: NPY002 - as OpenGait, seeded by worker
        unordered.append(frames[picked])
    return ordered, unordered


def pairs(
    root: Path,
    subjects: list[str],
    config: AugmentConfig,
    *,
    batch: int,
    frames: int,
    workers: int,
    device: str = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs float64 (B, T, 64, 64) and (B, T, 64, 44) in 0..1, without end."""
    data = Pickles(root, subjects)
    assert len(data) >= batch, f"{root}: {len(data)} sequences for batches of {batch}"
    loader = DataLoader(
        data,
        batch_sampler=RandomBatches(len(data), batch),
        collate_fn=partial(pick_frames, count=frames),
        num_workers=workers,
    )
    for clips_e, clips_g in loader:
        yield (
            hand_over([transform(clip, draw(config), cut=False) for clip in clips_e], device),
            hand_over([transform(clip, draw(config), cut=True) for clip in clips_g], device),
        )
