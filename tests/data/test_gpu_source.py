"""DALI's graph for a GPU as far as a CPU can tell: it is well formed, and what it is fed belongs together."""

import numpy as np
import pytest
import torch

from gaitfast.config import DataConfig
from gaitfast.data import dali
from gaitfast.data.augment import KERNELS, SIZE
from gaitfast.data.codec import ChunkReader
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import make_plan
from gaitfast.data.residency import DeviceChunks, MappedChunks
from tests.data.silhouettes import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("packed") / "figures", [9, 12, 6, 20, 15], shard_files=2)


def inflated(chunks: torch.Tensor, sizes: np.ndarray) -> np.ndarray:
    """As fn.decoders.inflate does it: chunks of `sizes`, back to back."""
    offset = np.cumsum(sizes, dtype=np.int64) - sizes
    return ChunkReader(chunks.numpy()).inflate(offset, sizes.astype(np.int64)).reshape(-1, SIZE, SIZE)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_graph_is_one_that_dali_accepts(on_device):
    """Operators, arguments and their types; whether the kernels exist is found out on a GPU."""
    options = {"batch_size": 4, "num_threads": 1, "device_id": None}
    assert dali.gpu_clips(lambda: (), lambda: (), (64, 44), on_device, **options).serialize()


@pytest.mark.parametrize("order", ["chunks first", "parameters first", "in turn"])
@pytest.mark.parametrize("same_clip", [False, True])
def test_chunks_and_parameters_of_a_step_stay_together(dataset, order, same_clip):
    config = DataConfig(frames=5, same_clip=same_clip)
    plan = make_plan(dataset, config, seed=3, batch=3)
    source = dali._GpuSource(MappedChunks(dataset), plan, 7)
    for step in range(7, 11):
        chunks_first = order == "chunks first" or (order == "in turn" and step % 2)
        if chunks_first:
            chunks, inputs = source.chunks(), source()
        else:
            inputs, chunks = source(), source.chunks()
        selection, clips = source.pending.popleft()
        assert selection.step == step and len(chunks) == 2 and len(inputs) == 2 * dali._GPU_INPUTS
        for k, clip in enumerate(clips):
            sizes, matrix, warp, flip, dilated, *rest = inputs[k * dali._GPU_INPUTS : (k + 1) * dali._GPU_INPUTS]
            drawn = clip.parameters
            for sample in range(3):
                frames = dataset.frames(clip.frames[sample])
                np.testing.assert_array_equal(inflated(chunks[k][sample], sizes[sample]), frames)
            np.testing.assert_array_equal(matrix, drawn.matrix.astype(np.float32))
            assert (warp == drawn.warp).all() and (flip == drawn.flip).all()
            assert (dilated == (drawn.dilate_rows[:, 0] < drawn.dilate_rows[:, 1])).all()
            assert [tuple(map(tuple, pair)) for pair in zip(rest[2].tolist(), rest[3].tolist())] == [
                KERNELS[number].boxes for number in drawn.kernel
            ]


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_gathered_chunks_are_those_of_the_frames(dataset, backend):
    numbers = np.array([4, 0, 61, 4])
    chunks, sizes = MappedChunks(PackedDataset.open(dataset.path, backend=backend)).gather(numbers)
    np.testing.assert_array_equal(inflated(chunks, sizes), dataset.frames(numbers))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_chunks_on_a_device_are_those_of_the_files(dataset, device):
    """The arithmetic is the same on a CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    chunks = DeviceChunks(dataset, np.array([0, 2, 4]), torch.device(device))
    numbers = np.array([3, 61, 3, 0, 26, 47])
    data, size = chunks.gather(numbers)
    assert data.device.type == device
    np.testing.assert_array_equal(inflated(data.cpu(), size), dataset.frames(numbers))
