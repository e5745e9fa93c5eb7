"""Writes a believable run folder without training anything: the input of the report's tests.

`python tests/report/fake_run.py FOLDER` writes one to look at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gaitfast import config

STEPS, EVERY, LOG = 6000, 500, 20


def walker(phase: float, girth: float = 1.0, width: int = 64) -> np.ndarray:
    """A person seen from the side at a phase of the gait cycle: uint8 (64, width), anti-aliased."""
    y, x = np.mgrid[0:64, 0:width].astype(np.float64)
    centre = width / 2
    shape = np.full((64, width), 99.0)

    def limb(start, end, radius):
        nonlocal shape
        a, b = np.array(start), np.array(end)
        along = np.clip(((x - a[0]) * (b - a)[0] + (y - a[1]) * (b - a)[1]) / max(((b - a) ** 2).sum(), 1e-9), 0, 1)
        distance = np.hypot(x - a[0] - along * (b - a)[0], y - a[1] - along * (b - a)[1])
        shape = np.minimum(shape, distance - radius * girth)

    def chain(origin, lengths, angles, radius):
        point = np.array(origin, dtype=float)
        for length, angle in zip(lengths, angles):
            end = point + length * np.array([np.sin(angle), np.cos(angle)])
            limb(point, end, radius)
            point, radius = end, 0.8 * radius

    limb((centre, 6), (centre, 6), 4.2)
    limb((centre, 13), (centre, 31), 5.0)
    for side in (0.0, np.pi):
        swing = np.sin(phase + side)
        bend = 0.5 * max(0.0, np.sin(phase + side + 1.2))
        chain((centre, 33), (13, 14), (0.45 * swing, 0.45 * swing - bend), 3.4)
        chain((centre, 14), (10, 10), (-0.5 * swing, -0.5 * swing + 0.3), 1.9)
    return (255 * np.clip(0.5 - shape, 0, 1)).astype(np.uint8)


def clips(count: int, frames: int, width: int = 64) -> np.ndarray:
    """Walks of `count` people: uint8 (count, frames, 64, width)."""
    return np.stack(
        [[walker(0.7 * m + 2 * np.pi * t / 18, 0.85 + 0.2 * m, width) for t in range(frames)] for m in range(count)]
    )


def pictures(rng: np.random.Generator, frames: int = 30) -> dict[str, np.ndarray]:
    """Every tensor of pictures.safetensors, drawn."""
    stills = np.stack(
        [walker(p, g) for p, g in ((0.3, 0.9), (1.7, 1.1), (2.9, 1.0), (4.4, 1.2), (5.0, 0.8), (0.9, 1.0))]
    )
    dilated, blurred = stills.copy(), stills.copy()
    dilated[:, 14:45] = np.maximum(
        stills[:, 14:45], np.maximum(np.roll(stills, 2, 2), np.roll(stills, -2, 2))[:, 14:45]
    )
    blurred[:, 14:45] = np.mean([np.roll(stills, s, 2) for s in range(-3, 4)], axis=0)[:, 14:45]
    coarse = stills.reshape(6, 8, 8, 8, 8).mean(axis=(2, 4)) / 127.5 - 1
    latents = np.stack([coarse, -0.6 * coarse, np.roll(coarse, 1, 2) - coarse, np.roll(coarse, 1, 1) - coarse], axis=1)
    target = clips(3, frames)
    blurry = np.mean([np.roll(target, (a, b), (2, 3)) for a in (-1, 0, 1) for b in (-1, 0, 1)], axis=0)
    noise = rng.normal(0, 90, target.shape)
    as_bytes = lambda a: np.clip(a, 0, 255).astype(np.uint8)  # noqa: E731
    return {
        "augment.original": stills,
        "augment.affine": np.roll(stills, (3, -4), (1, 2)),
        "augment.perspective": np.ascontiguousarray(np.roll(stills, 3, 2)),
        "augment.flip": np.ascontiguousarray(stills[:, :, ::-1]),
        "augment.part_dilate": dilated,
        "augment.part_blur": blurred,
        "autoencoder.frames": stills,
        "autoencoder.latents": (latents + 0.1 * rng.normal(size=latents.shape)).astype(np.float32),
        "autoencoder.decoded": as_bytes(stills + rng.normal(0, 5, stills.shape)),
        "samples.target": target,
        "samples.condition": clips(3, frames, 44),
        "samples.noised": as_bytes(0.5 * target + noise),
        "samples.denoised": as_bytes(blurry),
        "samples.generated": as_bytes(0.9 * np.roll(blurry, 2, 1) + 0.2 * np.abs(noise)),
    }


def metrics(rng: np.random.Generator, steps: int = STEPS) -> list[dict]:
    rows = []
    for step in range(LOG, steps + 1, LOG):
        warm = min(1.0, 0.01 + step / 600) * (0.5 + 0.5 * np.cos(np.pi * step / STEPS))
        rows.append(
            {
                "step": step,
                "loss": float((0.11 + 0.9 * np.exp(-step / 350)) * np.exp(0.1 * rng.normal())),
                "lr_denoiser": 1e-4 * warm,
                "lr_backbone": 5e-4 * warm,
                "clips_per_s": float(412 + 14 * rng.normal() - (180 if step == LOG else 0)),
                "data_wait": float(abs(0.012 + 0.006 * rng.normal())),
                "seconds": 0.16 * step,
            }
        )
    return rows


def evaluations(rng: np.random.Generator, steps: int = STEPS) -> list[dict]:
    rows = []
    for step in range(0, steps + 1, EVERY):
        done = 1 - np.exp(-step / 2200)
        level = 0.128 + 0.8 * np.exp(-step / 400)
        negative, positive = 0.031 + 0.21 * done, 0.024 + 0.07 * done
        rows.append(
            {
                "step": step,
                "rank1": 31.2 + 34 * done + float(rng.normal()),
                "rank5": 52.0 + 30 * done,
                "rank10": 63.0 + 26 * done,
                "mAP": 24.0 + 22 * done,
                "mINP": 11.0 + 13 * done,
                "rank1_euclidean": 29.9 + 30 * done + float(rng.normal()),
                "distance_positive": positive,
                "distance_negative": negative,
                "gap": negative - positive,
                "loss_self": level * (1 - 0.021 * done),
                "loss_same": level * (1 - 0.012 * done),
                "loss_other": level * (1 + 0.013 * done),
                "loss_null": level * (1 + 0.006 * done),
                "identity": 0.025 * done / (1 - 0.012 * done),
                "identity_error": 0.0004 + 0.002 * done,
                "seconds": 0.16 * step,
            }
        )
    return rows


def summary(rows: list[dict]) -> dict:
    first, last = rows[0], rows[-1]
    return {
        "rank1_before": first["rank1"],
        "rank1_after": last["rank1"],
        "gap_before": first["gap"],
        "gap_after": last["gap"],
        **{key: last[key] for key in ("loss_self", "loss_same", "loss_other", "loss_null")},
        "steps": last["step"],
        "seconds": 1043.2,
        "seed": 0,
        "backend": {"denoiser": "triton", "data": "DALI on GPU", "retrieval": "C++", "engine": "ZeRO-2, nccl"},
        "world_size": 1,
        "peak_memory_bytes": 4_831_838_208,
        "commit": "0123456789abcdef",
        "before": first,
        "after": last,
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fake_run(folder: Path, *, steps: int = STEPS, finished: bool = True, with_pictures: bool = True) -> Path:
    """A run folder: of `steps` steps, with summary.json where `finished`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(7))
    options = config.PretrainConfig(run=f"runs/{folder.name}", backbone=config.BackboneConfig(name="gaitset"))
    options.train.iterations = STEPS
    (folder / "config.resolved.yaml").write_text(config.dump(options), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", metrics(rng, steps))
    rows = evaluations(rng, steps)
    write_lines(folder / "evaluations.jsonl", rows)
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary(rows), indent=2), encoding="utf-8")
        (folder / "backbone.safetensors").write_bytes(b"\0" * 2048)
    if with_pictures:
        save_file(pictures(rng), folder / "pictures.safetensors")
    return folder


if __name__ == "__main__":
    print(fake_run(Path(sys.argv[1])))
