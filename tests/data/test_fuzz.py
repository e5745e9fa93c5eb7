"""Foreign bytes, mutated: every reader gives what was written or an error that it announces, and nothing else.

A fixed number of seeded cases each; GAITFAST_FUZZ_SECONDS=N goes on for N seconds per target with other seeds. A
failure prints the seed of its case: `CASES[target](np.random.default_rng(seed), folder)` runs it alone.
"""

import json
import os
import pickle
import shutil
import time
import traceback
import tracemalloc
import zlib

import cv2
import lz4.block
import numpy as np
import pytest
import scipy.io

from gaitfast.config import UserError
from gaitfast.data import codec, packed, partition, safe_pickle, shards, sources, usf17
from tests.data.silhouettes import walk
from tests.data.test_packed import PARTITION, make_sequences, write_in_shards

SECONDS = float(os.environ.get("GAITFAST_FUZZ_SECONDS", 0))
FIGURES = np.concatenate([walk(person, 4) for person in range(3)])


def mutated(rng, data):
    """`data` with bits flipped, bytes set to telling values, pieces cut out, doubled or moved; never what it was."""
    while True:
        found = bytearray(data)
        for _ in range(rng.integers(1, 5)):
            kind, at = rng.integers(6), int(rng.integers(len(found) or 1))
            length = int(rng.integers(1, 1 + min(64, len(found) or 1)))
            if kind == 0 and found:
                found[at] ^= 1 << rng.integers(8)
            elif kind == 1 and found:
                found[at] = rng.choice([0, 1, 15, 16, 127, 128, 240, 254, 255, ord("."), ord("0"), ord('"')])
            elif kind == 2:
                del found[at : at + length]
            elif kind == 3:
                found[at:at] = found[at : at + length]
            elif kind == 4:
                found[at:at] = rng.bytes(length)
            elif rng.random() < 0.3:
                del found[at:]
        if found != data:
            return bytes(found)


def strict_lz4(block):
    """The block format as its document puts it, in plain Python: the frame, or None."""
    try:
        return _strict_lz4(block)
    except IndexError:  # the block ends where a byte should be
        return None


def _strict_lz4(block):
    out, at = bytearray(), 0

    def byte():
        nonlocal at
        at += 1
        return block[at - 1]

    def length(nibble):
        more = 255 if nibble == 15 else 0
        while more == 255:
            more = byte()
            nibble += more
        return nibble

    while True:
        token = byte()
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at > len(block) or len(out) > 4096:
            return None
        if at == len(block):
            return bytes(out) if len(out) == 4096 else None
        distance = byte() | byte() << 8
        match = length(token & 15) + 4
        if not 0 < distance <= len(out) or len(out) + match > 4096:
            return None
        for _ in range(match):
            out.append(out[-distance])


def random_block(rng):
    """Sequences that are well formed but for their numbers."""
    block = bytearray()
    for _ in range(rng.integers(1, 12)):
        literals, match = (int(rng.choice([0, 1, 3, 14, 15, 16, 300])) for _ in range(2))
        block.append(min(literals, 15) << 4 | min(match, 15))
        if literals >= 15:
            block += b"\xff" * ((literals - 15) // 255) + bytes([(literals - 15) % 255])
        block += rng.bytes(literals)
        block += int(rng.choice([1, 2, 3, 8, 15, 16, 17, 64, 0, 4000])).to_bytes(2, "little")
        if match >= 15:
            block += b"\xff" * int(rng.integers(0, 17)) + bytes([int(rng.integers(255))])
    tail = 4096 - int(rng.integers(0, 4096))
    return bytes(block) + b"\xf0" + b"\xff" * ((tail - 15) // 255) + bytes([max(tail - 15, 0) % 255]) + rng.bytes(tail)


def lz4_blocks(rng, folder):
    """The decoders against the format's definition: the same frame, or refused by both."""
    frame = FIGURES[rng.integers(len(FIGURES))]
    modes = {"mode": rng.choice(["default", "high_compression"]), "store_size": False}
    written = codec.compress(frame[None]).data.tobytes() if rng.random() < 0.5 else lz4.block.compress(frame, **modes)
    block = random_block(rng) if rng.random() < 0.2 else mutated(rng, written)
    expected = strict_lz4(block)
    around = rng.bytes(int(rng.integers(0, 40)))  # so that reading on would find bytes
    data = np.frombuffer(around + block + around, np.uint8)
    reader = codec.ChunkReader(data, "auto")
    place = np.array([len(around)], np.int64), np.array([len(block)], np.int64)
    assert reader.checksums(*place)[0] == zlib.crc32(block)
    try:
        got = reader.inflate(*place).tobytes()
    except codec.CorruptChunk:
        got = None
    assert got == expected or (reader.backend == "plain" and expected is None)


def frames_there_and_back(rng, folder):
    """The encoder on frames of any texture, read by our decoder and by lz4."""
    frame = FIGURES[rng.integers(len(FIGURES))].copy()
    for _ in range(rng.integers(0, 4)):
        top, left = rng.integers(0, 64, 2)
        high, wide = rng.integers(1, 65, 2)
        patch = frame[top : top + high, left : left + wide]
        patch[:] = rng.choice([0, 255]) if rng.random() < 0.5 else rng.integers(0, rng.integers(2, 257), patch.shape)
    if rng.random() < 0.3:
        frame = np.resize(frame.ravel()[: rng.integers(1, 4097)], (64, 64))
    chunks = codec.compress(frame[None])
    block = chunks.data.tobytes()
    assert lz4.block.decompress(block, uncompressed_size=4096) == frame.tobytes() and chunks.crc[0] == zlib.crc32(block)
    decoded = codec.ChunkReader(chunks.data).inflate(np.zeros(1, np.int64), chunks.size)
    assert decoded.tobytes() == frame.tobytes()


class _Live:
    def __reduce__(self):
        return os.mkdir, ("/nowhere/at/all",)


PICKLES = [pickle.dumps(FIGURES[:2], p) for p in range(6)]
PICKLES += [pickle.dumps(np.asfortranarray(FIGURES[:1]), p) for p in (2, 5)] + [pickle.dumps((FIGURES[0], _Live()), 4)]


def pickles(rng, folder):
    """An array of a plain type, or PickleError; and no more memory than a few times the bytes."""
    data = PICKLES[rng.integers(len(PICKLES))]
    head = mutated(rng, data[:400]) if rng.random() < 0.8 else data[:400]
    data = head + (data[400:] if rng.random() < 0.8 else mutated(rng, data[400:]))
    tracemalloc.start()
    try:
        array = safe_pickle.loads(data)
        assert isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.nbytes <= len(data)
    except safe_pickle.PickleError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * len(data) + 500_000


def headers(rng, folder):
    """A safetensors file: arrays that lie within it, or UserError."""
    path = folder / "x.safetensors"
    if not path.exists():
        shards.write_tensors(folder / "whole", {"a": np.arange(9), "b": np.arange(4, dtype=np.uint8)})
    whole = (folder / "whole").read_bytes()
    data = mutated(rng, whole)
    path.write_bytes(data)
    try:
        arrays = shards.map_tensors(path)
        assert sum(array.nbytes for array in arrays.values()) < len(data)
    except UserError as error:
        assert str(path) in str(error)


def datasets(rng, folder):
    """Any file of a packed dataset: the frames that were packed, or UserError; never others."""
    if not (folder / "set").exists():
        write_in_shards(folder / "set", make_sequences(), 4, partition=PARTITION)
        np.save(folder / "frames.npy", packed.PackedDataset.open(folder / "set").frames(np.arange(_count(folder))))
    expected = np.load(folder / "frames.npy", mmap_mode="r")
    path = folder / "set" / rng.choice(sorted(p.name for p in (folder / "set").iterdir()))
    whole = path.read_bytes()
    try:
        path.write_bytes(mutated(rng, whole))
        backend = "plain" if rng.random() < 0.2 else "auto"
        dataset = packed.PackedDataset.open(folder / "set", backend=backend)
        order = rng.integers(0, dataset.num_frames, 40)
        assert np.array_equal(dataset.frames(order), expected[order])
        data, offset, size = dataset.chunk_bytes(order)
        assert np.array_equal(codec.ChunkReader(data).inflate(offset, size).reshape(-1, 64, 64), expected[order])
    except UserError as error:
        assert str(folder / "set") in str(error)
    finally:
        path.write_bytes(whole)


def _count(folder):
    return json.loads((folder / "set" / "dataset.json").read_text())["frames"]


PICTURES = [
    cv2.imencode(".png", f, [cv2.IMWRITE_PNG_COMPRESSION, c])[1].tobytes() for f in FIGURES[::5] for c in (0, 6)
]


def pictures(rng, folder):
    """A PNG: a picture of the size that it claims, or SourceError."""
    path = folder / "1.png"
    path.write_bytes(mutated(rng, PICTURES[rng.integers(len(PICTURES))]))
    try:
        picture = sources._read_picture(path)
        assert picture.dtype == np.uint8 and picture.ndim == 2 and picture.size <= sources.PICTURE_LIMIT
    except sources.SourceError as error:
        assert error.path == str(path)


def matlab_files(rng, folder):
    """A .mat file of the USF release: half-cycles and their subjects, or SourceError."""
    if not (folder / "whole.mat").exists():
        content = {"fea3D": rng.integers(0, 2, (32, 22, 10, 3), dtype=np.uint8), "gnd": np.array([[1], [2], [3]], "u1")}
        scipy.io.savemat(folder / "whole.mat", content)
    whole = (folder / "whole.mat").read_bytes()
    head = mutated(rng, whole[:400])
    path = folder / "Gal.mat"
    path.write_bytes(head + whole[400:])
    try:
        silhouettes, subjects = usf17._load_usf.__wrapped__(str(path), 0)
        assert silhouettes.shape == (32, 22, 10, len(subjects))
    except sources.SourceError as error:
        assert error.path == str(path)


def partitions(rng, folder):
    """A partition JSON: sets of strings, or UserError."""
    path = folder / "p.json"
    path.write_bytes(mutated(rng, json.dumps(PARTITION).encode()))
    try:
        found = partition.Partition.load(path)
        assert all(isinstance(name, str) for name in found.train | found.test | found.probe)
    except UserError as error:
        assert str(path) in str(error)


CASES = {
    "lz4 blocks": (lz4_blocks, 3000),
    "frames there and back": (frames_there_and_back, 3000),
    "pickles": (pickles, 1500),
    "headers": (headers, 1500),
    "datasets": (datasets, 400),
    "pictures": (pictures, 1500),
    "matlab files": (matlab_files, 200),
    "partitions": (partitions, 1500),
}


def first_failure(case, count: int, folder) -> str:
    """The first seed whose input is handled otherwise than `case` says, with the traceback; empty if there is none."""
    until = time.monotonic() + SECONDS
    seed = 0
    while seed < count or time.monotonic() < until:
        try:
            case(np.random.default_rng(seed), folder)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            return f"seed {seed}: {traceback.format_exc()}"
        seed += 1
    return ""


@pytest.mark.parametrize("target", CASES)
@pytest.mark.timeout(600 + 2 * SECONDS)
def test_fuzz(target, tmp_path):
    case, count = CASES[target]
    assert first_failure(case, count, tmp_path) == ""


def test_a_failure_is_reported_with_its_seed(tmp_path):
    def case(rng, folder):
        assert rng.random() < 0.5, "half"

    seeds = [seed for seed in range(9) if np.random.default_rng(seed).random() >= 0.5]
    found = first_failure(case, 9, tmp_path)
    assert found.startswith(f"seed {seeds[0]}: ") and "half" in found


def test_the_reference_decoder_is_one():
    """What the fuzzing compares with reads what lz4 and we write."""
    for frame in FIGURES:
        for block in (lz4.block.compress(frame, store_size=False), codec.compress(frame[None]).data.tobytes()):
            assert strict_lz4(block) == frame.tobytes()
