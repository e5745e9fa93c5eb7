"""What a loader does at a step, before anything is read: which clips, how each is augmented, and the batch they become.

A plan is all that pretraining and supervised training differ in; pipeline.py (DALI) and reference.py (NumPy) carry out
either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gaitfast.config import ClipConfig, DataConfig, UserError
from gaitfast.data.augment import WIDTH_E, WIDTH_G, ClipParameters, draw_pair, draw_supervised
from gaitfast.data.batch import PretrainBatch, RecognitionBatch
from gaitfast.data.packed import PackedDataset
from gaitfast.data.sampling import LabelledSelection, PeopleSampler, Sampler, Selection


class Clip(NamedTuple):
    """One clip of each of B samples."""

    frames: np.ndarray
    """int64 (B, N): frame numbers. Two clips of a step that share this very array are read once."""
    parameters: ClipParameters


@dataclass(frozen=True)
class Plan:
    """`select(step)`, then `clips(selection)` are read and augmented, then `batch(selection, tensors)` is delivered."""

    select: Callable[[int], Any]
    clips: Callable[[Any], Sequence[Clip]]
    batch: Callable[[Any, Sequence[torch.Tensor]], Any]
    """Tensors uint8 (B, N, 64, width), one per clip, all on one device."""
    widths: tuple[int, ...]
    """Columns of each clip after augmentation."""
    size: int
    """B, the samples of this rank."""


def make_plan(
    dataset: PackedDataset,
    config: DataConfig | ClipConfig,
    *,
    sampling: tuple[str, int] = ("unordered", 0),
    seed: int,
    batch: int | tuple[int, int],
    rank: int = 0,
    world_size: int = 1,
) -> Plan:
    """The plan of one rank: samples rank * B .. (rank + 1) * B - 1 of the global batch.

    With a DataConfig, pairs for pretraining, and `batch` is their number; with a ClipConfig, labelled clips, and
    `batch` is (P, K). UserError if the split cannot fill a batch or the batch does not divide.
    """
    numbers = dataset.split(config.split)
    options = {"sampling": sampling, "seed": seed, "batch": batch, "rank": rank, "world_size": world_size}
    if isinstance(config, ClipConfig):
        select = PeopleSampler(dataset.starts, dataset.subject, numbers, config, **options)
        size = batch[0] * batch[1] // world_size
        return Plan(select, lambda selection: _labelled(selection, config, seed), _recognition_batch, (WIDTH_G,), size)
    select = Sampler(dataset.starts, numbers, config, **options)
    size = batch // world_size
    return Plan(select, lambda selection: _pair(selection, config, seed), _pretrain_batch, (WIDTH_E, WIDTH_G), size)


def located(error: Exception, step: int) -> Exception:
    """`error`, met while the batch of `step` was made, as what the loader raises."""
    if isinstance(error, UserError):
        return UserError(f"{error} (read for step {step})")
    return RuntimeError(f"reading the batch of step {step} failed: {error!r}")


def _pair(selection: Selection, config: DataConfig, seed: int) -> tuple[Clip, Clip]:
    drawn = draw_pair(
        config.augment, seed=seed, step=selection.step, sample=selection.sample, same_clip=config.same_clip
    )
    return Clip(selection.frames_e, drawn[0]), Clip(selection.frames_g, drawn[1])


def _pretrain_batch(selection: Selection, clips: Sequence[torch.Tensor]) -> PretrainBatch:
    return PretrainBatch(selection.step, torch.from_numpy(selection.sequence), *clips)


def _labelled(selection: LabelledSelection, config: ClipConfig, seed: int) -> tuple[Clip]:
    drawn = draw_supervised(config.augment, seed=seed, step=selection.step, sample=selection.sample)
    return (Clip(selection.frames, drawn),)


def _recognition_batch(selection: LabelledSelection, clips: Sequence[torch.Tensor]) -> RecognitionBatch:
    (silhouettes,) = clips
    lengths = None
    if (selection.lengths < silhouettes.shape[1]).any():
        lengths = selection.lengths.tolist()
        meant = np.arange(silhouettes.shape[1]) < selection.lengths[:, None]
        rows = torch.from_numpy(np.flatnonzero(meant)).to(silhouettes.device)
        silhouettes = silhouettes.flatten(0, 1)[rows][None]
    label = torch.from_numpy(selection.label).to(silhouettes.device)
    return RecognitionBatch(selection.step, torch.from_numpy(selection.sequence), label, silhouettes, lengths)
