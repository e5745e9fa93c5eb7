"""The denoiser against the golden cases, and what the architecture promises about memory, shapes and seeds."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gaitfast import kernels
from gaitfast.interop import video_diffusion
from gaitfast.models.denoiser import build_denoiser, flops_per_sample
from gaitfast.models.denoiser_blocks import FramewiseConv, FramewiseConvTranspose
from tests.golden_recipe import golden_integers, golden_normal, golden_tensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ROTARY = 1.0 / 10_000 ** (torch.arange(0, 32, 2) / 32)


def golden_model(facts: dict, dtype: torch.dtype):
    weights = {
        key: ROTARY if key.endswith("rotary_emb.freqs") else golden_tensor(key, shape)
        for key, shape in facts["state_dict"].items()
    }
    model = build_denoiser(facts["dim"], facts["cond_dim"]).to(dtype)
    video_diffusion.load_state_dict(model, weights)
    return model


def inputs(batch=2, frames=3, height=8, width=8, cond_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, frames, height, width, generator=generator, dtype=torch.float64).to(dtype)
    condition = torch.randn(batch, cond_dim, generator=generator, dtype=torch.float64).to(dtype)
    return latents, torch.arange(1, batch + 1) * 150, condition


@pytest.fixture(scope="module")
def model():
    return build_denoiser(32, 16)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["denoiser_dim32", "denoiser_dim64"])
def test_golden_outputs_loss_and_every_gradient(name, dtype, tolerance):
    facts, golden = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    model, batch = golden_model(facts, dtype), facts["batch"]
    latents = golden_normal(f"{name}.x", (batch, 4, facts["frames"], 8, 8)).to(dtype)
    timestep = golden_integers(f"{name}.t", (batch,), 0, 1000)
    condition = golden_normal(f"{name}.cond", (batch, facts["cond_dim"])).to(dtype).requires_grad_()
    predicted = model(latents, timestep, condition)
    loss = (predicted - golden_normal(f"{name}.target", latents.shape)).square().mean()
    loss.backward()
    with torch.no_grad():
        unconditional = model(latents, timestep, condition, torch.ones(batch, dtype=torch.bool))

    def deviation(ours, reference):
        return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()

    # The stored tensors are float32 themselves, so float64 is judged after the same rounding.
    assert deviation(predicted.float(), golden["pred"]) < tolerance
    assert deviation(unconditional.float(), golden["pred_uncond"]) < tolerance
    assert deviation(condition.grad.float(), golden["grad_cond"]) < tolerance
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=tolerance)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients["positions.frequencies"] = torch.zeros(16)
    gradients = video_diffusion.export_tensors(model, gradients)
    # At one channel per group a bias before the norm has no gradient but rounding, hence the absolute part.
    floor = tolerance * max(facts["grad_norms"].values())
    for key, expected in facts["grad_norms"].items():
        assert gradients[key].double().norm().item() == pytest.approx(expected, rel=tolerance, abs=floor), key


@pytest.mark.parametrize(
    "dim,cond_dim,count",
    [(32, 256, 3_654_228), (64, 256, 11_573_908), (128, 256, 40_211_220), (64, 128, 11_082_260)],
)
def test_parameter_counts_are_the_papers(dim, cond_dim, count):
    model = build_denoiser(dim, cond_dim)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 16


def test_drop_condition_works_sample_by_sample_and_trains_the_null_condition(model):
    latents, timestep, condition = inputs()
    condition.requires_grad_()
    mixed = model(latents, timestep, condition, torch.tensor([True, False]))
    dropped = model(latents, timestep, torch.full_like(condition, 7.0), torch.tensor([True, True]))
    kept = model(latents, timestep, condition)
    torch.testing.assert_close(mixed[0], dropped[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], kept[1], rtol=1e-4, atol=1e-5)
    model.zero_grad()
    mixed.square().mean().backward()
    assert condition.grad[0].abs().max() == 0 and condition.grad[1].abs().max() > 0
    assert model.null_condition.grad.abs().max() > 0
    model.zero_grad()
    model(latents, timestep, condition).sum().backward()
    assert model.null_condition.grad.abs().max() == 0  # unused, yet never None: every rank reduces the same tensors


@pytest.mark.parametrize("frames,height,width", [(1, 8, 8), (64, 4, 4), (7, 4, 12)])
def test_any_length_and_grid(model, frames, height, width):
    latents, timestep, condition = inputs(1, frames, height, width)
    out = model(latents, timestep, condition)
    assert out.shape == latents.shape and out.is_contiguous() and torch.isfinite(out).all()


def test_samples_do_not_see_each_other():
    model = build_denoiser(32, 16).double()
    latents, timestep, condition = inputs(3, dtype=torch.float64)
    alone = torch.cat([model(latents[i : i + 1], timestep[i : i + 1], condition[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(latents, timestep, condition), alone, rtol=1e-9, atol=1e-9)


def test_timesteps_may_be_integers_or_floats(model):
    latents, timestep, condition = inputs()
    whole = model(latents, timestep, condition)
    assert torch.equal(whole, model(latents, timestep.float(), condition))
    assert not torch.allclose(whole, model(latents, timestep + 1, condition), atol=1e-6)


@pytest.mark.parametrize("frames", [0, 65])
def test_more_or_fewer_frames_than_the_positions_know_are_refused(model, frames):
    with pytest.raises(AssertionError, match=r"1\.\.64 frames"):
        model(*inputs(1, frames))


def test_bfloat16_autocast_stays_near_float32_and_returns_float32():
    model = build_denoiser(32, 16)
    latents, timestep, condition = inputs()
    precise = model(latents, timestep, condition)
    with torch.autocast("cpu", torch.bfloat16):
        fast = model(latents, timestep, condition)
    assert fast.dtype == torch.float32
    assert (fast - precise).norm() / precise.norm() < 0.03
    fast.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def recorded_copies(monkeypatch):
    """Copies of tensors, by size, that the layers make; what happens inside an operation is the operation's affair."""
    copies, inside = [], []
    run = kernels._dispatch.run

    def marked(*arguments):
        inside.append(True)
        try:
            return run(*arguments)
        finally:
            inside.pop()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if not inside and function.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous"):
                copies.append(arguments[0].numel())
            return function(*arguments, **(keywords or {}))

    monkeypatch.setattr(kernels._dispatch, "run", marked)
    with Record():
        yield copies


def test_no_permute_is_ever_materialised(model, monkeypatch):
    latents, timestep, condition = inputs(2, 6)
    with recorded_copies(monkeypatch) as copies:
        model(latents, timestep, condition)
    activation = 2 * 6 * 2 * 2 * 32  # the smallest that a layer could copy
    assert [n for n in copies if n >= activation] == [latents.numel()] * 2, "the public layout, in and out, and no more"


def test_the_copy_recorder_would_see_a_materialised_permute(model, monkeypatch):
    convolve = FramewiseConv.forward
    monkeypatch.setattr(FramewiseConv, "forward", lambda self, x: convolve(self, x.transpose(2, 3).contiguous()))
    latents, timestep, condition = inputs(2, 6)
    with recorded_copies(monkeypatch) as copies:
        model(latents, timestep, condition)
    assert len(copies) > 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations_and_their_gradients_keep_channels_last(dtype):
    model = build_denoiser(32, 16).to(dtype)
    gradients = []

    def keep_gradient(gradient):
        gradients.append(gradient)

    def watch(name):
        def after(module, arguments, out):
            assert out.is_contiguous(), f"{name}: {tuple(out.shape)} {out.stride()}"
            out.register_hook(keep_gradient)

        return after

    for name, module in model.named_modules():
        if isinstance(module, FramewiseConv | FramewiseConvTranspose):
            module.register_forward_hook(watch(name))
    model(*inputs(dtype=dtype)).square().mean().backward()
    assert len(gradients) == 35
    for gradient in gradients:  # a gradient may be a slice of a concatenation's, but never permuted
        assert list(gradient.stride()) == sorted(gradient.stride(), reverse=True) and gradient.stride(-1) == 1


def test_computing_projections_again_changes_no_bit(monkeypatch):
    """Queries, keys and values are not kept on a CPU; under a compiler they are."""
    model = build_denoiser(32, 16)

    def gradients() -> list[torch.Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*inputs()).float().square().mean()
        # What is computed again is so outside of autocast, and from the weights of the forward pass.
        return list(torch.autograd.grad(loss, parameters))

    again = gradients()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients(), strict=True))


@pytest.mark.parametrize("backend", ["reference", ""])
def test_a_forward_pass_that_no_backward_pass_follows_leaves_nothing(monkeypatch, backend):
    """A result that its own node saves must not lead back to that node: the graph would hold itself for ever."""
    monkeypatch.setenv("GAITFAST_BACKEND", backend)
    model, results = build_denoiser(32, 16), []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= 1000:
                results.append(StorageWeakRef(result.untyped_storage()))
            return result

    arguments = inputs()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *arguments)}
    with Watched():
        model(*arguments)
    assert len(results) > 100
    assert not [found for found in results if found.cdata not in own and not found.expired()]


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_denoiser(32, 16, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second, other = (build_denoiser(32, 16, seed=s).state_dict() for s in (1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_initial_weights_have_pytorchs_default_distributions():
    state = build_denoiser(64).state_dict()
    for key, fan_in in (
        ("stem.weight", 4 * 25),
        ("down.1.block2.conv1.weight", 128 * 9),
        ("film.weight", 512),
        ("up.0.frames.qkv.weight", 128),
        ("grow.0.weight", 128 * 16),
    ):
        bound = fan_in**-0.5
        assert 0.98 * bound < state[key].abs().max() <= bound, key
        assert state[key].std().item() == pytest.approx(bound / 3**0.5, rel=0.05), key
    assert state["null_condition"].std().item() == pytest.approx(1.0, rel=0.15)
    assert state["positions.bias.weight"].std().item() == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("dim,gigaflops", [(32, 2.401), (64, 6.476), (128, 20.80)])
def test_cost_of_a_forward_pass(dim, gigaflops):
    assert flops_per_sample(dim) / 1e9 == pytest.approx(gigaflops, rel=3e-4)


def test_cost_is_what_pytorch_counts(monkeypatch):
    monkeypatch.setenv("GAITFAST_BACKEND", "reference")  # whose products PyTorch can see
    latents, timestep, condition = inputs(2, 5, 4, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_denoiser(32, 16)(latents, timestep, condition)
    assert counter.get_total_flops() == 2 * flops_per_sample(32, 5, 16, height=4, width=8)
