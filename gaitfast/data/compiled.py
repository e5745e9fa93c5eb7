"""Decoding and augmentation of a clip by one compiled operator (csrc/cpu/clips.cpp), on the CPU.

A frame is checked, decoded, warped or cut and flipped, dilated and blurred while it is in the cache, and written once,
where the batch wants it. The frames of a clip share their homography, so they are warped side by side in the lanes of a
vector. The operations are those of dali.py; the warp alone may differ from it, by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gaitfast.data import part_ops
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import Clip, Plan, located
from gaitfast.data.prefetch import Prefetcher


def augment(dataset: PackedDataset, clip: Clip, threads: int = 1) -> torch.Tensor:
    """The clips of a step, uint8 (B, T, 64, width). Each is one thread's work: their number changes no byte."""
    drawn = clip.parameters
    return dataset.clips(
        clip.frames,
        drawn.width,
        threads,
        matrix=torch.from_numpy(drawn.matrix),
        warp=torch.from_numpy(drawn.warp),
        flip=torch.from_numpy(drawn.flip),
        **part_ops.tensors(drawn),
    )


def _planned(plan: Plan, step: int) -> Iterator[tuple[Any, Sequence[Clip]]]:
    while True:
        try:
            selection = plan.select(step)
            clips = plan.clips(selection)
        except Exception as error:
            raise located(error, step) from error
        yield selection, clips
        step += 1


def batches(dataset: PackedDataset, plan: Plan, step: int, threads: int) -> Iterator[tuple[Any, None]]:
    """Batches from `step` on, for ever, each with None: there is nothing to wait for (dali.batches).

    The next step is planned in a thread of its own while the operator, which needs no Python, works on this one.
    """
    planned = Prefetcher(_planned(plan, step), 1)
    try:
        for selection, clips in planned:
            try:
                batch = plan.batch(selection, [augment(dataset, clip, threads) for clip in clips])
            except Exception as error:
                raise located(error, selection.step) from error
            yield batch, None
    finally:
        planned.close()
