"""Weights and inputs of the OpenGait golden cases, as the `_about` of tests/golden/opengait_models.json says."""

import math

import numpy as np
import torch
from torch import Tensor


def stream(count: int, key: int) -> np.ndarray:
    """`count` float64 numbers in [-1, 1) of stream `key` (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64((key + 1) << 32)
        z *= np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2**53 * 2 - 1


def golden_weights(template: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for the keys of an OpenGait state dict; counters keep their value."""
    weights = {key: value for key, value in template.items() if key.endswith("num_batches_tracked")}
    for number, key in enumerate(sorted(set(template) - set(weights))):
        shape = tuple(template[key].shape)
        s = stream(math.prod(shape), number).reshape(shape)
        if key == "HPP.p":
            value = np.full(shape, 6.5)
        elif key.endswith("running_mean"):
            value = 0.1 * s
        elif key.endswith("running_var"):
            value = 1 + 0.5 * s
        elif key.endswith("fc_bin"):
            value = s * math.sqrt(3 / shape[1])
        elif len(shape) == 1:
            value = 1 + 0.1 * s if key.endswith("weight") else 0.1 * s
        else:
            value = s * math.sqrt(6 / math.prod(shape[1:]))
        weights[key] = torch.from_numpy(value.astype(np.float32))
    return weights


def golden_silhouettes(clips: int, frames: int) -> Tensor:
    """Random binary (clips, frames, 64, 44)."""
    values = stream(clips * frames * 64 * 44, 999) > 0
    return torch.from_numpy(values.astype(np.float32).reshape(clips, frames, 64, 44))
