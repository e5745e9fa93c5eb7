"""The compiled operators from compressed chunks to clips: against float64, OpenCV, the reference, and themselves.

Tolerances in grey levels. The compiled warp's weights have 16 bits and its products 8 behind the point: csrc/cpu/warp.h
bounds what that costs by 0.02 before rounding.
"""

import itertools
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaitfast.config import AugmentConfig, UserError
from gaitfast.data import codec, part_ops, reference
from gaitfast.data.augment import ClipParameters, draw_parameters
from gaitfast.data.packed import PackedDataset
from tests.data.silhouettes import walk, write_dataset
from tests.data.test_parity import bilinear

pytestmark = pytest.mark.skipif(not codec.compiled(), reason="the extension is not built")

WARP_TOLERANCE = 1
"""Largest difference of a pixel to another backend's warp."""
EXACT_TOLERANCE = 0.52
"""Largest distance of a warped pixel from float64 interpolation: rounding to whole levels, and 0.02."""
LEVELS = ("generic", "avx2", "avx512")

seeds = st.integers(0, 2**32)
examples = settings(max_examples=25, deadline=None)


def clips(seed: int, count: int = 5, frames: int = 3) -> np.ndarray:
    """uint8 (count, frames, 64, 64): figures, noise, and black and white noise."""
    rng = np.random.default_rng(seed)
    figures = np.stack([walk(int(rng.integers(100)), frames) for _ in range(count)])
    figures[-1] = rng.integers(0, 256, figures[-1].shape)
    figures[count // 2] = rng.integers(0, 2, figures[-1].shape) * 255
    return figures


def shards_of(frames: np.ndarray, sizes: tuple[int, ...] = ()) -> dict:
    """Frames uint8 (n, 64, 64) in shards of `sizes` frames, all of them asked for, as the operator takes them."""
    sizes = sizes or (len(frames),)
    assert sum(sizes) == len(frames)
    found = {"data": [], "offsets": [], "crc": []}
    for begin, end in itertools.pairwise(np.cumsum([0, *sizes])):
        chunks = codec.compress(frames[begin:end])
        found["data"].append(torch.from_numpy(chunks.data.copy()))
        found["offsets"].append(torch.from_numpy(np.concatenate([[0], np.cumsum(chunks.size)])))
        found["crc"].append(torch.from_numpy(chunks.crc.view(np.int32)))
    found["shards"] = torch.repeat_interleave(torch.tensor(sizes))
    found["numbers"] = torch.cat([torch.arange(size) for size in sizes])
    return found


def arguments(frames: np.ndarray, drawn: ClipParameters, threads: int = 1, shards: dict | None = None) -> dict:
    return {
        **(shards or shards_of(frames.reshape(-1, 64, 64))),
        "width": drawn.width,
        "matrix": torch.from_numpy(drawn.matrix),
        "warp": torch.from_numpy(drawn.warp),
        "flip": torch.from_numpy(drawn.flip),
        **part_ops.tensors(drawn),
        "threads": threads,
    }


def compiled(frames: np.ndarray, drawn: ClipParameters, threads: int = 1, shards: dict | None = None) -> torch.Tensor:
    """Clips uint8 (B, T, 64, 64), compressed and then augmented."""
    result, problem = torch.ops.gaitfast.augment_clips(**arguments(frames, drawn, threads, shards))
    assert problem.tolist() == [-1, 0]
    return result


def parameters(seed: int, width: int, count: int = 5, **probabilities) -> ClipParameters:
    names = ("affine", "perspective", "rotate", "part_dilate", "part_blur")
    config = AugmentConfig(**{**dict.fromkeys(names, 0.5), **probabilities})
    return draw_parameters(config, seed=seed, purpose="test", step=0, sample=np.arange(count), width=width)


def expected(frames: np.ndarray, drawn: ClipParameters) -> np.ndarray:
    return np.stack([reference.augment_clip(clip, drawn, i) for i, clip in enumerate(frames)])


def difference(a, b) -> float:
    return np.abs(np.asarray(a, np.float64) - b).max()


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 44])
@examples
@given(seed=seeds, frames=st.sampled_from([1, 3, 16, 17, 33]))
def test_warp_agrees_with_opencv_and_with_float64(width, seed, frames):
    stored, drawn = clips(seed, frames=frames), parameters(seed, width, part_dilate=0.0, part_blur=0.0)
    result = compiled(stored, drawn).numpy()
    assert difference(result, expected(stored, drawn)) <= WARP_TOLERANCE
    for clip, matrix, found in zip(stored, drawn.matrix, result):
        assert difference(found, bilinear(clip, matrix, width)) <= EXACT_TOLERANCE


@examples
@given(
    seed=seeds,
    shift=st.tuples(*[st.floats(-70, 70)] * 2),
    scale=st.floats(0.05, 20),
    tilt=st.tuples(*[st.floats(-0.01, 0.01)] * 2),
)
def test_warps_far_beyond_those_that_are_drawn(seed, shift, scale, tilt):
    """All of the frame, none of it, strongly shrunk or enlarged."""
    stored, drawn = clips(seed), parameters(seed, 64, part_dilate=0.0, part_blur=0.0)
    drawn.warp[:] = True
    drawn.matrix[:] = [[scale, 0.1, shift[0]], [-0.1, scale, shift[1]], [*tilt, 1.7]]
    result = compiled(stored, drawn).numpy()
    for clip, matrix, found in zip(stored, drawn.matrix, result):
        assert difference(found, bilinear(clip, matrix, 64)) <= EXACT_TOLERANCE


def test_a_homography_that_has_no_answer_reads_nothing_outside():
    stored, drawn = clips(0), parameters(0, 64, part_dilate=0.0, part_blur=0.0)
    drawn.warp[:] = True
    for bad in (
        np.zeros((3, 3)),
        np.full((3, 3), np.nan),
        np.full((3, 3), np.inf),
        np.eye(3) * [[1e308], [1e308], [1e-308]],
    ):
        drawn.matrix[:] = bad
        result = compiled(stored, drawn)
        assert result.shape == (5, 3, 64, 64) and not result[:, :, 1:, 1:].any()


@pytest.mark.parametrize("width", [64, 44])
def test_what_is_not_warped_is_copied_exactly(width):
    stored, off = clips(1), {"affine": 0.0, "perspective": 0.0, "rotate": 0.0, "part_dilate": 0.0, "part_blur": 0.0}
    drawn = parameters(1, width, **off)
    assert 0 < drawn.flip.sum() < 5 and not drawn.warp.any()
    exact = expected(stored, drawn)
    np.testing.assert_array_equal(compiled(stored, drawn).numpy(), exact)
    drawn.warp[:] = True
    np.testing.assert_array_equal(compiled(stored, drawn).numpy(), exact)


@pytest.mark.parametrize("width", [64, 44])
@examples
@given(seed=seeds)
def test_part_operations_equal_the_reference(width, seed):
    stored = clips(seed)
    drawn = parameters(seed, width, affine=0.0, perspective=0.0, rotate=0.0, part_dilate=0.7, part_blur=0.7)
    np.testing.assert_array_equal(compiled(stored, drawn).numpy(), expected(stored, drawn))


@pytest.mark.parametrize("width", [64, 44])
def test_all_operations_composed_agree_with_the_reference(width):
    unequal = []
    for seed in range(20):
        stored, drawn = walk_clips(seed), parameters(seed, width)
        unequal.append(compiled(stored, drawn).numpy() != expected(stored, drawn))
    # A level of difference in front of the threshold may become 255 behind it, so shares are compared.
    assert np.mean(unequal) < 1e-3


def walk_clips(seed: int) -> np.ndarray:
    return np.stack([walk(5 * seed + i, 4) for i in range(5)])


# --- what it does not depend on ---------------------------------------------------------------------------------------


@examples
@given(seed=seeds, width=st.sampled_from([64, 44]))
def test_bytes_do_not_depend_on_instructions_threads_or_shards(seed, width):
    stored, drawn = clips(seed), parameters(seed, width)
    first = compiled(stored, drawn)
    with pytest.MonkeyPatch.context() as patch:
        for level in LEVELS:
            patch.setenv("GAITFAST_CPU", level)
            assert torch.equal(compiled(stored, drawn, threads=3), first)
    cut = shards_of(stored.reshape(-1, 64, 64), (1, 6, 0, 8))
    assert torch.equal(compiled(stored, drawn, threads=2, shards=cut), first)


def test_memory_is_used_again_but_never_while_somebody_holds_it():
    stored, drawn = clips(3), parameters(3, 64)
    held = [compiled(stored, drawn) for _ in range(12)]
    assert len({tensor.data_ptr() for tensor in held}) == 12
    copy, view = held[0].clone(), held[0][1:]
    places = {tensor.data_ptr() for tensor in held[1:]}
    del held
    again = [compiled(255 - stored, drawn) for _ in range(4)]
    assert {tensor.data_ptr() for tensor in again} <= places
    assert torch.equal(view, copy[1:])


# --- damage and mistakes ----------------------------------------------------------------------------------------------

CHECKSUM, BLOCK = 1, 2
"""What is wrong with a row (csrc/cpu/shards.h)."""


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_corrupt_frame_is_named_whatever_thread_meets_it(threads):
    stored, drawn = clips(0), parameters(0, 64)
    shards = shards_of(stored.reshape(-1, 64, 64), (9, 6))
    for shard, number in ((1, 4), (0, 7)):
        shards["data"][shard][shards["offsets"][shard][number] + 5] ^= 16
    _, problem = torch.ops.gaitfast.augment_clips(**arguments(stored, drawn, threads, shards))
    assert problem.tolist() == [7, CHECKSUM]


@pytest.mark.parametrize("chunk", [b"", b"\x00", b"\x10a", b"\x1fa\x01\x00" + b"\xff" * 40, bytes(300)])
def test_a_chunk_that_is_no_frame_is_named_even_with_the_right_checksum(chunk):
    shards = {
        "data": [torch.from_numpy(np.frombuffer(bytearray(chunk), np.uint8))],
        "offsets": [torch.tensor([0, len(chunk)])],
        "crc": [torch.from_numpy(np.array([zlib.crc32(chunk)], np.uint32).view(np.int32))],
        "shards": torch.zeros(1, dtype=torch.int64),
        "numbers": torch.zeros(1, dtype=torch.int64),
    }
    _, problem = torch.ops.gaitfast.augment_clips(**arguments(clips(0)[:1, :1], parameters(0, 64, 1), 1, shards))
    assert problem.tolist() == [0, BLOCK]


@pytest.mark.parametrize("offset", [(-5, 10), (0, 2**62), (2**62, -(2**62)), (50, 10)])
def test_an_index_that_leaves_the_file_is_named(offset):
    shards = shards_of(clips(0)[:1, 0])
    shards["offsets"] = [torch.tensor(offset)]
    _, problem = torch.ops.gaitfast.augment_clips(**arguments(clips(0)[:1, :1], parameters(0, 64, 1), 1, shards))
    assert problem.tolist() == [0, CHECKSUM]


def damaged(path, corrupt: str) -> PackedDataset:
    """The last frame of sequence 1, whose bytes are like no other's, has a wrong bit."""
    dataset = write_dataset(path, [4, 5, 6])
    chunk = dataset.chunk_bytes(np.array([8]))[0].tobytes()
    data = bytearray((path / "shard-00000.safetensors").read_bytes())
    data[data.index(chunk) + 9] ^= 1
    (path / "shard-00000.safetensors").write_bytes(data)
    return PackedDataset.open(path, corrupt=corrupt)


def test_a_corrupt_frame_is_refused_or_skipped_as_elsewhere(tmp_path):
    numbers, drawn = np.array([[0, 8], [7, 5]]), parameters(0, 64, 2, affine=0.0, perspective=0.0, rotate=0.0)
    options = {key: value for key, value in arguments(clips(0), drawn).items() if key not in shards_of(clips(0)[0])}
    with pytest.raises(UserError, match=r"refuse/shard-00000.*frame 4 of sequence 001-nm-01-000 does not match"):
        damaged(tmp_path / "refuse", "refuse").clips(numbers, **options)
    dataset = damaged(tmp_path / "skip", "skip")
    with pytest.warns(UserWarning, match="frame 3 is taken instead"):
        found = dataset.clips(numbers, **options)
    sound = dataset.frames(np.array([0, 7, 7, 5])).reshape(2, 2, 64, 64)
    np.testing.assert_array_equal(found.numpy(), expected(sound, drawn))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"numbers": torch.tensor([0, 15])}, "is not in its shard"),
        ({"numbers": torch.tensor([-1, 0])}, "is not in its shard"),
        ({"shards": torch.tensor([0, 1])}, "is of no shard"),
        ({"width": 66}, "width is even"),
        ({"width": 43}, "width is even"),
        ({"matrix": torch.eye(3)[None]}, "matrix must be contiguous float64"),
        ({"matrix": torch.eye(3).expand(3, 3, 3)}, "same number of frames for each matrix"),
        ({"warp": torch.zeros(2, dtype=torch.bool)}, "warp and flip"),
        ({"threads": 0}, "threads must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    shards = {
        **shards_of(clips(0).reshape(-1, 64, 64)),
        "numbers": torch.tensor([0, 14]),
        "shards": torch.tensor([0, 0]),
    }
    sound = arguments(clips(0), parameters(0, 64, 1), 1, shards)
    assert torch.ops.gaitfast.augment_clips(**sound)[0].shape == (1, 2, 64, 64)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gaitfast.augment_clips(**{**sound, **change})
