"""`gaitfast rank` from the command line to the figures: every kind of model, launchers, and what users get wrong."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gaitfast.data import packed
from gaitfast.data.packed import PackedDataset
from gaitfast.engine.embed import embed
from gaitfast.engine.portable import save_backbone, save_recognizer
from gaitfast.interop import opengait
from gaitfast.models import build_recognizer
from gaitfast.rank import mean_silhouette
from tests.conftest import run_command
from tests.data.silhouettes import walk

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


def recognizer_file(folder, seed=7, classes=5, **changes):
    name, variant, width = MODEL
    recognizer = build_recognizer(name, variant, classes, width=width, seed=seed)
    config = {"backbone": {"name": name, "variant": variant, "width": width}, "data": {"path": "datasets/grew"}}
    file = folder / "recognizer.safetensors"
    save_recognizer(file, recognizer, {"config": config, "step": 90, "classes": classes} | changes)
    return file


@pytest.mark.parametrize("feature", ["auto", "feature", "embedding"])
def test_the_recognizer_of_a_run(walkers_dataset, tmp_path, feature):
    figures = rank(walkers_dataset, tmp_path, "--checkpoint", recognizer_file(tmp_path), "--feature", feature)
    used = "embedding" if feature == "auto" else feature
    expected = rank(walkers_dataset, tmp_path, "--random", "smplgait:gait3d:0.25", "--seed", 7, "--feature", used)
    assert figures["results"] == expected["results"]
    assert (figures["feature"], figures["step"], figures["classes"]) == (used, 90, 5)
    assert figures["trained_on"] == "datasets/grew"


def test_a_backbone_has_no_embedding(walkers_dataset, tmp_path, capsys):
    name, variant, width = MODEL
    file = tmp_path / "backbone.safetensors"
    config = {"backbone": {"name": name, "variant": variant, "width": width}}
    save_backbone(file, build_recognizer(name, variant, width=width).backbone, {"config": config})
    options = ("--checkpoint", file, "--feature", "embedding", "--quiet")
    assert run_command("rank", "--dataset", walkers_dataset, *options) == 2
    error = capsys.readouterr().err.strip()
    assert "holds a backbone without a head; use --feature feature" in error and "\n" not in error


def test_the_json_says_where_its_figures_come_from(random_figures):
    assert set(random_figures) == {
        *("dataset", "protocol", "model", "weights", "feature", "shape", "notes", "results", "seconds"),
        *("version", "commit", "versions"),
    }
    facts = random_figures["dataset"]
    assert (facts["name"], facts["protocol"], facts["subjects"], facts["sequences"]) == ("walkers", "walkers", 11, 33)
    assert facts["partition"]["probe"] == 5 and facts["frames"] > 300
    assert set(random_figures["versions"]) == {"python", "torch", "numpy"}


def small_casia_b(folder):
    """Two people, two cameras, one walk of each type that the protocol needs."""
    types = ("nm-01", "nm-05", "bg-01", "cl-01")
    sequences = [
        (f"{75 + i:03d}", kind, view, walk(i + len(view), 2))
        for i in range(2)
        for kind in types
        for view in ("000", "090")
    ]
    people = {"TRAIN_SET": [], "TEST_SET": ["075", "076"]}
    return packed.write(folder / "casia", sequences, name="small", protocol="casia-b", partition=people).path


def test_every_model_on_every_dataset(walkers_dataset, random_figures, tmp_path, capsys):
    """The paper's Table 10: models trained anywhere, ranked everywhere, each set by its own protocol."""
    casia, file = small_casia_b(tmp_path), tmp_path / "matrix.json"
    models = ("--checkpoint", recognizer_file(tmp_path), "--random", "smplgait:gait3d:0.25", "--seed", 3)
    datasets = ("--dataset", walkers_dataset, "--dataset", casia)
    options = ("--mean-silhouette", "--json", file, "--device", "cpu", "--quiet")
    assert run_command("rank", *datasets, *models, *options) == 0
    document = json.loads(file.read_text(encoding="utf-8"))
    cells = [(cell["model"], cell["dataset"]["name"], cell["protocol"]) for cell in document["cells"]]
    names = ("smplgait:gait3d:0.25", "smplgait:gait3d:0.25", "mean silhouette")
    assert cells == [(n, *d) for n in names for d in (("walkers", "walkers"), ("small", "casia-b"))]
    assert document["cells"][2]["results"] == random_figures["results"] and document["commit"]
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("rank1 in percent, cosine; rows: model, columns: dataset")
    assert lines[start + 1].split() == ["walkers", "small"]
    for row, line in enumerate(lines[start + 2 : start + 5]):
        expected = [document["cells"][2 * row + i]["results"]["cosine"]["rank1"] for i in range(2)]
        assert [float(x) for x in line.split()[-2:]] == pytest.approx(expected, abs=0.005)
    assert any("of the 11 published views" in line for line in lines)


def test_datasets_of_one_name_go_by_their_paths(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    first, second = small_casia_b(tmp_path), small_casia_b(tmp_path / "b")
    assert run_command("rank", "--dataset", first, "--dataset", second, "--mean-silhouette", "--quiet") == 0
    assert any(line.split() == [str(first), str(second)] for line in capsys.readouterr().out.splitlines())


def test_a_wrong_dataset_is_found_before_the_first_is_embedded(walkers_dataset, tmp_path, capsys):
    options = ("--dataset", walkers_dataset, "--dataset", tmp_path / "absent", "--mean-silhouette")
    assert run_command("rank", *options) == 2
    captured = capsys.readouterr()
    assert "absent: no such dataset folder" in captured.err and not captured.out


@pytest.mark.parametrize("name", ["gaitset", "gaitpart", "gaitgl", "smplgait", "gaitbase"])
def test_sequences_of_one_frame_are_ranked_as_any_other(tmp_path, name):
    sequences = [(f"{i:03d}", kind, "v", walk(i, 1)) for i in range(3) for kind in ("01", "02")]
    partition = {"TRAIN_SET": [], "TEST_SET": ["000", "001", "002"]}
    data = packed.write(tmp_path / "set", sequences, protocol="grew", partition=partition)
    result = rank(data.path, tmp_path, "--random", f"{name}:gait3d:0.25")["results"]["cosine"]
    assert (result["rank1"], result["probes"]) == (100.0, 3)  # both walks of a person are the same frame


def test_the_submission_is_written(tmp_path, capsys):
    sequences = [(f"{i:05d}", kind, f"v{i}{kind}", walk(i, 1)) for i in range(10) for kind in ("01", "02")]
    partition = {"TRAIN_SET": [], "TEST_SET": [f"{i:05d}" for i in range(10)] + ["probe"]}
    few = packed.write(tmp_path / "few", sequences, protocol="grew", partition=partition).path
    sequences += [("probe", "03", f"w{i}", walk(i, 1)) for i in range(2)]
    data = packed.write(tmp_path / "set", sequences, protocol="grew", partition=partition).path
    file = tmp_path / "submission.csv"
    figures = rank(data, tmp_path, "--mean-silhouette", "--submission", file)
    assert figures["results"] == rank(few, tmp_path, "--mean-silhouette")["results"]
    rows = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows[0][:2] == ["videoId", "rank1"] and [row[0] for row in rows[1:]] == ["w0", "w1"]
    assert [row[1:3] for row in rows[1:]] == [["0", "0"], ["1", "1"]] and {len(row) for row in rows} == {21}
    for wrong, message in (
        (("--dataset", few), "0 probes of type 03"),
        (("--dataset", data, "--dataset", data), "one model on one dataset"),
    ):
        assert run_command("rank", *wrong, "--mean-silhouette", "--submission", file, "--quiet") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("submission", [False, True])
def test_the_probes_of_grew_are_embedded_for_a_submission_alone(tmp_path, monkeypatch, submission):
    sequences = [(f"{i:05d}", kind, f"v{i}{kind}", walk(3 * i, 2)) for i in range(10) for kind in ("01", "02")]
    sequences += [("probe", "03", f"w{i}", walk(i, 2)) for i in range(7)]
    partition = {"TRAIN_SET": [], "TEST_SET": [f"{i:05d}" for i in range(10)] + ["probe"]}
    data = packed.write(tmp_path / "set", sequences, protocol="grew", partition=partition)
    embedded = []

    def counting(function, dataset, numbers, **options):
        embedded.extend(numbers.tolist())
        return embed(function, dataset, numbers, **options)

    monkeypatch.setattr("gaitfast.rank.embed", counting)
    options = ("--submission", tmp_path / "submission.csv") if submission else ()
    rank(data.path, tmp_path, "--mean-silhouette", *options)
    assert len(embedded) == (27 if submission else 20)


@pytest.mark.parametrize("feature", ["auto", "feature", "embedding"])
def test_an_opengait_checkpoint(walkers_dataset, tmp_path, feature):
    recognizer = build_recognizer("gaitset", "gait3d", seed=5)
    file = tmp_path / "GaitSet-180000.pt"
    torch.save({"model": opengait.state_dict(recognizer), "iteration": 180000}, file)
    used = "embedding" if feature == "auto" else feature  # a whole checkpoint is there for its embedding
    small = ("--frames-limit", 3)
    figures = rank(walkers_dataset, tmp_path, "--checkpoint", file, *small, "--feature", feature)
    expected = rank(walkers_dataset, tmp_path, "--random", "gaitset:gait3d", "--seed", 5, *small, "--feature", used)
    assert figures["results"] == expected["results"]
    assert figures["shape"] == ([128, 62] if used == "feature" else [256, 62])


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
        (["--checkpoint", "x.safetensors", "--feature", "embedding"], "no such checkpoint"),
        ([], "name what to rank, with --checkpoint FILE"),
        (["--mean-silhouette", "--protocol", "all-views"], "all-views is a form of casia-b and ou-mvlp"),
        (["--mean-silhouette", "--protocol", "usf17"], "no gallery of type Gal"),
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


def edited(file, **metadata):
    """A safetensors file with other metadata."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        text = opened.metadata()
    save_file(tensors, file, metadata={key: value for key, value in (text | metadata).items() if value is not None})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "gaitfast-recognizer-2"}, "format 'gaitfast-recognizer-2'"),
        ({"format": None}, "format None"),
        ({"classes": "6"}, "the network needs"),
        ({"classes": '"many"'}, "its number of classes is 'many'"),
        ({"config": json.dumps({"backbone": {"name": "gaitset", "variant": "gait3d"}})}, "is missing"),
        ({"config": json.dumps({"backbone": {"name": "gaitset", "variant": "mars"}})}, "got 'mars'"),
    ],
)
def test_a_recognizer_of_another_model_class_count_or_version_is_refused(
    walkers_dataset, tmp_path, capsys, metadata, message
):
    file = recognizer_file(tmp_path)
    edited(file, **metadata)
    assert run_command("rank", "--dataset", walkers_dataset, "--checkpoint", file, "--quiet") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_an_opengait_checkpoint_of_another_model_is_refused(walkers_dataset, tmp_path, capsys):
    weights = opengait.state_dict(build_recognizer("gaitset", "gait3d"))
    file = tmp_path / "GaitSet.pt"
    for content, options, message in (
        (weights, ("--model", "gaitset:grew"), "has shape"),
        (weights, ("--model", "gaitgl:gait3d"), "lacks"),
        ({"some.weight": torch.zeros(3)}, (), "fit no known model"),
        (weights | {"Head.fc_bin": torch.full((62, 128, 256), float("nan"))}, ("--feature", "embedding"), "not finite"),
        ({k: v for k, v in weights.items() if "Head" not in k}, ("--feature", "embedding"), "without a head"),
    ):
        torch.save({"model": content}, file)
        assert run_command("rank", "--dataset", walkers_dataset, "--checkpoint", file, *options, "--quiet") == 2
        error = capsys.readouterr().err.strip()
        assert message in error and str(file) in error and "\n" not in error


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
