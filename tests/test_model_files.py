"""One reader for every kind of model file."""

import pytest
import torch

from gaitfast.config import BackboneConfig, UserError
from gaitfast.engine import portable
from gaitfast.interop import opengait
from gaitfast.model_files import describe_model, is_pytorch, parse_model, read_model
from gaitfast.models import build_recognizer


@pytest.mark.parametrize(
    "text", ["gaitset:grew", "smplgait:gait3d:0.5", "gaitgl:grew-bnneck", "smplgait:grew-baseline"]
)
def test_a_model_in_words(text):
    assert describe_model(parse_model(text, "--model")) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gaitset", "NAME:VARIANT"),
        ("a:b:c:d", "NAME:VARIANT"),
        ("gaitset:grew:wide", "'wide' is not a number"),
        ("gaitsat:grew", "backbone.name"),
        ("gaitset:grow", "backbone.variant"),
        ("gaitset:grew:nan", "backbone.width"),
    ],
)
def test_wrong_words(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_model(text, "--model")


def test_a_file_is_known_by_its_content(tmp_path):
    model = build_recognizer("gaitset", "gait3d", width=0.125)
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.safetensors"
    metadata = {"config": {"backbone": {"name": "gaitset", "variant": "gait3d", "width": 0.125}}, "classes": None}
    portable.save_recognizer(ours, model, metadata)
    opengait.write_checkpoint(theirs, opengait.state_dict(model), 5)
    assert not is_pytorch(ours) and is_pytorch(theirs)
    config = BackboneConfig(name="gaitset", variant="gait3d", width=0.125)
    one, other = read_model(ours), read_model(theirs, model=config)
    for key, value in one.recognizer.state_dict().items():
        assert torch.equal(value, other.recognizer.state_dict()[key])
    assert one.config == other.config == config and other.metadata == {"step": 5}
    torch.save(opengait.state_dict(model), theirs, _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    assert is_pytorch(theirs) and read_model(theirs, model=config).metadata == {}
    assert is_pytorch(tmp_path / "absent.pt") and not is_pytorch(tmp_path / "absent.safetensors")


def test_the_head_is_taken_where_there_is_one(tmp_path):
    model = build_recognizer("smplgait", "gait3d", 74, seed=4)
    path = tmp_path / "smplgait.pt"
    opengait.write_checkpoint(path, opengait.state_dict(model), 5)
    file = read_model(path)
    assert (file.part, file.classes, file.config.variant, file.unused) == ("all", 74, "casia-b", [])
    assert {config.variant for config in file.alike} == {"gait3d", "grew", "ou-mvlp"}
    assert not file.recognizer.training
    file = read_model(path, "backbone")
    assert (file.part, file.classes, len(file.unused)) == ("backbone", 74, 7)
    opengait.write_checkpoint(path, opengait.state_dict(model, "backbone"), 5)
    file = read_model(path)
    assert (file.part, file.classes) == ("backbone", None)


def test_a_checkpoint_of_smplgait_with_the_3d_branch_gives_its_backbone(tmp_path):
    weights = opengait.state_dict(build_recognizer("smplgait", "gait3d", 3000))
    path = tmp_path / "SMPLGait.pt"
    opengait.write_checkpoint(path, weights | {"fc1.weight": torch.zeros(128, 85)}, 1)
    with pytest.raises(UserError, match=r"unknown 1 keys \(fc1.weight\).*the backbone fits, load it alone"):
        read_model(path)
    assert "fc1.weight" in read_model(path, "backbone").unused
