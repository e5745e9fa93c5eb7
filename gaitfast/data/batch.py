"""What a step of pretraining consumes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PretrainBatch:
    """One rank's share of the batch of one step. The tensors are the consumer's own."""

    step: int
    sequence: torch.Tensor
    """int64 (B,), on the CPU: sequence numbers of the dataset."""
    clip_e: torch.Tensor
    """uint8 (B, T, 64, 64) on the loader's device: s_E, for the autoencoder."""
    clip_g: torch.Tensor
    """uint8 (B, T, 64, 44) on the loader's device: s_G, for the backbone."""
