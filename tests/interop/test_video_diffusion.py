"""Reference checkpoints go in and come out bit for bit, and nothing else goes in."""

import json
from pathlib import Path

import pytest
import torch

from gaitfast.config import UserError
from gaitfast.interop import video_diffusion
from gaitfast.models.denoiser import build_denoiser
from tests.golden_recipe import golden_tensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ROTARY = "rotary_emb.freqs"


@pytest.fixture
def checkpoint():
    shapes = json.loads((GOLDEN / "denoiser_dim32.json").read_text())["state_dict"]
    return {key: golden_tensor(ROTARY if key.endswith(ROTARY) else key, shape) for key, shape in shapes.items()}


def test_reference_checkpoint_survives_the_round_trip_bit_for_bit(checkpoint):
    model = build_denoiser(32)
    video_diffusion.load_state_dict(model, checkpoint)
    out = video_diffusion.state_dict(model)
    assert len(out) == 237 and list(out) == list(checkpoint)  # in the reference's order too
    for key, value in checkpoint.items():
        assert out[key].shape == value.shape and out[key].dtype == value.dtype and torch.equal(out[key], value), key


@pytest.mark.parametrize("prefix", ["module.", "denoise_fn.", "module.denoise_fn."])
def test_wrapped_checkpoints_are_unwrapped(checkpoint, prefix):
    plain, wrapped = build_denoiser(32), build_denoiser(32, seed=1)
    video_diffusion.load_state_dict(plain, checkpoint)
    schedule = {prefix.removesuffix("denoise_fn.") + "betas": torch.ones(1000)} if "denoise_fn" in prefix else {}
    video_diffusion.load_state_dict(wrapped, {prefix + key: value for key, value in checkpoint.items()} | schedule)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in wrapped.state_dict().items())


def test_own_weights_survive_the_round_trip_bit_for_bit():
    source, target = build_denoiser(64, 24, seed=3), build_denoiser(64, 24, seed=4)
    video_diffusion.load_state_dict(target, video_diffusion.state_dict(source))
    expected = source.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in target.state_dict().items())


def test_export_is_a_copy():
    model = build_denoiser(32)
    before = model.stem.bias.detach().clone()
    video_diffusion.state_dict(model)["init_conv.bias"].zero_()
    assert torch.equal(model.stem.bias, before)


def test_fresh_rotary_frequencies_are_the_references(checkpoint):
    exported = video_diffusion.state_dict(build_denoiser(32))
    expected = 1.0 / (10_000 ** (torch.arange(0, 32, 2)[:16].float() / 32))
    rotary = [key for key in exported if key.endswith(ROTARY)]
    assert len(rotary) == 8 and all(torch.equal(exported[key], expected) for key in rotary)


def missing(sd):
    del sd["downs.1.0.mlp.1.weight"]


def unexpected(sd):
    sd["downs.9.0.mlp.1.weight"] = torch.zeros(1)


def misshaped(sd):
    sd["init_conv.weight"] = sd["init_conv.weight"].squeeze(2)


def transposed(sd):
    sd["final_conv.1.weight"] = sd["final_conv.1.weight"].transpose(0, 1)


def not_a_tensor(sd):
    sd["init_conv.bias"] = [0.0] * 32


def integers(sd):
    sd["init_conv.bias"] = torch.zeros(32, dtype=torch.int64)


def not_finite(sd):
    sd["mid_block1.block1.norm.bias"][3] = float("nan")


def unequal_rotary(sd):
    sd[f"ups.1.3.fn.fn.fn.{ROTARY}"][0] += 1


@pytest.mark.parametrize(
    "damage,named",
    [
        (missing, "missing downs.1.0.mlp.1.weight"),
        (unexpected, "unexpected downs.9.0.mlp.1.weight"),
        (misshaped, r"init_conv.weight is \[32, 4, 5, 5\], expected \[32, 4, 1, 5, 5\]"),
        (transposed, r"final_conv.1.weight is \[32, 4, 1, 1, 1\], expected \[4, 32, 1, 1, 1\]"),
        (not_a_tensor, "init_conv.bias is a list"),
        (integers, "init_conv.bias is .*int64"),
        (not_finite, "mid_block1.block1.norm.bias holds values that are not finite"),
        (unequal_rotary, f"ups.1.3.fn.fn.fn.{ROTARY} differs from init_temporal_attn"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_leaves_the_model_alone(checkpoint, damage, named):
    model = build_denoiser(32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    damage(checkpoint)
    with pytest.raises(UserError, match=named):
        video_diffusion.load_state_dict(model, checkpoint)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_of_another_size_is_one_short_line(checkpoint):
    with pytest.raises(UserError) as error:
        video_diffusion.load_state_dict(build_denoiser(64), checkpoint)
    assert "dim and cond_dim" in str(error.value) and len(str(error.value)) < 600 and "\n" not in str(error.value)
