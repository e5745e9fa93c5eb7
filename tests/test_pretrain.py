"""The real command, whole: DALI, DeepSpeed ZeRO, checkpoints, evaluation. Each run is a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gaitfast.engine.portable import load_backbone
from gaitfast.models import build_recognizer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
data: {{path: {dataset}, frames: 4, threads: 1}}
backbone: {{name: smplgait, variant: gait3d, width: 0.125}}
denoiser: {{dim: 32}}
optimizer: {{warmup: 4}}
train: {{iterations: 40, batch: 4, precision: fp32}}
eval: {{every: 20, condition_clips: 4, condition_timesteps: 2}}
checkpoint: {{every: 20, keep: 2}}
log_every: 1
"""


class Runner:
    """Starts `python gaitfast/pretrain.py` (or the deepspeed launcher) on a small config."""

    def __init__(self, folder: Path, dataset: Path):
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text(CONFIG.format(dataset=dataset))
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

    def command(self, run: str, *overrides: str, ranks: int = 0) -> list[str]:
        settings = [f"run={self.folder / run}", *overrides]
        if ranks:
            launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
            launcher += ["--master_port", str(20_000 + os.getpid() % 20_000)]
        else:
            launcher = [sys.executable]
        arguments = [str(ROOT / "gaitfast/pretrain.py"), "--config", str(self.config)]
        return launcher + arguments + [part for setting in settings for part in ("--set", setting)]

    def start(self, run: str, *overrides: str, ranks: int = 0) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(run, *overrides, ranks=ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**self.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            cwd=ROOT,
        )

    def __call__(self, run: str, *overrides: str, ranks: int = 0, code: int = 0) -> str:
        process = self.start(run, *overrides, ranks=ranks)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == code, output
        return output

    def rows(self, run: str, name: str = "metrics.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.folder / run / name).read_text().splitlines()]

    def losses(self, run: str) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self.rows(run)}


@pytest.fixture(scope="module")
def runner(tmp_path_factory, walkers_dataset):
    return Runner(tmp_path_factory.mktemp("runs"), walkers_dataset)


@pytest.fixture(scope="module")
def undisturbed(runner):
    """40 steps in one go."""
    runner("whole")
    return runner.folder / "whole"


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_names(undisturbed, runner):
    assert list(runner.losses("whole")) == list(range(1, 41))
    rows = runner.rows("whole", "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 20, 40]
    for row in rows:
        assert 0 <= row["rank1"] <= 100
        assert row["gap"] == pytest.approx(row["distance_negative"] - row["distance_positive"])
    summary = json.loads((undisturbed / "summary.json").read_text())
    wanted = {
        "rank1_before",
        "rank1_after",
        "gap_before",
        "gap_after",
        "loss_self",
        "loss_same",
        "loss_other",
        "loss_null",
    }
    assert wanted | {"steps", "seconds", "seed", "backend"} <= set(summary)
    assert summary["steps"] == 40 and summary["backend"]["loader"] == "compiled-cpu"
    names = {"config.resolved.yaml", "backbone.safetensors", "pictures.safetensors"}
    assert names <= {path.name for path in undisturbed.iterdir()}
    assert [p.name for p in sorted((undisturbed / "checkpoints").iterdir())] == [
        "step_00000020.safetensors",
        "step_00000040.safetensors",
    ]


@pytest.mark.slow
def test_the_portable_backbone_loads(undisturbed):
    def build(config):
        section = config["backbone"]
        return build_recognizer(section["name"], section["variant"], width=section["width"]).backbone

    backbone, metadata = load_backbone(undisturbed / "backbone.safetensors", build)
    assert metadata["step"] == metadata["metrics"]["step"] == 40
    assert not backbone.training


@pytest.mark.slow
def test_20_and_resume_and_20_equal_40_bit_for_bit(undisturbed, runner):
    assert "stopped cleanly after step 20" in runner("halves", "train.stop_after=20")
    assert "resumed from" in runner("halves")
    assert runner.losses("halves") == runner.losses("whole")
    ours, theirs = runner.rows("halves", "evaluations.jsonl"), runner.rows("whole", "evaluations.jsonl")
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    pictures = runner.folder / "halves/pictures.safetensors"
    assert pictures.read_bytes() == (undisturbed / "pictures.safetensors").read_bytes()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, runner):
    process = runner.start("terminated")
    path = runner.folder / "terminated/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < 5:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped cleanly after step" in output
    runner("terminated")
    assert runner.losses("terminated") == runner.losses("whole")
    happened = [row["event"] for row in runner.rows("terminated", "events.jsonl")]
    first = happened.index("resume")
    assert happened[0] == "start" and happened[first - 2 : first] == ["checkpoint", "stop"]
    assert happened[-2:] == ["checkpoint", "finish"]


@pytest.mark.slow
def test_a_corrupt_newest_checkpoint_is_passed_over(undisturbed, runner):
    runner("corrupt", "train.stop_after=24", "checkpoint.every=12")
    victim = runner.folder / "corrupt/checkpoints/step_00000024.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    output = runner("corrupt", "checkpoint.every=12")
    assert "step_00000024.safetensors is broken" in output and "does not match its checksum" in output
    assert runner.losses("corrupt") == runner.losses("whole")


@pytest.mark.slow
def test_two_ranks_train_as_one(undisturbed, runner):
    runner("two", "train.iterations=10", "eval.every=0", ranks=2)
    runner("one", "train.iterations=10", "eval.every=0")
    one, two = runner.losses("one"), runner.losses("two")
    assert list(one) == list(two)
    assert list(two.values()) == pytest.approx(list(one.values()), rel=2e-4)
    a, b = runner.rows("one", "evaluations.jsonl"), runner.rows("two", "evaluations.jsonl")
    assert a[0]["loss_same"] == pytest.approx(b[0]["loss_same"], rel=1e-5)


@pytest.mark.slow
def test_one_then_two_then_one_equal_one(undisturbed, runner):
    for stop, ranks in ((5, 0), (5, 2), (0, 0)):
        runner("changing", "train.iterations=14", "eval.every=0", f"train.stop_after={stop}", ranks=ranks)
    runner("constant", "train.iterations=14", "eval.every=0")
    changing, constant = runner.losses("changing"), runner.losses("constant")
    assert list(changing) == list(constant) == list(range(1, 15))
    assert list(changing.values()) == pytest.approx(list(constant.values()), rel=2e-4)
    assert [row["processes"] for row in runner.rows("changing", "events.jsonl") if "processes" in row] == [1, 2, 1]


@pytest.mark.slow
def test_partitioned_weights_on_two_ranks_stop_resume_and_evaluate(runner):
    options = ("train.iterations=6", "eval.every=2", "train.zero_stage=3", "backbone.width=0.5")
    assert "stopped cleanly after step 3" in runner("partitioned", *options, "train.stop_after=3", ranks=2)
    runner("partitioned", *options, ranks=2)
    runner("whole-weights", "train.iterations=6", "eval.every=2", "backbone.width=0.5")
    ours, theirs = runner.losses("partitioned"), runner.losses("whole-weights")
    assert list(ours) == list(theirs) == [1, 2, 3, 4, 5, 6]
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-4)
    rows = runner.rows("partitioned", "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row, other in zip(rows, runner.rows("whole-weights", "evaluations.jsonl")):
        assert row["loss_same"] == pytest.approx(other["loss_same"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("train.zero_stage=0", "train.precision=bf16", "train.encode_ahead=true"),
        ("train.zero_stage=1", "train.precision=fp32", "train.accumulation=2"),
        ("train.zero_stage=3", "train.precision=bf16", "backbone.name=gaitset"),
        ("train.zero_stage=2", "train.precision=fp16", "diffusion.pooling=mean+max", "data.same_clip=true"),
    ],
    ids=lambda settings: ",".join(settings),
)
def test_options_train(runner, settings):
    name = "options-" + "-".join(settings).replace("=", "-")
    runner(name, *settings, "train.iterations=3", "eval.every=0")
    assert len(runner.losses(name)) == 3


@pytest.mark.slow
def test_accumulation_equals_the_large_batch(runner):
    runner("large", "train.iterations=4", "eval.every=0")
    runner("accumulated", "train.iterations=4", "eval.every=0", "train.accumulation=4")
    large, small = runner.losses("large"), runner.losses("accumulated")
    assert list(small.values()) == pytest.approx(list(large.values()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.path=nowhere",), "nowhere"),
        (("trian.batch=3",), "did you mean train?"),
        (("data.frames=65",), "data.frames"),
        (("train.batch=5", "train.accumulation=2"), "does not divide"),
        (("autoencoder.weights=absent.safetensors",), "absent.safetensors"),
        (("backbone.name=gaitset", "backbone.variant=grew-bnneck"), "backbone.variant"),
        (("optimizer.lr_backbone=1e30", "optimizer.lr_denoiser=1e30"), "the loss is not finite; the batch held"),
        (
            ("optimizer.lr_backbone=1e30", "optimizer.lr_denoiser=1e30", "train.zero_stage=3"),
            "the gradients of a step are not finite",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_line(runner, settings, message):
    output = runner("mistake-" + settings[0].replace("=", "-"), *settings, code=2)
    lines = [line for line in output.splitlines() if line.startswith("gaitfast: error: ")]
    assert len(lines) == 1 and message in lines[0], output
    assert "Traceback" not in output


@pytest.mark.slow
def test_another_config_is_refused_in_the_same_folder(undisturbed, runner):
    output = runner("whole", "train.batch=2", code=2)
    assert "another train.batch" in output


@pytest.mark.slow
def test_a_mended_mistake_does_not_leave_a_claimed_folder(runner):
    runner("mended", "train.iterations=2", "eval.every=0", "data.path=nowhere", code=2)
    assert not (runner.folder / "mended").exists()
    runner("mended", "train.iterations=2", "eval.every=0")
