"""The network that ours is timed against computes the same function, from the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reference_denoiser import Unet3D
from gaitfast.interop import video_diffusion
from gaitfast.models.denoiser import build_denoiser
from tests.golden_recipe import golden_integers, golden_normal
from tests.models.test_denoiser import GOLDEN, golden_model


@pytest.mark.parametrize("dropped", [False, True])
def test_it_reproduces_the_golden_case(dropped):
    name = "denoiser_dim32"
    facts, golden = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    reference = Unet3D(facts["dim"], facts["cond_dim"]).double()
    weights = video_diffusion.state_dict(golden_model(facts, torch.float64))
    assert list(reference.state_dict()) and set(reference.state_dict()) == set(weights)
    reference.load_state_dict(weights)
    batch = facts["batch"]
    latents = golden_normal(f"{name}.x", (batch, 4, facts["frames"], 8, 8)).double()
    condition = golden_normal(f"{name}.cond", (batch, facts["cond_dim"])).double()
    timestep = golden_integers(f"{name}.t", (batch,), 0, 1000).double()
    drop = torch.full((batch,), dropped)
    with torch.no_grad():
        out = reference(latents, timestep, condition, drop).float()
    expected = golden["pred_uncond" if dropped else "pred"]
    assert (out - expected).norm() / expected.norm() < 1e-6


def test_it_has_as_many_parameters():
    ours, reference = build_denoiser(64), Unet3D(64, 256)
    assert sum(p.numel() for p in reference.parameters()) == sum(p.numel() for p in ours.parameters())
