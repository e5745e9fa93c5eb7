"""GaitBase (Fan et al., CVPR 2023): a residual network of nine layers, set pooling, 16 horizontal parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gaitfast.models.parts import Backbone, Head, Lengths, fold_frames, pool_set, pool_strips, scale_channels

PARTS = 16
STAGES = ((64, 1), (128, 2), (256, 2), (512, 1))
"""Channels and stride of the four residual blocks."""
CHANNELS = dict.fromkeys(("gait3d", "grew", "casia-b", "ou-mvlp"), STAGES)


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


class FrameNorm(nn.BatchNorm2d):
    """Batch norm over folded frames, (F, C, H, W).

    PyTorch's CPU kernel for channels_last images adds up a channel in float32, one entry after the other: with 24
    frames on one thread the variance of a batch was off by 2.7e-4, relative. So a training batch on a CPU gets its
    moments in short parts, put together in float64.
    """

    POSITIONS = 4096
    """Map positions of a part, at most, unless one frame has more."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and x.device.type == "cpu"):
            return super().forward(x)
        with torch.no_grad():
            parts = x.detach().split(max(1, self.POSITIONS // x[0, 0].numel()))
            moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
            means, variances = (torch.stack(values).double() for values in zip(*moments))
            share = torch.tensor([[len(part) / len(x)] for part in parts], dtype=torch.float64)
            mean = (share * means).sum(0)
            var = (share * (variances + (means - mean).square())).sum(0)
            count = x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), self.momentum)
        return _ExactMoments.apply(x, self.weight, self.bias, mean.to(self.weight), var.to(self.weight), self.eps)


class ResidualBlock(nn.Module):
    """relu(x' + norm(conv(relu(norm(conv(x)))))), where x' is x, projected when its shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = FrameNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = FrameNorm(channels)
        self.project = None
        if stride != 1 or in_channels != channels:
            self.project = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), FrameNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        return F.relu(out + (x if self.project is None else self.project(x)), inplace=True)


class GaitBase(Backbone):
    """Features (N, C, 16). The batch norms see all frames of all clips."""

    def __init__(self, stages: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        channels = stages[0][0]
        self.conv = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.norm = FrameNorm(channels)
        self.blocks = nn.ModuleList()
        for out_channels, stride in stages:
            self.blocks.append(ResidualBlock(channels, out_channels, stride))
            channels = out_channels
        self.feature_channels = channels
        self.feature_parts = PARTS

    def extract(self, silhouettes: Tensor, lengths: Lengths) -> Tensor:
        x = F.relu(self.norm(self.conv(fold_frames(silhouettes))), inplace=True)
        for block in self.blocks:
            x = block(x)
        return pool_strips(pool_set(x, lengths), (PARTS,))


def build(variant: str, num_classes: int | None, width: float) -> tuple[GaitBase, Head]:
    backbone = GaitBase(tuple((scale_channels(c, width), stride) for c, stride in CHANNELS[variant]))
    return backbone, Head(PARTS, backbone.feature_channels, scale_channels(256, width), num_classes)
