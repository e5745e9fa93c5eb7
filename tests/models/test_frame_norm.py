"""The batch norm of frames with a shortcut and ReLU against float64: values, gradients, statistics, on every path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaitfast.engine.norms import RankBatchNorm, synchronize_norms
from gaitfast.models import gaitbase, stack
from gaitfast.models.frame_norm import FrameNorm, norm_relu

LEVELS = ("generic", "avx2", "avx512", "amx")
KINDS = ("plain", "relu", "shortcut")
# Whole and broken vectors of channels, parts and chunks of rows; one frame, one position, one channel.
SHAPES = [(30, 64, 32, 22), (7, 8, 9, 5), (1, 24, 7, 3), (5, 3, 1, 1), (9, 1, 5, 3), (11, 130, 16, 11), (3, 512, 5, 5)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
compiled = pytest.mark.skipif(
    not stack.compiled() or not hasattr(torch.ops.gaitfast, "frame_norm"), reason="needs the compiled extension"
)


def inputs(shape, kind, dtype):
    """x, its gradient, weight, bias and with `kind` shortcut a shortcut."""
    generator = torch.Generator().manual_seed(0)
    x, gradient, shortcut = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    x = (2 * x + 0.5).relu().contiguous(memory_format=torch.channels_last)
    weight = torch.rand(shape[1], generator=generator) + 0.5
    bias = torch.randn(shape[1], generator=generator)
    return x, gradient, weight, bias, shortcut if kind == "shortcut" else None


def run(norm, kind, x, gradient, weight, bias, shortcut, dtype=None):
    """Result, gradients of x, weight, bias (and the shortcut), running mean and variance, in `dtype` or as they are."""
    layer = norm(x.shape[1]).to(dtype or torch.float32)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    if shortcut is not None:
        shortcut = shortcut.detach().to(x.dtype).requires_grad_()
        leaves.append(shortcut)
    out = layer(x) if kind == "plain" else norm_relu(layer, x, shortcut)
    gradients = torch.autograd.grad(out, leaves, gradient.to(x.dtype))
    assert layer.num_batches_tracked == 1
    return [out.detach(), *gradients, layer.running_mean, layer.running_var]


def exact(kind, *values):
    return run(nn.BatchNorm2d, kind, *values, dtype=torch.float64)


def distance(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@compiled
@DTYPES
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_gradients_and_statistics(shape, kind, level, dtype, monkeypatch):
    """Within rounding of what goes out; sums, that are float32 in either type, within theirs."""
    monkeypatch.setenv("GAITFAST_CPU", level)
    values = inputs(shape, kind, dtype)
    layer, x = FrameNorm(shape[1]), values[0]
    assert layer._fuses(x, values[-1]) and not layer.eval()._fuses(x, None)
    ours, truth = run(FrameNorm, kind, *values), exact(kind, *values)
    rounding = 2e-7 if dtype == torch.float32 else 3e-3
    for number, (one, other) in enumerate(zip(ours, truth)):
        maps = one.dim() == 4
        assert one.dtype == (dtype if maps else torch.float32)
        assert distance(one, other) < (rounding if maps else 1e-6), number
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_at_least_as_exact_as_without_the_extension(kind, monkeypatch):
    values = inputs((50, 64, 16, 11), kind, torch.float32)
    truth, ours = exact(kind, *values), run(FrameNorm, kind, *values)
    monkeypatch.setenv("GAITFAST_BACKEND", "reference")
    theirs = run(FrameNorm, kind, *values)
    assert not torch.equal(ours[0], theirs[0])
    for one, other, true in zip(ours, theirs, truth):
        assert distance(one, true) <= max(distance(other, true), 3e-7)


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [1e4, -300.0], ids=str)
def test_outliers_in_front_and_a_mean_far_from_zero(kind, first):
    """The first rows give the pivot of a part's sums: the worst case for them."""
    x, *others = inputs((4, 16, 32, 22), kind, torch.float32)
    x = x + 100.0
    x[0, :, 0] = first
    ours, truth = run(FrameNorm, kind, x, *others), exact(kind, x, *others)
    for one, other in list(zip(ours, truth))[-2:]:
        assert distance(one, other) < 1e-6
    assert distance(ours[0], truth[0]) < 1e-5 and distance(ours[1], truth[1]) < 1e-5


@compiled
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind, dtype):
    values = inputs((13, 72, 33, 21), kind, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(FrameNorm, kind, *values))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_any_layout_gives_the_same_bits(kind):
    x, gradient, weight, bias, shortcut = inputs((6, 20, 9, 7), kind, torch.bfloat16)
    wanted = run(FrameNorm, kind, x, gradient, weight, bias, shortcut)

    def spread(map):
        """The same map with gaps between its entries."""
        return None if map is None else torch.stack([map, map], -1).transpose(0, 2).contiguous().transpose(0, 2)[..., 0]

    for change in (lambda map: None if map is None else map.contiguous(), spread):
        found = run(FrameNorm, kind, change(x), change(gradient), weight, bias, change(shortcut))
        assert all(torch.equal(a, b) for a, b in zip(wanted, found))


@compiled
@DTYPES
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_not_finite_stays_visible(bad, level, dtype, monkeypatch):
    monkeypatch.setenv("GAITFAST_CPU", level)
    for kind in KINDS:
        x, gradient, *others, shortcut = inputs((3, 20, 5, 5), kind, dtype)
        x[1, 2, 3, 4] = bad
        out, of_x, *_, mean, variance = run(FrameNorm, kind, x, gradient, *others, shortcut)
        for found in (out, of_x):
            assert found[:, 2].isnan().all() and found[:, :2].isfinite().all() and found[:, 3:].isfinite().all()
        assert not mean[2].isfinite() and variance[2].isnan() and mean[3:].isfinite().all()
    x, gradient, weight, bias, shortcut = inputs((3, 20, 5, 5), "shortcut", dtype)
    shortcut[1, 2, 3, 4] = bad
    wanted = F.relu(torch.tensor(bad))
    out = run(FrameNorm, "shortcut", x, gradient, weight, bias, shortcut)[0]
    assert torch.equal(out[1, 2, 3, 4].isnan(), wanted.isnan()) and (wanted.isnan() or out[1, 2, 3, 4] == wanted)
    gradient[1, 2, 3, 4] = bad
    shortcut[1, 2, 3, 4] = 9.0
    of_x = run(FrameNorm, "shortcut", x, gradient, weight, bias, shortcut)[1]
    assert not of_x[1, 2, 3, 4].isfinite() and of_x[:, 3:].isfinite().all()


def test_what_the_compiled_norm_does_not_take_runs_without_it():
    values = inputs((4, 8, 6, 5), "shortcut", torch.float32)
    layer = FrameNorm(8).double()
    assert not layer._fuses(values[0].double(), None)
    for one, other in zip(run(FrameNorm, "shortcut", *values, dtype=torch.float64), exact("shortcut", *values)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    layer = FrameNorm(8)
    assert not layer._fuses(values[0], values[-1].bfloat16())
    with torch.no_grad():
        mixed = layer(values[0], values[-1].bfloat16(), relu=True)
        torch.testing.assert_close(mixed, layer(values[0], values[-1].bfloat16().float(), relu=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_block_whose_norms_span_the_ranks(training):
    """synchronize_norms replaces the norms, not the block: results stay within rounding."""
    torch.manual_seed(0)
    x = torch.rand(6, 16, 8, 6).contiguous(memory_format=torch.channels_last)
    for stride, channels in ((1, 16), (2, 24)):
        block = gaitbase.ResidualBlock(16, channels, stride).train(training)
        other = gaitbase.ResidualBlock(16, channels, stride).train(training)
        other.load_state_dict(block.state_dict())
        other = synchronize_norms(other, torch.device("cpu"))
        assert isinstance(other.norm1, RankBatchNorm)
        torch.testing.assert_close(block(x), other(x))


def test_evaluation_does_not_depend_on_the_extension(monkeypatch):
    torch.manual_seed(0)
    block, x = gaitbase.ResidualBlock(16, 24, 2).eval(), torch.rand(6, 16, 8, 6)
    found = block(x)
    monkeypatch.setenv("GAITFAST_BACKEND", "reference")
    assert torch.equal(found, block(x))


@compiled
def test_what_does_not_fit_is_refused():
    frame_norm = torch.ops.gaitfast.frame_norm
    x, weight, bias = torch.rand(2, 8, 3, 3), torch.ones(8), torch.zeros(8)
    for arguments, message in [
        ((x.double(), weight, bias, None, True, 1e-5), "float32 or bfloat16"),
        ((x[:0], weight, bias, None, True, 1e-5), "not empty"),
        ((x, weight[:7], bias, None, True, 1e-5), "weight and bias"),
        ((x, weight, bias.double(), None, True, 1e-5), "weight and bias"),
        ((x, weight, bias, x[:1], True, 1e-5), "shortcut"),
        ((x, weight, bias, x, False, 1e-5), "shortcut"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            frame_norm(*arguments)
