"""The reference's figures, and the features they belong to, remade from the recipe in the file."""

import json
from pathlib import Path

import numpy as np
import torch

FIGURES = json.loads((Path(__file__).parents[1] / "golden" / "retrieval.json").read_text(encoding="utf-8"))


def numbers(count, stream):
    """`prng` of the recipe: float64 (count,) in [-1, 1)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64((stream + 1) << 32)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53 * 2.0 - 1.0


def clustered(identities, per_identity, channels, parts, weight, noise_stream, base_stream):
    """float32 (identities * per_identity, C, P), identities one after the other, and their numbers."""
    count = identities * per_identity
    base = numbers(identities * channels * parts, base_stream).reshape(identities, channels, parts)
    noise = numbers(count * channels * parts, noise_stream).reshape(count, channels, parts)
    ids = np.repeat(np.arange(identities), per_identity)
    return torch.from_numpy((weight * base[ids] + noise).astype(np.float32)), ids
