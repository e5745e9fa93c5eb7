"""The five models against numbers that OpenGait's own classes computed, and against its key lists."""

import json
from pathlib import Path

import pytest
import torch

from gaitfast.interop import opengait
from gaitfast.models.recognizer import VARIANTS, build_recognizer
from gaitfast.recognition import identity_loss, triplet_loss
from tests.models.opengait_oracle import oracle
from tests.models.opengait_recipe import golden_silhouettes, golden_weights

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "opengait_models.json").read_text())["models"]
KEYS = json.loads((GOLDEN / "opengait_keys.json").read_text())["models"]
NAMES = {
    "GaitSet": "gaitset",
    "GaitPart": "gaitpart",
    "GaitGL": "gaitgl",
    "SMPLGait_wo_3D": "smplgait",
    "GaitBase": "gaitbase",
}
LABELS = torch.tensor([0, 0, 1, 1])


def golden_model(case: str):
    name, variant = case.split("/")
    model = build_recognizer(NAMES[name], variant.lower().replace("_", "-"), num_classes=10)
    opengait.load_state_dict(model, golden_weights(opengait.state_dict(model)))
    return model


def check(value: torch.Tensor, expected: dict) -> None:
    """Within 1e-4 relative: single entries against the tensor's scale, sums against the sum of magnitudes."""
    assert list(value.shape) == expected["shape"]
    flat = value.detach().double().flatten()
    entries = torch.cat((flat[:5], flat[-3:]))
    wanted = torch.tensor(expected["first5"] + expected["last3"], dtype=torch.float64)
    torch.testing.assert_close(entries, wanted, rtol=1e-4, atol=1e-5)
    assert abs(flat.sum().item() - expected["sum"]) <= 1e-5 * expected["abssum"]
    assert flat.abs().sum().item() == pytest.approx(expected["abssum"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_losses_are_opengaits(case):
    model = golden_model(case)
    checked = 0
    for run, expected in CASES[case].items():
        training = run.startswith("train")
        model.train(training)
        out = model(golden_silhouettes(*((4, 6) if training else (1, 7))))
        assert (out.logits is None) == ("logits" not in expected)
        for what, value in expected.items():
            if what.startswith("G(s)"):
                check(out.features, value)
            elif what == "inference":
                check(out.embedding, value)
            elif what == "logits":
                check(out.logits, value)
            elif what.startswith("triplet"):
                loss = triplet_loss(out.embedding, LABELS, margin=0.2, metric="euclidean").loss
                assert loss.item() == pytest.approx(value, abs=1e-4)
            else:
                scale, smoothing = (16.0 if "scale 16" in what else 1.0), (0.1 if "smooth True" in what else 0.0)
                loss = identity_loss(out.logits, LABELS, scale=scale, smoothing=smoothing).loss
                assert loss.item() == pytest.approx(value, abs=1e-4)
            checked += 1
    assert checked == sum(len(run) for run in CASES[case].values()) >= 5


@pytest.mark.parametrize("case", KEYS)
def test_keys_shapes_and_counts_are_opengaits(case):
    name, variant = case.split("/")
    expected = KEYS[case]
    with torch.device("meta"):  # GREW's GaitGL alone has 339 M parameters
        model = build_recognizer(name, variant, expected["classes"])
        silhouettes = torch.zeros(2, 6, 64, 44)
    assert list(opengait.state_dict(model)) == list(expected["keys"])
    shapes = {key: list(value.shape) for key, value in opengait.state_dict(model).items()}
    assert shapes == expected["keys"]
    backbone = opengait.state_dict(model, part="backbone")
    assert list(backbone) == [key for key in expected["keys"] if key not in expected["head"]]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    assert sum(p.numel() for p in model.backbone.parameters()) == expected["backbone_params"]
    out = model.eval()(silhouettes)
    assert list(out.features.shape) == [2, *expected["feature"]]
    assert [model.feature_channels, model.feature_parts] == expected["feature"]
    assert list(out.embedding.shape) == [2, *expected["embedding"]]
    if expected["classes"]:
        assert out.logits.shape == (2, expected["classes"], expected["feature"][1])


@pytest.mark.parametrize("case", KEYS)
@pytest.mark.parametrize(("clips", "training"), [((3, 1), False), ((2, 2), True), ((1, 5), False), ((3, 7), True)])
def test_every_variant_computes_what_its_layer_table_says(case, clips, training):
    """Against the naive oracle, in float64: lengths and numbers of classes that the golden numbers do not have."""
    name, variant = case.split("/")
    model = build_recognizer(name, variant, num_classes=7, width=0.125).train(training).double()
    weights = {
        key: value.double() if value.is_floating_point() else value
        for key, value in golden_weights(opengait.state_dict(model)).items()
    }
    if "HPP.p" in weights:
        weights["HPP.p"] += 0.25  # a trained exponent
    opengait.load_state_dict(model, weights)
    silhouettes = golden_silhouettes(*clips).double()
    expected = oracle(name, variant, weights, silhouettes, training)
    for one, other in zip(model(silhouettes), expected):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_every_model_and_variant_has_its_keys():
    assert set(KEYS) == {f"{name}/{variant}" for name, variants in VARIANTS.items() for variant in variants}


@torch.no_grad()
def test_a_set_does_not_depend_on_order_or_repetition():
    model = golden_model("GaitSet/Gait3D").eval()
    clip = golden_silhouettes(1, 5)
    shuffled = clip[:, [3, 0, 4, 1, 2, 2, 0]]
    torch.testing.assert_close(model(clip).embedding, model(shuffled).embedding, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_short_clips_of_gaitgl_are_repeated():
    backbone = golden_model("GaitGL/Gait3D").eval().backbone
    clip = golden_silhouettes(1, 2)
    torch.testing.assert_close(backbone(clip), backbone(clip.repeat(1, 2, 1, 1)), rtol=0, atol=0)
    torch.testing.assert_close(backbone(clip[:, :1]), backbone(clip[:, :1].repeat(1, 3, 1, 1)), rtol=0, atol=0)


@torch.no_grad()
def test_gaitgl_drops_the_frames_behind_the_last_three():
    """The stem still sees them: dropping a frame that the last time window's kernel does not reach changes nothing."""
    backbone = golden_model("GaitGL/Gait3D").eval().backbone
    clip = golden_silhouettes(1, 8)
    changed = clip.clone()
    changed[:, 7] = 1 - changed[:, 7]
    torch.testing.assert_close(backbone(changed), backbone(clip), rtol=0, atol=0)
    changed[:, 5] = 1 - changed[:, 5]
    assert not torch.allclose(backbone(changed), backbone(clip))
