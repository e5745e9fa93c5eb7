"""Building, initialising and running the recognizers: what does not need OpenGait's numbers."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gaitfast.config import UserError
from gaitfast.models import parts
from gaitfast.models.gaitbase import FrameNorm
from gaitfast.models.gaitgl import GeneralizedMean
from gaitfast.models.recognizer import INITIALIZATIONS, VARIANTS, build_recognizer, initialize
from gaitfast.recognition import identity_loss, triplet_loss

MODELS = tuple(VARIANTS)


def silhouettes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, 64, 44, generator=generator) > 0.5).float()


def small(name: str, num_classes: int | None = None, **options):
    return build_recognizer(name, "gait3d", num_classes, width=0.25, **options)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5))
@example(lengths=[5, 1, 7, 2, 3])
@example(lengths=[1, 1, 1])
@example(lengths=[2, 1])
@torch.no_grad()
def test_packed_clips_give_what_each_gives_alone(name, lengths):
    """Evaluation mode, any lengths: single frames too, and lengths below GaitGL's three or no multiple of it."""
    model = small(name, num_classes=5).eval()
    packed = silhouettes(1, sum(lengths))
    alone = [model(clip) for clip in packed.split(lengths, dim=1)]
    for given_lengths in (lengths, torch.tensor(lengths)):
        together = model(packed, given_lengths)
        for field in ("features", "embedding", "logits"):
            if getattr(together, field) is not None:
                expected = torch.cat([getattr(out, field) for out in alone])
                torch.testing.assert_close(getattr(together, field), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_fixed_in_training(name):
    model, clips = small(name, num_classes=5).train(), silhouettes(4, 6)
    fixed, packed = model(clips), model(clips.reshape(1, 24, 64, 44), [6, 6, 6, 6])
    for one, other in zip(fixed, packed):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_clips_train(name):
    model, lengths = small(name).train(), [3, 5, 4]
    packed = silhouettes(1, sum(lengths))
    features = model.backbone(packed, lengths)
    assert features.shape == (3, model.feature_channels, model.feature_parts)
    features[1].square().mean().backward()
    before = {key: p.grad.clone() for key, p in model.backbone.named_parameters()}
    if name == "gaitbase":  # its batch norms see the frames of all clips, so every clip has a part in the gradient
        return
    model.zero_grad()
    model.backbone(packed[:, 3:8]).square().mean().backward()
    for key, p in model.backbone.named_parameters():
        torch.testing.assert_close(p.grad, before[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_backbone_gets_a_gradient(name):
    backbone = small(name).backbone
    backbone(silhouettes(3, 6)).square().mean().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", MODELS)
def test_the_head_trains_too(name):
    model = small(name, num_classes=3)
    labels = torch.tensor([0, 0, 1, 2])
    out = model(silhouettes(4, 4))
    loss = triplet_loss(out.embedding, labels).loss
    if out.logits is not None:
        loss = loss + identity_loss(out.logits, labels).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_backbone_takes_any_number_of_clips_and_frames(name):
    backbone = small(name).backbone.eval()
    free = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(backbone, (silhouettes(2, 6),), dynamic_shapes=free).module()
    clips = silhouettes(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(exported(clips), backbone(clips), rtol=1e-5, atol=1e-5)


class NoHostReads(TorchDispatchMode):
    """Refuses every operation whose result the host would have to wait for on a GPU."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.removeprefix("aten::") not in self.READS, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_the_fixed_length_path_never_waits_for_a_value(name):
    model, clips, labels = small(name, num_classes=3), silhouettes(4, 6), torch.tensor([0, 0, 1, 2])
    with NoHostReads():
        out = model(clips)
        loss = sum(triplet_loss(out.embedding, labels, metric=metric).loss for metric in ("cosine", "euclidean"))
        if out.logits is not None:
            loss = loss + identity_loss(out.logits, labels).loss
        loss.backward()
    with pytest.raises(AssertionError), NoHostReads():
        loss.item()


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast_is_finite_and_close(name):
    model, clips = build_recognizer(name, "gait3d", 5), silhouettes(3, 4)
    model.eval()
    with torch.no_grad():
        exact = model(clips)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(clips)
    for field, one, other in zip(exact._fields, exact, rough):
        if one is not None:
            error = (one - other.float()).square().mean().sqrt() / one.square().mean().sqrt()
            assert error < 0.02, (field, error.item())
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.backbone(clips)
    features.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gaitgl"])
def test_two_dimensional_networks_run_in_channels_last(name, monkeypatch):
    """Layer by layer, as everywhere but on a CPU, where plain stacks are one operation (test_stack.py)."""
    monkeypatch.setenv("GAITFAST_BACKEND", "reference")
    model, layouts = small(name), []
    convs = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.weight.is_contiguous() for conv in convs)  # as ZeRO keeps them
    for conv in convs:
        conv.register_forward_hook(lambda _, __, out: layouts.append(out))
    model(silhouettes(2, 5))
    by_frame = [out for out in layouts if len(out) >= 10]  # GaitSet's global pipeline sees two pooled sets
    assert len(by_frame) >= 6 and all(out.is_contiguous(memory_format=torch.channels_last) for out in by_frame)


@pytest.mark.parametrize("shape", [(7, 8, 64, 44), (50, 8, 16, 11)])
def test_batch_norm_over_frames_is_exact_in_channels_last(shape):
    """Its output, gradients and running statistics against float64; PyTorch's own kernel is off by 2e-5 here."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(shape, generator=generator).add(0.5).relu().contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(shape, generator=generator)

    def run(norm: type[nn.BatchNorm2d], dtype: torch.dtype) -> list[torch.Tensor]:
        layer, x = norm(8).to(dtype), frames.detach().clone().to(dtype).requires_grad_()
        out = layer(x)
        out.backward(gradient.to(dtype))
        assert out.is_contiguous(memory_format=torch.channels_last) and layer.num_batches_tracked == 1
        return [out, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]

    exact = run(nn.BatchNorm2d, torch.float64)
    for one, other in zip(run(FrameNorm, torch.float32), exact):
        assert (one - other).abs().max() < 8e-6 * other.abs().max()
    for one, other in zip(run(FrameNorm, torch.float64), exact):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_strips_of_channels_last_images_are_views():
    x = (
        torch.arange(2 * 3 * 8 * 5, dtype=torch.float32)
        .reshape(2, 3, 8, 5)
        .contiguous(memory_format=torch.channels_last)
    )
    folded = parts.fold_strips(x, 4)
    assert folded.shape == (8, 3, 2, 5) and folded.data_ptr() == x.data_ptr()
    assert torch.equal(folded[5], x[1, :, 2:4])
    restored = parts.unfold_strips(folded, 4)
    assert restored.data_ptr() == x.data_ptr() and torch.equal(restored, x)
    volume = torch.randn(2, 3, 4, 8, 5)
    assert torch.equal(parts.unfold_strips(parts.fold_strips(volume, 2), 2), volume)
    assert torch.equal(parts.fold_strips(volume, 2)[3], volume[1, :, :, 4:])


def test_pyramid_is_mean_plus_maximum_of_row_strips():
    maps = torch.randn(2, 3, 8, 5)
    pooled = parts.pool_strips(maps, (4, 1))
    assert pooled.shape == (2, 3, 5)
    strip = maps[:, :, 2:4]
    torch.testing.assert_close(pooled[:, :, 1], strip.mean((2, 3)) + strip.amax((2, 3)))
    torch.testing.assert_close(pooled[:, :, 4], maps.mean((2, 3)) + maps.amax((2, 3)))


def test_maximum_has_one_value_and_sends_ties_to_one_entry():
    x = torch.tensor([[1.0, 3.0, 3.0]], requires_grad=True)
    parts.max_over(x, 1).sum().backward()
    assert sorted(x.grad[0].tolist()) == [0.0, 0.0, 1.0]
    with torch.no_grad():
        assert parts.max_over(x, 1).item() == 3.0


def test_pooling_before_the_activation_is_the_published_order():
    stack = parts.ConvStack(1, (parts.Layer(8, pool=True), parts.Layer(8, strips=4)), stem=True)
    x = torch.randn(3, 1, 16, 12)
    y = nn.functional.max_pool2d(nn.functional.leaky_relu(stack.convs[0](x)), 2)
    strips = [nn.functional.leaky_relu(stack.convs[1](strip)) for strip in y.chunk(4, 2)]
    torch.testing.assert_close(stack(x), torch.cat(strips, 2))
    assert stack.convs[0].kernel_size == (5, 5) and stack.convs[1].kernel_size == (3, 3)


def test_generalized_mean():
    pool = GeneralizedMean().double()
    x = (torch.rand(2, 3, 4, 5, dtype=torch.float64) * 9 - 2).requires_grad_()
    expected = x.clamp(min=1e-6).pow(6.5).mean(-1).pow(1 / 6.5)
    torch.testing.assert_close(pool(x), expected)
    assert torch.autograd.gradcheck(pool, x)
    pool = GeneralizedMean()
    dark = torch.full((1, 1, 1, 22), -1.0, requires_grad=True)
    pool(dark).sum().backward()
    assert pool(dark).item() == pytest.approx(1e-6)
    assert torch.isfinite(pool.exponent.grad).all()
    assert pool(torch.full((1, 1, 1, 22), 1e30)).item() == pytest.approx(1e30)


@pytest.mark.parametrize("name", MODELS)
def test_width_scales_every_channel_count(name):
    full, half = build_recognizer(name, "grew", 10), build_recognizer(name, "grew", 10, width=0.5)
    assert half.feature_channels == full.feature_channels // 2
    assert half.feature_parts == full.feature_parts
    for (key, one), (_, other) in zip(full.named_parameters(), half.named_parameters()):
        for n, m in zip(one.shape, other.shape):
            fixed = (1, 3, 5, 10, full.feature_parts)  # kernels, input, classes and parts have no width
            assert m in (n, n // 2) and (m == n // 2 or n in fixed), key
    out = half(silhouettes(2, 3))
    assert out.embedding.shape[1] in (64, 128)
    tiny = build_recognizer(name, "grew", width=0.001)
    assert {m.out_channels for m in tiny.backbone.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))} == {8}
    assert tiny(silhouettes(2, 3)).features.shape == (2, 8, full.feature_parts)


def test_width_rounds_to_multiples_of_eight():
    assert [parts.scale_channels(64, w) for w in (1, 0.5, 0.3, 0.01, 1.55)] == [64, 32, 16, 8, 96]
    assert parts.scale_channels(100, 1) == 100


@pytest.mark.parametrize("name", MODELS)
def test_a_build_depends_on_the_seed_alone(name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    model = small(name)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other, classified = small(name), small(name, seed=7), small(name, num_classes=6)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    differing = [k for k, v in model.state_dict().items() if v.dim() > 1 and torch.equal(v, other.state_dict()[k])]
    assert not differing
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, classified.backbone.state_dict()[key]), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", INITIALIZATIONS)
def test_initialization_sets_everything(name, method):
    model = small(name, num_classes=6)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan") if value.is_floating_point() else 99)
    initialize(model, method, seed=3)
    for key, value in model.state_dict().items():
        assert torch.isfinite(value).all(), key
        if "num_batches" in key:
            assert value == 0
    fresh = small(name, num_classes=6, seed=3)
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values()))
    assert same == (method == "xavier_uniform")


def test_scales_of_the_initialization():
    model = build_recognizer("gaitset", "gait3d")
    head = model.head.embed.weight  # (62, 128, 256): the fans of a one-dimensional convolution
    assert head.abs().max().item() == pytest.approx(math.sqrt(6 / ((128 + 62) * 256)), rel=1e-3)
    conv = model.backbone.block3.convs[1].weight
    assert conv.abs().max().item() == pytest.approx(math.sqrt(6 / (2 * 128 * 9)), rel=1e-3)
    grouped = build_recognizer("gaitpart", "gait3d").backbone.motion3.squeeze.weight  # 16 convolutions 128 -> 32
    assert grouped.abs().max().item() == pytest.approx(math.sqrt(6 / ((128 + 32) * 3)), rel=1e-3)
    initialize(model, "xavier_normal")
    assert conv.std().item() == pytest.approx(math.sqrt(1 / (128 * 9)), rel=0.02)
    initialize(model, "he")
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
    assert head.abs().max().item() == pytest.approx(math.sqrt(6 / ((128 + 62) * 256)), rel=1e-3)
    norm = build_recognizer("gaitbase", "gait3d").backbone.blocks[3].norm2
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.005)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not norm.bias.any()


def test_sampling_rules_are_the_authors():
    rules = {name: small(name).sampling for name in MODELS}
    assert rules == {
        "gaitset": ("unordered", 0),
        "gaitpart": ("ordered", 10),
        "gaitgl": ("ordered", 0),
        "smplgait": ("unordered", 0),
        "gaitbase": ("unordered", 0),
    }


@pytest.mark.parametrize("name", MODELS)
def test_without_classes_there_is_no_classifier(name):
    model = small(name)
    out = model(silhouettes(2, 3))
    assert out.logits is None and out.embedding.shape[0] == 2
    assert not any("classifier" in key or "neck" in key for key in model.state_dict())
    torch.testing.assert_close(out.features, model.backbone(silhouettes(2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gaitsett", "gait3d"), "did you mean gaitset"),
        (("resnet", "gait3d"), "choose one of gaitset, gaitpart, gaitgl, smplgait, gaitbase"),
        (("gaitbase", "gait3"), "did you mean gait3d"),
        (("gaitset", "grew-bnneck"), "gaitset has no 'grew-bnneck'; choose one of gait3d, casia-b, grew, ou-mvlp"),
        (("gaitset", "gait3d", 0), "num_classes"),
    ],
)
def test_wrong_names_are_told_what_exists(arguments, message):
    with pytest.raises(UserError, match=message):
        build_recognizer(*arguments)


def test_wrong_width_and_method():
    with pytest.raises(UserError, match="width"):
        build_recognizer("gaitset", "gait3d", width=0)
    with pytest.raises(UserError, match="xavier_uniform"):
        initialize(small("gaitset"), "xavier")


@pytest.mark.parametrize(
    ("batch", "lengths"),
    [
        (torch.zeros(2, 3, 64, 64), None),
        (torch.zeros(3, 64, 44), None),
        (torch.zeros(2, 3, 64, 44, dtype=torch.uint8), None),
        (torch.zeros(2, 0, 64, 44), None),
        (torch.zeros(1, 5, 64, 44), [2, 2]),
        (torch.zeros(1, 5, 64, 44), [5, 0]),
        (torch.zeros(1, 5, 64, 44), []),
        (torch.zeros(2, 5, 64, 44), [5, 4]),
    ],
)
def test_malformed_batches_are_refused(batch, lengths):
    with pytest.raises(AssertionError):
        small("gaitset").backbone(batch, lengths)


def test_lengths_in_opengaits_form_and_of_a_fixed_batch():
    model = small("smplgait").eval()
    packed, batch = silhouettes(1, 10), silhouettes(2, 5)
    expected = model(packed, [3, 5, 2]).features
    assert torch.equal(model(packed, [[3, 5, 2]]).features, expected)
    assert torch.equal(model(packed, torch.tensor([[3, 5, 2]])).features, expected)
    assert torch.equal(model(batch, [5, 5]).features, model(batch).features)
    with pytest.raises(AssertionError):
        model(batch, [5, 4])
