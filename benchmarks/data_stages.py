"""Parts of benchmarks/data.py: whether the two loaders make the same clips, and what each operation costs alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks import opengait_loader as contender
from benchmarks.timing import Timing
from gaitfast import randomness
from gaitfast.config import AugmentConfig, DataConfig
from gaitfast.data import compiled, reference
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import Clip, make_plan

SEED = 1
WARP_TOLERANCE, UNEQUAL = 1, 1e-3
"""Grey levels, and the share of pixels in clips with at most one warp: a level off before the blur's threshold is 255
behind it."""
TWO_WARPS = 4.0
"""Mean difference in grey levels where both warps were drawn: OpenGait rounds and cuts off in between."""


def compare(dataset: PackedDataset, batch: int, frames: int, steps: int = 4) -> dict:
    """Asserts that both make the same clips of the same frames by the same parameters. Returns how nearly."""
    config = DataConfig(frames=frames)
    plan = make_plan(dataset, config, seed=SEED, batch=batch)
    largest, unequal, pixels, twice = 0, 0, 0, []
    for step in range(steps):
        selection = plan.select(step)
        for clip, purpose in zip(plan.clips(selection), ("augmentation of s_E", "augmentation of s_G")):
            ours = compiled.augment(dataset, clip, threads=2).numpy().astype(np.int64)
            drawn = contender.drawn_by_engine(
                config.augment, seed=SEED, purpose=purpose, step=step, sample=selection.sample
            )
            for found, numbers, by in zip(ours, clip.frames, drawn):
                clip_of = contender.transform(dataset.frames(numbers), by, cut=clip.parameters.width < contender.SIZE)
                off = np.abs(found - np.round(clip_of * 255))
                if by.affine is not None and by.perspective is not None:
                    if by.blur is None:
                        twice.append(off.mean())
                    continue
                if by.blur is None:
                    largest = max(largest, int(off.max()))
                unequal, pixels = unequal + int((off > 0).sum()), pixels + off.size
    share, mean = unequal / pixels, float(np.mean(twice)) if twice else 0.0
    assert largest <= WARP_TOLERANCE, f"clips differ from OpenGait's by {largest} grey levels"
    assert share <= UNEQUAL, f"{share:.2%} of the pixels differ from OpenGait's"
    assert mean <= TWO_WARPS, f"clips of two warps differ from OpenGait's by {mean:.1f} grey levels on average"
    return {"largest_difference": largest, "unequal_share": share, "mean_difference_of_two_warps": round(mean, 3)}


def _forced(**probabilities: float) -> AugmentConfig:
    return replace(
        AugmentConfig(affine=0.0, perspective=0.0, flip=0.0, part_dilate=0.0, part_blur=0.0), **probabilities
    )


def _clips(dataset: PackedDataset, batch: int, frames: int, augment: AugmentConfig) -> Iterator[tuple[Clip, list]]:
    """The two clips of a step, and the parameters as the contender takes them."""
    plan = make_plan(dataset, DataConfig(frames=frames, augment=augment), seed=SEED, batch=batch)
    selection = plan.select(0)
    for clip, purpose in zip(plan.clips(selection), ("augmentation of s_E", "augmentation of s_G")):
        yield (
            clip,
            contender.drawn_by_engine(augment, seed=SEED, purpose=purpose, step=0, sample=selection.sample),
        )


def stages(dataset: PackedDataset, batch: int, frames: int, rounds: int) -> list[dict]:
    """One row for each operation on all clips of a batch, in microseconds per frame on one thread: (median, 20th, 80th
    percentile). `ours`: the compiled operator with that operation alone drawn, decoding included, as it must be;
    `reference`: NumPy and OpenCV on uint8; `opengait`: its transform alone, on what it works on."""
    pixels: dict[int, list[np.ndarray]] = {}
    rows = []
    for stage, augment in (
        ("decode", _forced()),
        ("decode, affine warp", _forced(affine=1.0)),
        ("decode, perspective warp", _forced(perspective=1.0)),
        ("decode, flip", _forced(flip=1.0)),
        ("decode, part dilation", _forced(part_dilate=1.0)),
        ("decode, part blur", _forced(part_blur=1.0)),
        ("decode, all as in pretraining", AugmentConfig()),
    ):
        pair = list(_clips(dataset, batch, frames, augment))
        for clip, _ in pair:
            if id(clip.parameters) not in pixels:
                pixels[id(clip.parameters)] = [dataset.frames(numbers) for numbers in clip.frames]
        held = [pixels[id(clip.parameters)] for clip, _ in pair]

        def by_opengait(pair: list = pair, held: list = held) -> None:
            for (clip, drawn), frames_of in zip(pair, held):
                for each, by in zip(frames_of, drawn):
                    contender.transform(each, by, cut=clip.parameters.width < contender.SIZE)

        def by_reference(pair: list = pair, held: list = held) -> None:
            for (clip, _), frames_of in zip(pair, held):
                for i, each in enumerate(frames_of):
                    reference.augment_clip(each, clip.parameters, i)

        sides = {
            "ours": lambda pair=pair: [compiled.augment(dataset, clip) for clip, _ in pair],
            "reference": by_reference,
            "opengait": by_opengait,
        }
        if stage == "decode":
            sides = {"ours": sides["ours"]}
        rows.append({"stage": stage, "us_per_frame": _timed(sides, rounds, 2 * batch * frames)})
    clips = [compiled.augment(dataset, clip) for clip, _ in pair]
    as_float = [list(clip.numpy() / 255.0) for clip in clips]
    numbers = np.concatenate([clip.frames.ravel() for clip, _ in pair])
    sample = np.arange(batch)
    for stage, sides in (
        (
            "hand-over and float32",
            {
                "ours": lambda: [clip.float().div_(255) for clip in clips],
                "opengait": lambda: [contender.hand_over(clip, "cpu").float() for clip in as_float],
            },
        ),
        ("chunks for a decoder on a GPU", {"ours": lambda: dataset.chunk_bytes(numbers)}),
        ("random numbers of one clip", {"ours": lambda: randomness.uniform(SEED, "x", 0, sample, 28)}),
        ("what to read, and parameters", {"ours": _planning(dataset, batch, frames)}),
    ):
        rows.append({"stage": stage, "us_per_frame": _timed(sides, rounds, 2 * batch * frames)})
    return rows


def _planning(dataset: PackedDataset, batch: int, frames: int) -> Callable[[], object]:
    plan = make_plan(dataset, DataConfig(frames=frames), seed=SEED, batch=batch)
    return lambda: plan.clips(plan.select(0))


def _timed(sides: dict[str, Callable[[], object]], rounds: int, frames: int) -> dict[str, list[float]]:
    """Microseconds per frame of each side, run in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if number:  # the first call warms up
                samples[name].append((time.perf_counter() - started) / frames * 1e6)
    torch.set_num_threads(threads)
    return {name: [round(value, 3) for value in Timing.of(taken)] for name, taken in samples.items()}
