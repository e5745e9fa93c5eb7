"""Memory: the estimate against what processes really take, its words, and what the C library keeps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gaitfast import needs
from gaitfast.config import PretrainConfig, TransferConfig, UserError, load
from gaitfast.data.packed import PackedDataset
from gaitfast.engine.memory import Estimate, describe, saved_bytes, states
from gaitfast.models import build_recognizer

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


def test_more_ranks_are_a_way_only_where_each_has_its_own_memory():
    found = {kind: needs.ways(PretrainConfig(), NEEDED, torch.device(kind), 2) for kind in ("cpu", "cuda")}
    half = 2 * GIB + 21 * GIB // 2
    assert found["cpu"]["train.accumulation=2"] == half and found["cpu"]["data.frames=15"] == half
    assert not any("ranks" in setting for setting in found["cpu"])
    assert found["cuda"]["4 ranks"] == half and found["cpu"].items() <= found["cuda"].items()


def test_each_stage_of_zero_divides_more():
    weights = [torch.empty(1000), torch.empty(500, requires_grad=True)]
    assert [states(weights, stage, 4) for stage in range(4)] == [
        4 * 1500 + 4 * 500 + 8 * 500,
        4 * 1500 + 4 * 500 + 12 * 500 // 4,
        4 * 1500 + 4 * 500 // 4 + 12 * 500 // 4,
        4 * 1500 + 4 * 1500 // 4 + 4 * 500 // 4 + 12 * 500 // 4,
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


TRANSFER = "transfer: {ratio: 0.5}\nbackbone: {width: 0.125}\ndata: {frames: 4}\ntrain: {batch: [2, 2]}\n"


@pytest.fixture
def estimated(tmp_path, monkeypatch):
    """Overrides of a small transfer config -> the network that its estimate is about, and what the line ends in."""

    def look(*overrides: str) -> tuple[torch.nn.Module, str]:
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(needs, "report", lambda config, module, *others: seen.append(module) or (True, "line"))
            _, line = needs.on_paper(str(file), overrides)
        return seen[0], line

    file = tmp_path / "c.yaml"
    file.write_text(TRANSFER)
    return look


def shapes(module: torch.nn.Module) -> list[torch.Size]:
    return [value.shape for value in module.state_dict().values()]


def test_transfer_has_a_classifier_for_the_people_of_the_dataset(estimated, walkers_dataset):
    dataset = PackedDataset.open(walkers_dataset)
    people = len(np.unique(dataset.subject[dataset.split("train")]))
    module, line = estimated(f"data.path={walkers_dataset}")
    assert shapes(module) == shapes(build_recognizer("smplgait", "gait3d", people, width=0.125))
    assert line == "line"
    module, _ = estimated(f"data.path={walkers_dataset}", "identity.weight=0")
    assert shapes(module) == shapes(build_recognizer("smplgait", "gait3d", width=0.125))


@pytest.mark.parametrize(
    ("name", "variant", "classes"), [("smplgait", "gait3d", 3000), ("gaitgl", "grew-bnneck", 20000)]
)
def test_without_the_dataset_the_published_number_of_people_is_taken(estimated, name, variant, classes):
    module, line = estimated(f"backbone.name={name}", f"backbone.variant={variant}", "data.path=nowhere")
    assert shapes(module) == shapes(build_recognizer(name, variant, classes, width=0.125))
    assert line == f"line (the dataset is not there: {classes} classes assumed)"


def test_a_frozen_backbone_has_neither_gradients_nor_activations(estimated, tmp_path):
    config = load(TransferConfig, tmp_path / "c.yaml")
    whole, frozen = (
        needs.estimate(config, estimated("identity.weight=0", f"transfer.freeze={freeze}")[0], torch.device("cpu"))
        for freeze in ("false", "true")
    )
    backbone = sum(p.numel() for p in estimated()[0].backbone.parameters())
    assert whole.states - frozen.states == 12 * backbone  # gradient and two moments
    assert frozen.activations < whole.activations / 10


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("transfer: {raito: 0.5}", (), "transfer.raito: unknown key; did you mean transfer.ratio?"),
        ("transfer: {ratio: 0}", (), r"transfer.ratio: lies in \(0, 100\]"),
        ("triplet: {margin: -1}", (), "triplet.margin: must not be negative"),
        ("identity: {weight: 1}\nbackbone: {name: gaitsett}", (), "backbone.name: is one of"),
        ("trian: {}\ntrain: {batch: [8, 4]}", (), "trian: unknown key; did you mean train?"),
        ("optimizer: {lr: -1}", (), "optimizer.lr: must not be negative"),
        ("train: {batch: [1, 4]}", (), "train.batch: needs at least 2 people"),
        ("seed: 0", ("transfer.raito=1",), "transfer.raito: unknown key"),
        ("seed: 0", ("train.batch=[1, 4]",), "train.batch: needs at least 2 people"),
        ("transfer: {ratio: 0.5}", ("train.batch=8",), "train.batch: needs 2 values, got 8"),
        ("denoiser: {dim: 33}", (), "denoiser.dim: must be a multiple of 32"),
        ("denoiser: {dim: 32}\ntrain: {batch: [8, 4]}", (), "train.batch: expected int"),
        ("train: {batch: 0}", (), "train.batch: must be positive"),
        ("[1, 2]", (), "the top level must be keys and values"),
        ("a: [", (), "not valid YAML"),
    ],
)
def test_a_mistake_is_that_of_the_stage_whose_keys_the_file_has(text, overrides, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        needs.on_paper(str(file), overrides)
    with pytest.raises(UserError, match="no such config file"):
        needs.on_paper(str(tmp_path / "other.yaml"))


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
