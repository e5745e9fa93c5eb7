"""The transfer command, whole: DALI, DeepSpeed ZeRO, checkpoints, evaluation. Each run is a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gaitfast.config import PretrainConfig, TransferConfig, UserError, dump, load
from gaitfast.data import packed
from gaitfast.engine.portable import load_backbone, load_recognizer, save_backbone
from gaitfast.engine.zero import milestones, stepped_factor
from gaitfast.interop import opengait
from gaitfast.models import build_recognizer
from gaitfast.models.recognizer import initialize
from gaitfast.transfer import groups, initialize_from, origin, require_same_origin
from tests.conftest import run_command
from tests.data.silhouettes import walk

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
data: {{path: {dataset}, frames: 4, threads: 1}}
backbone: {{name: gaitbase, width: 0.125}}
optimizer: {{name: sgd, lr: 0.005, milestones: [3], milestones_for: 0}}
train: {{iterations: 4, batch: [4, 2], precision: fp32}}
eval: {{every: 2}}
checkpoint: {{every: 2}}
log_every: 1
"""


def config_with(tmp_path, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text("backbone: {width: 0.125}\n")
    return load(TransferConfig, path, overrides)


# --- where the weights come from --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["xavier_uniform", "xavier_normal", "he"])
def test_every_way_to_draw_the_weights(tmp_path, method):
    config = config_with(tmp_path, f"transfer.init={method}", "seed=3")
    recognizer = build_recognizer("smplgait", "gait3d", 5, width=0.125, seed=3)
    expected = build_recognizer("smplgait", "gait3d", 5, width=0.125, seed=9)
    initialize(expected, method, 3)
    initialize_from(recognizer, config)
    assert all(torch.equal(a, b) for a, b in zip(recognizer.state_dict().values(), expected.state_dict().values()))
    conv = recognizer.backbone.frames.convs[2].weight
    fan_in, fan_out = conv[0].numel(), conv.shape[0] * 9
    variance = 2 / fan_in if method == "he" else 2 / (fan_in + fan_out)
    assert conv.var().item() == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("kind", ["backbone.safetensors", "opengait.pt"])
def test_a_pretrained_backbone_is_taken_and_the_head_drawn(tmp_path, kind):
    pretrained = build_recognizer("smplgait", "gait3d", 7, width=0.125, seed=8)
    path = tmp_path / kind
    if kind.endswith(".pt"):
        torch.save({"model": opengait.state_dict(pretrained), "iteration": 5}, path)
    else:
        section = {"name": "smplgait", "variant": "gait3d", "width": 0.125}
        save_backbone(path, pretrained.backbone, {"config": {"backbone": section}})
    recognizer = build_recognizer("smplgait", "gait3d", 5, width=0.125, seed=0)
    head = {name: value.clone() for name, value in recognizer.head.state_dict().items()}
    initialize_from(recognizer, config_with(tmp_path, f"transfer.init={path}"))
    for name, value in recognizer.backbone.state_dict().items():
        assert torch.equal(value, pretrained.backbone.state_dict()[name])
    assert all(torch.equal(value, head[name]) for name, value in recognizer.head.state_dict().items())


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("gaitset", 0.125, "holds gaitset:gait3d:0.125, this run trains smplgait:gait3d:0.125"),
        ("smplgait", 0.25, "holds smplgait:gait3d:0.25, this run trains smplgait:gait3d:0.125"),
    ],
)
def test_the_backbone_of_another_network_is_refused(tmp_path, name, width, message):
    path = tmp_path / "backbone.safetensors"
    section = {"name": name, "variant": "gait3d", "width": width}
    save_backbone(path, build_recognizer(name, "gait3d", width=width).backbone, {"config": {"backbone": section}})
    recognizer = build_recognizer("smplgait", "gait3d", width=0.125)
    with pytest.raises(UserError, match=message):
        initialize_from(recognizer, config_with(tmp_path, f"transfer.init={path}"))
    torch.save({"model": opengait.state_dict(build_recognizer("gaitset", "gait3d"))}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="smplgait/gait3d"):
        initialize_from(recognizer, config_with(tmp_path, f"transfer.init={tmp_path / 'other.pt'}"))
    with pytest.raises(UserError, match="'xavier' is neither a file nor one of xavier_uniform"):
        initialize_from(recognizer, config_with(tmp_path, "transfer.init=xavier"))
    with pytest.raises(UserError, match="no such checkpoint"):
        initialize_from(recognizer, config_with(tmp_path, "transfer.init=absent.safetensors"))


def saved_backbone(path, seed, **metadata):
    section = {"name": "smplgait", "variant": "gait3d", "width": 0.125}
    backbone = build_recognizer(*list(section.values())[:2], width=0.125, seed=seed).backbone
    save_backbone(path, backbone, {"config": {"backbone": section}, **metadata})


def test_a_run_goes_on_from_the_file_that_it_began_with_alone(tmp_path):
    path = tmp_path / "backbone.safetensors"
    config = config_with(tmp_path, f"transfer.init={path}")
    recognizer = build_recognizer("smplgait", "gait3d", 5, width=0.125, seed=0)
    saved_backbone(path, 8)
    began = origin(recognizer, config)
    require_same_origin(began, recognizer, config)
    saved_backbone(path, 8, step=40)  # what pretraining writes when it is started once more
    require_same_origin(began, recognizer, config)
    saved_backbone(path, 9)
    with pytest.raises(UserError, match=r"backbone\.safetensors: differs from the file that this run began with"):
        require_same_origin(began, recognizer, config)
    require_same_origin(None, recognizer, config)  # a checkpoint of a version that did not note it
    path.unlink()
    require_same_origin(began, recognizer, config)
    assert origin(recognizer, config_with(tmp_path, "transfer.init=he")) is None


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_the_backbone_has_r_times_the_rate_of_the_head(tmp_path, ratio):
    config = config_with(tmp_path, f"transfer.ratio={ratio}", "optimizer.lr=0.003", "train.iterations=18000")
    recognizer = build_recognizer("smplgait", "gait3d", 5, width=0.125)
    head, backbone = groups(recognizer, config)
    assert (head.name, backbone.name) == ("head", "backbone")
    assert {*map(id, head.parameters), *map(id, backbone.parameters)} == {*map(id, recognizer.parameters())}
    for step in (0, 2999, 3000, 9000):
        assert backbone.rate(step) == ratio * head.rate(step)
    assert head.rate(0) == 0.003


def test_a_frozen_backbone_has_no_rate(tmp_path):
    recognizer = build_recognizer("smplgait", "gait3d", 5, width=0.125)
    (only,) = groups(recognizer, config_with(tmp_path, "transfer.freeze=true"))
    assert {*map(id, only.parameters)} == {*map(id, recognizer.head.parameters())}


def test_milestones_scale_with_the_length_of_the_run(tmp_path):
    optimizer = config_with(tmp_path).optimizer
    assert milestones(180_000, optimizer) == [30_000, 90_000]
    assert milestones(60_000, optimizer) == [10_000, 30_000]
    factors = [stepped_factor(step, 60_000, optimizer) for step in (0, 9_999, 10_000, 29_999, 30_000, 59_999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    as_written = config_with(tmp_path, "optimizer.milestones_for=0", "optimizer.milestones=[7]").optimizer
    assert milestones(60_000, as_written) == [7]
    never = config_with(tmp_path, "optimizer.milestones=[]").optimizer
    assert stepped_factor(10**6, 60_000, never) == 1


# --- the command ------------------------------------------------------------------------------------------------------


class Runner:
    """Starts `python gaitfast/transfer.py` (or the deepspeed launcher) on a small config."""

    def __init__(self, folder: Path, dataset: Path):
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text(CONFIG.format(dataset=dataset))

    def __call__(self, run: str, *overrides: str, ranks: int = 0, code: int = 0) -> str:
        launcher = [sys.executable]
        if ranks:
            launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
            launcher += ["--master_port", str(20_000 + os.getpid() % 20_000)]
        settings = [f"run={self.folder / run}", *overrides]
        command = [*launcher, str(ROOT / "gaitfast/transfer.py"), "--config", str(self.config)]
        done = subprocess.run(
            command + [part for setting in settings for part in ("--set", setting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def rows(self, run: str, name: str = "metrics.jsonl") -> list[dict]:
        drop = ("clips_per_s", "data_wait", "seconds")
        rows = [json.loads(line) for line in (self.folder / run / name).read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in drop} for row in rows]

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_recognizer(self.folder / run / "recognizer.safetensors", build)[0].state_dict()


def build(config, classes=None):
    section = config["backbone"]
    return build_recognizer(section["name"], section["variant"], classes, width=section["width"])


@pytest.fixture(scope="module")
def runner(tmp_path_factory, walkers_dataset):
    return Runner(tmp_path_factory.mktemp("runs"), walkers_dataset)


@pytest.fixture(scope="module")
def undisturbed(runner):
    """4 steps in one go, at half the rate for the backbone, with clips of drawn lengths and augmentation."""
    runner("whole", *VARIED)
    return runner.folder / "whole"


VARIED = ("transfer.ratio=0.5", "data.frames_range=[3,6]", "data.augment.enabled=true")


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_names(undisturbed, runner):
    rows = runner.rows("whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {"loss", "triplet", "active", "identity", "accuracy"} <= row.keys() and 0 <= row["active"] <= 1
        assert row["loss"] == pytest.approx(row["triplet"] + 0.1 * row["identity"])
        assert row["lr_backbone"] == 0.5 * row["lr_head"]
    assert [row["lr_head"] for row in rows] == pytest.approx([5e-3, 5e-3, 5e-3, 5e-4])
    evaluations = runner.rows("whole", "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert all(0 <= row["rank1"] <= 100 for row in evaluations)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["rank1_after"] == evaluations[-1]["rank1"] and summary["classes"] == 6
    assert [p.name for p in sorted((undisturbed / "checkpoints").iterdir())] == [
        f"step_0000000{n}.safetensors" for n in (2, 4)
    ]
    recognizer, metadata = load_recognizer(undisturbed / "recognizer.safetensors", build)
    assert (metadata["classes"], metadata["step"]) == (6, 4)
    backbone, _ = load_backbone(undisturbed / "backbone.safetensors", lambda config: build(config).backbone)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, recognizer.backbone.state_dict()[name])


@pytest.mark.slow
def test_2_and_resume_and_2_equal_4_bit_for_bit(undisturbed, runner):
    assert "stopped cleanly after step 2" in runner("halves", *VARIED, "train.stop_after=2")
    assert "resumed from" in runner("halves", *VARIED)
    assert runner.rows("halves") == runner.rows("whole")
    assert runner.rows("halves", "evaluations.jsonl") == runner.rows("whole", "evaluations.jsonl")
    ours, theirs = runner.weights("halves"), runner.weights("whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_ranks_train_as_one(runner):
    """In float32, so with a network whose gradients are less sensitive to rounding than GaitBase's many batch norms;
    tests/recognition/test_objective.py holds all of them to 1e-12 in float64."""
    settings = (*VARIED, "backbone.name=smplgait", "eval.every=0")
    runner("one", *settings)
    runner("two", *settings, ranks=2)
    for ours, theirs in zip(runner.rows("two"), runner.rows("one"), strict=True):
        for key in ("loss", "triplet", "identity"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (key, ours["step"])
    ours, theirs = runner.weights("two"), runner.weights("one")
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


@pytest.mark.slow
def test_a_frozen_backbone_leaves_the_run_as_it_came(undisturbed, runner):
    source = undisturbed / "backbone.safetensors"
    runner("frozen", f"transfer.init={source}", "transfer.freeze=true", "optimizer.name=adam", "train.stop_after=2")
    runner("frozen", f"transfer.init={source}", "transfer.freeze=true", "optimizer.name=adam")
    backbone, _ = load_backbone(runner.folder / "frozen/backbone.safetensors", lambda config: build(config).backbone)
    before, _ = load_backbone(source, lambda config: build(config).backbone)
    for name, value in before.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert "lr_backbone" not in runner.rows("frozen")[0]


@pytest.mark.slow
def test_another_file_to_begin_with_is_refused_in_the_same_folder(undisturbed, runner, tmp_path):
    """Whether the run is finished or not; one that is gone is not missed."""
    source, init = undisturbed / "backbone.safetensors", tmp_path / "backbone.safetensors"
    shutil.copy(source, init)
    runner("began", f"transfer.init={init}", "train.stop_after=2")
    other, metadata = load_backbone(source, lambda config: build(config).backbone)
    with torch.no_grad():
        next(other.parameters())[0] += 1
    save_backbone(init, other, {"config": metadata["config"]})
    output = runner("began", f"transfer.init={init}", code=2)
    lines = [line for line in output.splitlines() if line.startswith("gaitfast: error: ")]
    assert len(lines) == 1 and f"{init}: differs from the file that this run began with" in lines[0], output
    init.unlink()
    runner("began", f"transfer.init={init}")
    save_backbone(init, other, {"config": metadata["config"]})
    assert "differs from the file" in runner("began", f"transfer.init={init}", code=2), "noted to the last checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("backbone.name=gaitset", "identity.weight=0", "optimizer.name=adamw", "train.zero_stage=3"),
        ("backbone.name=gaitgl", "identity.scale=1", "identity.smoothing=0", "train.precision=bf16"),
        ("backbone.name=gaitpart", "identity.weight=0", "triplet.metric=euclidean", "eval.output=feature"),
    ],
    ids=lambda settings: settings[0],
)
def test_options_train(runner, settings):
    name = "options-" + settings[0].rpartition("=")[2]
    runner(name, *settings, "train.iterations=2", "eval.every=0")
    assert len(runner.rows(name)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.path=nowhere",), "nowhere"),
        (("train.batch=[8,2]",), "asks for 8 people"),
        (("backbone.name=gaitset",), "gaitset has no classifier; set identity.weight=0"),
        (("train.accumulation=2",), "batch-all triplet loss needs the whole batch"),
        (("eval.protocol=gait4d",), "gait4d"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_line(runner, settings, message):
    run = "mistake-" + settings[0].replace("=", "-")
    output = runner(run, *settings, code=2)
    lines = [line for line in output.splitlines() if line.startswith("gaitfast: error: ")]
    assert len(lines) == 1 and message in lines[0], output
    assert "Traceback" not in output and not (runner.folder / run).exists()


@pytest.mark.slow
def test_another_run_is_refused_in_the_same_folder(undisturbed, runner):
    assert "another transfer.ratio" in runner("whole", *VARIED, "transfer.ratio=1", code=2)


@pytest.mark.slow
def test_another_dataset_is_refused_in_the_same_folder(undisturbed, runner, tmp_path):
    options = ("--subjects", 7, "--test-subjects", 5, "--walks", 3, "--frames", 12, 20, "--workers", 1)
    assert run_command("walkers", tmp_path / "tree", *options) == 0
    assert run_command("prepare", tmp_path / "tree", tmp_path / "set", "--layout", "opengait", "--workers", 1) == 0
    output = runner("whole", *VARIED, f"data.path={tmp_path / 'set'}", code=2)
    assert "was trained on a dataset with another content" in output and "Traceback" not in output


@pytest.mark.slow
def test_the_folder_of_another_stage_is_refused(undisturbed, runner, tmp_path):
    folder = runner.folder / "pretrained"
    (folder / "checkpoints/step_00000002").mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(dump(PretrainConfig()))
    assert "holds a run of another stage or version" in runner("pretrained", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaitgl", "gaitpart"])
def test_sequences_of_one_frame_train_and_rank(runner, tmp_path, name):
    rows = [(f"{p:03d}", f"nm-{k:02d}", "000", walk(10 * p + k, 1)) for p in range(8) for k in range(2)]
    people = [f"{p:03d}" for p in range(8)]
    partition = {"TRAIN_SET": people[:5], "TEST_SET": people[5:], "PROBE_SET": [f"{p}-nm-00-000" for p in people[5:]]}
    packed.write(tmp_path / "set", rows, name="short", protocol="walkers", partition=partition)
    settings = [f"backbone.name={name}", f"data.path={tmp_path / 'set'}", "train.iterations=1", "eval.every=0"]
    if name == "gaitpart":
        settings.append("identity.weight=0")
    runner(f"short-{name}", *settings)
    assert len(runner.rows(f"short-{name}", "evaluations.jsonl")) == 2
