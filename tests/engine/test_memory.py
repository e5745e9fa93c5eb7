"""Memory: the estimate against what processes really take, its words, and what the C library keeps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gaitfast import needs
from gaitfast.config import PretrainConfig, TransferConfig, load
from gaitfast.engine.memory import Estimate, describe, saved_bytes, states

ROOT = Path(needs.__file__).resolve().parents[1]
GIB = 2**30
NEEDED = Estimate(1 * GIB, 16 * GIB, 5 * GIB, 1 * GIB)


def test_a_run_that_fits_says_what_it_needs():
    line = describe(NEEDED, 30 * GIB, 64, {})
    assert line.startswith("needs about 23.0 GiB at batch 64 (states 1.0, activations 16.0, transient 5.0, base 1.0)")
    assert "30.0 GiB are free" in line and "fits" not in line


def test_a_run_that_does_not_fit_names_the_ways_that_do():
    ways = {"train.accumulation=2": 12 * GIB, "2 ranks": 13 * GIB, "data.frames=15": 12 * GIB, "one more": 21 * GIB}
    line = describe(NEEDED, 20 * GIB, 64, ways)
    assert line.endswith(
        "too much; fits 3 ways: train.accumulation=2 (12.0 GiB), 2 ranks (13.0 GiB), data.frames=15 (12.0 GiB)"
    )
    assert "not enough" in describe(NEEDED, 2 * GIB, 64, ways)


def test_each_stage_of_zero_divides_more():
    weights = [torch.empty(1000), torch.empty(500, requires_grad=True)]
    assert [states(weights, stage, 4) for stage in range(4)] == [
        4 * 1500 + 4 * 500 + 8 * 500,
        4 * 1500 + 4 * 500 + 12 * 500 // 4,
        4 * 1500 + 4 * 500 // 4 + 12 * 500 // 4,
        4 * 1500 // 4 + 4 * 500 // 4 + 12 * 500 // 4,
    ]


def test_saved_bytes_counts_a_memory_once_and_no_weights():
    weight = torch.randn(8, 8, requires_grad=True)

    def forward():
        x = torch.randn(4, 8) @ weight  # keeps the input
        y = x.exp()  # keeps its result
        return y * y  # the same memory again

    assert saved_bytes(forward, [weight]) == 2 * 4 * 8 * 4


def test_saved_bytes_frees_what_the_forward_pass_kept():
    weight = torch.randn(8, 8, requires_grad=True)
    results = []

    def forward():
        y = (torch.randn(4, 8) @ weight).exp()  # keeps its result
        results.append(StorageWeakRef(y.untyped_storage()))
        return y.sum()

    saved_bytes(forward, [weight])
    assert results[0].expired()


@pytest.mark.parametrize("name", ["smplgait", "gaitbase"])
def test_an_estimate_leaves_the_networks_as_they_are(name, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"backbone: {{name: {name}, width: 0.125}}\ndenoiser: {{dim: 32}}\ndata: {{frames: 4}}\n")
    config = load(PretrainConfig, file)
    _, objective = needs.pretraining_objective(config)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    needed = needs.estimate(config, objective, torch.device("cpu"))
    assert all(torch.equal(before[key], value) for key, value in objective.state_dict().items())
    twice = needs.estimate(load(PretrainConfig, file, ["train.batch=128"]), objective, torch.device("cpu"))
    assert 1.9 < twice.activations / needed.activations < 2.1 and twice.states == needed.states
    half = needs.estimate(load(PretrainConfig, file, ["train.accumulation=2"]), objective, torch.device("cpu"))
    assert 1.9 < needed.activations / half.activations < 2.1


def test_a_transfer_config_too(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("transfer: {ratio: 0.5}\nbackbone: {width: 0.125}\ndata: {frames: 4}\ntrain: {batch: [2, 2]}\n")
    load(TransferConfig, file)
    fits, line = needs.on_paper(str(file))
    assert fits and "at batch 4" in line


PROGRAM = """
import resource, sys, torch
import gaitfast.pretrain as entry
from gaitfast.config import PretrainConfig, load
from gaitfast.data.reference import ReferenceLoader
from gaitfast.engine import world
from gaitfast import needs
torch.set_num_threads(1)
config = load(PretrainConfig, sys.argv[1])
process = world.start()
run = entry.Pretraining(config, process)
loader = entry.build_loader(run.dataset, config.data, sampling=run.sampling, seed=0, batch=config.train.batch)
for step in range(3):
    run.train_step(next(loader), step)
loader.close()
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
world.stop()
"""


@pytest.mark.slow
def test_the_estimate_is_within_a_third_of_the_measured_peak(tmp_path, walkers_dataset):
    """Where activations are most of it: 16 x 16 frames, bf16."""
    file = tmp_path / "c.yaml"
    file.write_text(
        f"run: {tmp_path / 'run'}\ndata: {{path: {walkers_dataset}, frames: 16, threads: 1}}\ntrain: {{batch: 16}}\n"
        "backbone: {width: 0.5}\ndenoiser: {dim: 64}\neval: {condition_clips: 1, condition_timesteps: 1}\n"
    )
    config = load(PretrainConfig, file)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("PEAK")[1])
    needed = needs.estimate(config, needs.pretraining_objective(config)[1], torch.device("cpu"))
    assert 0.75 < needed.total / peak < 1.33, (needed, peak)


FAULTS = """
import resource, torch
from gaitfast.engine.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB, above any threshold of glibc's own
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = min(faults() for _ in range(5))
assert keep_freed_memory()
print(usual, min(faults() for _ in range(20)))  # the first ones make the room
"""


def test_the_c_library_keeps_what_is_freed():
    """A large block takes the pages of the one before it: it faults in none."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    usual, kept = map(int, done.stdout.split())
    assert kept < 100 < 16_000 < usual


HOLES = """
from benchmarks.memory import status_kib
from gaitfast.engine.memory import hand_back_freed_memory, keep_freed_memory
import torch
assert keep_freed_memory()
hole, wall = torch.ones(16 * 2**20), torch.ones(2**20)  # 64 MiB below a block that stays
del hole
before = status_kib("VmRSS")
hand_back_freed_memory()
print(before - status_kib("VmRSS"))
"""


def test_freed_memory_between_blocks_is_handed_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 60_000 < int(done.stdout) < 80_000
