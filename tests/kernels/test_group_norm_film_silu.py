"""GroupNorm, scale and shift, SiLU on every backend against float64."""

import pytest
import torch

from gaitfast import kernels
from gaitfast.kernels import triton_ops
from gaitfast.kernels.triton_ops import _launch
from tests.kernels.cases import assert_as_good_as_pytorch, backend, distance, group_norm_film_silu, typed

OPERATION = "group_norm_film_silu"


@pytest.mark.parametrize("frames,height,width", [(1, 1, 1), (1, 2, 2), (7, 1, 5), (30, 2, 2), (33, 1, 1), (64, 2, 2)])
@pytest.mark.parametrize("modulated", [False, True])
def test_lengths_and_grids(side, frames, height, width, modulated):
    arguments = group_norm_film_silu(1, frames, height, width, 64, modulated=modulated)
    if frames * height * width == 1:
        arguments = (*arguments[:3], 16, *arguments[4:])  # a group of two equal signs has no variance to speak of
    assert_as_good_as_pytorch(OPERATION, side, arguments)


@pytest.mark.parametrize("channels,groups", [(32, 32), (128, 32), (96, 32), (8, 2), (6, 1), (2, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_widths_of_a_group(side, channels, groups, batch):
    arguments = group_norm_film_silu(batch, 5, 2, 2, channels, groups)
    assert_as_good_as_pytorch(OPERATION, side, arguments)


@pytest.mark.parametrize("rows", [8, 32])
def test_rows_that_come_in_chunks(triton_side, rows):
    with (
        _launch.replaced(f"{OPERATION}_fwd", {"BLOCK_P": rows}),
        _launch.replaced(f"{OPERATION}_bwd", {"BLOCK_P": rows}),
    ):
        assert_as_good_as_pytorch(OPERATION, triton_side, group_norm_film_silu(2, 11, 3, 3))


@pytest.mark.parametrize("rows", [16, 128])
def test_a_mean_far_from_zero(single, rows):
    x, weight, bias, groups, *rest = group_norm_film_silu(1, 16, 2, 2)
    given = [t.float() for t in (x + 3000, weight, bias)]
    rest = [t.float() if isinstance(t, torch.Tensor) else t for t in rest]
    truth = kernels.group_norm_film_silu(
        *(t.double() for t in given), groups, *(t.double() if isinstance(t, torch.Tensor) else t for t in rest)
    )
    plain = kernels.group_norm_film_silu(*given, groups, *rest)
    moved = [t.to(single.device) if isinstance(t, torch.Tensor) else t for t in (*given, groups, *rest)]
    with backend(single.name), _launch.replaced(f"{OPERATION}_fwd", {"BLOCK_P": rows}):
        ours = kernels.group_norm_film_silu(*moved)
    assert distance(ours, truth) <= 2 * distance(plain, truth)


def test_an_outlier_in_the_first_row_does_not_spoil_the_statistics(single):
    x, weight, bias, groups, *rest = group_norm_film_silu(1, 16, 2, 2, modulated=False)
    x[0, 0, 0, 0] = 1e4
    given = [t.float() for t in (x, weight, bias)]
    truth = kernels.group_norm_film_silu(*(t.double() for t in given), groups, *rest)
    plain = kernels.group_norm_film_silu(*given, groups, *rest)
    with backend(single.name), _launch.replaced(f"{OPERATION}_fwd", {"BLOCK_P": 16}):
        ours = kernels.group_norm_film_silu(*(t.to(single.device) for t in given), groups, *rest)
    assert distance(ours, truth) <= 2 * distance(plain, truth)


def test_scale_and_shift_may_be_slices_and_activations_may_be_strided(single):
    arguments = typed(OPERATION, group_norm_film_silu(), torch.float32, single.device)
    x, weight, bias, groups, scale, shift, eps = arguments
    both = torch.cat((scale, shift), dim=1)
    rows = both.split(scale.shape[1], dim=1)
    with backend(single.name):
        plain = kernels.group_norm_film_silu(*arguments)
        assert torch.equal(kernels.group_norm_film_silu(x, weight, bias, groups, *rows, eps), plain)
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        out = kernels.group_norm_film_silu(strided, weight, bias, groups, scale, shift, eps)
    assert torch.equal(out, plain) and out.is_contiguous()


def test_too_wide_a_group_is_refused():
    arguments = group_norm_film_silu(1, 1, 1, 1, 130, 1)
    assert "channels in a group" in triton_ops.MODULES[OPERATION].refusal(*arguments)
