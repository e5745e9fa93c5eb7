"""A dataset that changes, shrinks or rots under its reader: an error that names the file, no crash and no garbage."""

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from gaitfast.config import ClipConfig, UserError
from gaitfast.data import codec, packed, shards
from gaitfast.data.pipeline import build_loader
from tests.data.test_packed import make_sequences, write_in_shards

BACKENDS = [
    "plain",
    pytest.param("compiled", marks=pytest.mark.skipif(not codec.compiled(), reason="gaitfast._C is not built")),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_in_shards(tmp_path_factory.mktemp("packed") / "set", make_sequences(), 4)


@pytest.fixture
def folder(tmp_path, pristine):
    return shutil.copytree(pristine, tmp_path / "set")


def every(dataset):
    return np.arange(dataset.num_frames)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 5000])
def test_a_shard_that_is_cut_short_is_an_error(folder, backend, size, monkeypatch):
    """Reading a page of a mapped file that is gone is SIGBUS, which would end the process without a word."""
    monkeypatch.setattr(shards, "_LOOK_EVERY", 1e9)  # on a slow machine the look at the file's time would come first
    dataset = packed.PackedDataset.open(folder, backend=backend)
    whole = dataset.frames(every(dataset))
    os.truncate(folder / "shard-00002.safetensors", size)
    for read in (dataset.frames, dataset.chunk_bytes):
        with pytest.raises(UserError, match=r"shard-00002\.safetensors: (cannot be read any more|was changed while)"):
            read(every(dataset))
    before = int(dataset.starts[8])  # the shards before it, of four sequences each, still read
    assert np.array_equal(dataset.frames(np.arange(before)), whole[:before])


CUT = """
import faulthandler, os, sys
import numpy as np
from gaitfast.config import UserError
from gaitfast.data.packed import PackedDataset
from gaitfast.data import shards
faulthandler.enable()
shards._LOOK_EVERY = 1e9  # on a slow machine the look at the file's time would come first
dataset = PackedDataset.open(sys.argv[1])
os.truncate(sys.argv[1] + "/shard-00002.safetensors", 0)
try:
    dataset.frames(np.arange(dataset.num_frames))
except UserError as error:
    print(error, flush=True)
import mmap
with open(sys.argv[1] + "/shard-00001.safetensors", "r+b") as file:
    other = mmap.mmap(file.fileno(), 0)
    file.truncate(0)
print(other[100])
"""


@pytest.mark.skipif(not codec.compiled(), reason="gaitfast._C is not built")
def test_other_readers_of_mapped_files_still_get_their_signal(folder):
    """Ours is caught; what is not ours goes to whoever wanted SIGBUS before: here Python's own reporter of crashes."""
    root = Path(packed.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CUT, folder],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "shard-00002.safetensors: cannot be read any more" in done.stdout
    assert "Fatal Python error: Bus error" in done.stderr and done.returncode == -7


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_bytes_under_the_old_name_are_an_error(folder, tmp_path, backend, monkeypatch):
    """A whole other shard, sound by its own checksums, copied over the mapped one: only the file's time tells."""
    rng = np.random.default_rng(1)
    dataset = packed.PackedDataset.open(folder, backend=backend)
    path = folder / "shard-00000.safetensors"
    size, count = path.stat().st_size, dataset.facts["shards"][0]["frames"]
    writer = shards.ShardWriter(tmp_path / "other")
    writer.append(codec.compress((rng.random((count, 64, 64)) > 0.97).astype(np.uint8)))
    writer.close()
    other = (tmp_path / "other").read_bytes()
    assert len(other) <= size
    monkeypatch.setattr(shards, "_LOOK_EVERY", 0.0)
    dataset.frames(every(dataset)[:3])
    with open(path, "r+b") as file:
        file.write(other)
    for read in (dataset.frames, dataset.chunk_bytes):
        with pytest.raises(UserError, match=r"shard-00000\.safetensors: was changed while it was in use; let whatever"):
            read(np.array([dataset.num_frames - 1]))
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: No such file"):
        dataset.frames(np.array([0]))


def test_the_index_is_the_one_that_was_checked(folder):
    dataset = packed.PackedDataset.open(folder)
    expected = dataset.starts.copy(), dataset.subject.copy()
    (folder / "index.safetensors").write_bytes(bytes((folder / "index.safetensors").stat().st_size))
    assert np.array_equal(dataset.starts, expected[0]) and np.array_equal(dataset.subject, expected[1])


def flip(folder, dataset, numbers):
    """Flip a bit in the block of each of these frames, all of the first shard."""
    path = folder / "shard-00000.safetensors"
    offsets = shards.map_tensors(path)["offsets"].copy()
    data = bytearray(path.read_bytes())
    for number in numbers:
        data[512 + int(offsets[number])] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_corrupt_frames_can_be_skipped(folder, backend):
    """The nearest sound frame of the same sequence stands in, the earlier of two; the same each time."""
    dataset = packed.PackedDataset.open(folder)
    whole = dataset.frames(every(dataset))
    first = next(int(s) for s, n in zip(dataset.starts, dataset.lengths) if n >= 8)
    flip(folder, dataset, [first, first + 1, first + 4, first + 6])
    dataset = packed.PackedDataset.open(folder, backend=backend, corrupt="skip")
    expected = whole.copy()
    for number, instead in ((0, 2), (1, 2), (4, 3), (6, 5)):
        expected[first + number] = whole[first + instead]
    with pytest.warns(UserWarning, match="does not match its checksum; frame . is taken instead") as caught:
        assert np.array_equal(dataset.frames(every(dataset)), expected)
    assert len(caught) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert np.array_equal(dataset.frames(every(dataset)), expected)
        data, offset, size = dataset.chunk_bytes(every(dataset))
    assert np.array_equal(codec.ChunkReader(data, "plain").inflate(offset, size).reshape(-1, 64, 64), expected)
    assert pickle.loads(pickle.dumps(dataset)).corrupt == "skip"


def test_a_sequence_without_a_sound_frame_is_refused_all_the_same(folder):
    dataset = packed.PackedDataset.open(folder, corrupt="skip")
    flip(folder, dataset, range(dataset.lengths[0]))
    with pytest.raises(UserError, match="and no other frame of it is sound"):
        packed.PackedDataset.open(folder, corrupt="skip").frames(np.array([0]))


def test_the_loader_says_so_at_the_step(folder):
    dataset = packed.PackedDataset.open(folder)
    config = ClipConfig(frames=4, split="all", threads=1, prefetch=1)
    loader = build_loader(dataset, config, seed=0, batch=(2, 2))
    try:
        next(loader)
        for record in dataset.facts["shards"]:
            os.truncate(folder / record["file"], 600)
        with pytest.raises(UserError, match=r"shard-.*cannot be read any more|shard-.*was changed.* \(read for step"):
            for _ in range(50):
                next(loader)
    finally:
        loader.close()
