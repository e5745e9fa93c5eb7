import itertools
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gaitfast.config import AugmentConfig, DataConfig, UserError
from gaitfast.data import codec
from gaitfast.data.packed import PackedDataset
from gaitfast.data.pipeline import build_loader
from gaitfast.data.reference import ReferenceLoader
from gaitfast.data.sampling import Sampler
from tests.data.silhouettes import write_dataset

CONFIG = DataConfig(
    frames=6, threads=1, augment=AugmentConfig(affine=0.4, perspective=0.4, part_dilate=0.4, part_blur=0.4)
)
OPTIONS = {"seed": 11, "batch": 6}
UNEQUAL = {("cpu", "compiled"): 2e-3, ("cpu", "dali"): 1e-4, ("cuda", "dali"): 2e-2}
"""Largest share of pixels that may differ from the reference. The compiled warp has weights of 16 bits."""
LENGTHS = [3, 9, 12, 6, 20, 15, 7, 31, 14, 8]

gpu = (
    [pytest.mark.gpu]
    if torch.cuda.is_available()
    else [pytest.mark.gpu, pytest.mark.skip(reason="needs a CUDA device")]
)
built = [] if codec.compiled() else [pytest.mark.skip(reason="the extension is not built")]
ENGINES = [
    pytest.param(("cpu", "compiled"), marks=built, id="cpu-compiled"),
    pytest.param(("cpu", "dali"), id="cpu-dali"),
    pytest.param(("cuda", "dali"), marks=gpu, id="cuda"),
]


@pytest.fixture(scope="module", params=ENGINES)
def where(request) -> tuple[str, str]:
    """(device, engine)."""
    return request.param


@pytest.fixture(scope="module")
def device(where) -> str:
    return where[0]


@pytest.fixture(scope="module")
def config(where) -> DataConfig:
    return replace(CONFIG, engine=where[1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PackedDataset:
    return write_dataset(tmp_path_factory.mktemp("packed") / "figures", LENGTHS)


def take(loader, steps: int) -> list:
    """The first batches of a loader, which is closed."""
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def assert_equal(a, b):
    assert a.step == b.step
    for name in ("sequence", "clip_e", "clip_g"):
        assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), f"{name} of step {a.step}"


@pytest.fixture(scope="module")
def batches(dataset, device, config):
    """Six steps, more than two epochs of the eight training sequences."""
    return take(build_loader(dataset, config, **OPTIONS, device=device), 6)


# --- what a batch is --------------------------------------------------------------------------------------------------


def test_shapes_and_types(batches, device):
    for step, batch in enumerate(batches):
        assert batch.step == step
        assert batch.sequence.shape == (6,) and batch.sequence.dtype == torch.int64
        assert batch.clip_e.shape == (6, 6, 64, 64) and batch.clip_g.shape == (6, 6, 64, 44)
        for clip in (batch.clip_e, batch.clip_g):
            assert clip.dtype == torch.uint8 and clip.device.type == device and clip.is_contiguous()
            assert clip.flatten(1).any(1).all()
        assert (batch.sequence < 8).all()  # the last two sequences belong to the test set


@pytest.mark.parametrize(
    "change, sampling",
    [
        ({}, ("unordered", 0)),
        ({}, ("ordered", 3)),
        ({"same_clip": True}, ("unordered", 0)),
        ({"split": "all", "frames": 11}, ("ordered", 0)),
    ],
)
def test_batches_equal_the_reference(dataset, device, config, change, sampling):
    config = replace(config, **change)
    options = {**OPTIONS, "sampling": sampling}
    loader = build_loader(dataset, config, **options, device=device)
    for ours, reference in zip(take(loader, 5), ReferenceLoader(dataset, config, **options)):
        assert ours.step == reference.step and torch.equal(ours.sequence, reference.sequence)
        for name in ("clip_e", "clip_g"):
            # A level of difference before the blur's threshold may become 255 behind it, so the share counts.
            unequal = (getattr(ours, name).cpu() != getattr(reference, name)).float().mean()
            assert unequal < UNEQUAL[device, config.engine], name


def test_without_augmentation_clips_are_the_stored_frames(dataset, device, config):
    off = AugmentConfig(affine=0.0, perspective=0.0, flip=0.0, part_dilate=0.0, part_blur=0.0)
    config = replace(config, augment=off, same_clip=True)
    for batch in take(build_loader(dataset, config, **OPTIONS, device=device), 3):
        for number, clip_e, clip_g in zip(batch.sequence.tolist(), batch.clip_e.cpu(), batch.clip_g.cpu()):
            stored = torch.from_numpy(dataset.sequence(number))
            tiled = stored.repeat(3, 1, 1)
            assert any(torch.equal(tiled[start : start + 6], clip_e) for start in range(len(stored)))
            assert torch.equal(clip_g, clip_e[..., 10:54])


# --- what a batch does not depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"threads": 2}, {"threads": 3, "prefetch": 5}, {"threads": 0, "prefetch": 1}])
def test_batches_do_not_depend_on_threads_or_look_ahead(dataset, device, config, batches, change):
    loader = build_loader(dataset, replace(config, **change), **OPTIONS, device=device)
    for a, b in zip(take(loader, 6), batches):
        assert_equal(a, b)


@pytest.mark.parametrize("start", [1, 4])
def test_a_restart_is_a_number(dataset, device, config, batches, start):
    loader = build_loader(dataset, config, **OPTIONS, device=device, start_step=start)
    for a, b in zip(take(loader, 6 - start), batches[start:]):
        assert_equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(dataset, device, config, batches, world_size):
    ranks = [
        take(build_loader(dataset, config, **OPTIONS, device=device, rank=r, world_size=world_size), 4)
        for r in range(world_size)
    ]
    for whole, *parts in zip(batches, *ranks):
        assert all(len(part.sequence) == 6 // world_size for part in parts)
        for name in ("sequence", "clip_e", "clip_g"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_batches_do_not_depend_on_the_decoder(dataset, device):
    """Of DALI's, that is: the compiled engine has one of its own."""
    config = replace(CONFIG, engine="dali")
    plain = PackedDataset.open(dataset.path, backend="plain")
    loaders = [build_loader(each, config, **OPTIONS, device=device) for each in (plain, dataset)]
    for a, b in zip(*(take(loader, 2) for loader in loaders)):
        assert_equal(a, b)


@pytest.mark.parametrize("residency", ["host", "device"])
def test_batches_do_not_depend_on_residency(dataset, device, config, batches, residency):
    if not codec.compiled():
        pytest.skip("the extension is not built")
    opened = PackedDataset.open(dataset.path)  # which then holds its frames in memory
    loader = build_loader(opened, replace(config, residency=residency), **OPTIONS, device=device)
    for a, b in zip(take(loader, 6), batches):
        assert_equal(a, b)
    assert torch.equal(torch.from_numpy(opened.sequence(3)), torch.from_numpy(dataset.sequence(3)))


def test_what_needs_the_extension_says_so(dataset, device):
    plain = PackedDataset.open(dataset.path, backend="plain")
    for change, key in (({"engine": "compiled"}, "engine"), ({"residency": "host"}, "residency")):
        with pytest.raises(UserError, match=rf"data\.{key}: .*(make setup|on a GPU)"):
            build_loader(plain, replace(CONFIG, **change), **OPTIONS, device=device)


def test_several_shards_are_one_dataset(dataset, device, config, batches, tmp_path):
    several = write_dataset(tmp_path / "several", LENGTHS, shard_files=4)
    assert len(several.facts["shards"]) == 4
    for residency in ("mapped", "host", "device") if codec.compiled() else ("mapped",):
        loader = build_loader(several, replace(config, residency=residency), **OPTIONS, device=device)
        for a, b in zip(take(loader, 3), batches):
            assert_equal(a, b)


def test_seed_and_step_do_matter(dataset, device, config, batches):
    (other,) = take(build_loader(dataset, config, **{**OPTIONS, "seed": 12}, device=device), 1)
    assert not torch.equal(other.clip_e, batches[0].clip_e)
    assert not torch.equal(batches[1].clip_e, batches[0].clip_e)


# --- ownership and life -----------------------------------------------------------------------------------------------


def test_a_batch_stays_as_it_was_while_others_are_made(dataset, device, config, batches):
    loader = build_loader(dataset, config, **OPTIONS, device=device)
    first = next(loader)
    copy = first.clip_e.clone(), first.clip_g.clone()
    later = [next(loader) for _ in range(8)]
    loader.close()
    assert torch.equal(first.clip_e, copy[0]) and torch.equal(first.clip_g, copy[1])
    assert_equal(first, batches[0])
    held = [first, *later]
    assert len({clip.data_ptr() for batch in held for clip in (batch.clip_e, batch.clip_g)}) == 2 * len(held)
    first.clip_e.zero_()  # and writing to it harms nobody
    assert_equal(later[0], batches[1])


def loader_threads() -> list:
    return [thread for thread in threading.enumerate() if thread.name == "gaitfast-prefetch"]


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_close_ends_the_thread_and_the_iteration(dataset, device, config, consumed):
    loader = build_loader(dataset, config, **OPTIONS, device=device)
    for _ in range(consumed):
        next(loader)
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_process_that_never_closes_its_loader_ends(dataset):
    script = (
        "import sys\n"
        "from gaitfast.config import DataConfig\n"
        "from gaitfast.data.packed import PackedDataset\n"
        "from gaitfast.data.pipeline import build_loader\n"
        "loader = build_loader(PackedDataset.open(sys.argv[1]), DataConfig(frames=4, threads=1), seed=0, batch=2)\n"
        "print(next(loader).step)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, dataset.path], cwd=root, timeout=120, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


# --- mistakes and damage ----------------------------------------------------------------------------------------------


def first_frame_of(dataset: PackedDataset, earliest: int) -> tuple[int, int]:
    """(step, frame number): a frame that step reads and no step before it, `earliest` or later."""
    select = Sampler(dataset.starts, dataset.split("train"), CONFIG, **OPTIONS)
    seen = set()
    for step in itertools.count():
        frames = set(np.concatenate([select(step).frames_e, select(step).frames_g], axis=None).tolist())
        if step >= earliest and frames - seen:
            return step, min(frames - seen)
        seen |= frames


@pytest.mark.parametrize("earliest, prefetch", [(0, 2), (1, 2), (2, 1), (2, 4)])
def test_a_corrupt_frame_is_named_when_its_step_is_due(tmp_path, device, config, batches, earliest, prefetch):
    damaged = write_dataset(tmp_path / "damaged", LENGTHS)
    step, frame = first_frame_of(damaged, earliest)
    sequence = damaged.sequence_name(int(np.searchsorted(damaged.starts, frame, side="right")) - 1)
    corrupt(damaged, frame)
    loader = build_loader(
        PackedDataset.open(damaged.path), replace(config, prefetch=prefetch), **OPTIONS, device=device
    )
    for earlier in range(step):
        assert_equal(next(loader), batches[earlier])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"damaged.*{sequence}.*prepare.*step {step}"):
            next(loader)
    loader.close()
    assert not loader_threads()


def corrupt(dataset: PackedDataset, number: int) -> None:
    """Flip a bit in the middle of the chunk of one frame."""
    chunk, _, _ = dataset.chunk_bytes(np.array([number]))
    (file,) = dataset.path.glob("shard-*")
    data = bytearray(file.read_bytes())
    place = data.index(chunk.tobytes())
    assert data.count(chunk.tobytes()) == 1
    data[place + len(chunk) // 2] ^= 1
    file.write_bytes(data)


def test_mistakes_are_named_at_once(dataset, device, config, tmp_path):
    with pytest.raises(UserError, match="6 does not divide by 4 ranks"):
        build_loader(dataset, config, **OPTIONS, device=device, world_size=4)
    nobody = write_dataset(tmp_path / "nobody", [5, 5])
    with pytest.raises(UserError, match=r"no sequence in 'train'"):
        build_loader(nobody, config, **OPTIONS, device=device)
    assert not loader_threads()
