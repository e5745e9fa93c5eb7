"""The pretraining objective: predict the noise in the latents of one clip from the gait feature of another (eq. 4)."""

from __future__ import annotations

import torch
from torch import nn

from gaitfast.diffusion.schedule import NoiseSchedule, add_noise


def pool_feature(feature: torch.Tensor, method: str = "mean") -> torch.Tensor:
    """Pool G(s) over its parts (Sec. 3.1.4): feature (B, C, P) -> condition (B, C). `mean+max` is the sum of both.

    ValueError for another method.
    """
    if method == "mean":
        return feature.mean(-1)
    if method == "max":
        return feature.amax(-1)
    if method == "mean+max":
        return feature.mean(-1) + feature.amax(-1)
    raise ValueError(f"unknown pooling {method!r}: mean, max or mean+max")


class DiffusionObjective(nn.Module):
    """The two trained networks and the loss between them; the frozen autoencoder stays outside (Fig. 1).

    Args:
        backbone: silhouettes (B, T, 64, 44) in [0, 1] -> feature (B, C, P).
        denoiser: (latents, timestep, condition, drop_condition) -> predicted noise.
        schedule: noise schedule.
        weights: float64 (T+1,) from `loss_weights`.
        pooling: `mean`, `max` or `mean+max`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        denoiser: nn.Module,
        schedule: NoiseSchedule,
        weights: torch.Tensor,
        pooling: str = "mean",
    ):
        super().__init__()
        self.backbone = backbone
        self.denoiser = denoiser
        self.pooling = pooling
        signal, sigma = schedule.tables()
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        self.register_buffer("weights", weights.to(torch.float32), persistent=False)

    def condition(self, silhouettes: torch.Tensor) -> torch.Tensor:
        """silhouettes (B, T, 64, 44) -> condition (B, C)."""
        return pool_feature(self.backbone(silhouettes), self.pooling)

    def errors(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error of the predicted noise per sample, float32 (B,), unweighted.

        latents and noise (B, 4, T, H, W), timestep int64 (B,) in 1..1000, condition (B, C), drop bool (B,).
        """
        noisy = add_noise(latents, noise, self.signal[timestep], self.sigma[timestep])
        predicted = self.denoiser(noisy, timestep, condition, drop)
        # The square is taken in float32 whatever the networks ran in: bf16 would round the differences that matter.
        return (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3, 4))

    def forward(
        self,
        latents: torch.Tensor,
        silhouettes: torch.Tensor,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        drop: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted loss, a scalar: mean over the batch of w(t) |eps - D(E(s_E)_t, t, pooled G(s_G))|^2 (eq. 4)."""
        errors = self.errors(latents, noise, timestep, self.condition(silhouettes), drop)
        return (self.weights[timestep] * errors).mean()
