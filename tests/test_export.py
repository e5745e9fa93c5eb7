"""`gaitfast export`: every format, exact round trips, graphs that compute what the model does, and clear refusals."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gaitfast import export
from gaitfast.engine import portable
from gaitfast.interop import onnx_graph, opengait
from gaitfast.model_files import read_model
from gaitfast.models.recognizer import VARIANTS, build_recognizer
from tests.conftest import run_command
from tests.models.opengait_recipe import golden_silhouettes, golden_weights
from tests.models.test_recognizers_golden import CASES, check, golden_model

EVERY = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def trained(name: str, variant: str, classes: int | None = 6, width: float = 0.25):
    """A model none of whose weights and statistics has its initial value."""
    model = build_recognizer(name, variant, classes, width=width).eval()
    opengait.load_state_dict(model, golden_weights(opengait.state_dict(model)))
    return model


def save(folder, model, classes, width: float = 0.25, kind: str = "recognizer"):
    """A file as transfer or pretraining writes it."""
    config = {"backbone": {"name": model.name, "variant": model.variant, "width": width}, "seed": 3}
    path = folder / f"{kind}.safetensors"
    if kind == "backbone":
        portable.save_backbone(path, model.backbone, {"config": config, "step": 12})
    else:
        portable.save_recognizer(path, model, {"config": config, "step": 12, "classes": classes})
    return path


def save_opengait(folder, model, iteration: int = 70, **options):
    path = folder / "gait-00070.pt"
    opengait.write_checkpoint(path, opengait.state_dict(model, **options), iteration)
    return path


def run_graph(path, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"silhouettes": clips.numpy()}))))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("gaitset", "grew"),
        ("gaitpart", "casia-b"),
        ("gaitpart", "ou-mvlp"),
        ("gaitgl", "gait3d"),
        ("gaitgl", "grew"),
        ("gaitgl", "grew-bnneck"),
        ("smplgait", "casia-b"),
        ("smplgait", "grew-baseline"),
        ("gaitbase", "ou-mvlp"),
    ],
)
def test_a_graph_computes_the_model_for_any_clips_and_frames(name, variant, tmp_path, capsys):
    model = trained(name, variant)
    classes = None if name in ("gaitset", "gaitpart") else 6
    path = tmp_path / "model.onnx"
    assert run_command("export", save(tmp_path, model, classes), path, "--format", "onnx") == 0
    assert "onnxruntime against PyTorch on 4 batches, largest difference: features" in capsys.readouterr().out
    for clips in ((4, 3), (1, 10), (2, 1), (1, 2), (1, 1), onnx_graph.TRACED):
        silhouettes = golden_silhouettes(*clips)
        with torch.no_grad():
            expected = {key: value for key, value in model(silhouettes)._asdict().items() if value is not None}
        found = run_graph(path, silhouettes)
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * value.abs().max().item())
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    dims = [dim.dim_param or dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["N", "S", 64, 44]
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts["model"] == f"{name}:{variant}:0.25" and facts["step"] == "12" and facts["part"] == "all"


@pytest.mark.parametrize("case", [*(case for case in CASES if case.endswith("Gait3D")), "GaitGL/GREW_BNNeck"])
def test_a_graph_of_the_published_width_gives_opengaits_numbers(case, tmp_path):
    model = golden_model(case)
    path = tmp_path / "model.onnx"
    onnx_graph.write(path, model, "all", {})
    found = run_graph(path, golden_silhouettes(1, 7))
    for what, expected in CASES[case]["eval n=1 s=7"].items():
        key = {"inference": "embedding", "logits": "logits"}.get(what, "features")
        check(found[key], expected)


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_opengait_to_safetensors_and_back_is_exact(name, variant, tmp_path, capsys):
    model = trained(name, variant, width=0.125)
    source = save_opengait(tmp_path, model)
    middle, back = tmp_path / "middle.safetensors", tmp_path / "back.pt"
    spec = f"{name}:{variant}:0.125"
    assert run_command("export", source, middle, "--format", "safetensors", "--model", spec) == 0
    assert run_command("export", middle, back, "--format", "opengait") == 0
    first, second = opengait.read_checkpoint(source), opengait.read_checkpoint(back)
    assert second.iteration == first.iteration == 70
    assert list(second.weights) == list(first.weights)
    for key, value in first.weights.items():
        assert value.dtype == second.weights[key].dtype and torch.equal(value, second.weights[key]), key
    assert f"{len(first.weights)} tensors under OpenGait's keys, each used once" in capsys.readouterr().out
    content = torch.load(back, weights_only=True)
    assert set(content) == {"model", "iteration"}


def test_safetensors_keep_what_the_run_said(tmp_path):
    model = trained("smplgait", "gait3d")
    out = tmp_path / "out.safetensors"
    assert run_command("export", save(tmp_path, model, 6), out, "--format", "safetensors") == 0
    file = read_model(out)
    assert (file.part, file.classes, file.metadata["step"]) == ("all", 6, 12)
    assert file.metadata["config"]["seed"] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), file.recognizer.state_dict().values()))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_the_backbone_alone(kind, tmp_path, capsys):
    model = trained("gaitbase", "gait3d", width=1.0)
    source = save_opengait(tmp_path, model) if kind == "pt" else save(tmp_path, model, 6, width=1.0)
    out = tmp_path / "backbone.safetensors"
    assert run_command("export", source, out, "--format", "safetensors", "--part", "backbone") == 0
    printed = capsys.readouterr().out
    if kind == "pt":
        assert "not used, 7 keys: FCs.fc_bin, BNNecks.fc_bin, BNNecks.bn1d.weight, BNNecks.bn1d.bias" in printed
        assert "the same network as gaitbase:grew, gaitbase:casia-b, gaitbase:ou-mvlp" in printed
    assert portable.content(out) == "backbone"
    file = read_model(out)
    assert (file.part, file.classes) == ("backbone", None) and "classes" not in file.metadata
    own = model.backbone.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in file.recognizer.backbone.state_dict().items())

    back, graph = tmp_path / "backbone.pt", tmp_path / "backbone.onnx"
    assert run_command("export", out, back, "--format", "opengait") == 0
    assert "restore_ckpt_strict: false" in capsys.readouterr().out
    weights = opengait.read(back)
    assert list(weights) == list(opengait.state_dict(model, "backbone"))
    assert read_model(back).part == "backbone"
    assert run_command("export", back, graph, "--format", "onnx") == 0
    clips = golden_silhouettes(2, 3)
    with torch.no_grad():
        expected = model.backbone(clips)
    found = run_graph(graph, clips)
    assert list(found) == ["features"]
    torch.testing.assert_close(found["features"], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_old_neck_order(tmp_path):
    model = trained("smplgait", "gait3d", width=1.0)
    old = save_opengait(tmp_path, model, old_bnneck_order=True)
    out = tmp_path / "new.pt"
    assert run_command("export", old, out, "--format", "opengait", "--old-bnneck-order") == 0
    expected = opengait.state_dict(model)
    assert all(torch.equal(value, expected[key]) for key, value in opengait.read(out).items())


def without(weights: dict, key: str) -> dict:
    return {name: value for name, value in weights.items() if name != key}


class Bomb:
    def __reduce__(self):
        return print, ("this must never be printed",)


BAD_CHECKPOINTS = {
    "lacks 1 keys (FCs.fc_bin)": lambda weights: {"model": without(weights, "FCs.fc_bin")},
    "lacks 1 keys (BNNecks.bn1d.bias)": lambda weights: {"model": without(weights, "BNNecks.bn1d.bias")},
    "has unknown 1 keys (fc1.weight)": lambda weights: {"model": weights | {"fc1.weight": torch.zeros(2, 2)}},
    "fit no known model": lambda weights: {"model": {"weight": torch.zeros(3)}},
    "BNNecks.fc_bin has shape (31, 256)": lambda weights: {"model": weights | {"BNNecks.fc_bin": torch.zeros(31, 256)}},
    "not finite": lambda weights: {"model": weights | {"FCs.fc_bin": weights["FCs.fc_bin"] * torch.inf}},
    "repeats a smaller tensor": lambda weights: {
        "model": weights | {"BNNecks.fc_bin": torch.zeros(1, 1, 1).expand(31, 256, 10**9)}
    },
    "no state dict": lambda weights: {"epoch": 3},
    "refused": lambda weights: {"model": Bomb()},
}


def refused(out, capsys, *arguments) -> str:
    """The one line of a refusal; nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} if out.parent.is_dir() else {}
    assert run_command("export", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("gaitfast: error: ") and printed.err.count("\n") == 1, printed.err
    assert "never" not in printed.out
    if before:
        assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} == before
    return printed.err


@pytest.mark.parametrize("reason", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused(reason, tmp_path, capsys):
    path, out = tmp_path / "bad.pt", tmp_path / "out.safetensors"
    torch.save(BAD_CHECKPOINTS[reason](opengait.state_dict(trained("smplgait", "gait3d", 2, 1.0))), path)
    line = refused(out, capsys, path, out, "--format", "safetensors")
    assert str(path) in line and reason in line


def test_damaged_files_are_refused(tmp_path, capsys):
    model = trained("gaitset", "gait3d", None)
    for path in (save_opengait(tmp_path, model), save(tmp_path, model, None)):
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"no model at all"):
            path.write_bytes(content)
            assert str(path) in refused(tmp_path / "out.pt", capsys, path, tmp_path / "out.pt", "--format", "opengait")


def test_files_of_another_model_are_refused(tmp_path, capsys):
    model, out = trained("smplgait", "gait3d", 6, 1.0), tmp_path / "out.pt"
    source = save_opengait(tmp_path, model)
    line = refused(out, capsys, source, out, "--format", "opengait", "--model", "gaitset:gait3d")
    assert "looks like smplgait/gait3d" in line
    line = refused(out, capsys, source, out, "--format", "opengait", "--model", "smplgait:gait3d:0.5")
    assert "choose the variant and width" in line
    assert "NAME:VARIANT" in refused(out, capsys, source, out, "--format", "opengait", "--model", "smplgait")
    for classes in (7, None, 10**12):
        portables = save(tmp_path, trained("smplgait", "gait3d"), classes)
        line = refused(out, capsys, portables, out, "--format", "opengait")
        assert f"its classifier has 6 classes, the network needs {classes}" in line
    portables = save(tmp_path, trained("smplgait", "gait3d"), 6)
    line = refused(out, capsys, portables, out, "--format", "opengait", "--model", "gaitset:gait3d")
    assert "holds smplgait:gait3d:0.25" in line
    assert "drop --old" in refused(out, capsys, portables, out, "--format", "opengait", "--old-bnneck-order")
    backbone = save(tmp_path, trained("smplgait", "gait3d"), None, kind="backbone")
    assert "without a head" in refused(out, capsys, backbone, out, "--format", "opengait", "--part", "all")
    only = tmp_path / "only.pt"
    opengait.write_checkpoint(only, opengait.state_dict(model, "backbone"), 1)
    assert "lacks 1 keys (FCs.fc_bin)" in refused(out, capsys, only, out, "--format", "opengait", "--part", "all")


def test_bad_places_are_refused(tmp_path, capsys):
    source, folder = save(tmp_path, trained("gaitset", "gait3d", None), None), tmp_path / "folder"
    folder.mkdir()
    for out, reason in (
        (folder, "is a folder"),
        (tmp_path / "nowhere" / "out.pt", "create it first"),
        (source, "is the checkpoint itself"),
    ):
        assert reason in refused(out, capsys, source, out, "--format", "opengait")
    missing, out = tmp_path / "none.safetensors", tmp_path / "out.pt"
    assert "no such checkpoint" in refused(out, capsys, missing, out, "--format", "opengait")
    assert "no such checkpoint" in refused(out, capsys, tmp_path / "none.pt", out, "--format", "opengait")
    assert run_command("export", source, out, "--format", "pickle") == 2


def test_a_wrong_graph_is_not_left_behind(tmp_path, capsys, monkeypatch):
    model, out = trained("smplgait", "gait3d"), tmp_path / "out.onnx"
    source, write = save(tmp_path, model, 6), onnx_graph.write

    def write_wrong(path, recognizer, part, facts):
        changed = trained("smplgait", "gait3d")
        with torch.no_grad():
            changed.head.embed.weight[0, 0, 0] += 1e-2
        write(path, changed, part, facts)

    out.write_bytes(b"an older graph")
    monkeypatch.setattr(onnx_graph, "write", write_wrong)
    line = refused(out, capsys, source, out, "--format", "onnx")
    assert "differs from PyTorch by more than 0.0001" in line and "embedding" in line
    assert out.read_bytes() == b"an older graph"


@pytest.mark.parametrize(("found", "expected"), [([1.0, np.nan], [1.0, 2.0]), ([1.0], [1.0, 2.0])])
def test_nan_and_other_shapes_are_differences(found, expected):
    difference = onnx_graph._difference(torch.tensor(found), torch.tensor(expected))
    assert not difference <= export.TOLERANCE


def test_packages_that_are_absent(tmp_path, capsys, monkeypatch):
    source, out = save(tmp_path, trained("gaitset", "gait3d", None), None), tmp_path / "out.onnx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
        assert "pip install -e '.[onnx]'" in refused(out, capsys, source, out, "--format", "onnx")
        assert run_command("export", source, tmp_path / "out.pt", "--format", "opengait") == 0
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_command("export", source, out, "--format", "onnx") == 0
    assert "not compared with PyTorch" in capsys.readouterr().out and out.is_file()
