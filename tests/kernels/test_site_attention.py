"""Full and linear attention over sites on every backend against float64."""

import pytest
import torch

from gaitfast.kernels import triton_ops
from tests.kernels.cases import assert_as_good_as_pytorch, results, site_attention, typed


@pytest.mark.parametrize("operation", ["linear_attention", "spatial_attention"])
@pytest.mark.parametrize("batch,frames,sites", [(1, 1, 1), (3, 3, 4), (1, 2, 33), (1, 1, 64), (2, 5, 16), (2, 2, 31)])
def test_frames_and_sites(operation, side, batch, frames, sites):
    assert_as_good_as_pytorch(operation, side, site_attention(batch, frames, sites))


@pytest.mark.parametrize("operation", ["linear_attention", "spatial_attention"])
@pytest.mark.parametrize("batch,frames,sites,dim_head", [(1, 5, 5, 16), (1, 2, 33, 64)])
def test_other_heads(operation, triton_side, batch, frames, sites, dim_head):
    assert_as_good_as_pytorch(operation, triton_side, site_attention(batch, frames, sites, 2, dim_head))


@pytest.mark.parametrize("operation", ["linear_attention", "spatial_attention"])
def test_strided_projection(operation, single):
    qkv, heads = typed(operation, site_attention(2, 3, 4), torch.float32, single.device)
    strided = qkv.transpose(0, 2).contiguous().transpose(0, 2)
    for ours, expected in zip(
        results(operation, (strided, heads), single.name), results(operation, (qkv, heads), single.name)
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("operation", ["linear_attention", "spatial_attention"])
def test_what_it_cannot_do_is_refused(operation):
    refusal = triton_ops.MODULES[operation].refusal
    assert "64 sites" in refusal(*typed(operation, site_attention(sites=65), torch.float32, "cpu"))
    assert "float64" in refusal(*site_attention())
