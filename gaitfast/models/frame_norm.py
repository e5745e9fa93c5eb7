"""Batch norm over the frames of a batch: exact statistics on a CPU, with a shortcut and ReLU in the same pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gaitfast.models import stack


class _ExactMoments(torch.autograd.Function):
    """Batch norm of a training batch x (F, C, H, W) whose mean and biased variance (C,) are given."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        backward = torch.ops.aten.native_batch_norm_backward
        return (
            *backward(gradient, x, weight, None, None, mean, scale, True, ctx.eps, ctx.needs_input_grad[:3]),
            *(None, None, None),
        )


class _Fused(torch.autograd.Function):
    """The compiled norm (csrc/cpu/frame_norm.cpp): its result, and mean and biased variance, float64 (2, C).

    Backward computes again what passed the ReLU. Only a norm with a shortcut keeps its result for that.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool, eps: float):
        y, moments = torch.ops.gaitfast.frame_norm(x, weight, bias, shortcut, relu, eps)
        ctx.save_for_backward(x, weight, bias, moments, None if shortcut is None else y)
        ctx.relu, ctx.eps = relu, eps
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.gaitfast.frame_norm_backward
        of_x, parameters, of_shortcut = backward(gradient, *ctx.saved_tensors, ctx.relu, ctx.eps)
        return of_x, *parameters, of_shortcut if of_shortcut.numel() else None, None, None


class FrameNorm(nn.BatchNorm2d):
    """Batch norm over folded frames, (F, C, H, W); with `relu`, relu(norm(x) + shortcut).

    PyTorch's CPU kernel for channels_last images adds up a channel in float32, one entry after the other: with 24
    frames on one thread the variance of a batch was off by 2.7e-4, relative. So a training batch on a CPU gets its
    moments in short parts, put together in float64.
    """

    POSITIONS = 4096
    """Map positions of a part, at most, unless one frame has more. The compiled norm has parts of its own."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
        assert relu or shortcut is None, "a shortcut comes with a ReLU"
        if self._fuses(x, shortcut):
            y, moments = _Fused.apply(x, self.weight, self.bias, shortcut, relu, self.eps)
            self._track(x, *moments)
            return y
        y = self._plain(x)
        if shortcut is not None:
            y = y + shortcut
        return F.relu(y, inplace=True) if relu else y

    def _fuses(self, x: Tensor, shortcut: Tensor | None) -> bool:
        """Whether the compiled norm computes this: a training batch on a CPU, nothing that is being traced."""
        return (
            self.training
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16)
            and self.weight.dtype == self.bias.dtype == torch.float32
            and (shortcut is None or (shortcut.dtype == x.dtype and shortcut.shape == x.shape))
            and stack.compiled()
            and hasattr(torch.ops.gaitfast, "frame_norm")
        )

    def _plain(self, x: Tensor) -> Tensor:
        if not (self.training and x.device.type == "cpu"):
            return super().forward(x)
        with torch.no_grad():
            parts = x.detach().split(max(1, self.POSITIONS // x[0, 0].numel()))
            moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
            means, variances = (torch.stack(values).double() for values in zip(*moments))
            share = torch.tensor([[len(part) / len(x)] for part in parts], dtype=torch.float64)
            mean = (share * means).sum(0)
            var = (share * (variances + (means - mean).square())).sum(0)
        self._track(x, mean, var)
        return _ExactMoments.apply(x, self.weight, self.bias, mean.to(self.weight), var.to(self.weight), self.eps)

    @torch.no_grad()
    def _track(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """The running statistics after a batch x with this mean and biased variance."""
        count = x.numel() // x.shape[1]
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), self.momentum)


def norm_relu(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(x) + shortcut), where `norm` is a FrameNorm or what stands for it when norms span the ranks."""
    if isinstance(norm, FrameNorm):
        return norm(x, shortcut, relu=True)
    y = norm(x)
    return F.relu(y if shortcut is None else y + shortcut, inplace=True)
