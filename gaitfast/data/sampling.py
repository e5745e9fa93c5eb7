"""Which sequences and frames make up the batch of step s: a pure function of (index arrays, config, seed, step).

Sequences come epoch by epoch, each epoch a permutation of the split; batches run over the end of an epoch, so none is
partial. From each sequence two clips of N frames are drawn (Sec. 3.1.5): s_E, consecutive frames for the autoencoder,
and s_G, by the rule of the backbone's authors. Every draw is addressed by (seed, purpose, step, sample of the global
batch), so neither ranks nor restarts change it (invariants 1 and 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gaitfast import randomness
from gaitfast.config import DataConfig, UserError


@dataclass(frozen=True, slots=True)
class Selection:
    """One rank's share of the batch of one step: what to read, before anything is read."""

    step: int
    sample: np.ndarray
    """int64 (B,): numbers within the global batch; the address of every further draw."""
    sequence: np.ndarray
    """int64 (B,): sequence numbers of the dataset."""
    frames_e: np.ndarray
    """int64 (B, N): frame numbers of s_E, as PackedDataset.frames takes them."""
    frames_g: np.ndarray
    """int64 (B, N): frame numbers of s_G."""


def ordered_frames(
    length: np.ndarray, count: int, skip: int, *, seed: int, purpose: str, step: int, sample: np.ndarray
) -> np.ndarray:
    """OpenGait's fixed_ordered: `count` of `count + skip` consecutive frames, in order; int64 (B, count) from 0.

    `length` int64 (B,). A sequence shorter than the window is repeated until it is not, so its order wraps around;
    the start of the window is uniform over the repeated sequence.
    """
    window = count + skip
    draws = randomness.uniform(seed, purpose, step, sample, 1 + (window if skip else 0))
    repeated = length * -(-window // length)
    start = (draws[:, 0] * (repeated - window + 1)).astype(np.int64)
    if skip:
        chosen = np.sort(np.argsort(draws[:, 1:], axis=1, kind="stable")[:, :count], axis=1)
    else:
        chosen = np.arange(count)[None]
    return (start[:, None] + chosen) % length[:, None]


def unordered_frames(
    length: np.ndarray, count: int, *, seed: int, purpose: str, step: int, sample: np.ndarray
) -> np.ndarray:
    """OpenGait's fixed_unordered: `count` frames in random order, with replacement only if there are fewer; (B, count).

    `length` int64 (B,). Without replacement: Floyd's algorithm for all samples at once, so that the cost does not grow
    with the length of the sequences, then a random order.
    """
    draws = randomness.uniform(seed, purpose, step, sample, 2 * count)
    enough = length >= count
    chosen = np.empty((len(length), count), np.int64)
    for i in range(count):
        bound = np.where(enough, length - count + i + 1, length)
        pick = (draws[:, i] * bound).astype(np.int64)
        taken = enough & (chosen[:, :i] == pick[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, bound - 1, pick)
    order = np.argsort(draws[:, count:], axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def resolve_rule(config: DataConfig, sampling: tuple[str, int]) -> tuple[str, int]:
    """The rule for the frames of s_G: the backbone's `sampling`, unless the config names another."""
    return sampling if config.sampler == "auto" else (config.sampler, config.frames_skip)


class Sampler:
    """Selections for any step, in any order. Holds index arrays and the permutations of the two latest epochs only.

    `starts` int64 (num_sequences + 1) and `sequences` int64 (n,), the numbers that the split admits, are a
    PackedDataset's; `sampling` is the backbone's rule for s_G, ("unordered" | "ordered", extra frames of the window).
    """

    def __init__(
        self,
        starts: np.ndarray,
        sequences: np.ndarray,
        config: DataConfig,
        *,
        sampling: tuple[str, int] = ("unordered", 0),
        seed: int,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(sequences) == 0:
            raise UserError(
                f"data.split: {config.path or 'the dataset'} has no sequence in {config.split!r}; use another"
            )
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if batch < 1:
            raise UserError(f"train.batch: must be positive, got {batch}")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed: lies in 0..2^63-1, got {seed}")
        if batch % world_size:
            raise UserError(f"train.batch: {batch} does not divide by {world_size} ranks; choose a multiple")
        self.batch = batch
        self._starts, self._sequences, self._config, self._seed = starts, sequences, config, seed
        self._rule, self._skip = resolve_rule(config, sampling)
        if self._rule not in ("ordered", "unordered"):
            raise ValueError(f"sampling: unknown rule {self._rule!r}")
        share = batch // world_size
        self._sample = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: randomness.permutation(seed, "sequences", epoch, len(sequences))
        )

    def sequences(self, step: int) -> np.ndarray:
        """Sequence numbers int64 (B,) of this rank's samples at `step`."""
        epoch, place = np.divmod(step * self.batch + self._sample, len(self._sequences))
        picked = np.empty_like(place)
        for number in range(int(epoch[0]), int(epoch[-1]) + 1):
            now = epoch == number
            picked[now] = self._permutation(number)[place[now]]
        return self._sequences[picked]

    def __call__(self, step: int) -> Selection:
        assert step >= 0, f"steps count from 0, got {step}"
        sequence = self.sequences(step)
        start = self._starts[sequence]
        length = self._starts[sequence + 1] - start
        count = self._config.frames
        address = {"seed": self._seed, "step": step, "sample": self._sample}
        frames_e = start[:, None] + ordered_frames(length, count, 0, purpose="frames of s_E", **address)
        if self._config.same_clip:
            frames_g = frames_e
        elif self._rule == "ordered":
            frames_g = start[:, None] + ordered_frames(length, count, self._skip, purpose="frames of s_G", **address)
        else:
            frames_g = start[:, None] + unordered_frames(length, count, purpose="frames of s_G", **address)
        return Selection(step, self._sample, sequence, frames_e, frames_g)
