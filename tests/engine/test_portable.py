"""A whole recognizer on the disk and back; what is refused. The backbone's own cases are in test_files_and_records."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gaitfast.config import UserError
from gaitfast.engine.portable import content, load_backbone, load_recognizer, save_backbone, save_recognizer
from gaitfast.models import build_recognizer

CONFIG = {"backbone": {"name": "smplgait", "variant": "gait3d", "width": 0.125}}


def build(config, classes):
    section = config["backbone"]
    return build_recognizer(section["name"], section["variant"], classes, width=section["width"], seed=1)


@pytest.fixture
def saved(tmp_path):
    recognizer = build_recognizer("smplgait", "gait3d", 5, width=0.125, seed=0)
    path = tmp_path / "recognizer.safetensors"
    save_recognizer(path, recognizer, {"config": CONFIG, "classes": 5, "step": 3})
    return path, recognizer


@pytest.mark.parametrize("classes", [7, None])
def test_round_trip(tmp_path, classes):
    recognizer = build_recognizer("smplgait", "gait3d", classes, width=0.125, seed=0)
    path = tmp_path / "recognizer.safetensors"
    save_recognizer(path, recognizer, {"config": CONFIG, "classes": classes, "step": 3})
    loaded, metadata = load_recognizer(path, build)
    assert (metadata["classes"], metadata["step"], metadata["format"]) == (classes, 3, "gaitfast-recognizer-1")
    assert not loaded.training
    for name, tensor in recognizer.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_one_kind_of_file_is_not_taken_for_the_other(saved, tmp_path):
    path, recognizer = saved
    with pytest.raises(UserError, match=r"holds a recognizer, and a backbone is needed; use the backbone.safetensors"):
        load_backbone(path, lambda config: recognizer.backbone)
    other = tmp_path / "backbone.safetensors"
    save_backbone(other, recognizer.backbone, {"config": CONFIG})
    with pytest.raises(UserError, match=r"holds a backbone, and a recognizer is needed; use the recognizer"):
        load_recognizer(other, build)
    assert (content(path), content(other)) == ("recognizer", "backbone")
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(UserError, match="not a gaitfast backbone or recognizer"):
        content(other)


def test_damage_is_named(saved):
    path, recognizer = saved
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"weight head.neck.weight has shape \(31, 32, 5\), the network needs"):
        load_recognizer(path, lambda config, classes: build(config, 9))
    with pytest.raises(UserError, match=r"does not have: head.neck"):
        load_recognizer(path, lambda config, classes: build(config, None))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_recognizer(path, build)
    path.unlink()
    with pytest.raises(UserError, match="no such checkpoint"):
        load_recognizer(path, build)
    for classes in (0, -1, True, "5", 5.0):
        save_recognizer(path, recognizer, {"config": CONFIG, "classes": classes})
        with pytest.raises(UserError, match="number of classes"):
            load_recognizer(path, build)


def test_missing_and_non_finite_weights_are_named(saved):
    path, recognizer = saved
    metadata = {"format": "gaitfast-recognizer-1", "config": '{"backbone": {}}', "classes": "5"}
    tensors = load_file(path)
    for value, message in ((None, "weight head.embed.weight is missing"), (torch.nan, "head.embed.weight is not fin")):
        changed = dict(tensors)
        del changed["head.embed.weight"]
        if value is not None:
            changed["head.embed.weight"] = torch.full_like(tensors["head.embed.weight"], value)
        save_file(changed, path, metadata=metadata)
        with pytest.raises(UserError, match=message):
            load_recognizer(path, lambda config, classes: recognizer)
