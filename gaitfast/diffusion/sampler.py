"""Deterministic DDIM sampling with guidance, for figures (Song et al. 2020, eta = 0; Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from gaitfast.diffusion.schedule import NoiseSchedule

Denoiser = Callable[..., torch.Tensor]


def predict_noise(
    denoiser: Denoiser, latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Guided noise: null + guidance * (conditional - null); guidance 1 is the plain conditional prediction.

    Floating latents (B, 4, T, H, W), int64 timestep (B,), condition (B, C) -> noise like the latents.
    """
    conditional = denoiser(latents, timestep, condition)
    if guidance == 1.0:
        return conditional
    dropped = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    null = denoiser(latents, timestep, condition, dropped)
    return null + guidance * (conditional - null)


def predict_latents(noisy: torch.Tensor, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """The clean latents that `noisy` and a predicted `noise`, of one shape and type, imply (eq. 1 solved for x)."""
    return (noisy - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: torch.Tensor,
    condition: torch.Tensor,
    *,
    steps: int = 50,
    guidance: float = 2.0,
    start: int | None = None,
    clamp: float = 5.0,
) -> torch.Tensor:
    """Run the reverse process from `start` (default: pure noise, the largest t) to clean latents.

    Args:
        denoiser: as `build_denoiser` returns.
        schedule: the one that the denoiser was trained on.
        noise: float (B, 4, T, H, W): the latents at `start`.
        condition: floating (B, C).
        steps: evaluations of the denoiser (twice as many with guidance).
        guidance: weight of the conditional prediction against the unconditional one; 1: none.
        start: timestep 1..T to begin at; None: T.
        clamp: the estimate of the clean latents is kept within +-clamp; unit-variance latents rarely leave it.

    Returns:
        latents, float32 (B, 4, T, H, W).
    """
    start = schedule.timesteps if start is None else start
    path = torch.linspace(start, 0, steps + 1).round().to(torch.int64).tolist()
    latents = noise.float()
    for now, after in pairwise(path):
        timestep = torch.full((len(latents),), now, dtype=torch.int64, device=latents.device)
        predicted = predict_noise(denoiser, latents, timestep, condition, guidance).float()
        alpha_now, alpha_after = float(schedule.alpha_bar[now]), float(schedule.alpha_bar[after])
        clean = predict_latents(latents, predicted, alpha_now).clamp(-clamp, clamp)
        # After clamping, the noise that belongs to the estimate is derived anew, so that the two stay consistent.
        predicted = (latents - alpha_now**0.5 * clean) / (1 - alpha_now) ** 0.5
        latents = alpha_after**0.5 * clean + (1 - alpha_after) ** 0.5 * predicted
    return latents
