"""What pretraining has learnt, measured directly: how much each condition helps on held-out people.

The denoising loss is taken at fixed noise and fixed timesteps on clips of people that were never trained on, with the
condition from another clip of the same walk (`self`), from another walk of the same person (`same`), from another
person (`other`), or dropped (`null`). `other - same` is the identity that the feature carries. Everything but the
condition is the same in the four, so differences far below the spread of the loss itself can be seen.
"""

from __future__ import annotations

import torch

from gaitfast.diffusion.objective import DiffusionObjective

CONDITIONS = ("self", "same", "other", "null")


@torch.no_grad()
def condition_losses(
    objective: DiffusionObjective,
    latents: torch.Tensor,
    silhouettes: dict[str, torch.Tensor],
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    batch: int = 32,
) -> dict[str, torch.Tensor]:
    """Unweighted mean squared error of each clip under each kind of condition, averaged over the timesteps.

    Args:
        objective: in eval mode.
        latents: (N, 4, T, H, W) of the held-out clips.
        silhouettes: for `self`, `same` and `other`: (N, T, 64, 44) from which the condition of clip n is taken, on any
            device; uint8 of 0..255, which a batch at a time becomes float, or float of 0..1.
        noise: (N, 4, T, H, W), the same at each timestep.
        timesteps: int64 (K,) in 1..1000.
        batch: clips per forward.

    Returns:
        {"self", "same", "other", "null"}: float64 (N,) on the CPU.
    """
    total = {name: torch.zeros(len(latents), dtype=torch.float64) for name in CONDITIONS}
    for first in range(0, len(latents), batch):
        part = slice(first, first + batch)
        conditions = {
            name: objective.condition(_as_float(silhouettes[name][part].to(latents.device)))
            for name in ("self", "same", "other")
        }
        conditions["null"] = conditions["self"]
        drop = torch.ones(len(latents[part]), dtype=torch.bool, device=latents.device)
        for t in timesteps.tolist():
            timestep = torch.full((len(latents[part]),), t, dtype=torch.int64, device=latents.device)
            for name, condition in conditions.items():
                errors = objective.errors(
                    latents[part], noise[part], timestep, condition, drop if name == "null" else None
                )
                total[name][part] += errors.double().cpu() / len(timesteps)
    return total


def _as_float(clips: torch.Tensor) -> torch.Tensor:
    return clips.float() / 255 if clips.dtype == torch.uint8 else clips
