"""The reference operations against slow, literal formulas in float64, and the dispatch in front of them."""

import math

import pytest
import torch
from torch.nn import functional as F

from gaitfast import kernels

HEADS, DIM_HEAD = 2, 8


def rotation_table(frames: int, dim_head: int, dtype=torch.float64) -> torch.Tensor:
    angle = torch.arange(frames)[:, None] * 100.0 ** -(torch.arange(0, dim_head, 2).double() / dim_head)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)


def normal(*shape, dtype=torch.float64, seed=0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive_temporal_attention(qkv, bias, rotation, heads):
    """Site by site, head by head, every rotation a 2x2 matrix."""
    batch, frames, sites, width = qkv.shape
    dim_head = width // (3 * heads)
    parts = qkv.view(batch, frames, sites, 3, heads, dim_head)
    cos, sin = rotation.unbind(-1)
    matrices = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)  # (T, D/2, 2, 2)
    out = torch.empty(batch, frames, sites, heads, dim_head, dtype=qkv.dtype)
    for b in range(batch):
        for s in range(sites):
            for h in range(heads):
                q, k, v = (parts[b, :, s, i, h] for i in range(3))
                q, k = (torch.einsum("tpij,tpj->tpi", matrices, z.view(frames, -1, 2)).flatten(1) for z in (q, k))
                scores = q @ k.T / math.sqrt(dim_head) + bias[h]
                out[b, :, s, h] = scores.softmax(dim=1) @ v
    return out.flatten(3)


@pytest.mark.parametrize("frames", [1, 2, 7, 30])
def test_temporal_attention_is_the_literal_formula(frames):
    qkv, bias = normal(2, frames, 3, 3 * HEADS * DIM_HEAD), normal(HEADS, frames, frames, seed=1)
    rotation = rotation_table(frames, DIM_HEAD)
    ours = kernels.temporal_attention(qkv, bias, rotation, HEADS)
    torch.testing.assert_close(ours, naive_temporal_attention(qkv, bias, rotation, HEADS), rtol=1e-12, atol=1e-12)


def test_temporal_attention_never_mixes_sites_or_samples():
    qkv = normal(2, 5, 4, 3 * HEADS * DIM_HEAD).requires_grad_()
    out = kernels.temporal_attention(qkv, normal(HEADS, 5, 5), rotation_table(5, DIM_HEAD), HEADS)
    out[1, 2, 3].sum().backward()
    reached = qkv.grad.abs().sum(dim=(1, 3)) > 0
    assert reached.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("sites", [1, 4, 9])
def test_linear_attention_is_the_literal_formula(sites):
    qkv = normal(2, 3, sites, 3 * HEADS * DIM_HEAD)
    q, k, v = qkv.view(2, 3, sites, 3, HEADS, DIM_HEAD).unbind(3)
    q, k = q.softmax(dim=-1) / math.sqrt(DIM_HEAD), k.softmax(dim=2)
    context = torch.einsum("btshd,btshe->bthde", k, v)
    expected = torch.einsum("bthde,btshd->btshe", context, q).flatten(3)
    torch.testing.assert_close(kernels.linear_attention(qkv, HEADS), expected, rtol=1e-12, atol=1e-12)


def test_spatial_attention_is_the_literal_formula():
    qkv = normal(2, 3, 4, 3 * HEADS * DIM_HEAD)
    q, k, v = qkv.view(2, 3, 4, 3, HEADS, DIM_HEAD).unbind(3)
    weights = (torch.einsum("btihd,btjhd->bthij", q, k) / math.sqrt(DIM_HEAD)).softmax(dim=-1)
    expected = torch.einsum("bthij,btjhd->btihd", weights, v).flatten(3)
    torch.testing.assert_close(kernels.spatial_attention(qkv, HEADS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels,groups", [(8, 8), (8, 4), (12, 4), (6, 1)])
@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_film_silu_is_the_literal_formula(channels, groups, modulated):
    x = normal(3, 5, 2, 2, channels) * 3 + 1
    weight, bias = normal(channels, seed=1), normal(channels, seed=2)
    scale, shift = (normal(3, channels, seed=3), normal(3, channels, seed=4)) if modulated else (None, None)
    expected = F.group_norm(x.movedim(-1, 1).contiguous(), groups, weight, bias).movedim(1, -1)
    if modulated:
        expected = expected * (scale[:, None, None, None] + 1) + shift[:, None, None, None]
    ours = kernels.group_norm_film_silu(x, weight, bias, groups, scale, shift)
    torch.testing.assert_close(ours, F.silu(expected), rtol=1e-12, atol=1e-12)
    assert ours.is_contiguous()


def test_group_norm_survives_a_mean_far_from_zero():
    x = normal(2, 4, 4, 4, 8) + 3_000.0
    weight, bias = torch.ones(8), torch.zeros(8)
    single = kernels.group_norm_film_silu(x.float(), weight, bias, 4)
    double = kernels.group_norm_film_silu(x.float().double(), weight.double(), bias.double(), 4)
    assert (single - double).abs().max() < 1e-3


def test_layer_norm_is_the_literal_formula():
    x, weight = normal(2, 3, 4, 10) * 2 + 5, normal(10, seed=1)
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, unbiased=False, keepdim=True)
    expected = (x - mean) / torch.sqrt(variance + 1e-5) * weight
    torch.testing.assert_close(kernels.layer_norm(x, weight), expected, rtol=1e-12, atol=1e-12)


def test_film_equals_one_linear_layer_after_another():
    channels = (4, 4, 6)
    time, condition = normal(3, 5), normal(3, 7, seed=1)
    weights = [normal(2 * c, 12, seed=c + i) for i, c in enumerate(channels)]
    biases = [normal(2 * c, seed=30 + i) for i, c in enumerate(channels)]
    pairs = kernels.film(time, condition, torch.cat(weights), torch.cat(biases), channels)
    assert len(pairs) == 3
    for (scale, shift), weight, bias in zip(pairs, weights, biases):
        expected = F.silu(torch.cat((time, condition), dim=1)) @ weight.T + bias
        torch.testing.assert_close(torch.cat((scale, shift), dim=1), expected, rtol=1e-12, atol=1e-12)


GRADIENT_CASES = {
    "film": lambda t, c, w, b: torch.cat([x for pair in kernels.film(t, c, w, b, (2, 3)) for x in pair], dim=1),
    "group_norm_film_silu": lambda x, w, b, s, h: kernels.group_norm_film_silu(x, w, b, 2, s, h),
    "layer_norm": kernels.layer_norm,
    "linear_attention": lambda qkv: kernels.linear_attention(qkv, HEADS),
    "spatial_attention": lambda qkv: kernels.spatial_attention(qkv, HEADS),
    "temporal_attention": lambda qkv, bias: kernels.temporal_attention(qkv, bias, rotation_table(3, 4), HEADS),
}
GRADIENT_SHAPES = {
    "film": [(2, 3), (2, 2), (10, 5), (10,)],
    "group_norm_film_silu": [(2, 2, 2, 1, 4), (4,), (4,), (2, 4), (2, 4)],
    "layer_norm": [(2, 3, 5), (5,)],
    "linear_attention": [(1, 2, 3, 3 * HEADS * 4)],
    "spatial_attention": [(1, 2, 3, 3 * HEADS * 4)],
    "temporal_attention": [(1, 3, 2, 3 * HEADS * 4), (HEADS, 3, 3)],
}


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_every_gradient_is_the_derivative(operation):
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(GRADIENT_SHAPES[operation])]
    assert torch.autograd.gradcheck(GRADIENT_CASES[operation], inputs)


def low_precision_calls(dtype):
    """Each activation operation on `dtype` activations with float32 parameters, and the same in float64."""
    x, qkv = normal(2, 4, 4, 4, 8, dtype=dtype), normal(2, 4, 4, 3 * HEADS * DIM_HEAD, dtype=dtype, seed=1)
    vectors = [normal(8, dtype=torch.float32, seed=2), normal(8, dtype=torch.float32, seed=3)]
    rows = [normal(2, 8, dtype=torch.float32, seed=4), normal(2, 8, dtype=torch.float32, seed=5)]
    bias, rotation = normal(HEADS, 4, 4, dtype=torch.float32), rotation_table(4, DIM_HEAD, torch.float32)
    return {
        "group_norm_film_silu": (
            lambda a, w, b, s, h: kernels.group_norm_film_silu(a, w, b, 8, s, h),
            x,
            *vectors,
            *rows,
        ),
        "layer_norm": (kernels.layer_norm, x, vectors[0]),
        "linear_attention": (lambda a: kernels.linear_attention(a, HEADS), qkv),
        "spatial_attention": (lambda a: kernels.spatial_attention(a, HEADS), qkv),
        "temporal_attention": (lambda a, b, r: kernels.temporal_attention(a, b, r, HEADS), qkv, bias, rotation),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", [name for name in kernels.OPERATIONS if name != "film"])
def test_low_precision_activations_keep_their_type_and_stay_near_float64(operation, dtype):
    call, *tensors = low_precision_calls(dtype)[operation]
    ours, truth = call(*tensors), call(*(t.double() for t in tensors))
    assert ours.dtype == dtype
    error = (ours.double() - truth).norm() / truth.norm()
    assert error < 2 * torch.finfo(dtype).eps, error


def test_group_norm_rounds_to_bfloat16_once():
    call, *tensors = low_precision_calls(torch.bfloat16)["group_norm_film_silu"]
    ours, truth = call(*tensors).double(), call(*(t.double() for t in tensors))
    assert ((ours - truth).abs() <= 2.0**-8 * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("operation", [name for name in kernels.OPERATIONS if name != "film"])
def test_autocast_does_not_change_a_result(operation):
    call, *tensors = low_precision_calls(torch.float32)[operation]
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(*tensors)
    assert torch.equal(inside, call(*tensors)) and inside.dtype == torch.float32


def test_every_operation_tells_its_backend_and_why(monkeypatch):
    monkeypatch.delenv("GAITFAST_BACKEND", raising=False)
    for operation in kernels.OPERATIONS:
        name, reason = kernels.backend_of(operation)
        expected = ("reference", "no faster") if operation == "film" else ("compiled", "CPU")
        assert name == expected[0] and expected[1] in reason


def test_a_forced_backend_is_named_as_the_reason(monkeypatch):
    monkeypatch.setenv("GAITFAST_BACKEND", "reference")
    name, reason = kernels.backend_of("layer_norm")
    assert name == "reference" and "GAITFAST_BACKEND" in reason


@pytest.mark.parametrize("forced", ["compiled", "triton", "cuda"])
def test_a_backend_that_cannot_run_is_refused_with_what_can(monkeypatch, forced):
    monkeypatch.setenv("GAITFAST_BACKEND", forced)
    with pytest.raises(kernels.BackendError, match=rf"GAITFAST_BACKEND={forced}.*reference"):
        kernels.layer_norm(normal(2, 4), normal(4))


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        kernels.temporal_attention(normal(1, 4, 2, 48), normal(2, 3, 4), rotation_table(4, 8), 2)
    with pytest.raises(AssertionError):
        kernels.group_norm_film_silu(normal(1, 2, 2, 2, 8), normal(8), normal(8), 3)
    with pytest.raises(AssertionError):
        kernels.group_norm_film_silu(normal(1, 2, 2, 2, 8), normal(8), normal(8), 4, scale=normal(1, 8))
