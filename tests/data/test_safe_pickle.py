"""The array reader admits what NumPy writes, and refuses everything else without doing anything."""

import os
import pickle

import numpy as np
import pytest

from gaitfast.data import safe_pickle

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
FROZEN = FRAMES.copy()
FROZEN.flags.writeable = False
ARRAYS = {
    "frames": FRAMES,
    "read-only": FROZEN,
    "fortran": np.asfortranarray(FRAMES),
    "strided": FRAMES[::2, :, ::-1],
    "empty": np.zeros((0, 64, 64), np.uint8),
    "scalar": np.full((), 7, np.uint8),
    "bool": FRAMES > 128,
    "float": FRAMES / 255.0,
    "big-endian": FRAMES.astype(">i4"),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_reads_what_numpy_writes(name, protocol):
    array = safe_pickle.loads(pickle.dumps(ARRAYS[name], protocol))
    assert array.dtype == ARRAYS[name].dtype and array.shape == ARRAYS[name].shape
    assert np.array_equal(array, ARRAYS[name])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_the_module_paths_of_numpy_1_and_2(protocol):
    data = pickle.dumps(FRAMES, protocol)
    one, two = b"numpy.core.multiarray", b"numpy._core.multiarray"
    if two not in data and one not in data:
        one, two = b"numpy.core.numeric", b"numpy._core.numeric"
    assert one in data or two in data
    for old, new in ((one, two), (two, one)):
        other = data.replace(old, new)
        if other != data and protocol >= 4:  # the name's length, one byte, stands before it; so does the frame's, eight
            at = other.index(new)
            other = other[: at - 1] + bytes([len(new)]) + other[at:]
            other = other[:3] + (len(other) - 11).to_bytes(8, "little") + other[11:] if other[2:3] == b"\x95" else other
        assert np.array_equal(safe_pickle.loads(other), FRAMES)


def test_reads_a_python_2_pickle():
    raw = bytes(range(256)) * 16
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03"
        b"(K\x01K\x01K@K@\x87cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb."
    )
    assert np.array_equal(safe_pickle.loads(data), np.frombuffer(raw, np.uint8).reshape(1, 64, 64))


class _Touch:
    """A pickle of this leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: np.array([x], object), lambda x: (FRAMES, x)])
def test_never_runs_code(tmp_path, wrap, protocol):
    target = tmp_path / "harmed"
    data = pickle.dumps(wrap(_Touch(target)), protocol)
    with pytest.raises(safe_pickle.PickleError):
        safe_pickle.loads(data)
    assert not target.exists()
    pickle.loads(data)
    assert target.exists()  # so the pickle was a live one


@pytest.mark.parametrize(
    "thing",
    [
        [FRAMES],
        {"a": FRAMES},
        "text",
        None,
        (1, 2),
        np.array(["text"]),
        np.array([1j]),
        np.zeros(3, [("a", "u1")]),
        np.ma.array([1]),
        np.datetime64("2020-01-01"),
        np.float64(1.0),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_refuses_everything_else(thing, protocol):
    with pytest.raises(safe_pickle.PickleError):
        safe_pickle.loads(pickle.dumps(thing, protocol))


BOMBS = {
    "nothing": b"",
    "memo index of 4 billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "bytes of 2^62": b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"x.",
    "frame of 2^62": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N.",
    "a million opcodes": b"\x80\x02" + b"N" * 1_000_000 + b".",
    "tuples that double": b"\x80\x02)" + b"q\x00h\x00\x86" * 3000 + b".",
    "stack underflow": b"\x80\x02\x87.",
    "tuple without mark": b"\x80\x02Nt.",
    "build on nothing": b"\x80\x02Nb.",
    "persistent id": b"\x80\x02Pname\n.",
    "extension code": b"\x80\x02\x82\x01.",
    "zip archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", BOMBS)
def test_refuses_bombs_at_once(name):
    with pytest.raises(safe_pickle.PickleError):
        safe_pickle.loads(BOMBS[name])


def test_claimed_shapes_must_fit_the_bytes():
    data = pickle.dumps(np.zeros((3, 64, 64), np.uint8), 2)
    shape = b"K\x03K@K@\x87"
    assert data.count(shape) == 1
    for other in (b"K\x04K@K@\x87", b"J\xff\xff\xff\xffK@K@\x87", b"K\x03K@\x86", b"NNN\x87", b"]"):
        with pytest.raises(safe_pickle.PickleError):
            safe_pickle.loads(data.replace(shape, other))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_truncation_and_many_flipped_bits_are_refused_or_read_as_an_array(protocol):
    small = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    data = pickle.dumps(small, protocol)
    for end in range(len(data)):
        with pytest.raises(safe_pickle.PickleError):
            safe_pickle.loads(data[:end])
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                array = safe_pickle.loads(bytes(flipped))
            except safe_pickle.PickleError:
                continue
            assert isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.nbytes <= len(data)
