"""GaitSet (Chao et al., AAAI 2019): a clip is a set of frames, pooled at three depths. 62 parts."""

from __future__ import annotations

import torch
from torch import Tensor

from gaitfast.models.parts import (
    PYRAMID,
    Backbone,
    ConvStack,
    Head,
    Layer,
    Lengths,
    fold_frames,
    pool_set,
    pool_strips,
    scale_channels,
)

CHANNELS = {
    "gait3d": (32, 64, 128),
    "casia-b": (32, 64, 128),
    "grew": (64, 128, 256),
    "ou-mvlp": (64, 128, 256),
}


class GaitSet(Backbone):
    """Features (N, C, 62): the pyramid of the pooled frames, then that of the multilayer global pipeline."""

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        c1, c2, c3 = channels
        second = (Layer(c2), Layer(c2, pool=True))
        third = (Layer(c3), Layer(c3))
        self.block1 = ConvStack(1, (Layer(c1), Layer(c1, pool=True)), stem=True)
        self.block2 = ConvStack(c1, second)
        self.block3 = ConvStack(c2, third)
        self.global2 = ConvStack(c1, second)
        self.global3 = ConvStack(c2, third)
        self.feature_channels = c3
        self.feature_parts = 2 * sum(PYRAMID)

    def extract(self, silhouettes: Tensor, lengths: Lengths) -> Tensor:
        frames = self.block1(fold_frames(silhouettes))
        whole = self.global2(pool_set(frames, lengths))
        frames = self.block2(frames)
        whole = self.global3(whole + pool_set(frames, lengths))
        pooled = pool_set(self.block3(frames), lengths)
        return torch.cat((pool_strips(pooled, PYRAMID), pool_strips(whole + pooled, PYRAMID)), 2)


def build(variant: str, num_classes: int | None, width: float) -> tuple[GaitSet, Head]:
    """GaitSet is trained by the triplet loss alone: it has no classifier, whatever `num_classes` says."""
    backbone = GaitSet(tuple(scale_channels(c, width) for c in CHANNELS[variant]))
    return backbone, Head(backbone.feature_parts, backbone.feature_channels, scale_channels(256, width))
