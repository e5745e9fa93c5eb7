"""The compiled plain stack and set pooling against plain PyTorch: values, gradients, ties, bad numbers."""

import pytest
import torch
import torch.nn.functional as F

from gaitfast.models import build_recognizer, stack
from gaitfast.models.parts import ConvStack, Layer, fold_frames, max_over, pool_set

LAYERS = {
    "plain": (Layer(8), Layer(16, pool=True), Layer(16, pool=True), Layer(24)),
    "ends with a maximum": (Layer(8), Layer(8, pool=True)),
    "strips": (Layer(8, pool=True), Layer(16, strips=4), Layer(16, strips=8, pool=True)),
    "one layer": (Layer(8, pool=True),),
}
pytestmark = pytest.mark.skipif(not stack.compiled(), reason="needs the compiled extension")


def plain(x, convs, layers, dtype=torch.float64):
    """From the published formulation, in `dtype`."""
    for conv, layer in zip(convs, layers):
        parts = [F.conv2d(s, conv.weight.to(dtype), padding=conv.padding) for s in x.chunk(layer.strips, 2)]
        x = F.leaky_relu(torch.cat(parts, 2), 0.01)
        x = F.max_pool2d(x, 2) if layer.pool else x
    return x


def gradients(module, out, x, gradient):
    wanted = [*module.parameters(), *([x] if x.requires_grad else [])]
    return torch.autograd.grad(out, wanted, gradient.to(out.dtype))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("frames", [1, 2 * stack.FRAMES + 3])
def test_values_and_gradients_in_float32(layers, channels, frames):
    torch.manual_seed(0)
    module = ConvStack(channels, layers, stem=True)
    x = torch.rand(frames, channels, 32, 24).to(memory_format=torch.channels_last).requires_grad_(channels > 1)
    assert stack.takes(x, [conv.weight for conv in module.convs])
    out = module(x)
    expected = plain(x.double(), module.convs, layers)
    gradient = torch.randn(expected.shape)
    assert distance(out, expected) < 1e-6
    for ours, theirs in zip(gradients(module, out, x, gradient), gradients(module, expected, x, gradient.double())):
        assert ours.dtype == torch.float32 and distance(ours, theirs) < 4e-6


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_bfloat16_is_at_most_as_far_off_as_twice_plain_pytorch(layers):
    torch.manual_seed(0)
    module = ConvStack(1, layers, stem=True)
    x = torch.rand(2 * stack.FRAMES + 3, 1, 32, 24)
    exact = plain(x.double(), module.convs, layers)
    gradient = torch.randn(exact.shape).bfloat16()
    truth = [exact, *gradients(module, exact, x, gradient.double())]
    usual = plain(x.bfloat16(), module.convs, layers, torch.bfloat16)
    usual = [usual, *gradients(module, usual, x, gradient)]
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    for ours, theirs, right in zip([out, *gradients(module, out, x, gradient)], usual, truth):
        assert distance(ours, right) <= 2 * distance(theirs, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_a_maximum_goes_to_the_first_of_equal_entries(dtype, size):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (3, 20, *size)).to(dtype).to(memory_format=torch.channels_last)  # full of ties
    reference = x.clone().requires_grad_()
    expected = F.leaky_relu(F.max_pool2d(reference, 2), 0.01)
    out, code = torch.ops.gaitfast.pool_leaky(x, 0.01)
    assert torch.equal(out, expected)
    gradient = torch.randn_like(expected)
    back = torch.ops.gaitfast.pool_leaky_backward(
        gradient.to(memory_format=torch.channels_last), out, code, *size, 0.01
    )
    (expected_back,) = torch.autograd.grad(expected, reference, gradient)
    assert torch.equal(back, expected_back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_are_not_hidden(dtype):
    x = torch.zeros(1, 16, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = torch.nan
    x[0, 5, 2, 3] = torch.inf
    out, _ = torch.ops.gaitfast.pool_leaky(x, 0.01)
    assert out[0, 3, 0, 0].isnan() and out.isnan().sum() == 1
    assert out[0, 5, 1, 1].isinf() and out.isinf().sum() == 1
    best, _ = torch.ops.gaitfast.frames_max(x.permute(0, 2, 3, 1).reshape(1, 4, -1))
    assert best.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 7, 256])
def test_set_pooling(dtype, frames):
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (2 * frames, 24, 5, 3)).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    assert stack.pools(x, frames)
    out = pool_set(x, frames)
    expected = x.unflatten(0, (2, frames)).max(1).values
    assert torch.equal(out, expected)
    gradient = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(out, x, gradient)
    (theirs,) = torch.autograd.grad(max_over(x.unflatten(0, (2, frames)), 1), x, gradient)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    torch.manual_seed(0)
    module = ConvStack(1, LAYERS["plain"], stem=True)
    x = fold_frames(torch.rand(2, 9, 32, 24))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            out, code = torch.ops.gaitfast.pool_leaky(
                x.expand(-1, 16, -1, -1).contiguous(memory_format=torch.channels_last), 0.01
            )
            results.append((out, code, module(x)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert distance(results[1][2], results[0][2]) < 1e-6


@pytest.mark.parametrize("name", ["smplgait", "gaitset", "gaitpart"])
def test_a_backbone_keeps_little(name):
    """What backward needs of a clip in bfloat16: less than half of what plain PyTorch keeps."""
    backbone = build_recognizer(name, "gait3d", width=0.25).backbone
    clips = torch.rand(2, 6, 64, 44)

    def kept() -> int:
        seen = {}
        own = {p.data_ptr() for p in backbone.parameters()}

        def note(tensor):
            if tensor.data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            backbone(clips)
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    fused = kept()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "compiled", lambda: False)
        plain = kept()
    assert fused < plain / 2, (fused, plain)
