"""All randomness of the engine, counter-based (Philox-4x32-10): a number depends on its purpose and on nothing else.

A draw is addressed by (seed, purpose, step, sample, index) and is the same in NumPy and in PyTorch, on any device, for
any number of workers or ranks, and after any restart: resume is a number, not a replay (invariant 1).
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np
import torch

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _philox(counter, key0, key1, mul_hi_lo):
    """Ten rounds over four 32-bit counter words and two key words; `mul_hi_lo(constant, word)` -> (high, low)."""
    c0, c1, c2, c3 = counter
    for round_ in range(10):
        if round_:
            key0 = (key0 + _WEYL[0]) & _MASK
            key1 = (key1 + _WEYL[1]) & _MASK
        hi0, lo0 = mul_hi_lo(_MULTIPLIER[0], c0)
        hi1, lo1 = mul_hi_lo(_MULTIPLIER[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
    return c0, c1, c2, c3


def _mul_numpy(constant: int, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    product = word * np.uint64(constant)
    return product >> np.uint64(32), product & np.uint64(_MASK)


def _mul_torch(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = word * constant  # wraps as int64; the bits are those of the unsigned product
    return (product >> 32) & _MASK, product & _MASK


def key(seed: int, purpose: str) -> tuple[int, int]:
    """The two key words. The purpose enters as its CRC, so streams of different purposes never meet.

    ValueError for a seed outside 0..2^63-1.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0..2^63-1, got {seed}")
    return (seed ^ zlib.crc32(purpose.encode())) & _MASK, (seed >> 32) & _MASK


@functools.cache
def compiled() -> bool:
    """Whether the extension is built, with its generator of the same numbers."""
    try:
        import gaitfast._C  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops.gaitfast, "philox_bits")


def bits(seed: int, purpose: str, step: int, sample: np.ndarray, count: int) -> np.ndarray:
    """Uniform 32-bit words (len(sample), count), as uint64. `sample` are int64 sample numbers of the global batch."""
    if compiled():
        sample = torch.from_numpy(np.array(sample, np.int64))
        return torch.ops.gaitfast.philox_bits(*key(seed, purpose), step, sample, count).numpy().view(np.uint64)
    return _numpy_bits(seed, purpose, step, sample, count)


def _numpy_bits(seed: int, purpose: str, step: int, sample: np.ndarray, count: int) -> np.ndarray:
    sample = np.asarray(sample, np.uint64)
    blocks = -(-count // 4)
    c0 = np.broadcast_to(np.arange(blocks, dtype=np.uint64), (len(sample), blocks))
    c1 = np.broadcast_to(sample[:, None] & np.uint64(_MASK), c0.shape)
    c2 = np.full(c0.shape, step & _MASK, np.uint64)
    c3 = np.full(c0.shape, (step >> 32) & _MASK, np.uint64)
    key0, key1 = (np.uint64(k) for k in key(seed, purpose))
    with np.errstate(over="ignore"):
        words = _philox((c0, c1, c2, c3), key0, key1, _mul_numpy)
    return np.stack(words, axis=-1).reshape(len(sample), blocks * 4)[:, :count]


def uniform(seed: int, purpose: str, step: int, sample: np.ndarray, count: int) -> np.ndarray:
    """Uniform float64 in [0, 1), shape (len(sample), count)."""
    return bits(seed, purpose, step, sample, count).astype(np.float64) * 2.0**-32


def permutation(seed: int, purpose: str, step: int, length: int) -> np.ndarray:
    """A random order of 0..length-1 as int64 (for an epoch: `step` is its number)."""
    words = bits(seed, purpose, step, np.arange(1), 2 * length)[0]
    return np.argsort((words[:length] << np.uint64(32)) | words[length:], kind="stable")


def _torch_words(seed: int, purpose: str, step: int, sample: torch.Tensor, count: int) -> torch.Tensor:
    blocks = -(-count // 4)
    device = sample.device
    c0 = torch.arange(blocks, device=device, dtype=torch.int64).expand(len(sample), blocks)
    c1 = (sample.to(torch.int64) & _MASK)[:, None].expand_as(c0)
    c2 = torch.full_like(c0, step & _MASK)
    c3 = torch.full_like(c0, (step >> 32) & _MASK)
    words = _philox((c0, c1, c2, c3), *key(seed, purpose), _mul_torch)
    return torch.stack(words, dim=-1).reshape(len(sample), blocks * 4)


def uniform_tensor(seed: int, purpose: str, step: int, sample: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform float64 in [0, 1), shape (len(sample), count), on the device of `sample` (int64 sample numbers)."""
    return _torch_words(seed, purpose, step, sample, count)[:, :count].to(torch.float64) * 2.0**-32


def normal_tensor(seed: int, purpose: str, step: int, sample: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 (len(sample), *shape) on the device of `sample`, by Box-Muller.

    Equal for every rank that asks for the same samples; between devices equal up to the rounding of log and cos.
    """
    count = math.prod(shape)
    words = _torch_words(seed, purpose, step, sample, 2 * -(-count // 2))
    pairs = words.reshape(len(sample), -1, 2)
    radius = torch.sqrt(-2.0 * torch.log((pairs[..., 0].to(torch.float32) + 0.5) * 2.0**-32))
    # float32 keeps 24 bits: the half step above stays away from log(0); a radius of 0 (word rounds to 2^32) is harmless
    angle = pairs[..., 1].to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.reshape(len(sample), -1)[:, :count].reshape(len(sample), *shape)
