"""Convolutions of the frames of a clip on the CPU in bfloat16, where PyTorch's own are far from the machine's rate.

Two things are done differently; all else is PyTorch's convolution. Between grids so small that a kernel covers most of
them (2 x 2, and 4 x 4 <-> 2 x 2), a convolution is one dense product of whole frames, which needs no rearrangement of
activations at all. The gradient of every weight is one product over all sites of all frames (csrc/cpu/convolution).

Activations are (B, T, H, W, C), contiguous; weights have PyTorch's shapes and any floating type up to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dispatch import may_run_compiled

try:
    import gaitfast._C  # noqa: F401  registers torch.ops.gaitfast

    _PRESENT = hasattr(torch.ops.gaitfast, "dense_weight")  # else the extension is older than this file
except ImportError:  # built without the extension
    _PRESENT = False

_LEAST_FRAMES = 32
"""Fewer frames do not pay for building the matrix of a dense product."""


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolution` computes this: on the CPU, in bfloat16, with the instructions, and nothing else forced."""
    return (
        _PRESENT
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and weight.dtype in (torch.float32, torch.bfloat16)
        and may_run_compiled()
        and _has_products()
    )


@torch.compiler.assume_constant_result
def _has_products() -> bool:
    return torch.ops.gaitfast.has_row_products()


def convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, transposed: bool = False) -> Tensor:
    """conv2d, or conv_transpose2d, of every frame.

    Args:
        x: bfloat16 (B, T, H, W, I).
        weight: float32 or bfloat16 (O, I, k, k), or (I, O, k, k) where transposed.
        bias: (O,).

    Returns:
        bfloat16 (B, T, H', W', O). Gradients are summed in float32 and have their parameter's type.
    """
    assert takes(x, weight), (x.device, x.dtype, weight.dtype)
    frames = x.flatten(0, 1).contiguous()
    with torch.autocast("cpu", enabled=False):
        return _Convolution.apply(frames, weight, bias, stride, padding, transposed).unflatten(0, x.shape[:2])


class _Convolution(torch.autograd.Function):
    """Over frames (F, H, W, C), contiguous."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, transposed):
        ctx.save_for_backward(x, weight)
        ctx.kind = stride, padding, transposed
        ctx.bias_type = bias.dtype
        if _is_dense(x, weight, stride, transposed):
            matrix = _matrix(x, weight, stride, padding, transposed)
            height, width = _grid(x, weight, stride, padding, transposed)
            rows = bias.to(x.dtype).repeat(height * width)
            return torch.addmm(rows, x.flatten(1), matrix).view(len(x), height, width, len(bias))
        return _last(torch.convolution(_first(x), weight.to(x.dtype), bias.to(x.dtype), *_settings(*ctx.kind)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, transposed = ctx.kind
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if _is_dense(x, weight, stride, transposed):
                matrix = _matrix(x, weight, stride, padding, transposed)
                grad_x = torch.mm(grad.flatten(1), matrix.t()).view(x.shape)
            else:
                grad_x = _last(
                    torch.ops.aten.convolution_backward(
                        _first(grad), _first(x), weight.to(x.dtype), None, *_settings(*ctx.kind), [True, False, False]
                    )[0]
                )
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            kernel = weight.shape[2]
            # A transposed convolution is the adjoint of one that takes its output to its input.
            left, right = (x, grad) if transposed else (grad, x)
            grad_weight, grad_bias = torch.ops.gaitfast.weight_gradient(left, right, kernel, stride, padding)
            if transposed:
                grad_bias = grad.sum((0, 1, 2), dtype=torch.float32)
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_type)
        return grad_x, grad_weight, grad_bias, None, None, None


def _settings(stride: int, padding: int, transposed: bool) -> tuple:
    """PyTorch's order: stride, padding, dilation, transposed, output padding, groups."""
    return [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1


def _first(x: Tensor) -> Tensor:
    """View (F, C, H, W) with channels-last strides."""
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _is_dense(x: Tensor, weight: Tensor, stride: int, transposed: bool) -> bool:
    """Where the dense product has no more operations than the convolution has taps."""
    fine = x.shape[1] * x.shape[2] * (stride**2 if transposed else 1)
    return len(x) >= _LEAST_FRAMES and fine <= weight.shape[2] * weight.shape[3] and weight.shape[2] > 1


def _grid(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> tuple[int, int]:
    """Height and width of the result."""
    kernel = weight.shape[2]
    if transposed:
        return tuple((n - 1) * stride - 2 * padding + kernel for n in x.shape[1:3])
    return tuple((n + 2 * padding - kernel) // stride + 1 for n in x.shape[1:3])


def _matrix(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    """(H*W*I, H'*W'*O): what takes a whole frame to its result."""
    if transposed:
        grid = _grid(x, weight, stride, padding, transposed)
        return torch.ops.gaitfast.dense_weight(weight.contiguous(), *grid, stride, padding)
    return torch.ops.gaitfast.dense_weight(weight.contiguous(), x.shape[1], x.shape[2], stride, padding).t()


def _register_fakes() -> None:
    @torch.library.register_fake("gaitfast::weight_gradient")
    def _(left, right, kernel, stride, padding):
        width, channels = left.shape[3], right.shape[3]
        shape = (width, channels, kernel, kernel)
        return left.new_empty(shape, dtype=torch.float32), left.new_empty((width,), dtype=torch.float32)

    @torch.library.register_fake("gaitfast::dense_weight")
    def _(weight, height, width, stride, padding):
        m, n, kernel, _ = weight.shape
        sites = ((height + 2 * padding - kernel) // stride + 1) * ((width + 2 * padding - kernel) // stride + 1)
        return weight.new_empty((sites * m, height * width * n), dtype=torch.bfloat16)


if _PRESENT:
    _register_fakes()
