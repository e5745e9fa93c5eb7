"""Training of the autoencoder: what it sees, what it minimises, what it reports, and the command."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gaitfast.config import UserError
from gaitfast.data.packed import PackedDataset
from gaitfast.models.autoencoder import Autoencoder, build_autoencoder
from gaitfast.train_autoencoder import (
    HELD_OUT_FRAMES,
    dataset_frames,
    degrade,
    fit,
    measure,
    moment_penalty,
    save,
    walker_frames,
)
from tests.conftest import run_command


@pytest.fixture(scope="module")
def people() -> np.ndarray:
    """uint8 (96, 64, 64)."""
    return walker_frames(96, seed=4)


@pytest.fixture(scope="module")
def small(people) -> np.ndarray:
    """uint8 (96, 32, 32): the same at half the resolution, for training that must be quick."""
    return np.ascontiguousarray(people[:, ::2, ::2])


def pixels(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames)[:, None].float() / 255


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_walker_frames_depend_on_the_seed_and_on_who_comes_first(people):
    assert people.shape == (96, 64, 64) and people.dtype == np.uint8
    assert np.array_equal(people, walker_frames(96, seed=4))
    assert not np.array_equal(people, walker_frames(96, seed=5))
    assert not np.array_equal(people, walker_frames(96, seed=4, first=1000))
    assert len(walker_frames(7, seed=4)) == 7


def test_degraded_frames_are_silhouettes_of_the_same_people(people):
    clean = pixels(people)
    seen = torch.cat([degrade(clean, 0, step) for step in range(4)])
    assert seen.shape == (384, 1, 64, 64) and seen.dtype == torch.float32
    assert seen.min() >= 0 and seen.max() <= 1
    mass = seen.mean((1, 2, 3)) / clean.mean((1, 2, 3)).repeat(4)
    assert 0.8 < mass.median() < 1.25
    assert (mass < 0.1).float().mean() < 0.02, "hardly any person is wiped out"


def test_degradation_hits_a_share_of_the_frames_and_leaves_a_share_alone(people):
    clean = pixels(people)
    seen = degrade(clean, 0, 0)
    flipped = clean.flip(-1)
    distance = torch.minimum((seen - clean).abs().mean((1, 2, 3)), (seen - flipped).abs().mean((1, 2, 3)))
    untouched = (distance < 1e-4).float().mean()
    assert 0.02 < untouched < 0.3
    assert ((seen > 0.01) & (seen < 0.99)).any((1, 2, 3)).float().mean() > 0.3, "some have soft edges"
    binary = ((seen == 0) | (seen == 1)).all(-1).all(-1).all(-1).float().mean()
    assert binary > 0.2, "some are masks"
    steps = seen[..., ::2, ::2] == seen[..., 1::2, 1::2]
    assert 0.05 < steps.all(-1).all(-1).all(-1).float().mean() < 0.5, "some are masks of half the resolution"


def test_degradation_is_a_function_of_seed_and_step(people):
    clean = pixels(people)
    assert torch.equal(degrade(clean, 3, 7), degrade(clean, 3, 7))
    for seed, step in ((3, 8), (4, 7)):
        same = (degrade(clean, 3, 7) == degrade(clean, seed, step)).flatten(1).all(1)
        assert same.float().mean() < 0.3, "only what both leave alone is equal"
    # A sample's draws do not depend on who else is in the batch.
    torch.testing.assert_close(degrade(clean, 3, 7)[:5], degrade(clean[:5], 3, 7))


def test_dataset_frames_are_of_training_people_and_test_people_are_held_out(walkers_dataset):
    dataset = PackedDataset.open(walkers_dataset)
    train, held_out = dataset_frames(str(walkers_dataset), 10**6)
    for frames, split in ((train, "train"), (held_out, "test")):
        whole = np.concatenate([dataset.sequence(i) for i in dataset.split(split)])
        assert np.array_equal(frames, whole[: len(frames)]) and len(frames) == min(len(whole), HELD_OUT_FRAMES)
    few, _ = dataset_frames(str(walkers_dataset), 10)
    assert few.shape == (10, 64, 64)
    assert np.array_equal(few[0], train[0]) and np.array_equal(few[-1], train[-1])


# --- what it minimises ------------------------------------------------------------------------------------------------


def white(count: int = 64) -> torch.Tensor:
    """Latents (count, 4, 8, 8) with exactly zero mean and unit covariance."""
    values = torch.randn(4, count * 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = values - values.mean(1, keepdim=True)
    factor = torch.linalg.cholesky(values @ values.T / values.shape[1])
    return torch.linalg.solve_triangular(factor, values, upper=False).view(4, count, 8, 8).transpose(0, 1)


def test_moment_penalty_is_zero_for_white_latents_alone():
    latents = white()
    assert moment_penalty(latents) < 1e-9
    assert moment_penalty(latents + 0.5).item() == pytest.approx(0.25, rel=1e-4)
    assert moment_penalty(2 * latents).item() == pytest.approx(4 * 3**2 / 16, rel=1e-4)
    mixed = latents.clone()
    mixed[:, 1] = (latents[:, 0] + latents[:, 1]) / math.sqrt(2)
    assert moment_penalty(mixed).item() == pytest.approx(2 * 0.5 / 16, rel=1e-4)


def trained(frames: np.ndarray, steps: int, **options) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(width=8)
    fit(model, frames, steps=steps, batch=8, seed=1, precision="fp32", **options)
    return model


def test_training_learns(small):
    torch.manual_seed(0)
    before = measure(Autoencoder(width=8), small)["error_percent"]
    assert measure(trained(small, 120), small)["error_percent"] < 0.7 * before


def test_training_repeats_itself(small):
    calls: list[int] = []
    one, other = trained(small, 6, on_step=calls.append), trained(small, 6)
    assert calls == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    longer = trained(small, 7)
    assert not torch.equal(one.encoder[0].weight, longer.encoder[0].weight)


def test_a_loss_that_is_not_finite_stops_the_training(small):
    with pytest.raises(UserError, match=r"--learning-rate: .*not finite at step"):
        fit(Autoencoder(width=8), small, steps=60, batch=4, seed=0, precision="fp32", learning_rate=1e9)


# --- what it reports --------------------------------------------------------------------------------------------------


def test_measure_is_the_mean_absolute_pixel_error(people):
    model = Autoencoder(width=8)
    with torch.no_grad():
        for half in (model.encoder, model.decoder):
            half[-1].weight.zero_()
        model.encoder[-1].bias.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
        model.decoder[-1].bias.copy_(torch.tensor([0.1, 0.2, 0.6]))
    figures = measure(model, people)
    assert figures["error_percent"] == pytest.approx(100 * np.abs(people / 255 - 0.3).mean(), rel=1e-5)
    assert figures["latent_mean"] == pytest.approx([1.0, -2.0, 0.0, 0.5])
    assert figures["latent_std"] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert model.training


def test_saved_weights_are_half_precision_and_come_back(tmp_path):
    model = Autoencoder(width=8)
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    save(model, path, {"seed": "5"})
    assert all(value.dtype == torch.float16 for value in load_file(path).values())
    again = build_autoencoder(path)
    assert again.facts == {"seed": "5"}
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].half().float()), key
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/weights\.safetensors: cannot be written"):
        save(Autoencoder(width=8), tmp_path / "file" / "weights.safetensors", {})


# --- command ----------------------------------------------------------------------------------------------------------

SHORT = (
    "--steps",
    4,
    "--batch",
    4,
    "--width",
    8,
    "--save-every",
    3,
    "--frames",
    60,
    "--seed",
    2,
    "--precision",
    "fp32",
)


def test_command_on_walkers(tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert run_command("train-autoencoder", out, *SHORT) == 0
    model = build_autoencoder(out)
    assert model.width == 8
    assert model.facts["steps"] == "4 of 4"
    assert model.facts["seed"] == "2"
    assert model.facts["measured_on"] == "frames of people not trained on"
    assert 0 < json.loads(model.facts["error_percent"]) < 100
    assert len(json.loads(model.facts["latent_mean"])) == len(json.loads(model.facts["latent_std"])) == 4
    printed = capsys.readouterr()
    assert "step 3: pixel error" in printed.out + printed.err


def test_command_on_a_dataset(tmp_path, walkers_dataset):
    out = tmp_path / "weights.safetensors"
    assert run_command("train-autoencoder", out, "--data", walkers_dataset, *SHORT) == 0
    assert "60 frames" in build_autoencoder(out).facts["data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("OUT.pth",), "OUT.pth: name a file that ends in .safetensors"),
        (("OUT.safetensors", "--steps", 0), "--steps: must be positive, got 0"),
        (("OUT.safetensors", "--learning-rate", "nan"), "--learning-rate: must be positive, got nan"),
        (("OUT.safetensors", "--seed", -1), "--seed: must lie in"),
        (("OUT.safetensors", "--data", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_command("train-autoencoder", *arguments) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line
    assert not list(tmp_path.iterdir())
