"""The golden cases of the denoiser on every backend but the reference: the whole network, every gradient."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gaitfast.interop import video_diffusion
from tests.golden_recipe import golden_integers, golden_normal
from tests.kernels.cases import Side, backend, distance
from tests.models.test_denoiser import GOLDEN, golden_model

CASES = ("denoiser_dim32", "denoiser_dim64")


@pytest.mark.parametrize(
    "name,implementation",
    [
        *((name, Side("compiled", level, "cpu", torch.float32)) for name in CASES for level in ("avx2", "amx")),
        # The other one takes the interpreter minutes.
        pytest.param("denoiser_dim64", Side("triton", None, "cpu", torch.float32), marks=pytest.mark.slow),
        *(pytest.param(name, Side("triton", None, "cuda", torch.float32), marks=pytest.mark.gpu) for name in CASES),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}-{value.level or value.device}",
)
def test_golden_outputs_loss_and_every_gradient(name, implementation, monkeypatch):
    device = implementation.device
    if implementation.level:
        monkeypatch.setenv("GAITFAST_CPU", implementation.level)
    # cuDNN would multiply in TF32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    facts, golden = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    batch, shape = facts["batch"], (facts["batch"], 4, facts["frames"], 8, 8)
    model = golden_model(facts, torch.float32).to(device)
    latents = golden_normal(f"{name}.x", shape).float().to(device)
    timestep = golden_integers(f"{name}.t", (batch,), 0, 1000).to(device)
    condition = golden_normal(f"{name}.cond", (batch, facts["cond_dim"])).float().to(device).requires_grad_()
    with backend(implementation.name):
        predicted = model(latents, timestep, condition)
        loss = (predicted - golden_normal(f"{name}.target", shape).to(device)).square().mean()
        loss.backward()
    tolerance = 1e-4
    assert distance(predicted, golden["pred"].double()) < tolerance
    assert distance(condition.grad, golden["grad_cond"].double()) < tolerance
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=tolerance)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    gradients["positions.frequencies"] = torch.zeros(16)
    gradients = video_diffusion.export_tensors(model, gradients)
    floor = tolerance * max(facts["grad_norms"].values())
    for key, expected in facts["grad_norms"].items():
        assert gradients[key].double().norm().item() == pytest.approx(expected, rel=tolerance, abs=floor), key
