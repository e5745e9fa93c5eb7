"""Layer norm on every backend against float64."""

import pytest
import torch

from tests.kernels.cases import assert_as_good_as_pytorch, layer_norm, results, typed


@pytest.mark.parametrize("rows,channels", [(1, 1), (1, 32), (7, 64), (33, 96), (300, 17), (5, 512)])
def test_rows_and_channels(side, rows, channels):
    assert_as_good_as_pytorch("layer_norm", side, layer_norm(rows, channels))


def test_strided_rows(single):
    x, weight, eps = typed("layer_norm", layer_norm(), torch.float32, single.device)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(
        results("layer_norm", (strided, weight, eps), single.name), results("layer_norm", (x, weight, eps), single.name)
    ):
        assert torch.equal(a, b)
