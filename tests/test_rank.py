"""`gaitfast rank` from the command line to the figures: every kind of model, launchers, and what users get wrong."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gaitfast.data.packed import PackedDataset
from gaitfast.engine.portable import save_backbone
from gaitfast.interop import opengait
from gaitfast.models import build_recognizer
from gaitfast.rank import mean_silhouette
from tests.conftest import run_command

ROOT = Path(__file__).parents[1]
MODEL = ("smplgait", "gait3d", 0.25)


def rank(dataset, folder, *options):
    """The JSON of `gaitfast rank`, its exit code checked."""
    file = folder / "figures.json"
    assert run_command("rank", "--dataset", dataset, *options, "--json", file, "--device", "cpu", "--quiet") == 0
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def random_figures(walkers_dataset, tmp_path_factory):
    return rank(walkers_dataset, tmp_path_factory.mktemp("random"), "--random", "smplgait:gait3d:0.25", "--seed", 3)


def test_random_weights(walkers_dataset, random_figures, tmp_path, capsys):
    assert random_figures["protocol"] == "walkers" and random_figures["shape"] == [64, 31]
    assert random_figures["dataset"]["fingerprint"] == PackedDataset.open(walkers_dataset).fingerprint
    result = random_figures["results"]["cosine"]
    assert {"rank1", "rank5", "rank10", "mAP", "mINP"} <= set(result)
    assert (result["probes"], result["gallery"], result["unmatched"]) == (5, 10, 0)
    again = rank(walkers_dataset, tmp_path, "--random", "smplgait:gait3d:0.25", "--seed", 3, "--metric", "both")
    assert again["results"]["cosine"] == result and set(again["results"]) == {"cosine", "euclidean"}
    printed = capsys.readouterr().out
    assert "5 probes, 10 gallery sequences" in printed and f"{result['mAP']:.2f}" in printed


def test_the_backbone_of_a_run(walkers_dataset, random_figures, tmp_path):
    name, variant, width = MODEL
    backbone = build_recognizer(name, variant, width=width, seed=3).backbone
    config = {"backbone": {"name": name, "variant": variant, "width": width}}
    file = tmp_path / "backbone.safetensors"
    save_backbone(file, backbone, {"config": config, "step": 40})
    figures = rank(walkers_dataset, tmp_path, "--checkpoint", file)
    assert figures["results"] == random_figures["results"]
    assert (figures["model"], figures["step"]) == ("smplgait:gait3d:0.25", 40)


@pytest.mark.parametrize("feature", ["feature", "embedding"])
def test_an_opengait_checkpoint(walkers_dataset, tmp_path, feature):
    recognizer = build_recognizer("gaitset", "gait3d", seed=5)
    file = tmp_path / "GaitSet-180000.pt"
    torch.save({"model": opengait.state_dict(recognizer), "iteration": 180000}, file)
    small = ("--frames-limit", 3, "--feature", feature)
    figures = rank(walkers_dataset, tmp_path, "--checkpoint", file, *small)
    expected = rank(walkers_dataset, tmp_path, "--random", "gaitset:gait3d", "--seed", 5, *small)
    assert figures["results"] == expected["results"]
    assert figures["shape"] == ([128, 62] if feature == "feature" else [256, 62])


def test_the_mean_silhouette_is_the_mean_frame():
    frames = torch.rand(1, 7, 64, 44)
    feature = mean_silhouette(frames, [3, 4])
    assert feature.shape == (2, 64 * 44, 1)
    torch.testing.assert_close(feature[1, :, 0].view(64, 44), frames[0, 3:].mean(0))


def test_published_figures_of_the_mean_silhouette_on_usf17(usf17, tmp_path):
    """Nearest neighbour on the mean silhouette, as published with the files: A .79 B .59 D .24 F .08."""
    assert run_command("prepare", usf17, tmp_path / "set", "--layout", "usf17", "--workers", 1) == 0
    result = rank(tmp_path / "set", tmp_path, "--mean-silhouette", "--metric", "euclidean")["results"]["euclidean"]
    published = {"A": 79, "B": 59, "C": 44, "D": 24, "E": 29, "F": 8, "G": 12}
    found = {key.removeprefix("rank1_"): value for key, value in result.items() if key.startswith("rank1_")}
    assert found.pop("unseen") > 0 and {"A", "B"} <= set(found)
    assert found == pytest.approx({name: published[name] for name in found}, abs=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--random", "smplgait"], "write NAME:VARIANT"),
        (["--random", "smplgait:gait3d:wide"], "the width 'wide' is not a number"),
        (["--random", "gaitsett:gait3d"], "gaitset"),
        (["--checkpoint", "absent.safetensors"], "no such checkpoint"),
        (["--checkpoint", "absent.pt"], "no such checkpoint"),
        (["--checkpoint", "pyproject.toml"], "not a readable safetensors file"),
        (["--checkpoint", "x.safetensors", "--feature", "embedding"], "holds a backbone without a head"),
        (["--mean-silhouette", "--feature", "embedding"], "the mean silhouette has none"),
        (["--mean-silhouette", "--protocol", "gait3"], "did you mean gait3d"),
        (["--mean-silhouette", "--protocol", "ou-mvlp"], "no probe of type 00"),
        (["--mean-silhouette", "--submission", "s.csv"], "is for the protocol grew"),
        (["--mean-silhouette", "--frames-limit", "0"], "--frames-limit: must be positive"),
        (["--mean-silhouette", "--batch-frames", "0"], "--batch-frames: must be positive"),
        (["--mean-silhouette", "--json", "absent/figures.json"], "no such folder"),
        (["--mean-silhouette", "--json", "."], "is a folder"),
        (["--random", "smplgait:gait3d", "--seed", "-5"], "--seed: lies in 0..2^63-1"),
        (["--random", "smplgait:gait3d", "--seed", "9" * 30], "--seed: lies in 0..2^63-1"),
    ],
)
def test_mistakes_get_one_line(walkers_dataset, capsys, options, message):
    assert run_command("rank", "--dataset", walkers_dataset, *options, "--quiet") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("gaitfast: error:") and "\n" not in error


def test_a_checkpoint_of_another_width_is_refused(walkers_dataset, tmp_path, capsys):
    backbone = build_recognizer("smplgait", "gait3d", width=0.25).backbone
    file = tmp_path / "backbone.safetensors"
    for backbone_config, message in (
        ({"name": "smplgait", "variant": "gait3d", "width": 0.5}, "the network needs"),
        ({"name": "smplgait", "depth": 3}, "does not describe a backbone"),
    ):
        save_backbone(file, backbone, {"config": {"backbone": backbone_config}})
        assert run_command("rank", "--dataset", walkers_dataset, "--checkpoint", file, "--quiet") == 2
        assert message in capsys.readouterr().err


def launched(command, dataset, file):
    options = ["--dataset", dataset, "--random", "smplgait:gait3d:0.25", "--seed", "3", "--json", file, "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [*command, ROOT / "gaitfast" / "rank.py", *options], cwd=ROOT, env=environment, check=True, timeout=500
    )
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_as_a_script_and_under_the_deepspeed_launcher(walkers_dataset, random_figures, tmp_path):
    alone = launched([sys.executable], walkers_dataset, tmp_path / "alone.json")
    assert alone["results"] == random_figures["results"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--master_port", str(port)]
    shared = launched(launcher, walkers_dataset, tmp_path / "shared.json")
    assert shared["results"] == random_figures["results"]
