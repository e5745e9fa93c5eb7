"""What a step of pretraining, and of transfer, consumes."""

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


@dataclass(frozen=True, slots=True)
class RecognitionBatch:
    """One rank's share of the batch of one step of supervised training. The tensors are the consumer's own."""

    step: int
    sequence: torch.Tensor
    """int64 (B,), on the CPU: sequence numbers of the dataset."""
    label: torch.Tensor
    """int64 (B,) on the loader's device: 0..K-1, the place of the subject in the sorted list of the split's."""
    silhouettes: torch.Tensor
    """uint8 (B, T, 64, 44) on the loader's device; packed (1, sum(lengths), 64, 44) where the lengths differ."""
    lengths: list[int] | None
    """Frames of each clip where the batch is packed, else None."""
