"""Schedules and weights against the published curves' values (Nichol & Dhariwal; SODA; Min-SNR)."""

import pytest
import torch

from gaitfast.diffusion import NoiseSchedule, loss_weights
from gaitfast.diffusion.schedule import add_noise

GOLDEN = {
    "inverted_cosine": {
        1: 0.97970,
        2: 0.97129,
        10: 0.93572,
        100: 0.79353,
        250: 0.66400,
        500: 0.49600,
        750: 0.32800,
        900: 0.19847,
        990: 0.056279,
        999: 0.012296,
        1000: 1.2296e-05,
    },
    "cosine": {
        1: 0.99996,
        2: 0.99991,
        10: 0.99937,
        100: 0.97209,
        250: 0.84701,
        500: 0.49384,
        750: 0.14427,
        900: 0.024092,
        990: 2.4288e-4,
        999: 2.4288e-6,
        1000: 2.4288e-9,
    },
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_alpha_bar(name):
    alpha_bar = NoiseSchedule(name).alpha_bar
    for t, expected in GOLDEN[name].items():
        assert float(alpha_bar[t]) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", ["inverted_cosine", "cosine", "linear"])
def test_table_properties(name):
    schedule = NoiseSchedule(name)
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.alpha_bar.shape == (1001,)
    assert schedule.alpha_bar[0] == 1
    assert (schedule.alpha_bar.diff() < 0).all()
    assert (schedule.alpha_bar > 0).all()
    betas = 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    assert betas.max() <= 0.999 + 1e-12


def test_linear_is_ddpms():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(NoiseSchedule("linear").alpha_bar[1:], (1 - betas).cumprod(0), rtol=1e-12)


def test_inverted_cosine_inverts_the_cosine():
    cosine, inverted = NoiseSchedule("cosine").alpha_bar, NoiseSchedule("inverted_cosine").alpha_bar
    for t in (100, 250, 500, 750, 900):  # abar_cos(abar_inv(u)) = u up to the tables' grid
        u = float(inverted[t])
        assert float(cosine[round(u * 1000)]) == pytest.approx(t / 1000, abs=2e-3)


@pytest.mark.parametrize(
    ("gamma", "mean", "first", "last_but_one"),
    [
        (1, 0.509, 0.0207, 0.0125),
        (2, 0.788, 0.0414, 0.0249),
        (5, 0.948, 0.104, 0.062),
    ],
)
def test_golden_mnp(gamma, mean, first, last_but_one):
    weights = loss_weights(NoiseSchedule(), "mnp", gamma)
    assert weights.shape == (1001,)
    assert float(weights[1:].mean()) == pytest.approx(mean, abs=1e-3)
    assert float(weights[1]) == pytest.approx(first, rel=0.01)
    assert float(weights[999]) == pytest.approx(last_but_one, rel=0.01)


def test_golden_means_of_the_others():
    assert float(loss_weights(NoiseSchedule("cosine"), "min_snr", 5)[1:].mean()) == pytest.approx(0.824, abs=1e-3)
    assert float(loss_weights(NoiseSchedule("cosine"), "mnp", 5)[1:].mean()) == pytest.approx(0.639, abs=1e-3)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 5.0])
def test_mnp_is_min_snr_mirrored(gamma):
    schedule = NoiseSchedule()
    mnp, min_snr = loss_weights(schedule, "mnp", gamma), loss_weights(schedule, "min_snr", gamma)
    log_snr = schedule.snr.log()
    assert torch.allclose(mnp[1:], (gamma * torch.exp(-log_snr[1:].abs())).clamp(max=1))
    low_noise = schedule.snr >= 1
    assert torch.equal(mnp[low_noise], min_snr[low_noise])
    assert (mnp <= 1).all() and (mnp >= 0).all()


def test_limits_and_normalization():
    schedule = NoiseSchedule()
    assert torch.equal(loss_weights(schedule, "mnp", 1e12)[1:], loss_weights(schedule, "uniform")[1:])
    for name in ("mnp", "min_snr", "uniform"):
        assert float(loss_weights(schedule, name, 1.0, normalize=True)[1:].mean()) == pytest.approx(1)
        assert torch.isfinite(loss_weights(schedule, name, 1.0)).all()
    with pytest.raises(ValueError, match="mnp, min_snr or uniform"):
        loss_weights(schedule, "snr")
    with pytest.raises(ValueError, match="inverted_cosine, cosine or linear"):
        NoiseSchedule("sine")


def test_add_noise_keeps_unit_variance():
    schedule = NoiseSchedule()
    signal, sigma = schedule.tables()
    torch.manual_seed(0)
    latents, noise = torch.randn(3, 4, 10, 8, 8), torch.randn(3, 4, 10, 8, 8)
    t = torch.tensor([1, 500, 1000])
    noisy = add_noise(latents, noise, signal[t], sigma[t])
    assert noisy.var(dim=(1, 2, 3, 4)) == pytest.approx(torch.ones(3), abs=0.1)
    assert torch.allclose(noisy[2], noise[2], atol=0.05)
