"""The objective, the direct measure and the sampler on networks whose answer is known."""

import pytest
import torch
from torch import nn

from gaitfast.diffusion import NoiseSchedule, loss_weights
from gaitfast.diffusion.objective import DiffusionObjective, pool_feature
from gaitfast.diffusion.probe import condition_losses
from gaitfast.diffusion.sampler import ddim_sample, predict_latents, predict_noise
from gaitfast.diffusion.schedule import add_noise


class Backbone(nn.Module):
    """Feature (B, 2, 3): mean brightness times learnt numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, silhouettes):
        return silhouettes.mean(dim=(1, 2, 3))[:, None, None] * self.weight


class Denoiser(nn.Module):
    """Adds the sum of the condition, or a learnt null value where it is dropped."""

    def __init__(self):
        super().__init__()
        self.null = nn.Parameter(torch.tensor(0.5))

    def forward(self, latents, timestep, condition, drop_condition=None):
        value = condition.sum(1)
        if drop_condition is not None:
            value = torch.where(drop_condition, self.null, value)
        return latents + value.view(-1, 1, 1, 1, 1)


@pytest.fixture
def objective():
    torch.manual_seed(0)
    schedule = NoiseSchedule()
    return DiffusionObjective(Backbone(), Denoiser(), schedule, loss_weights(schedule))


def batch(count=4):
    torch.manual_seed(1)
    return {
        "latents": torch.randn(count, 4, 5, 8, 8),
        "silhouettes": torch.rand(count, 5, 64, 44),
        "noise": torch.randn(count, 4, 5, 8, 8),
        "timestep": torch.tensor([1, 400, 700, 1000])[:count],
        "drop": torch.tensor([False, True, False, False])[:count],
    }


def test_loss_is_equation_4(objective):
    inputs = batch()
    schedule, expected = NoiseSchedule(), []
    for n in range(4):
        t = int(inputs["timestep"][n])
        abar = float(schedule.alpha_bar[t])
        noisy = abar**0.5 * inputs["latents"][n] + (1 - abar) ** 0.5 * inputs["noise"][n]
        condition = inputs["silhouettes"][n].mean() * objective.backbone.weight.mean(1)
        value = objective.denoiser.null if inputs["drop"][n] else condition.sum()
        error = (noisy + value - inputs["noise"][n]).square().mean()
        expected.append(float(loss_weights(schedule)[t]) * error)
    assert objective(**inputs).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_gradients_reach_both_networks_and_respect_the_drop(objective):
    inputs = batch()
    objective(**inputs).backward()
    assert objective.backbone.weight.grad.abs().sum() > 0
    assert objective.denoiser.null.grad.abs() > 0
    objective.zero_grad()
    objective(**{**inputs, "drop": torch.ones(4, dtype=torch.bool)}).backward()
    assert objective.backbone.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("method", ["mean", "max", "mean+max"])
def test_pooling(method):
    feature = torch.randn(2, 5, 7)
    expected = {
        "mean": feature.mean(2),
        "max": feature.max(2).values,
        "mean+max": feature.mean(2) + feature.max(2).values,
    }
    assert torch.allclose(pool_feature(feature, method), expected[method])
    with pytest.raises(ValueError, match="mean, max or mean"):
        pool_feature(feature, "sum")


def test_probe_averages_over_clips_and_timesteps_whatever_the_batch(objective):
    inputs = batch()
    silhouettes = {name: torch.rand(4, 5, 64, 44) for name in ("self", "same", "other")}
    timesteps = torch.tensor([100, 600])
    whole = condition_losses(objective, inputs["latents"], silhouettes, inputs["noise"], timesteps)
    parts = condition_losses(objective, inputs["latents"], silhouettes, inputs["noise"], timesteps, batch=3)
    assert set(whole) == {"self", "same", "other", "null"}
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=0)
    assert len({round(float(loss.mean()), 9) for loss in whole.values()}) == 4
    expected = []
    for t in timesteps:
        t = t.expand(4)
        expected.append(
            objective.errors(inputs["latents"], inputs["noise"], t, objective.condition(silhouettes["same"]))
        )
    torch.testing.assert_close(whole["same"], torch.stack(expected).mean(0).detach().double(), rtol=1e-6, atol=0)


def test_ddim_recovers_the_latents_from_a_perfect_denoiser():
    schedule = NoiseSchedule()
    torch.manual_seed(0)
    target = torch.randn(2, 4, 3, 8, 8)

    def perfect(latents, timestep, condition, drop_condition=None):
        abar = schedule.alpha_bar[timestep].float().view(-1, 1, 1, 1, 1)
        return (latents - abar.sqrt() * target) / (1 - abar).sqrt()

    result = ddim_sample(perfect, schedule, torch.randn_like(target), torch.zeros(2, 1), steps=10, guidance=1.0)
    assert torch.allclose(result, target, atol=1e-3)


def test_guidance_mixes_null_and_condition():
    seen = []

    def denoiser(latents, timestep, condition, drop_condition=None):
        seen.append(drop_condition is not None)
        return torch.full_like(latents, 0.0 if drop_condition is not None else 1.0)

    latents = torch.zeros(1, 4, 1, 8, 8)
    assert predict_noise(denoiser, latents, torch.tensor([500]), torch.zeros(1, 1), 3.0).unique().tolist() == [3.0]
    assert seen == [False, True]


def test_predict_latents_inverts_add_noise():
    schedule = NoiseSchedule()
    signal, sigma = schedule.tables()
    latents, noise = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([300, 300])
    noisy = add_noise(latents, noise, signal[t], sigma[t])
    assert torch.allclose(predict_latents(noisy, noise, float(schedule.alpha_bar[300])), latents, atol=1e-5)
