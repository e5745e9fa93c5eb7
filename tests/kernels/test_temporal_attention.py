"""Attention over frames on every backend against float64."""

import pytest
import torch

from gaitfast import kernels
from gaitfast.kernels import triton_ops
from tests.kernels.cases import Side, assert_as_good_as_pytorch, backend, results, temporal_attention, typed

OPERATION = "temporal_attention"


@pytest.mark.parametrize("frames", [1, 2, 7, 16, 17, 30, 32, 33, 64])
def test_lengths(side, frames):
    assert_as_good_as_pytorch(OPERATION, side, temporal_attention(1, frames, 2))


@pytest.mark.parametrize("batch,sites,heads", [(3, 1, 1), (1, 5, 3), (2, 4, 2)])
def test_batches_sites_and_heads(side, batch, sites, heads):
    assert_as_good_as_pytorch(OPERATION, side, temporal_attention(batch, 5, sites, heads))


@pytest.mark.parametrize("sites,heads,dim_head", [(5, 3, 16), (4, 2, 64)])
def test_other_heads(triton_side, sites, heads, dim_head):
    assert_as_good_as_pytorch(OPERATION, triton_side, temporal_attention(1, 5, sites, heads, dim_head))


@pytest.mark.parametrize("walk", [1, 3, 5])
def test_the_gradient_of_the_bias_is_whole_however_sites_are_shared_out(device, walk):
    from gaitfast.kernels.triton_ops import _launch

    with _launch.replaced(f"{OPERATION}_bwd", {"SITES": walk}), _launch.replaced(f"{OPERATION}_fwd", {"SITES": walk}):
        assert_as_good_as_pytorch(OPERATION, Side("triton", None, device, torch.float32), temporal_attention(2, 6, 5))


def test_a_permuted_bias_and_a_strided_projection(single):
    arguments = typed(OPERATION, temporal_attention(), torch.float32, single.device)
    plain = results(OPERATION, arguments, single.name)
    qkv, bias, rotation, heads = arguments
    bias = bias.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    for ours, expected in zip(results(OPERATION, (qkv, bias, rotation, heads), single.name), plain):
        assert torch.equal(ours, expected)


def test_large_scores_do_not_overflow(single):
    qkv, bias, rotation, heads = typed(OPERATION, temporal_attention(), torch.float32, single.device)
    with backend(single.name):
        out = kernels.temporal_attention(qkv * 100, bias * 100, rotation, heads)
    assert torch.isfinite(out).all()


def test_two_runs_give_the_same_bits(single):
    arguments = typed(OPERATION, temporal_attention(2, 30, 4), torch.float32, single.device)
    first, second = (results(OPERATION, arguments, single.name) for _ in range(2))
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
