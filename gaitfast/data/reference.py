"""The contract of pipeline.py in NumPy and OpenCV, one clip and one frame at a time: oracle and benchmark baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch

from gaitfast.config import AugmentConfig, ClipConfig, DataConfig
from gaitfast.data.augment import KERNELS, SIZE, ClipParameters, draw_parameters
from gaitfast.data.batch import PretrainBatch, RecognitionBatch
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import make_plan

_BLUR = np.outer((1, 2, 1), (1, 2, 1))
_BLUR_THRESHOLD = 816
"""0.2 of full scale (255) times 16, the sum of _BLUR."""


def warp(frames: np.ndarray, matrix: np.ndarray, width: int) -> np.ndarray:
    """Frames uint8 (T, 64, 64) through one homography, output pixel -> input pixel; bilinear, black outside."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.stack([cv2.warpPerspective(frame, matrix, (width, SIZE), flags=flags) for frame in frames])


def cut_and_flip(frames: np.ndarray, flip: bool, width: int) -> np.ndarray:
    """The middle `width` columns of frames (T, H, 64), then mirrored where `flip`."""
    margin = (frames.shape[-1] - width) // 2
    frames = frames[..., margin : margin + width]
    return frames[..., ::-1] if flip else frames


def dilate_part(frames: np.ndarray, kernel: int, rows: Sequence[int]) -> np.ndarray:
    """RandomPartDilate: rows [first, last) of frames uint8 (T, H, W) by KERNELS[kernel]; other rows do not enter."""
    first, last = rows
    if first == last:
        return frames
    half_widths = np.array(KERNELS[kernel].half_widths)[:, None]
    element = (np.abs(np.arange(-2, 3)) <= half_widths).astype(np.uint8)
    frames = frames.copy()
    for frame in frames:
        frame[first:last] = cv2.dilate(frame[first:last], element)
    return frames


def blur_part(frames: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """RandomPartBlur: rows [first, last) of frames uint8 (T, H, W) through a 3x3 Gaussian, then 255 where it exceeds
    0.2 of full scale, else 0. Mirrored at the edges of the part without repeating them, as cv2.GaussianBlur does."""
    first, last = rows
    if first == last:
        return frames
    frames = frames.copy()
    for frame in frames:
        # In whole numbers, so that a value that lies on the threshold falls to the same side everywhere.
        sums = cv2.filter2D(frame[first:last].astype(np.float32), -1, _BLUR.astype(np.float32))
        frame[first:last] = np.where(sums > _BLUR_THRESHOLD, 255, 0)
    return frames


def augment_clip(frames: np.ndarray, parameters: ClipParameters, i: int) -> np.ndarray:
    """Frames uint8 (T, 64, 64) of sample `i` -> uint8 (T, 64, W)."""
    if parameters.warp[i]:
        frames = warp(frames, parameters.matrix[i], parameters.width)
    else:
        frames = cut_and_flip(frames, bool(parameters.flip[i]), parameters.width)
    frames = dilate_part(frames, int(parameters.kernel[i]), parameters.dilate_rows[i])
    return blur_part(frames, parameters.blur_rows[i])


class ReferenceLoader:
    """The iterator of pipeline.build_loader on the CPU, without DALI, threads or look-ahead. Takes its `options`."""

    def __init__(
        self, dataset: PackedDataset, config: DataConfig | ClipConfig, *, start_step: int = 0, **options: Any
    ) -> None:
        self._dataset, self._step = dataset, start_step
        self._plan = make_plan(dataset, config, **options)

    def __iter__(self) -> ReferenceLoader:
        return self

    def __next__(self) -> PretrainBatch | RecognitionBatch:
        selection = self._plan.select(self._step)
        self._step += 1
        tensors = [
            np.stack([augment_clip(self._dataset.frames(row), parameters, i) for i, row in enumerate(frames)])
            for frames, parameters in self._plan.clips(selection)
        ]
        return self._plan.batch(selection, [torch.from_numpy(tensor) for tensor in tensors])

    def close(self) -> None:
        """Nothing to release; part of the contract."""


def augmentation_sheet(frames: np.ndarray, seed: int, config: AugmentConfig | None = None) -> dict[str, np.ndarray]:
    """Each augmentation forced on alone, with an own draw for each frame (the paper's Fig. 7).

    Frames uint8 (K, 64, 64) -> {"original", "affine", "perspective", "flip", "part_dilate", "part_blur"}, each uint8
    (K, 64, 64). Ranges are those of `config`.
    """
    names = ("affine", "perspective", "flip", "part_dilate", "part_blur")
    off = replace(config or AugmentConfig(), **dict.fromkeys(names, 0.0))
    sheet = {"original": frames}
    for name in names:
        forced = replace(off, **{name: 1.0})
        parameters = draw_parameters(
            forced, seed=seed, purpose=f"sheet: {name}", step=0, sample=np.arange(len(frames)), width=SIZE
        )
        sheet[name] = np.concatenate([augment_clip(frame[None], parameters, i) for i, frame in enumerate(frames)])
    return sheet
