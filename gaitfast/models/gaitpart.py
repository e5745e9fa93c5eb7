"""GaitPart (Fan et al., CVPR 2020): focal convolutions, then a temporal aggregator of its own for each of 16 parts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gaitfast.models.parts import (
    Backbone,
    ConvStack,
    Head,
    Layer,
    Lengths,
    fold_frames,
    max_over,
    over_clips,
    pool_strips,
    scale_channels,
    scale_layers,
)

PARTS = 16

_SMALL = (
    Layer(32),
    Layer(32, pool=True),
    Layer(64, strips=4),
    Layer(64, strips=4, pool=True),
    Layer(128, strips=8),
    Layer(128, strips=8),
)
_LARGE = (
    Layer(32),
    Layer(32, pool=True),
    Layer(64),
    Layer(64, pool=True),
    Layer(128, strips=8),
    Layer(128, strips=8),
    Layer(256, strips=8),
    Layer(256, strips=8),
)
LAYERS = {"gait3d": _SMALL, "casia-b": _SMALL, "grew": _LARGE, "ou-mvlp": _LARGE}


class MicroMotion(nn.Module):
    """A template of `window` frames times its attention: (N, P * C, S) -> (N, P * C, S).

    The P parts are the groups of grouped convolutions over time, so all of them run in two calls.
    """

    def __init__(self, parts: int, channels: int, hidden: int, window: int, last_kernel: int) -> None:
        super().__init__()
        self.window = window
        self.squeeze = nn.Conv1d(parts * channels, parts * hidden, 3, padding=1, groups=parts, bias=False)
        self.score = nn.Conv1d(
            parts * hidden, parts * channels, last_kernel, padding=last_kernel // 2, groups=parts, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        window, padding = self.window, self.window // 2
        # As a 2-D pooling, because max_pool1d would freeze the number of frames in an exported graph.
        peak = F.max_pool2d(x.unsqueeze(2), (1, window), 1, (0, padding)).squeeze(2)
        template = F.avg_pool1d(x, window, 1, padding) + peak
        score = self.score(F.leaky_relu(self.squeeze(x), inplace=True))
        return template * score.sigmoid()


class GaitPart(Backbone):
    """Features (N, C, 16): per part, the maximum over time of micro-motion templates of 3 and of 5 frames."""

    sampling = ("ordered", 10)

    def __init__(self, layers: tuple[Layer, ...], hidden: int) -> None:
        super().__init__()
        self.frames = ConvStack(1, layers, stem=True)
        channels = self.frames.out_channels
        self.motion3 = MicroMotion(PARTS, channels, hidden, window=3, last_kernel=1)
        self.motion5 = MicroMotion(PARTS, channels, hidden, window=5, last_kernel=3)
        self.feature_channels = channels
        self.feature_parts = PARTS

    def aggregate(self, clips: Tensor) -> Tensor:
        """(n, S, C, P) -> (n, C, P)."""
        x = clips.permute(0, 3, 2, 1).flatten(1, 2)
        x = max_over(self.motion3(x) + self.motion5(x), 2)
        return x.unflatten(1, (PARTS, -1)).transpose(1, 2)

    def extract(self, silhouettes: Tensor, lengths: Lengths) -> Tensor:
        strips = pool_strips(self.frames(fold_frames(silhouettes)), (PARTS,))
        return over_clips(self.aggregate, strips, lengths)


def build(variant: str, num_classes: int | None, width: float) -> tuple[GaitPart, Head]:
    """GaitPart is trained by the triplet loss alone: it has no classifier, whatever `num_classes` says."""
    layers = LAYERS[variant]
    hidden = scale_channels(layers[-1].channels // 4, width)
    backbone = GaitPart(scale_layers(layers, width), hidden)
    return backbone, Head(PARTS, backbone.feature_channels, backbone.feature_channels)
