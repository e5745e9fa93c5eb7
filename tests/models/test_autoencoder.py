"""The frozen autoencoder: its arithmetic, the built-in weights, and the files it is built from."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gaitfast.config import UserError
from gaitfast.data import walkers
from gaitfast.data.usf17 import UsfRelease
from gaitfast.interop import taesd
from gaitfast.models import autoencoder, build_autoencoder, weight_files
from gaitfast.models.autoencoder import BUILTIN, CPU_CHUNK, Autoencoder


def frames(count: int, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(
        torch.rand(count, 1, height // 8, width // 8, generator=generator), scale_factor=8
    )


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
def test_one_channel_equals_three_equal_ones(gradients):
    model = Autoencoder(width=16).double()
    one = frames(3).double()
    with torch.set_grad_enabled(gradients):
        assert error(model.encode(one), model.encode(one.expand(-1, 3, -1, -1))) < 1e-12


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 48), (8, 128)])
def test_shapes(height, width):
    model = Autoencoder(width=8)
    with torch.no_grad():
        latents = model.encode(frames(2, height, width))
        assert latents.shape == (2, 4, height // 8, width // 8)
        assert model.decode(latents).shape == (2, 3, height, width)
        silhouettes = model.decode_silhouette(10 * latents)
        assert silhouettes.shape == (2, 1, height, width)
        assert silhouettes.min() >= 0 and silhouettes.max() <= 1
        assert model.encode(frames(0, height, width)).shape == (0, 4, height // 8, width // 8)


def test_silhouette_is_the_clamped_mean_of_what_is_decoded():
    model = Autoencoder(width=8)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = model.decode(latents)
        assert torch.equal(model.decode_silhouette(latents), decoded.mean(1, keepdim=True).clamp(0, 1))


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, 64, 64), torch.zeros(2, 1, 64, 44), torch.zeros(2, 64, 64)])
def test_wrong_shapes_are_refused(bad):
    with pytest.raises(AssertionError):
        Autoencoder(width=8).encode(bad)


def test_bytes_are_refused():
    with pytest.raises(AssertionError, match="floats"):
        Autoencoder(width=8).encode(torch.zeros(2, 1, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, CPU_CHUNK, 2 * CPU_CHUNK + 3])
def test_chunked_and_fused_encoder_is_as_exact_as_the_plain_one(dtype, count):
    if dtype == torch.bfloat16 and not autoencoder.fuses(dtype):
        pytest.skip("this CPU or this PyTorch has no fused bf16 convolutions")
    model = build_autoencoder()
    pixels = frames(count)
    truth = build_autoencoder().double().encode(pixels.double())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain = model.encode(pixels)  # gradients are on: nothing is cut or fused
        with torch.no_grad():
            fused = model.encode(pixels)
    assert fused.dtype == plain.dtype == dtype and fused.shape == plain.shape
    assert error(fused, truth) <= 2 * error(plain, truth)


def test_gradients_reach_the_weights_through_the_folded_channel():
    model = Autoencoder(width=8).double()
    model.encode(frames(2).double()).square().sum().backward()
    folded = [p.grad.clone() for p in model.encoder.parameters()]
    model.zero_grad()
    model.encode(frames(2).double().expand(-1, 3, -1, -1)).square().sum().backward()
    for one, three in zip(folded, (p.grad for p in model.encoder.parameters())):
        torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-12)


def test_activations_stay_channels_last():
    model = Autoencoder(width=8)
    layouts = []
    for layer in model.encoder:
        layer.register_forward_hook(
            lambda module, _, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    model.encode(frames(2))
    assert len(layouts) == 14 and all(layouts)  # all but the first, which `encode` applies itself


# --- the built-in weights ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin() -> Autoencoder:
    return build_autoencoder()


def reconstruction(model: Autoencoder, pictures: np.ndarray) -> tuple[float, torch.Tensor]:
    """Mean absolute pixel error in percent, and the latents."""
    pixels = torch.from_numpy(pictures)[:, None].float() / 255
    with torch.no_grad():
        latents = model.encode(pixels)
        return 100 * (model.decode_silhouette(latents) - pixels).abs().mean().item(), latents


def test_builtin_is_frozen_small_and_tells_its_training(builtin):
    assert not builtin.training and not any(p.requires_grad for p in builtin.parameters())
    assert all(p.dtype == torch.float32 for p in builtin.parameters())
    assert BUILTIN.stat().st_size < 6 << 20
    assert builtin.width == int(builtin.facts["width"]) == 32
    for key in ("data", "steps", "seed", "error_percent", "latent_mean", "latent_std"):
        assert builtin.facts[key]
    assert len(json.loads(builtin.facts["latent_std"])) == 4


def test_builtin_on_walkers_it_never_saw(builtin):
    percent, latents = reconstruction(builtin, walkers.clips(7, 24, 4, first=3 * 10**6).reshape(-1, 64, 64))
    assert percent < 1.0
    values = latents.transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.25
    assert 0.75 < values.std(1).min() and values.std(1).max() < 1.35


def test_builtin_draws_back_what_it_is_given_and_not_an_average(builtin):
    people = walkers.clips(7, 16, 1, first=3 * 10**6).reshape(-1, 64, 64)
    percent, _ = reconstruction(builtin, people)
    average = 100 * np.abs(people / 255 - people.mean(0) / 255).mean()
    assert percent < average / 10


def test_builtin_on_real_people_it_never_saw(builtin, usf17):
    """Beside the paper's 3.8 % (Gait3D) and 3.4 % (GREW) for TAESD (appendix A.1)."""
    release = UsfRelease(usf17)
    for name in ("Gal", "PrbB", "PrbD"):
        walks = [entry for entry in release.scan().entries if entry.condition == name]
        pictures = np.concatenate([release.read(walk)[::60] for walk in walks])
        percent, _ = reconstruction(builtin, pictures)
        assert percent < 0.5, name
        # These masks are made of 2x2 steps, which training imitates: off that grid they are new in kind.
        shifted, _ = reconstruction(builtin, np.roll(pictures, (1, 1), (1, 2)))
        assert shifted < 2.0, name


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Autoencoder:
    torch.manual_seed(3)
    return Autoencoder(width=8).eval()


def same_weights(model: Autoencoder, other: Autoencoder) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def halves(model: Autoencoder) -> tuple[dict, dict]:
    """The bare state dicts of the two halves, as TAESD publishes them."""
    return dict(model.encoder.state_dict()), dict(model.decoder.state_dict())


def contiguous(weights: dict) -> dict:
    return {key: value.contiguous() for key, value in weights.items()}


@pytest.mark.parametrize("style", taesd.STYLES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_file(tmp_path, small, style, suffix):
    path = tmp_path / f"weights{suffix}"
    weights = taesd.state_dict(small, style)
    save_file(weights, path, {"made": "here"}) if suffix == ".safetensors" else torch.save(weights, path)
    model = build_autoencoder(path)
    assert same_weights(model, small) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.facts == ({"made": "here"} if suffix == ".safetensors" else {})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_encoder_alone_and_with_the_decoder_beside_it(tmp_path, small, suffix):
    def write(weights, name):
        path = tmp_path / f"{name}{suffix}"
        save_file(contiguous(weights), path) if suffix == ".safetensors" else torch.save(weights, path)
        return path

    encoder, decoder = halves(small)
    path = write(encoder, "taesd_encoder")
    model = build_autoencoder(path)
    with torch.no_grad():
        latents = model.encode(frames(1))
        assert torch.equal(latents, small.encode(frames(1)))
        with pytest.raises(UserError, match=r"taesd_encoder.*holds only an encoder.*beside it"):
            model.decode_silhouette(latents)
    write(decoder, "taesd_decoder")
    assert same_weights(build_autoencoder(path), small)
    with pytest.raises(UserError, match="holds only a decoder"):
        build_autoencoder(tmp_path / f"taesd_decoder{suffix}")


class Bomb:
    """Pickles into a call of print, which an unpickler that runs code would make."""

    def __reduce__(self):
        return print, ("the file ran code",)


def write_damaged(path, kind: str, model: Autoencoder):
    if kind == "missing":
        return
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(hashlib.sha256(b"noise").digest() * 40)
    elif kind == "code":
        path.write_bytes(pickle.dumps({"0.weight": Bomb()}, protocol=2))
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    elif kind == "truncated":
        save_file(taesd.state_dict(model), path)
        path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.safetensors", "missing"),
        ("a.safetensors", "empty"),
        ("a.safetensors", "noise"),
        ("a.safetensors", "truncated"),
        ("a.pth", "empty"),
        ("a.pth", "noise"),
        ("a.pth", "code"),
        ("a.pth", "list"),
    ],
)
def test_damaged_files_get_one_clear_line(tmp_path, capsys, small, name, kind):
    path = tmp_path / name
    write_damaged(path, kind, small)
    with pytest.raises(UserError, match=r"^\S*/" + name) as caught:
        build_autoencoder(str(path))
    assert "\n" not in str(caught.value)
    assert "ran code" not in capsys.readouterr().out


def test_official_refuses_a_file_with_another_digest(tmp_path, small):
    path = tmp_path / "taesd_encoder.safetensors"
    with pytest.raises(UserError, match="no such file"):
        build_autoencoder(f"official:{path}")
    save_file(contiguous(halves(small)[0]), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"{digest}, which is no published TAESD file; .*leave out official:"):
        build_autoencoder(f"official:{path}")


def test_official_takes_published_digests_and_names_old_ones(tmp_path, small, monkeypatch):
    """The published files cannot be had here, so files of ours are entered among the published digests."""
    encoder, decoder = halves(small)
    path, beside = tmp_path / "taesd_encoder.safetensors", tmp_path / "taesd_decoder.safetensors"
    save_file(contiguous(encoder), path)
    save_file(contiguous(decoder), beside)
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, beside)]

    monkeypatch.setitem(weight_files.OUTDATED_SHA256, digests[0], "encoder 1.1")
    with pytest.raises(UserError, match=r"is TAESD's encoder 1\.1, older than the paper's 1\.2"):
        build_autoencoder(f"official:{path}")
    monkeypatch.setitem(weight_files.OFFICIAL_SHA256, digests[0], "encoder 1.2")
    model = build_autoencoder(f"official:{path}")
    with pytest.raises(UserError, match="beside the official encoder, has no known digest"):
        model.decode(torch.zeros(1, 4, 8, 8))
    monkeypatch.setitem(weight_files.OFFICIAL_SHA256, digests[1], "decoder 1.2")
    assert same_weights(build_autoencoder(f"official:{path}"), small)


def test_pth_files_are_known_by_their_git_blob(tmp_path, small, monkeypatch):
    path = tmp_path / "taesd_encoder.pth"
    torch.save(halves(small)[0], path)
    assert weight_files.official_version(path) is None
    content = path.read_bytes()
    monkeypatch.setitem(
        weight_files.OFFICIAL_GIT_BLOB, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), "encoder 1.2"
    )
    assert weight_files.official_version(path) == "encoder 1.2"
    assert build_autoencoder(f"official:{path}").width == 8


def test_git_blob_ids_are_those_of_git(tmp_path, monkeypatch):
    path = tmp_path / "hello.pth"
    path.write_bytes(b"hello\n")
    monkeypatch.setitem(weight_files.OFFICIAL_GIT_BLOB, "ce013625030ba8dba906f756967f9e9ca394464a", "hello")
    assert weight_files.official_version(path) == "hello"
