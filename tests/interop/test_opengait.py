"""OpenGait checkpoints in and out: exact, whole, and refused when they are something else."""

import collections
import io
import re

import pytest
import torch

from gaitfast.config import UserError
from gaitfast.interop import opengait
from gaitfast.models.recognizer import VARIANTS, build_recognizer

EVERY = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def trained(name: str, variant: str = "gait3d", num_classes: int | None = 6, **options):
    """A model none of whose entries has its initial value."""
    model = build_recognizer(name, variant, num_classes, **options)
    generator = torch.Generator().manual_seed(5)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.fill_(1234)
    return model


def clips() -> torch.Tensor:
    return (torch.rand(2, 4, 64, 44, generator=torch.Generator().manual_seed(0)) > 0.5).float()


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_round_trip_is_exact_and_uses_every_entry_once(name, variant):
    source = trained(name, variant, width=0.125)
    exported = opengait.state_dict(source)
    assert sum(v.numel() for v in exported.values()) == sum(v.numel() for v in source.state_dict().values())
    target = build_recognizer(name, variant, 6, width=0.125, seed=1)
    report = opengait.load_state_dict(target, exported)
    assert report == (list(exported), [], [])
    assert opengait.keys(source) == list(exported)
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key]), key
    again = opengait.state_dict(target)
    assert list(again) == list(exported)
    assert all(torch.equal(again[key], value) and value.is_contiguous() for key, value in exported.items())


def test_an_export_is_a_copy():
    model = trained("gaitpart", width=0.125)
    exported = opengait.state_dict(model)
    before = [value.clone() for value in model.state_dict().values()]
    for value in exported.values():
        value.fill_(0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))
    assert len({value.untyped_storage().data_ptr() for value in exported.values()}) == len(exported)


def test_parts_of_gaitpart_go_to_their_place():
    model = trained("gaitpart", width=0.125)
    squeeze = model.backbone.motion5.squeeze.weight
    hidden = squeeze.shape[0] // 16
    exported = opengait.state_dict(model)
    assert torch.equal(exported["TFA.pooling_func.conv1d3x3.3.0.conv.weight"], squeeze[3 * hidden : 4 * hidden])
    assert "TFA.pooling_func.conv1d3x1.15.2.conv.weight" in exported


@pytest.mark.parametrize("name", VARIANTS)
def test_backbone_alone(name):
    source, target = trained(name), build_recognizer(name, "gait3d", 9, seed=2)
    head = {key: value.clone() for key, value in target.head.state_dict().items()}
    whole = opengait.state_dict(source)
    report = opengait.load_state_dict(target, whole, part="backbone")
    assert report.loaded == list(opengait.state_dict(source, part="backbone"))
    assert report.loaded + report.ignored != [] and set(report.loaded) | set(report.ignored) == set(whole)
    assert report.untouched == [f"head.{key}" for key in head]
    assert all(torch.equal(value, target.head.state_dict()[key]) for key, value in head.items())
    source.eval(), target.eval()
    with torch.no_grad():
        assert torch.equal(source.backbone(clips()), target.backbone(clips()))
    opengait.load_state_dict(target, opengait.state_dict(source, part="backbone"), part="backbone")


@pytest.mark.parametrize(("name", "variant"), [("gaitgl", "gait3d"), ("smplgait", "gait3d"), ("gaitbase", "grew")])
def test_a_model_without_classes_takes_all_but_the_classifier(name, variant):
    source, target = trained(name, variant), build_recognizer(name, variant)
    report = opengait.load_state_dict(target, opengait.state_dict(source))
    assert report.ignored and all(key.startswith(("BNNecks.", "Head1.")) for key in report.ignored)
    assert report.untouched == []
    source.eval(), target.eval()
    with torch.no_grad():
        torch.testing.assert_close(source(clips()).embedding, target(clips()).embedding, rtol=0, atol=0)


def test_module_prefix_is_dropped():
    source, target = trained("gaitset", width=0.125), build_recognizer("gaitset", "gait3d", width=0.125)
    opengait.load_state_dict(target, {f"module.{k}": v for k, v in opengait.state_dict(source).items()})
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    with pytest.raises(UserError, match="twice"):
        opengait.load_state_dict(target, {"Head.fc_bin": torch.zeros(1), "module.Head.fc_bin": torch.zeros(1)})


@torch.no_grad()
def test_old_order_of_the_neck():
    """An old checkpoint: batch norm over (part, channel). Its own computation, as the oracle, against ours."""
    model = trained("smplgait", width=0.25).eval()
    embedding, parts = 64, 31
    old = opengait.state_dict(model, old_bnneck_order=True)
    new = opengait.state_dict(model)
    changed = {key for key in new if not torch.equal(old[key], new[key])}
    assert changed == {f"BNNecks.bn1d.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert torch.equal(
        old["BNNecks.bn1d.bias"].reshape(parts, embedding).t(), new["BNNecks.bn1d.bias"].reshape(-1, parts)
    )

    fresh = build_recognizer("smplgait", "gait3d", 6, width=0.25).eval()
    opengait.load_state_dict(fresh, old, old_bnneck_order=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values()))

    out = fresh(clips())
    rows = out.embedding.permute(0, 2, 1).reshape(2, parts * embedding)  # part * C + channel
    bn = {name: old[f"BNNecks.bn1d.{name}"] for name in ("running_mean", "running_var", "weight", "bias")}
    normed = torch.nn.functional.batch_norm(rows, *bn.values()).reshape(2, parts, embedding)
    cosine = torch.nn.functional.cosine_similarity(normed[:, :, :, None], old["BNNecks.fc_bin"][None], dim=2)
    torch.testing.assert_close(out.logits, cosine.permute(0, 2, 1), rtol=1e-5, atol=1e-6)


def refused_unchanged(model, message: str, sd: dict, **options) -> bool:
    """Whether `sd` was refused with this message, and the model kept every value."""
    before = [value.clone() for value in model.state_dict().values()]
    try:
        opengait.load_state_dict(model, sd, **options)
    except UserError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))
        return same and re.search(message, str(error)) is not None
    return False


def test_wrong_checkpoints_are_refused_whole():
    model = build_recognizer("smplgait", "gait3d", 6)
    good = opengait.state_dict(trained("smplgait"))
    lacking = {key: value for key, value in good.items() if key != "FCs.fc_bin"}
    assert refused_unchanged(model, r"lacks 1 keys \(FCs.fc_bin\).*load it alone", lacking)
    assert refused_unchanged(model, r"unknown 1 keys \(fc1.weight\)", good | {"fc1.weight": torch.zeros(128, 85)})
    assert refused_unchanged(
        model, "looks like gaitset/gait3d or gaitset/casia-b", opengait.state_dict(trained("gaitset"))
    )
    assert refused_unchanged(model, "looks like gaitbase", opengait.state_dict(trained("gaitbase")), part="backbone")
    assert refused_unchanged(model, "fits none", {"weight": torch.zeros(1)})
    assert refused_unchanged(model, "7 classes, the model 6", opengait.state_dict(trained("smplgait", num_classes=7)))
    assert refused_unchanged(model, "variant and width", opengait.state_dict(trained("smplgait", width=0.5)))
    assert refused_unchanged(model, "not finite", good | {"FCs.fc_bin": good["FCs.fc_bin"] * float("nan")})
    assert refused_unchanged(model, "holds torch.int64", good | {"FCs.fc_bin": good["FCs.fc_bin"].long()})
    assert refused_unchanged(model, "no tensor", {"model": good})


def test_the_two_heads_of_gaitgl_are_not_mixed_up():
    """Their embeddings differ (before or after a batch norm), so neither loads into the other, classes or not."""
    plain, neck = trained("gaitgl", "grew", width=0.125), trained("gaitgl", "grew-bnneck", width=0.125)
    for num_classes in (6, None):
        assert refused_unchanged(
            build_recognizer("gaitgl", "grew-bnneck", num_classes, width=0.125), "unknown", opengait.state_dict(plain)
        )
        assert refused_unchanged(
            build_recognizer("gaitgl", "grew", num_classes, width=0.125), "lacks", opengait.state_dict(neck)
        )


def test_identify():
    for name, variant in (("gaitset", "gait3d"), ("gaitpart", "grew"), ("gaitgl", "ou-mvlp"), ("gaitbase", "gait3d")):
        sd = opengait.state_dict(trained(name, variant, 4))
        fits = opengait.identify(sd)
        assert (name, variant) in fits and {fit[0] for fit in fits} == {name}
        assert opengait.num_classes(sd) == (4 if name in ("gaitgl", "gaitbase") else None)
    assert opengait.identify({}) == []


@pytest.mark.parametrize(
    ("name", "variant", "classes", "others"),
    [
        ("smplgait", "grew", 20000, {"gait3d", "casia-b", "ou-mvlp"}),
        ("gaitbase", "casia-b", 74, {"gait3d", "grew", "ou-mvlp"}),
        ("gaitgl", "grew", 20000, {"ou-mvlp"}),  # the neck is another head
        ("gaitgl", "grew-bnneck", 9, set()),
        ("smplgait", "ou-mvlp-baseline", 9, set()),  # as many parts as the network of the paper, another trunk
        ("smplgait", "grew-baseline", 9, set()),  # the trunk of GaitPart's, without its motion
        ("gaitpart", "grew", None, {"ou-mvlp"}),
    ],
)
def test_identify_names_the_likeliest_first(name, variant, classes, others):
    with torch.device("meta"):
        sd = opengait.state_dict(build_recognizer(name, variant, classes))
    first, *rest = opengait.identify(sd)
    assert first == (name, variant) and set(rest) == {(name, other) for other in others}


def test_read_takes_what_opengait_saves(tmp_path):
    model = trained("gaitset", width=0.125)
    weights = opengait.state_dict(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20])
    path = tmp_path / "GaitSet-00010.pt"
    content = {"model": collections.OrderedDict(weights), "optimizer": optimizer.state_dict()}
    torch.save(content | {"scheduler": schedule.state_dict(), "iteration": 10}, path)
    read = opengait.read(path)
    assert list(read) == list(weights) and all(torch.equal(read[key], weights[key]) for key in weights)
    torch.save(weights, path)
    assert list(opengait.read(path)) == list(weights)


class Bomb:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_read_refuses_what_is_no_checkpoint(tmp_path, capsys):
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="no such checkpoint"):
        opengait.read(path)
    torch.save({"model": Bomb()}, path)
    with pytest.raises(UserError, match="refused"):
        opengait.read(path)
    assert "never" not in capsys.readouterr().out
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(1000)}}, buffer)
    path.write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(UserError, match=r"x\.pt"):
        opengait.read(path)
    for content in ({"model": {}}, {"model": {"lr": 0.1}}, [torch.zeros(1)], {"epoch": 3}):
        torch.save(content, path)
        with pytest.raises(UserError, match="no state dict"):
            opengait.read(path)
    for content in (b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pt"):
            opengait.read(path)
    with pytest.raises(UserError):
        opengait.read(tmp_path)
