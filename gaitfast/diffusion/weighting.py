"""Loss weights over timesteps for the epsilon objective (paper, Sec. 3.1.6 and Table 3)."""

from __future__ import annotations

import torch

from gaitfast.diffusion.schedule import NoiseSchedule


def loss_weights(
    schedule: NoiseSchedule, name: str = "mnp", gamma: float = 5.0, normalize: bool = False
) -> torch.Tensor:
    """Weight of the squared error at each timestep.

    `min_snr` is min(1, gamma / SNR) (Hang et al. 2023, for the epsilon objective): it takes weight from low noise.
    `mnp`, the paper's medium-level noise prioritization, takes weight from high noise as well. The paper gives no
    formula; this is Min-SNR mirrored, min(1, gamma / SNR) * min(1, gamma * SNR), which for gamma >= 1 is
    min(1, gamma * exp(-|log SNR|)): symmetric in the log of the signal-to-noise ratio and 1 in its middle.
    `uniform` is 1.

    Args:
        schedule: the noise schedule.
        name: `mnp`, `min_snr` or `uniform`.
        gamma: where the clamp sets in; 1 prioritizes strongly, infinity is uniform.
        normalize: divide by the mean over t = 1..T, so that the effective learning rate does not depend on gamma.

    Returns:
        float64 (T+1,), index t; index 0 (no noise, never drawn) holds the limit.

    Raises:
        ValueError: another name.
    """
    snr = schedule.snr  # infinite at t = 0, where the clamps give the limits
    if name == "uniform":
        weights = torch.ones_like(snr)
    elif name == "min_snr":
        weights = (gamma / snr).clamp(max=1)
    elif name == "mnp":
        weights = (gamma / snr).clamp(max=1) * (gamma * snr).clamp(max=1)
    else:
        raise ValueError(f"unknown weighting {name!r}: mnp, min_snr or uniform")
    if normalize:
        weights = weights / weights[1:].mean()
    return weights
