"""Layer norm in Triton against float64."""

import pytest
import torch

from tests.kernels.cases import assert_as_good_as_pytorch, layer_norm, results, typed


@pytest.mark.parametrize("rows,channels", [(1, 1), (1, 32), (7, 64), (33, 96), (5, 512)])
def test_rows_and_channels(device, precision, rows, channels):
    dtype, factor = precision
    assert_as_good_as_pytorch("layer_norm", dtype, device, layer_norm(rows, channels), factor=factor)


def test_strided_rows(device):
    x, weight, eps = typed("layer_norm", layer_norm(), torch.float32, device)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(
        results("layer_norm", (strided, weight, eps), "triton"), results("layer_norm", (x, weight, eps), "triton")
    ):
        assert torch.equal(a, b)
