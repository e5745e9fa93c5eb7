"""Attention over frames in Triton against float64."""

import pytest
import torch

from gaitfast import kernels
from gaitfast.kernels import triton_ops
from tests.kernels.cases import assert_as_good_as_pytorch, backend, results, temporal_attention, typed

OPERATION = "temporal_attention"


@pytest.mark.parametrize("frames", [1, 2, 7, 16, 30, 33, 64])
def test_lengths(device, precision, frames):
    dtype, factor = precision
    assert_as_good_as_pytorch(OPERATION, dtype, device, temporal_attention(1, frames, 2), factor=factor)


@pytest.mark.parametrize("batch,sites,heads,dim_head", [(3, 1, 1, 32), (1, 5, 3, 16), (2, 4, 2, 64)])
def test_batches_sites_and_heads(device, precision, batch, sites, heads, dim_head):
    dtype, factor = precision
    arguments = temporal_attention(batch, 5, sites, heads, dim_head)
    assert_as_good_as_pytorch(OPERATION, dtype, device, arguments, factor=factor)


@pytest.mark.parametrize("walk", [1, 3, 5])
def test_the_gradient_of_the_bias_is_whole_however_sites_are_shared_out(device, walk):
    from gaitfast.kernels.triton_ops import _launch

    with _launch.replaced(f"{OPERATION}_bwd", {"SITES": walk}), _launch.replaced(f"{OPERATION}_fwd", {"SITES": walk}):
        assert_as_good_as_pytorch(OPERATION, torch.float32, device, temporal_attention(2, 6, 5))


def test_a_permuted_bias_and_a_strided_projection(device):
    arguments = typed(OPERATION, temporal_attention(), torch.float32, device)
    plain = results(OPERATION, arguments, "triton")
    qkv, bias, rotation, heads = arguments
    bias = bias.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    for ours, expected in zip(results(OPERATION, (qkv, bias, rotation, heads), "triton"), plain):
        assert torch.equal(ours, expected)


def test_large_scores_do_not_overflow(device):
    qkv, bias, rotation, heads = typed(OPERATION, temporal_attention(), torch.float32, device)
    with backend("triton"):
        out = kernels.temporal_attention(qkv * 100, bias * 100, rotation, heads)
    assert torch.isfinite(out).all()


def test_two_runs_give_the_same_bits(device):
    arguments = typed(OPERATION, temporal_attention(2, 30, 4), torch.float32, device)
    first, second = (results(OPERATION, arguments, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "arguments,why",
    [(temporal_attention(1, 65, 1), "64 frames"), (temporal_attention(dim_head=8), "heads of 8 features")],
)
def test_what_it_cannot_do_is_refused(arguments, why):
    arguments = typed(OPERATION, arguments, torch.float32, "cpu")
    assert why in triton_ops.MODULES[OPERATION].refusal(*arguments)


def test_a_rotation_that_wants_a_gradient_is_refused():
    qkv, bias, rotation, heads = typed(OPERATION, temporal_attention(), torch.float32, "cpu")
    refusal = triton_ops.MODULES[OPERATION].refusal
    assert "rotation" in refusal(qkv, bias, rotation.requires_grad_(), heads)
    with torch.no_grad():
        assert refusal(qkv, bias, rotation, heads) is None
