"""The study: what it plans, what it makes of the rows, and a tiny one from start to end with real commands."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import study
from benchmarks.study_features import describe
from benchmarks.study_plan import ARMS, CONFIGS, SIZES, plan
from benchmarks.study_results import arm_results, curves, headline, picture, pretraining_table, table
from gaitfast.config import PretrainConfig, TransferConfig, UserError, dump, load
from gaitfast.engine.portable import load_backbone
from gaitfast.models import build_recognizer
from gaitfast.report.style import LIGHT, render


def transfer_config(run):
    return load(TransferConfig, run.config, run.settings)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_every_arm_runs_once_per_seed_after_its_pretraining(tmp_path):
    runs = plan("walkers", SIZES["default"], tmp_path, (0, 1, 2)).runs
    assert len({run.folder for run in runs}) == len(runs) == 3 * (1 + len(ARMS))
    for seed in range(3):
        pretraining, *arms = [run for run in runs if run.seed == seed]
        assert pretraining.stage == "pretrain" and [run.arm for run in arms] == [arm.name for arm in ARMS]
        assert runs.index(pretraining) == min(map(runs.index, arms)) - 1
        backbone = str(pretraining.folder / "backbone.safetensors")
        for run, arm in zip(arms, ARMS):
            assert transfer_config(run).transfer.init == (backbone if arm.pretrained else "xavier_uniform")


@pytest.mark.parametrize("size", SIZES)
def test_the_arms_differ_in_nothing_but_the_backbone(tmp_path, size):
    """Same iterations, batches, seed, rates of the head and evaluations; and the network that was pretrained."""
    pretraining, *arms = plan("usf17", SIZES[size], tmp_path, (5,)).runs
    configs = {run.arm: transfer_config(run) for run in arms}
    common = [replace(config, run="", transfer=None) for config in configs.values()]
    assert all(config == common[0] for config in common) and common[0].seed == 5
    settings = {name: (config.transfer.freeze, config.transfer.ratio) for name, config in configs.items()}
    assert settings == {
        "scratch": (False, 1.0),
        "finetune-0.1": (False, 0.1),
        "finetune-0.5": (False, 0.5),
        "finetune-1.0": (False, 1.0),
        "frozen": (True, 1.0),
        "frozen-random": (True, 1.0),
    }
    ours = load(PretrainConfig, pretraining.config, pretraining.settings)
    assert (ours.backbone, ours.seed, ours.data.path) == (common[0].backbone, 5, common[0].data.path)
    assert common[0].eval.protocol == ours.eval.protocol == "walkers"  # on USF as well: unseen people alone
    assert common[0].train.iterations % common[0].eval.every == 0


@pytest.mark.parametrize("size", SIZES)
def test_there_are_people_enough_for_a_batch(size):
    options = dict(zip(SIZES[size].walkers[::2], SIZES[size].walkers[1::2]))
    people, walks = load(TransferConfig, CONFIGS / size / "transfer.yaml").train.batch
    assert options["--subjects"] >= people and options["--walks"] >= walks and options["--test-subjects"] >= 16


def test_the_dataset_is_made_once(tmp_path):
    walkers = plan("walkers", SIZES["quick"], tmp_path / "w", (0,))
    assert [command[0] for command in walkers.preparation(Path("usf"))] == ["walkers", "prepare"]
    usf = plan("usf17", SIZES["quick"], tmp_path / "u", (0,))
    dataset = str(tmp_path / "u/dataset")
    assert usf.preparation(Path("usf")) == [["prepare", "usf", dataset, "--layout", "usf17"]]
    usf.dataset.mkdir(parents=True)
    assert usf.preparation(Path("usf")) == []


def test_a_seed_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="--seeds: 1 1 names a seed twice"):
        plan("walkers", SIZES["quick"], tmp_path, (1, 1))


def test_a_folder_with_another_run_is_refused(tmp_path):
    run = plan("walkers", SIZES["quick"], tmp_path, (0,)).runs[1]
    assert not run.finished()
    run.folder.mkdir()
    (run.folder / "summary.json").write_text("{}")
    config = transfer_config(run)
    (run.folder / "config.resolved.yaml").write_text(dump(replace(config, run="moved")))
    assert run.finished()
    (run.folder / "config.resolved.yaml").write_text(dump(replace(config, seed=7)))
    with pytest.raises(UserError, match="scratch-seed0: holds a run with another seed"):
        run.finished()


def test_the_time_that_is_left_comes_from_runs_alike(tmp_path):
    runs = plan("walkers", SIZES["quick"], tmp_path, (0, 1)).runs
    assert study.remaining(runs, {runs[0]: 100.0}) is None
    seconds = {run: 100.0 if run.stage == "pretrain" else 10.0 for run in runs[:7]}
    seconds[runs[6]] = 4.0
    assert study.remaining(runs, seconds) == 100 + 5 * 10 + 4
    assert study.progress(runs, runs[6], seconds, 31.25, False).startswith(
        "[7/14] seed 0, random, frozen: 4 s, rank-1 31"
    )
    assert study.progress(runs, runs[6], seconds, 31.25, False).endswith("about 3 min left")
    assert study.remaining(runs, dict.fromkeys(runs, 1.0)) == 0


# --- what came out ----------------------------------------------------------------------------------------------------


def rows(*, seeds=(0, 1, 2)):
    """Made-up runs: scratch ends at 40, 42, 44, finetune-0.5 4 above it, its best at step 10; frozen stays at 20."""
    ends = {"scratch": lambda s: (20, 30, 40 + 2 * s), "finetune-0.5": lambda s: (25, 60, 44 + 2 * s)}
    ends["frozen"] = lambda s: (20, 20, 20)
    found = []
    for seed in seeds:
        measures = {"gap": 0.01, "loss_same": 0.5, "identity": 0.001, "identity_error": 0.0002}
        curve = [{"step": step, "rank1": 30.0, **measures} for step in (0, 9)]
        features = {"effective_rank": 5.0, "spread": 0.1, "between_people": 0.2}
        found.append({"stage": "pretrain", "arm": "", "seed": seed, "curve": curve, "features": features})
        for arm, values in ends.items():
            curve = [{"step": 10 * i, "rank1": float(v), "mAP": v / 2} for i, v in enumerate(values(seed))]
            found.append({"stage": "transfer", "arm": arm, "seed": seed, "curve": curve})
    return found


def test_means_deviations_and_paired_differences():
    scratch, finetuned, frozen = arm_results(rows())
    assert (scratch.name, finetuned.name, frozen.name) == ("scratch", "finetune-0.5", "frozen")
    assert (finetuned.final.mean, finetuned.final.deviation) == (46.0, 2.0)
    assert (finetuned.best.mean, finetuned.first.mean, finetuned.mean_ap.mean) == (60.0, 25.0, 23.0)
    assert (finetuned.gain.mean, finetuned.gain.deviation) == (4.0, 0.0)  # paired: the seeds' own scatter cancels
    assert (frozen.gain.mean, frozen.gain.deviation) == (-22.0, 2.0)
    assert headline([finetuned])["finetune-0.5"]["final_rank1"] == [46.0, 2.0]
    assert "| from scratch | 20.0 +- 0.0 | 42.0 +- 2.0 |  | 42.0 +- 2.0 | 21.0 +- 1.0 |  |" in table([scratch])
    assert "| +4.0 +- 0.0 | 60.0 +- 0.0 | 23.0 +- 1.0 | +2.0 +- 0.0 |" in table([finetuned])


def test_what_pretraining_did_stands_beside_what_it_began_with():
    control = {"effective_rank": 10.0, "spread": 0.02, "between_people": 0.1}
    controls = [{"stage": "transfer", "arm": "frozen-random", "seed": s, "features": control} for s in range(3)]
    assert (
        "| 1 | 0.50 -> 0.500 | 0.100 +- 0.020 | 0.0100 -> 0.0100 | 30.0 -> 30.0 "
        "| 10.0 -> 5.0 | 0.020 -> 0.100 | 0.100 -> 0.200 |"
    ) in pretraining_table([*rows(), *controls])


def test_the_figures_of_features():
    """Two people at (1, 0) and (-1, 0), each with two sequences at +-0.5 of it along the second channel."""
    first = torch.tensor([[1, 0.5], [1, -0.5], [-1, 0.5], [-1, -0.5]])
    far = first + torch.tensor([3.0, 0])
    found = describe(torch.stack((first, far), 2), torch.tensor([7, 7, 2, 2]))
    assert found["between_people"] == pytest.approx(0.8) and found["between_chance"] == pytest.approx(1 / 3)
    assert found["effective_rank"] == pytest.approx(np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.2)))
    assert found["spread"] == pytest.approx(10 / (10 + 4 * 9))
    line = torch.arange(6.0)[:, None, None] * torch.tensor([1.0, 2, 3])[None, :, None]
    assert describe(line, torch.arange(6))["effective_rank"] == pytest.approx(1)
    collapsed = describe(torch.zeros(4, 2, 1), torch.tensor([0, 0, 1, 1]))
    assert (collapsed["spread"], collapsed["between_people"], collapsed["effective_rank"]) == (0, 0, 1)


def test_one_seed_has_no_deviation():
    only = arm_results(rows(seeds=(1,)))[0]
    assert only.final.deviation is None and "| 42.0 |" in table([only])


def test_runs_of_different_studies_are_refused():
    mixed = rows()
    mixed[-1]["curve"].pop()
    with pytest.raises(UserError, match="evaluated at different iterations"):
        arm_results(mixed)


def test_the_figure_shows_mean_range_and_name_of_every_arm(tmp_path):
    results = arm_results(rows())
    drawn: list[Figure] = []

    def draw(theme):
        drawn.append(curves(results, theme, "title", "unit"))
        return drawn[0]

    png = render(draw, LIGHT)
    axes = drawn[0].axes[0]
    assert len(axes.lines) == len(axes.collections) == 3
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [25, 60, 46])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (20, 44)
    assert {text.get_text() for text in axes.texts} == {
        "from scratch: 42.0%",
        "finetuned, r = 0.5: 46.0%",
        "pretrained, frozen: 20.0%",
    }
    assert axes.get_xlabel() == "supervised iteration"
    picture(results, tmp_path / "study.png", "title")
    assert png.startswith(b"\x89PNG") and (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


# --- the command ------------------------------------------------------------------------------------------------------

TINY = {
    "pretrain": """
data: {frames: 2, threads: 1}
backbone: {name: smplgait, width: 0.125}
denoiser: {dim: 32}
optimizer: {warmup: 0}
train: {iterations: 2, batch: 2, precision: fp32}
eval: {every: 0, condition_clips: 4, condition_timesteps: 1, frames_limit: 3}
checkpoint: {every: 2}
log_every: 1
""",
    "transfer": """
data: {frames: 2, threads: 1}
backbone: {name: smplgait, width: 0.125}
optimizer: {milestones: [], milestones_for: 0}
train: {iterations: 4, batch: [4, 2], precision: fp32}
eval: {every: 2, frames_limit: 3}
checkpoint: {every: 4}
log_every: 1
""",
}


def backbone(folder):
    def build(config):
        return build_recognizer("smplgait", "gait3d", width=config["backbone"]["width"]).backbone

    return load_backbone(folder / "backbone.safetensors", build)[0].state_dict()


@pytest.mark.slow
def test_a_study_from_start_to_end_and_again(tmp_path, walkers_dataset, capsys):
    for stage, text in TINY.items():
        (tmp_path / f"{stage}.yaml").write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset").symlink_to(walkers_dataset)
    command = ["--data", "walkers", "--quick", "--seeds", "3", "--out", str(out), "--configs", str(tmp_path)]
    command += ["--json", str(tmp_path / "rows.json")]

    assert study.main(command) == 0
    first = capsys.readouterr().out
    assert len([line for line in first.splitlines() if line.startswith("[")]) == 7 and "finished before" not in first
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [row["run"] for row in result["rows"]] == [f"{n}-seed3" for n in ("pretrain", *(arm.name for arm in ARMS))]
    assert result["study"] == {"data": "walkers", "size": "quick", "seeds": [3]}
    by_arm = {row["arm"]: row["curve"] for row in result["rows"]}
    assert all([e["step"] for e in by_arm[arm.name]] == [0, 2, 4] for arm in ARMS)
    # The pretrained arms start from what pretraining ended with, the others from what it started from.
    pretrained, frozen, control = (backbone(out / f"{n}-seed3") for n in ("pretrain", "frozen", "frozen-random"))
    started = build_recognizer("smplgait", "gait3d", width=0.125, seed=3).backbone.state_dict()
    assert all(torch.equal(frozen[name], pretrained[name]) for name in pretrained)
    assert all(torch.equal(control[name], started[name]) for name in started)
    assert not any(torch.equal(frozen[name], control[name]) for name in started)
    features = [row["features"] for row in result["rows"] if "features" in row]
    assert len(features) == 2 and all(0 < row["between_people"] < 1 for row in features)
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    lost = out / "finetune-0.5-seed3/summary.json"
    lost.unlink()
    (lost.parent / "checkpoints").rename(tmp_path / "away")
    assert study.main(command) == 0
    assert capsys.readouterr().out.count("finished before") == 6
    assert {p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp} == {lost}
    again = json.loads((tmp_path / "rows.json").read_text())
    assert again["headline"] == result["headline"]


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(UserError, match=r"gaitfast transfer ended with exit code 2; see .*run.log \(.*no such config"):
        study.execute(["transfer", "--config", str(tmp_path / "absent.yaml")], tmp_path / "logs/run.log")
