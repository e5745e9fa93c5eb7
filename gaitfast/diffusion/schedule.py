"""Noise schedules: how much of the signal is left at timestep t (paper, eq. 1 and Sec. 3.1.6)."""

from __future__ import annotations

import math

import torch

TIMESTEPS = 1000
_OFFSET = 0.008  # s of Nichol & Dhariwal's cosine schedule
_BETA_MAX = 0.999


def _cosine(u: torch.Tensor) -> torch.Tensor:
    """Nichol & Dhariwal 2021, eq. 17, at u = t / T."""

    def raw(v):
        return torch.cos((v + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    return raw(u) / raw(torch.zeros_like(u))


def _inverted_cosine(u: torch.Tensor) -> torch.Tensor:
    """The inverse function of the cosine curve (SODA, Hudson et al. 2023): most steps carry a medium noise level."""
    return 2 * (1 + _OFFSET) / math.pi * torch.arccos(torch.sqrt(u)) - _OFFSET


def _linear_betas(steps: int) -> torch.Tensor:
    """Ho et al. 2020: beta from 1e-4 to 0.02, scaled to the number of steps."""
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)


class NoiseSchedule:
    """The table of a schedule.

    Args:
        name: `inverted_cosine` (the paper's), `cosine` or `linear`.
        timesteps: T; t runs from 1 to T, and index 0 is the clean signal.

    Raises:
        ValueError: another name.

    Attributes:
        alpha_bar: float64 (T+1,), share of signal power left at t; alpha_bar[0] = 1.
        snr: float64 (T+1,), alpha_bar / (1 - alpha_bar); snr[0] = inf.
    """

    def __init__(self, name: str = "inverted_cosine", timesteps: int = TIMESTEPS):
        self.name = name
        self.timesteps = timesteps
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        if name == "linear":
            betas = _linear_betas(timesteps)
        elif name in ("cosine", "inverted_cosine"):
            curve = _cosine(u) if name == "cosine" else _inverted_cosine(u)
            # Both curves end at or below zero; clipped betas keep the last steps finite.
            betas = (1 - curve[1:] / curve[:-1]).clamp(0, _BETA_MAX)
        else:
            raise ValueError(f"unknown schedule {name!r}: inverted_cosine, cosine or linear")
        self.alpha_bar = torch.cat((torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)))
        self.snr = self.alpha_bar / (1 - self.alpha_bar)

    def tables(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (T+1,) each: sqrt(alpha_bar) and sqrt(1 - alpha_bar), for `add_noise`."""
        return (
            self.alpha_bar.sqrt().to(device, torch.float32),
            (1 - self.alpha_bar).sqrt().to(device, torch.float32),
        )


def add_noise(latents: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps (eq. 1). Floating latents, noise (B, ...); signal, sigma (B,)."""
    shape = (-1,) + (1,) * (latents.dim() - 1)
    return signal.view(shape) * latents + sigma.view(shape) * noise
