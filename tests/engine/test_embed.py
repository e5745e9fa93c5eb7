"""An embedding belongs to its sequence, whatever the batch, the limit and the number of ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gaitfast.config import UserError
from gaitfast.data import packed
from gaitfast.engine.embed import embed
from gaitfast.models import build_recognizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    sequences = []
    for i, length in enumerate((3, 9, 1, 14, 5, 30, 2)):
        frames = np.kron(rng.integers(0, 2, (length, 8, 8)), np.ones((8, 8))) * 255
        sequences.append((f"{i:03d}", "x", "v", frames.astype(np.uint8)))
    return packed.write(tmp_path_factory.mktemp("embed") / "set", sequences)


@pytest.fixture(scope="module")
def backbone():
    return build_recognizer("gaitset", "gait3d", width=0.25).eval().backbone


def one_by_one(backbone, data, numbers, limit=720):
    rows = []
    for i in numbers:
        frames = torch.from_numpy(data.sequence(i)[:limit, :, 10:54].astype(np.float32) / 255)
        with torch.no_grad():
            rows.append(backbone(frames[None])[0])
    return torch.stack(rows)


@pytest.mark.parametrize("batch_frames", [1, 17, 1000, None])
def test_it_does_not_depend_on_its_batch(data, backbone, batch_frames):
    numbers = [4, 0, 6, 5, 1, 2, 3]
    got = embed(backbone, data, numbers, batch_frames=batch_frames)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, one_by_one(backbone, data, numbers), rtol=1e-5, atol=1e-6)


def test_only_the_first_frames_of_long_sequences_count(data, backbone):
    got = embed(backbone, data, [5, 3, 0], frames_limit=7)
    torch.testing.assert_close(got, one_by_one(backbone, data, [5, 3, 0], 7), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[0], one_by_one(backbone, data, [5])[0], rtol=1e-3)


def test_batches_hold_no_more_frames_than_asked(data):
    seen = []

    def model(silhouettes, lengths):
        assert silhouettes.shape == (1, sum(lengths), 64, 44) and silhouettes.dtype == torch.float32
        assert 0.0 <= float(silhouettes.min()) and float(silhouettes.max()) == 1.0
        seen.append(lengths)
        return torch.zeros(len(lengths), 1, 1)

    embed(model, data, range(7), batch_frames=14)
    assert seen == [[3, 9, 1], [14], [5], [30], [2]]


def test_a_value_that_is_no_number_names_its_sequence(data):
    def model(silhouettes, lengths):
        return torch.tensor([float("nan") if length == 14 else 1.0 for length in lengths])[:, None, None]

    with pytest.raises(UserError, match="embedding of 003-x-v is not finite"):
        embed(model, data, range(7))
    with pytest.raises(UserError, match="no sequence to embed"):
        embed(model, data, [])


def test_an_error_of_the_dataset_reaches_the_caller(data, backbone):
    with pytest.raises(IndexError):
        embed(backbone, data, [0, 1, 99])


@pytest.mark.slow
def test_ranks_share_the_work_and_all_get_the_whole(data, backbone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    command = [sys.executable, "-m", "tests.engine.embed_ranks", str(data.path), str(tmp_path / "out")]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=common | {"RANK": str(rank)}) for rank in range(3)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0, 0]
    results = [np.load(tmp_path / f"out.{rank}.npy") for rank in range(3)]
    assert all(np.array_equal(result, results[0]) for result in results)
    torch.testing.assert_close(torch.from_numpy(results[0]), one_by_one(backbone, data, range(7)), rtol=1e-5, atol=1e-6)
