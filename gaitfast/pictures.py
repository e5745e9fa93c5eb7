"""The pictures of a run, as arrays for the report: augmentations, autoencoder, and what the denoiser makes of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

from gaitfast import files
from gaitfast.data.reference import augmentation_sheet
from gaitfast.diffusion import NoiseSchedule
from gaitfast.diffusion.objective import DiffusionObjective
from gaitfast.diffusion.sampler import ddim_sample, predict_latents, predict_noise
from gaitfast.diffusion.schedule import add_noise
from gaitfast.measure import Measures

_COUNT = 6
_GUIDANCE = 2.0
_STEPS = 25


def _bytes(frames: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> uint8."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def write_pictures(
    path: Path,
    measures: Measures,
    objective: DiffusionObjective,
    autoencoder: nn.Module,
    schedule: NoiseSchedule,
    seed: int,
) -> None:
    """Write RUN/pictures.safetensors from the held-out clips of the evaluation.

    augment.* and autoencoder.frames, .decoded are uint8 (K, 64, 64), autoencoder.latents is float32 (K, 4, 8, 8);
    samples.target, .generated, .denoised, .noised are uint8 (M, T, 64, 64), samples.condition is uint8 (M, T, 64, 44).
    """
    held, device = measures.held_out, measures.world.device
    clips = torch.from_numpy(held.clip[:_COUNT])
    middle = clips[:, clips.shape[1] // 2].contiguous()
    tensors = {
        f"augment.{name}": torch.from_numpy(np.ascontiguousarray(frames))
        for name, frames in augmentation_sheet(middle.numpy(), seed).items()
    }

    still = autoencoder.encode(middle.to(device).unsqueeze(1).float() / 255)
    tensors["autoencoder.frames"] = middle
    tensors["autoencoder.latents"] = still.float().cpu()
    tensors["autoencoder.decoded"] = _bytes(autoencoder.decode_silhouette(still)[:, 0])

    def decode(latents: torch.Tensor) -> torch.Tensor:
        frames = autoencoder.decode_silhouette(rearrange(latents, "b c t h w -> (b t) c h w"))
        return rearrange(_bytes(frames), "(b t) 1 h w -> b t h w", b=len(latents))

    silhouettes = torch.from_numpy(np.ascontiguousarray(held.conditions["same"][:_COUNT]))
    condition = objective.condition(silhouettes.to(device).float() / 255)
    latents = measures.encode(clips.to(device))
    noise = measures.noise[: len(clips)]
    half = schedule.timesteps // 2
    timestep = torch.full((len(clips),), half, dtype=torch.int64, device=device)
    noisy = add_noise(latents, noise, objective.signal[timestep], objective.sigma[timestep])
    predicted = predict_noise(objective.denoiser, noisy, timestep, condition, 1.0).float()
    tensors |= {
        "samples.target": clips,
        "samples.condition": silhouettes,
        "samples.noised": decode(noisy),
        "samples.denoised": decode(predict_latents(noisy, predicted, float(schedule.alpha_bar[half]))),
        "samples.generated": decode(
            ddim_sample(objective.denoiser, schedule, noise, condition, steps=_STEPS, guidance=_GUIDANCE)
        ),
    }
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    files.write_atomically(path, lambda temporary: save_file(tensors, temporary))
