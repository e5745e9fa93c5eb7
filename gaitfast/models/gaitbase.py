"""GaitBase (Fan et al., CVPR 2023): a residual network of nine layers, set pooling, 16 horizontal parts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gaitfast.models.frame_norm import FrameNorm, norm_relu
from gaitfast.models.parts import Backbone, Head, Lengths, fold_frames, pool_set, pool_strips, scale_channels

PARTS = 16
STAGES = ((64, 1), (128, 2), (256, 2), (512, 1))
"""Channels and stride of the four residual blocks."""
CHANNELS = dict.fromkeys(("gait3d", "grew", "casia-b", "ou-mvlp"), STAGES)


class Projection(nn.Conv2d):
    """A 1 x 1 convolution with a stride.

    On a CPU with fewer than 16 input channels (a narrow network) the other positions are left out before it: oneDNN's
    gradient of the weights of a strided one reads beyond its memory there, in channels_last, on several threads.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.in_channels >= 16:
            return super().forward(x)
        down, across = self.stride
        return F.conv2d(x[..., ::down, ::across], self.weight)


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
            self.project = nn.Sequential(Projection(in_channels, channels, 1, stride, bias=False), FrameNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(norm_relu(self.norm1, self.conv1(x)))
        return norm_relu(self.norm2, out, x if self.project is None else self.project(x))


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
        x = norm_relu(self.norm, self.conv(fold_frames(silhouettes)))
        for block in self.blocks:
            x = block(x)
        return pool_strips(pool_set(x, lengths), (PARTS,))


def build(variant: str, num_classes: int | None, width: float) -> tuple[GaitBase, Head]:
    backbone = GaitBase(tuple((scale_channels(c, width), stride) for c, stride in CHANNELS[variant]))
    return backbone, Head(PARTS, backbone.feature_channels, scale_channels(256, width), num_classes)
