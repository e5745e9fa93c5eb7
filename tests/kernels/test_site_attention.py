"""Full and linear attention over sites in Triton against float64."""

import pytest
import torch

from gaitfast.kernels import triton_ops
from tests.kernels.cases import assert_as_good_as_pytorch, results, site_attention, typed


@pytest.mark.parametrize("operation", ["linear_attention", "spatial_attention"])
@pytest.mark.parametrize(
    "batch,frames,sites,dim_head", [(1, 1, 1, 32), (3, 3, 4, 32), (1, 5, 5, 16), (1, 2, 33, 64), (1, 1, 64, 32)]
)
def test_frames_and_sites(operation, device, precision, batch, frames, sites, dim_head):
    dtype, factor = precision
    arguments = site_attention(batch, frames, sites, 2, dim_head)
    assert_as_good_as_pytorch(operation, dtype, device, arguments, factor=factor)


@pytest.mark.parametrize("operation", ["linear_attention", "spatial_attention"])
def test_strided_projection(operation, device):
    qkv, heads = typed(operation, site_attention(2, 3, 4), torch.float32, device)
    strided = qkv.transpose(0, 2).contiguous().transpose(0, 2)
    for ours, expected in zip(
        results(operation, (strided, heads), "triton"), results(operation, (qkv, heads), "triton")
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("operation", ["linear_attention", "spatial_attention"])
def test_what_it_cannot_do_is_refused(operation):
    refusal = triton_ops.MODULES[operation].refusal
    assert "64 sites" in refusal(*typed(operation, site_attention(sites=65), torch.float32, "cpu"))
    assert "float64" in refusal(*site_attention())
