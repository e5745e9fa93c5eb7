"""TAESD's weights in and out: golden outputs, both key styles, both halves, exact round trip, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gaitfast.config import UserError
from gaitfast.interop import taesd
from gaitfast.models.autoencoder import Autoencoder, build_autoencoder
from tests.golden_recipe import golden_integers, golden_normal, golden_tensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="module")
def golden_weights() -> dict[str, torch.Tensor]:
    shapes = json.loads((GOLDEN / "taesd.json").read_text())["state_dict"]
    keys = [(f"{half}.{key}", shape) for half in ("encoder", "decoder") for key, shape in shapes[half].items()]
    return {key: golden_tensor(key, shape) for key, shape in keys}


@pytest.fixture(scope="module")
def golden_outputs() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "taesd.safetensors")


def golden_frames() -> torch.Tensor:
    return golden_integers("taesd.x", (3, 1, 64, 64), 0, 256) / 255


def error(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Relative, in the norm, after rounding to the float32 in which the golden numbers are kept."""
    return ((ours.float() - golden).norm() / golden.norm()).item()


def half(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The bare keys of one half's own file."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(name)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_golden(golden_weights, golden_outputs, dtype, tolerance, gradients, channels):
    model = build_autoencoder()
    assert model.width == 32
    taesd.load_state_dict(model, golden_weights)
    assert model.width == 64
    model.to(dtype)
    frames = golden_integers("taesd.x", (3, 1, 64, 64), 0, 256).to(dtype) / 255
    with torch.set_grad_enabled(gradients):
        latents = model.encode(frames.expand(-1, channels, -1, -1))
        decoded = model.decode(golden_normal("taesd.z", (3, 4, 8, 8)))
    assert latents.dtype == decoded.dtype == dtype
    assert error(latents, golden_outputs["latent"]) < tolerance
    assert error(decoded, golden_outputs["decoded"]) < tolerance


@pytest.mark.parametrize("style", taesd.STYLES)
def test_round_trip_is_exact_and_a_copy(golden_weights, style):
    model = build_autoencoder()
    taesd.load_state_dict(model, golden_weights)
    exported = taesd.state_dict(model, style)
    again = build_autoencoder()
    taesd.load_state_dict(again, exported)
    back = taesd.state_dict(again)
    assert set(back) == set(golden_weights)
    assert all(torch.equal(back[key], value) for key, value in golden_weights.items())
    for value in exported.values():
        assert value.is_contiguous()
        value.zero_()
    assert all(torch.equal(value, golden_weights[key]) for key, value in taesd.state_dict(model).items())


def test_diffusers_keys_are_those_of_autoencoder_tiny():
    keys = set(taesd.state_dict(Autoencoder(width=8), "diffusers"))
    assert {"encoder.layers.0.weight", "encoder.layers.14.bias", "encoder.layers.1.conv.0.weight"} <= keys
    # The first convolution and the last, one less than in the original, where the clamp has number 0.
    assert {"decoder.layers.0.weight", "decoder.layers.18.bias", "decoder.layers.2.conv.4.bias"} <= keys
    assert not any(key.startswith("decoder.layers.19") for key in keys)


def test_halves_in_files_of_their_own(golden_weights, golden_outputs):
    model = build_autoencoder()
    taesd.load_state_dict(model, half(golden_weights, "encoder"))
    with torch.no_grad():
        latents = model.encode(golden_frames())
        assert error(latents, golden_outputs["latent"]) < 1e-4
        with pytest.raises(UserError, match="cannot decode"):
            model.decode(latents)
        assert set(taesd.state_dict(model)) == {key for key in golden_weights if key.startswith("encoder")}
        taesd.load_state_dict(model, half(golden_weights, "decoder"))
        assert error(model.decode(golden_normal("taesd.z", (3, 4, 8, 8))), golden_outputs["decoded"]) < 1e-4
        assert error(model.encode(golden_frames()), golden_outputs["latent"]) < 1e-4


def test_the_halves_may_come_in_any_order_and_form(golden_weights):
    first, second = build_autoencoder(), build_autoencoder()
    for name in ("decoder", "encoder"):
        taesd.load_state_dict(first, half(golden_weights, name))
    taesd.load_state_dict(second, {name: half(golden_weights, name) for name in ("encoder", "decoder")})
    for model in (first, second):
        ours = taesd.state_dict(model)
        assert ours.keys() == golden_weights.keys()
        assert all(torch.equal(ours[key], golden_weights[key]) for key in ours)


def test_the_model_keeps_its_dtype_mode_and_place_of_weights():
    model = Autoencoder(width=16).double().eval().requires_grad_(False)
    weights = taesd.state_dict(Autoencoder(width=16))
    before = model.encoder[0].weight
    taesd.load_state_dict(model, weights)
    assert model.encoder[0].weight is before and before.dtype == torch.float64
    assert torch.equal(before.float(), weights["encoder.0.weight"])
    taesd.load_state_dict(model, taesd.state_dict(Autoencoder(width=8)))
    assert model.width == 8 and len(model.decoder[1].weight) == 8
    for parameter in model.parameters():
        assert parameter.dtype == torch.float64 and not parameter.requires_grad
    assert not any(module.training for module in model.modules())


def without(key: str):
    return lambda weights: weights.pop(key)


def with_value(key: str, change):
    return lambda weights: weights.update({key: change(weights.get(key))})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("encoder.3.conv.2.bias"), "encoder.3.conv.2.bias is missing"),
        (without("encoder.0.weight"), "encoder.0.weight is missing"),
        (without("decoder.19.bias"), "decoder.19.bias is missing"),
        (with_value("decoder.20.weight", lambda _: torch.zeros(3)), "decoder.20.weight is no part of TAESD"),
        (with_value("quant_conv.weight", lambda _: torch.zeros(3)), "quant_conv.weight is no key of TAESD"),
        (with_value("encoder.14.weight", lambda _: torch.zeros(16, 8, 3, 3)), r"has shape \(16, 8, 3, 3\)"),
        (with_value("encoder.5.conv.0.bias", lambda old: old / 0), "not finite"),
        (with_value("encoder.5.conv.0.bias", lambda old: old.long()), "not finite floats"),
        (dict.clear, "holds no weights"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(spoil, message):
    model = Autoencoder(width=8)
    before = taesd.state_dict(model)
    weights = taesd.state_dict(Autoencoder(width=8))
    spoil(weights)
    with pytest.raises(UserError, match=message) as caught:
        taesd.load_state_dict(model, weights)
    assert re.match(r"TAESD weights: .*[;,]", str(caught.value)), caught.value
    assert all(torch.equal(value, before[key]) for key, value in taesd.state_dict(model).items())
