"""Philox: the published test vectors, NumPy = PyTorch, independence of the batch, and the distributions."""

import numpy as np
import pytest
import torch

from gaitfast import randomness


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer tests for philox4x32-10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = [np.array([c], np.uint64) for c in counter]
    result = randomness._philox(words, *(np.uint64(k) for k in key), randomness._mul_numpy)
    assert [int(word[0]) for word in result] == expected
    words = [torch.tensor([c]) for c in counter]
    result = randomness._philox(words, *key, randomness._mul_torch)
    assert [int(word[0]) for word in result] == expected


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**40 + 3])
@pytest.mark.parametrize("seed", [0, 7, 2**62 + 1])
def test_numpy_equals_torch(seed, step):
    sample = np.array([0, 3, 100_000])
    ours = randomness.uniform(seed, "purpose", step, sample, 11)
    theirs = randomness.uniform_tensor(seed, "purpose", step, torch.from_numpy(sample), 11)
    assert np.array_equal(ours, theirs.numpy())
    assert ours.min() >= 0 and ours.max() < 1


@pytest.mark.skipif(not randomness.compiled(), reason="gaitfast._C is not built")
@pytest.mark.parametrize("count", [0, 1, 4, 31, 33, 1000])
@pytest.mark.parametrize("step", [0, 2**31 + 1, 2**40 + 3])
def test_the_compiled_generator_gives_the_same_bits(step, count):
    sample = np.array([0, 7, 2**32 - 1, 2**33 + 5])
    for seed in (0, 2**62 + 3):
        words = randomness.bits(seed, "purpose", step, sample, count)
        assert words.dtype == np.uint64 and words.shape == (4, count)
        assert np.array_equal(words, randomness._numpy_bits(seed, "purpose", step, sample, count))


def test_a_draw_depends_only_on_its_address():
    every = randomness.uniform(1, "a", 5, np.arange(8), 6)
    assert np.array_equal(randomness.uniform(1, "a", 5, np.array([6, 2]), 3), every[[6, 2], :3])
    for other in (
        randomness.uniform(2, "a", 5, np.arange(8), 6),
        randomness.uniform(1, "b", 5, np.arange(8), 6),
        randomness.uniform(1, "a", 6, np.arange(8), 6),
    ):
        assert not np.any(other == every)
    normal = randomness.normal_tensor(1, "a", 5, torch.arange(4), (3, 5))
    assert torch.equal(randomness.normal_tensor(1, "a", 5, torch.tensor([2]), (3, 5))[0], normal[2])


def test_normal_distribution():
    draws = randomness.normal_tensor(3, "noise", 0, torch.arange(64), (4, 30, 8, 8)).double()
    count = draws.numel()
    assert torch.isfinite(draws).all()
    assert abs(draws.mean()) < 4 / count**0.5
    assert abs(draws.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert 4.5 < draws.abs().max() < 7


def test_permutation():
    order = randomness.permutation(0, "epoch", 2, 1000)
    assert sorted(order) == list(range(1000))
    assert not np.array_equal(order, randomness.permutation(0, "epoch", 3, 1000))
    assert np.array_equal(order, randomness.permutation(0, "epoch", 2, 1000))


def test_seed_range():
    with pytest.raises(ValueError, match="seed"):
        randomness.uniform(-1, "a", 0, np.arange(1), 1)
