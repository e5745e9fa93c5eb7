"""The plain convolution stack and set pooling on a CPU: a few frames at a time through all layers, little kept.

What a step of a backbone costs on a CPU beside its products is memory: maps of half-empty frames at full resolution,
written and read by every layer. Here some frames go through the whole stack while their maps are in the cache;
LeakyReLU is part of the convolution or of the maximum (csrc/cpu/pooling.cpp); backward keeps each layer's result alone,
with a byte that says which entry of a window won, and computes the first layer, of one input channel, again. Values
are those of the plain path up to the rounding of LeakyReLU, which here takes the convolution's result before it is
rounded; gradients of the weights are summed over the parts in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gaitfast import kernels

FRAMES = 32
"""Frames that go through a stack together. Measured with SMPLGait, forward and backward at 4 x 30 frames: 8: 679 ms,
16: 561, 32: 526, 64: 516; half the width: 378, 359, 341, 335."""
SLOPE = 0.01
"""Of LeakyReLU, in every one of the five models."""


def compiled() -> bool:
    """Whether the compiled operators are there, and wanted."""
    return _present() and kernels.may_run_compiled()


@functools.cache
def _present() -> bool:
    try:
        import gaitfast._C  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops.gaitfast, "pool_leaky")


def working_type(x: Tensor) -> torch.dtype:
    """The type that a convolution of `x` computes in, under autocast or not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `run` computes this: maps on a CPU in float32 or bfloat16, whole weights, nothing that is being traced.

    Under ZeRO-3 a weight is empty until its own layer is called.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and working_type(x) in (torch.float32, torch.bfloat16)
        and compiled()
        and all(weight.numel() for weight in weights)
    )


def run(x: Tensor, weights: Sequence[Tensor], layers: Sequence[Any]) -> Tensor:
    """`ConvStack` (parts.py): x (F, in, H, W) through its layers -> (F, C, H', W'), channels_last."""
    return _Stack.apply(x, tuple(layers), working_type(x), *weights)


def fold_strips(x: Tensor, strips: int) -> Tensor:
    """(N, C, ..., H, W) -> (N * strips, C, ..., H / strips, W): strips along the height become samples.

    For a channels_last batch of images this is a view of the same memory.
    """
    return x if strips == 1 else x.unflatten(-2, (strips, -1)).movedim(-3, 1).flatten(0, 1)


def unfold_strips(x: Tensor, strips: int) -> Tensor:
    """The inverse of `fold_strips`."""
    return x if strips == 1 else x.unflatten(0, (-1, strips)).movedim(1, -3).flatten(-3, -2)


def _convolve(x: Tensor, weight: Tensor, leak: bool) -> Tensor:
    """x (n, in, H, W) channels_last, the result too; with LeakyReLU where `leak`."""
    pad = [size // 2 for size in weight.shape[2:]]
    if leak and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, None, pad, [1, 1], [1, 1], 1, "leaky_relu", [SLOPE], "")
        return y.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, padding=pad).contiguous(memory_format=torch.channels_last)
    return F.leaky_relu_(y, SLOPE) if leak else y


def _layer(x: Tensor, weight: Tensor, layer: Any) -> tuple[Tensor, Tensor | None]:
    """The layer's result, and where it pools the byte of each window."""
    y = unfold_strips(_convolve(fold_strips(x, layer.strips), weight, not layer.pool), layer.strips)
    return torch.ops.gaitfast.pool_leaky(y, SLOPE) if layer.pool else (y, None)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layers: tuple, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        cast = [weight.detach().to(dtype) for weight in weights]
        again = x.shape[1] == 1 and not ctx.needs_input_grad[0] and not layers[0].pool and len(layers) > 1
        keeps = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        results = []
        for part in x.detach().split(FRAMES):
            y = part.to(dtype, memory_format=torch.channels_last)
            for number, (weight, layer) in enumerate(zip(cast, layers)):
                y, code = _layer(y, weight, layer)
                if keeps and number < len(layers) - 1 and not (again and number == 0):
                    kept.append(y)
                if keeps and code is not None:
                    kept.append(code)
            results.append(y)
        out = torch.cat(results) if len(results) > 1 else results[0]
        if keeps:
            ctx.layers, ctx.dtype, ctx.again = layers, dtype, again
            ctx.kinds = [weight.dtype for weight in weights]
            ctx.save_for_backward(x, out, *cast, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layers, count = ctx.layers, len(ctx.layers)
        x, out, *rest = ctx.saved_tensors
        weights, kept = rest[:count], iter(rest[count:])
        sums: list[Tensor | None] = [None] * count
        of_x = []
        for part, top, back in zip(x.split(FRAMES), out.split(FRAMES), gradient.split(FRAMES)):
            inputs, codes = [part.to(ctx.dtype, memory_format=torch.channels_last)], []
            for number, layer in enumerate(layers):
                if number < count - 1:
                    first = ctx.again and number == 0
                    inputs.append(_layer(inputs[0], weights[0], layer)[0] if first else next(kept))
                codes.append(next(kept) if layer.pool else None)
            g = back.to(ctx.dtype, memory_format=torch.channels_last)
            results = [*inputs[1:], top]
            for number in reversed(range(count)):
                layer, y, before, code = layers[number], results[number], inputs[number], codes[number]
                if code is not None:
                    g = torch.ops.gaitfast.pool_leaky_backward(g, y, code, *before.shape[2:], SLOPE)
                else:
                    g = g.clone() if number == count - 1 else g  # the one that came in is the caller's
                    torch.ops.gaitfast.leaky_backward_(g, y, SLOPE)
                down = number > 0 or ctx.needs_input_grad[0]
                g, of_weight = _convolve_backward(
                    fold_strips(g, layer.strips), fold_strips(before, layer.strips), weights[number], down
                )
                of_weight = of_weight.float()
                sums[number] = of_weight if sums[number] is None else sums[number].add_(of_weight)
                g = unfold_strips(g, layer.strips).contiguous(memory_format=torch.channels_last) if down else None
                results[number] = inputs[number] = codes[number] = None
            of_x.append(g)
        of_weights = [total.to(kind) for total, kind in zip(sums, ctx.kinds)]
        return torch.cat(of_x).to(x.dtype) if ctx.needs_input_grad[0] else None, None, None, *of_weights


def _convolve_backward(gradient: Tensor, x: Tensor, weight: Tensor, of_x: bool) -> tuple[Tensor | None, Tensor]:
    pad = [size // 2 for size in weight.shape[2:]]
    result = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [1, 1], pad, [1, 1], False, [0, 0], 1, [of_x, True, False]
    )
    return result[0], result[1]


def pools(x: Tensor, frames: int) -> bool:
    """Whether `pool_frames` takes these maps, clips of so many frames."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.dim() == 4
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and 1 <= frames <= 256
        and x.requires_grad
        and torch.is_grad_enabled()
        and x.is_contiguous(memory_format=torch.channels_last)
        and compiled()
    )


def pool_frames(x: Tensor, frames: int) -> Tensor:
    """Set pooling of maps (N * frames, C, H, W), channels_last -> (N, C, H, W): keeps a byte for each result."""
    return _FramesMax.apply(x, frames)


class _FramesMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, frames: int) -> Tensor:
        clips = x.detach().permute(0, 2, 3, 1).reshape(-1, frames, x[0].numel())
        out, which = torch.ops.gaitfast.frames_max(clips)
        ctx.save_for_backward(which)
        ctx.frames, ctx.shape = frames, x.shape
        return out.view(-1, *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (which,) = ctx.saved_tensors
        rows = gradient.permute(0, 2, 3, 1).reshape(which.shape)
        result = torch.ops.gaitfast.frames_max_backward(rows.contiguous(), which, ctx.frames)
        count, channels, height, width = ctx.shape
        return result.view(count, height, width, channels).permute(0, 3, 1, 2), None
