"""Weights and inputs of the golden cases of the denoiser and the autoencoder, made again from their names.

NumPy's legacy generator is frozen, so a name gives the same numbers on every machine.
"""

import zlib

import numpy as np
import torch


def golden_tensor(key: str, shape) -> torch.Tensor:
    """One state_dict entry: normal numbers, scaled by what the key is (float32; int64 zeros for a batch counter)."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    count = int(np.prod(shape))
    z = _generator(key).standard_normal(count)
    if key.endswith("running_var"):
        z = 0.5 + np.abs(z)
    elif key.endswith("gamma") or (key.endswith("weight") and len(shape) == 1):
        z = 1.0 + 0.1 * z
    elif key.endswith(("bias", "running_mean")) or len(shape) <= 1:
        z = 0.1 * z
    else:
        z = z / np.sqrt(count / shape[0])
    return torch.from_numpy(z.astype(np.float32).reshape(shape))


def golden_normal(name: str, shape) -> torch.Tensor:
    """Standard normal float32."""
    return torch.from_numpy(_generator(name).standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape))


def golden_integers(name: str, shape, low: int, high: int) -> torch.Tensor:
    """Integers in [low, high), int64."""
    return torch.from_numpy(_generator(name).randint(low, high, size=tuple(shape)))


def _generator(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))
