"""`gaitfast train-autoencoder`: trains the frozen autoencoder on silhouettes; the built-in weights come from here.

Frames are synthetic walkers or a prepared dataset, degraded the way real segmentation degrades them and the way
pretraining augments them, so that whatever pretraining feeds the encoder was in its training distribution. The loss is
the reconstruction error plus a penalty that gives the latents zero mean and unit covariance over the batch: the decoder
is free to undo any scale and rotation, and diffusion noise is then equally strong in every channel.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm import tqdm

from gaitfast import files
from gaitfast.config import UserError
from gaitfast.data import walkers
from gaitfast.data.packed import PackedDataset
from gaitfast.models.autoencoder import Autoencoder
from gaitfast.randomness import normal_tensor, uniform_tensor

LATENT_NOISE = 0.03
"""Standard deviation of the noise on training latents: keeps the decoder smooth at the scale of bf16 rounding."""
MOMENT_WEIGHT = 0.02
"""Of the moment penalty, beside a pixel error of some 0.01 to 0.1."""
HELD_OUT_FRAMES = 512
WALKER_CLIP = 6
"""Frames taken from one synthetic walk: few, because neighbours look alike and other people do not."""


# --- what the autoencoder sees ----------------------------------------------------------------------------------------


def walker_frames(count: int, seed: int, first: int = 0) -> np.ndarray:
    """uint8 (count, 64, 64) of synthetic walkers, people number `first` onwards, a third at each level of nuisances."""
    people = -(-count // WALKER_CLIP)
    share = -(-people // len(walkers.NUISANCES))
    parts = [
        walkers.clips(seed, share, WALKER_CLIP, first=first + i * share, nuisances=level)
        for i, level in enumerate(walkers.NUISANCES)
    ]
    return np.concatenate(parts).reshape(-1, 64, 64)[:count]


def dataset_frames(path: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 (n, 64, 64): at most `count` frames of a dataset's training people, and some of its test people.

    The second is empty where the dataset has no test people. UserError when it has no training people.
    """
    dataset = PackedDataset.open(path)

    def draw(split: str, limit: int) -> np.ndarray:
        sequences = dataset.split(split)
        lengths = dataset.lengths[sequences]
        ends = np.cumsum(lengths)
        if not len(sequences):
            return np.zeros((0, 64, 64), np.uint8)
        # Evenly spaced over all frames of the split: every sequence has its share, and no frame comes twice.
        chosen = np.unique(np.linspace(0, ends[-1] - 1, min(limit, int(ends[-1]))).astype(np.int64))
        owner = np.searchsorted(ends, chosen, side="right")
        return dataset.frames(dataset.starts[sequences[owner]] + chosen - (ends - lengths)[owner])

    train = draw("train", count)
    if not len(train):
        raise UserError(f"{path}: has no training people; prepare it with a partition that names a TRAIN_SET")
    return train, draw("test", HELD_OUT_FRAMES)


def degrade(frames: Tensor, seed: int, step: int) -> Tensor:
    """Frames float (N, 1, 64, 64) in [0, 1] as segmentation and augmentation may leave them, same shape and range.

    Flip, affine and perspective; ragged edges, holes and specks; occluders and ground shadow; a mask of half the
    resolution, up-sampled; part dilation and part blur; a soft edge. Each hits a random share of the frames.
    """
    sample = torch.arange(len(frames), device=frames.device)
    u = uniform_tensor(seed, "autoencoder-degrade", step, sample, 40).float()[..., None, None, None]
    frames = _warp(frames, u[:, :10].flatten(1))
    frames = torch.where(u[:, 10] < 0.5, _ragged(frames, seed, step, u[:, 11:14]), frames)
    frames = torch.where((u[:, 14] < 0.15) & _box(frames, u[:, 15:19], 4, 24), 0.0, frames)
    shadow = torch.cat((0.9 + 0.1 * u[:, 20:21], u[:, 21:24]), 1)
    frames = torch.where((u[:, 19] < 0.2) & _box(frames, shadow, 1, 20), 1.0, frames)
    frames = torch.where(u[:, 24] < 0.35, _half_resolution(frames, u[:, 25]), frames)
    rows = torch.arange(frames.shape[2], device=frames.device).view(1, 1, -1, 1)
    part = (rows >= 9 + 11 * u[:, 26]) & (rows < 39 + 11 * u[:, 27])
    frames = torch.where((u[:, 28] < 0.15) & part, F.max_pool2d(frames, 3, 1, 1), frames)
    frames = torch.where((u[:, 29] < 0.15) & part, _blur(frames, 5), frames)
    return torch.where(u[:, 30] < 0.2, _blur(frames, 3), frames)


def _blur(frames: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(frames, size, 1, size // 2)


def _warp(frames: Tensor, u: Tensor) -> Tensor:
    """A random homography (identity for a share of the frames), then a flip; `u` is uniform (N, 10)."""
    strength = (u[:, 0] < 0.6).float()
    v = (2 * u - 1) * strength[:, None]
    angle, shear = 0.25 * v[:, 1], 0.15 * v[:, 2]
    zoom_x, zoom_y = torch.exp(0.3 * v[:, 3]), torch.exp(0.2 * v[:, 4])
    flip = 1 - 2 * (u[:, 9] < 0.5).float()
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = (
        (flip * zoom_x * cos, flip * (shear - zoom_x * sin), 0.25 * v[:, 5]),
        (zoom_y * sin, zoom_y * cos, 0.12 * v[:, 6]),
        (0.2 * v[:, 7], 0.2 * v[:, 8], torch.ones_like(angle)),
    )
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)  # output -> input, in [-1, 1]
    size = frames.shape[-1]
    axis = (2 * torch.arange(size, device=frames.device) + 1) / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    seen = torch.stack((x, y, torch.ones_like(x)), -1).flatten(0, 1) @ matrix.mT  # (N, size^2, 3)
    grid = (seen[..., :2] / seen[..., 2:]).unflatten(1, (size, size))
    return F.grid_sample(frames, grid, align_corners=False)


def _ragged(frames: Tensor, seed: int, step: int, u: Tensor) -> Tensor:
    """Thresholded anew after smoothing and noise of two scales: weak noise frays the edge, strong noise tears holes."""
    sample = torch.arange(len(frames), device=frames.device)
    fine = normal_tensor(seed, "autoencoder-fine", step, sample, (1, 32, 32))
    coarse = normal_tensor(seed, "autoencoder-coarse", step, sample, (1, 8, 8))
    size = frames.shape[-2:]
    fine = F.interpolate(fine, size, mode="bilinear") * (0.4 * u[:, 0] ** 2)
    coarse = F.interpolate(coarse, size, mode="bilinear") * (0.5 * u[:, 1] ** 2)
    smooth = torch.where(u[:, 2] < 0.5, _blur(frames, 3), _blur(frames, 7))
    return (smooth + fine + coarse > 0.5).float()


def _box(frames: Tensor, u: Tensor, smallest: int, largest: int) -> Tensor:
    """bool (N, 1, H, W): inside a random rectangle with sides of `smallest`..`largest` pixels; `u` is uniform."""
    height, width = frames.shape[-2:]
    rows = torch.arange(height, device=frames.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=frames.device).view(1, 1, 1, -1)
    spread = largest - smallest
    inside_rows = (rows >= height * u[:, 0]) & (rows < height * u[:, 0] + smallest + spread * u[:, 2] ** 2)
    inside_columns = (columns >= width * u[:, 1]) & (columns < width * u[:, 1] + smallest + spread * u[:, 3])
    return inside_rows & inside_columns


def _half_resolution(frames: Tensor, u: Tensor) -> Tensor:
    """A binary mask of half the resolution, enlarged in steps or (for half of the frames) smoothly."""
    small = (F.avg_pool2d(frames, 2) > 0.5).float()
    size = frames.shape[-2:]
    stepped, smooth = F.interpolate(small, size), F.interpolate(small, size, mode="bilinear")
    return torch.where(u < 0.6, stepped, smooth)


# --- training ---------------------------------------------------------------------------------------------------------


def moment_penalty(latents: Tensor) -> Tensor:
    """How far the channels of latents (N, 4, h, w) are from zero mean and unit covariance over N, h and w."""
    values = latents.float().transpose(0, 1).flatten(1)
    mean = values.mean(1, keepdim=True)
    covariance = (values - mean) @ (values - mean).T / values.shape[1]
    return mean.square().mean() + (covariance - torch.eye(len(values), device=values.device)).square().mean()


def fit(
    model: Autoencoder,
    frames: np.ndarray,
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float = 3e-3,
    precision: str = "bf16",
    on_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Train `model` in place on uint8 (n, 64, 64); calls `on_step(done)` after every step.

    Every draw is addressed by (seed, step), so equal arguments give equal weights on one kind of machine.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3)
    warmup = min(200, 1 + steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    sample = torch.arange(batch, device=device)
    model.train().requires_grad_(True)
    bar = tqdm(range(steps), unit="step", mininterval=1.0)
    for step in bar:
        chosen = uniform_tensor(seed, "autoencoder-frames", step, sample, 1)[:, 0] * len(frames)
        clean = torch.from_numpy(frames[chosen.long().cpu().numpy()])[:, None].to(device).float() / 255
        target = degrade(clean, seed, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            latents = model.encode(target)
            noise = normal_tensor(seed, "autoencoder-latents", step, sample, tuple(latents.shape[1:]))
            decoded = model.decode(latents + LATENT_NOISE * noise)
        error = decoded.float() - target
        loss = error.abs().mean() + error.square().mean() + MOMENT_WEIGHT * moment_penalty(latents)
        if not torch.isfinite(loss):
            raise UserError(f"--learning-rate: {learning_rate} is too high, the loss is not finite at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", pixel=f"{100 * error.abs().mean().item():.2f}%")
        on_step(step + 1)


@torch.no_grad()
def measure(model: Autoencoder, frames: np.ndarray) -> dict[str, float | list[float]]:
    """On uint8 (n, H, W): `error_percent`, the mean absolute pixel error of decode_silhouette in percent of the full
    range (the measure of appendix A.1), and `latent_mean`, `latent_std` per channel. In float32."""
    assert frames.dtype == np.uint8 and frames.ndim == 3 and len(frames), (frames.dtype, frames.shape)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, latents = 0.0, []
    for part in np.array_split(frames, -(-len(frames) // 64)):
        pixels = torch.from_numpy(part)[:, None].to(device).float() / 255
        latents.append(model.encode(pixels))
        total += (model.decode_silhouette(latents[-1]) - pixels).abs().sum().item()
    model.train(training)
    values = torch.cat(latents).double().transpose(0, 1).flatten(1)
    return {
        "error_percent": 100 * total / frames.size,
        "latent_mean": values.mean(1).tolist(),
        "latent_std": values.std(1).tolist(),
    }


def save(model: Autoencoder, path: Path, facts: dict[str, str]) -> None:
    """Write the weights as float16 safetensors with `facts` as metadata; the file is complete or absent."""
    weights = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, lambda temporary: temporary.write_bytes(serialize(weights, facts)))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None


# --- command ----------------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="file to write (.safetensors, float16)")
    parser.add_argument("--data", default="", help="prepared dataset to train on; default: synthetic walkers")
    parser.add_argument("--frames", type=int, default=30_000, help="frames to train on (%(default)s)")
    parser.add_argument("--steps", type=int, default=5_000, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=32, help="channels; TAESD has 64 (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(%(default)s)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between intermediate saves (%(default)s)")


def main(args: argparse.Namespace) -> int:
    for name in ("frames", "steps", "batch", "width", "learning_rate", "save_every"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')}: must be positive, got {getattr(args, name)}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: must lie in 0..2^63-1, got {args.seed}")
    if args.out.suffix != ".safetensors":
        raise UserError(f"{args.out}: name a file that ends in .safetensors")
    if args.data:
        source = f"{args.data}: training people"
        frames, held_out = dataset_frames(args.data, args.frames)
    else:
        source = f"synthetic walkers, seed {args.seed}"
        frames = walker_frames(args.frames, args.seed)
        held_out = walker_frames(HELD_OUT_FRAMES, args.seed, first=10**6)
    torch.manual_seed(args.seed)  # initial weights: PyTorch's layers draw from the global generator
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Autoencoder(args.width).to(device)

    def keep(done: int) -> None:
        if done % args.save_every and done != args.steps:
            return
        figures = measure(model, held_out if len(held_out) else frames[:HELD_OUT_FRAMES])
        facts = {
            "data": f"{source}, {len(frames)} frames, degraded",
            "steps": f"{done} of {args.steps}",
            "batch": str(args.batch),
            "width": str(args.width),
            "seed": str(args.seed),
            "measured_on": "frames of people not trained on" if len(held_out) else "training frames",
            **{key: json.dumps(np.round(value, 4).tolist()) for key, value in figures.items()},
        }
        save(model, args.out, facts)
        tqdm.write(f"step {done}: pixel error {figures['error_percent']:.2f} %, wrote {args.out}")

    fit(
        model,
        frames,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        learning_rate=args.learning_rate,
        precision=args.precision,
        on_step=keep,
    )
    return 0
