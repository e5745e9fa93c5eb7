"""Which sequences and frames make up the batch of step s: a pure function of (index arrays, config, seed, step).

Sequences come epoch by epoch, each epoch a permutation of the split; batches run over the end of an epoch, so none is
partial. From each sequence two clips of N frames are drawn (Sec. 3.1.5): s_E, consecutive frames for the autoencoder,
and s_G, by the rule of the backbone's authors. Supervised training takes P people and K sequences of each instead, and
one clip of each sequence. Every draw is addressed by (seed, purpose, step, sample of the global batch), so neither
ranks nor restarts change it (invariants 1 and 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from gaitfast import randomness
from gaitfast.config import ClipConfig, DataConfig, SourceConfig, UserError


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
    length: np.ndarray,
    count: int,
    *,
    seed: int,
    purpose: str,
    step: int,
    sample: np.ndarray,
    meant: np.ndarray | None = None,
) -> np.ndarray:
    """OpenGait's fixed_unordered: `count` frames in random order, with replacement only if there are fewer; (B, count).

    `length` int64 (B,). Without replacement: Floyd's algorithm for all samples at once, so that the cost does not grow
    with the length of the sequences, then a random order. With `meant` int64 (B,), 1..count each, row i is a draw of
    meant[i] frames followed by padding.
    """
    meant = np.full(len(length), count) if meant is None else meant
    if randomness.compiled():
        address = *randomness.key(seed, purpose), step
        rows = (torch.from_numpy(np.array(column, np.int64)) for column in (sample, length, meant))
        return torch.ops.gaitfast.unordered_frames(*address, *rows, count).numpy()
    return _numpy_unordered_frames(length, count, meant, seed=seed, purpose=purpose, step=step, sample=sample)


def _numpy_unordered_frames(
    length: np.ndarray, count: int, meant: np.ndarray, *, seed: int, purpose: str, step: int, sample: np.ndarray
) -> np.ndarray:
    draws = randomness.uniform(seed, purpose, step, sample, 2 * count)
    enough = length >= meant
    chosen = np.empty((len(length), count), np.int64)
    for i in range(count):
        bound = np.where(enough, np.minimum(length - meant + i + 1, length), length)
        pick = (draws[:, i] * bound).astype(np.int64)
        taken = enough & (chosen[:, :i] == pick[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, bound - 1, pick)
    keys = np.where(np.arange(count) < meant[:, None], draws[:, count:], 1.0)  # draws lie below 1: padding stays behind
    order = np.argsort(keys, axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def resolve_rule(config: SourceConfig, sampling: tuple[str, int]) -> tuple[str, int]:
    """The rule for the frames that the model sees: its own `sampling`, unless the config names another."""
    return sampling if config.sampler == "auto" else (config.sampler, config.frames_skip)


def _own_samples(
    config: SourceConfig, sequences: np.ndarray, seed: int, batch: int, rank: int, world_size: int
) -> np.ndarray:
    """The samples of the global batch that one rank takes, int64 (B,). UserError where there is nothing to take."""
    if len(sequences) == 0:
        raise UserError(f"data.split: {config.path or 'the dataset'} has no sequence in {config.split!r}; use another")
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    if batch < 1:
        raise UserError(f"train.batch: must be positive, got {batch}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: lies in 0..2^63-1, got {seed}")
    if batch % world_size:
        raise UserError(f"train.batch: {batch} does not divide by {world_size} ranks; choose a multiple")
    share = batch // world_size
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)


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
        self._sample = _own_samples(config, sequences, seed, batch, rank, world_size)
        self.batch = batch
        self._starts, self._sequences, self._config, self._seed = starts, sequences, config, seed
        self._rule, self._skip = resolve_rule(config, sampling)
        if self._rule not in ("ordered", "unordered"):
            raise ValueError(f"sampling: unknown rule {self._rule!r}")
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


@dataclass(frozen=True, slots=True)
class LabelledSelection:
    """One rank's share of the batch of one step of supervised training, before anything is read."""

    step: int
    sample: np.ndarray
    """int64 (B,): numbers within the global batch."""
    sequence: np.ndarray
    """int64 (B,): sequence numbers of the dataset."""
    label: np.ndarray
    """int64 (B,): 0..num_classes-1, the place of the subject among the sorted subjects of the split."""
    frames: np.ndarray
    """int64 (B, N): frame numbers of the clips, as PackedDataset.frames takes them."""
    lengths: np.ndarray
    """int64 (B,): how many of the N, from the first on, are meant; the others are padding."""


class PeopleSampler:
    """P different people by K of their sequences for any step, in any order (OpenGait's TripletSampler).

    People are drawn anew at every step, uniformly and without replacement; of each, K sequences without replacement, or
    with it where there are fewer. Samples i*K .. i*K+K-1 of the global batch are the i-th person's, so a rank has whole
    people; that makes no difference, since loss and batch norms span all ranks. The cost does not depend on the number
    of people.

    `starts` int64 (num_sequences + 1), `subject` int (num_sequences) and `sequences` int64 (n,), the numbers that the
    split admits, are a PackedDataset's; `sampling` is the model's rule for frames. UserError for a split with fewer
    than P people, or in which nobody has two sequences.
    """

    def __init__(
        self,
        starts: np.ndarray,
        subject: np.ndarray,
        sequences: np.ndarray,
        config: ClipConfig,
        *,
        sampling: tuple[str, int] = ("unordered", 0),
        seed: int,
        batch: tuple[int, int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.people, self.each = batch
        self._sample = _own_samples(config, sequences, seed, self.people * self.each, rank, world_size)
        self._starts, self._config, self._seed = starts, config, seed
        self._rule, self._skip = resolve_rule(config, sampling)
        source = f"{config.path or 'the dataset'}, split {config.split!r}"
        if config.frames_range != (0, 0) and self._rule == "ordered":
            raise UserError("data.frames_range: ordered clips have a fixed number of frames; set data.frames instead")
        codes, label = np.unique(subject[sequences], return_inverse=True)
        self._members = sequences[np.argsort(label, kind="stable")]
        self._counts = np.bincount(label)
        self._first = np.cumsum(self._counts) - self._counts
        self.num_classes = len(codes)
        if self.people > self.num_classes:
            raise UserError(
                f"train.batch: asks for {self.people} people, {source}, has {self.num_classes}; use a smaller batch"
            )
        if self._counts.max() < 2:
            raise UserError(f"data.path: {source}: nobody has two sequences, so there is no triplet to learn from")

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels and sequence numbers of the whole global batch, int64 (P * K,) each."""
        address = {"seed": self._seed, "step": step}
        nobody = np.zeros(1, np.int64)
        number = np.array([self.num_classes])
        label = unordered_frames(number, self.people, purpose="people", sample=nobody, **address)[0]
        everyone = np.arange(self.people)
        pick = unordered_frames(self._counts[label], self.each, purpose="their sequences", sample=everyone, **address)
        return np.repeat(label, self.each), self._members[self._first[label][:, None] + pick].reshape(-1)

    def sequences(self, step: int) -> np.ndarray:
        """Sequence numbers int64 (B,) of this rank's samples at `step`."""
        return self._draw(step)[1][self._sample]

    def __call__(self, step: int) -> LabelledSelection:
        assert step >= 0, f"steps count from 0, got {step}"
        label, sequence = (whole[self._sample] for whole in self._draw(step))
        start = self._starts[sequence]
        length = self._starts[sequence + 1] - start
        address = {"seed": self._seed, "step": step, "sample": self._sample, "purpose": "frames of the training clip"}
        low, high = self._config.frames_range
        if high:
            draws = randomness.uniform(self._seed, "frames per clip", step, self._sample, 1)[:, 0]
            lengths = low + (draws * (high - low + 1)).astype(np.int64)
            frames = unordered_frames(length, high, meant=lengths, **address)
        else:
            count = self._config.frames
            lengths = np.full(len(sequence), count)
            if self._rule == "ordered":
                frames = ordered_frames(length, count, self._skip, **address)
            else:
                frames = unordered_frames(length, count, **address)
        return LabelledSelection(step, self._sample, sequence, label, start[:, None] + frames, lengths)
