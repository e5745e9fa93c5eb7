"""GaitGL (Lin et al., ICCV 2021): 3-D convolutions on the whole map and on its strips, side by side. 64 parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaitfast.models.parts import (
    Backbone,
    Head,
    Lengths,
    SeparateFCs,
    fold_strips,
    max_over,
    over_clips,
    scale_channels,
    unfold_strips,
)

PARTS = 64
LARGE = {"gait3d": False, "casia-b": False, "grew": True, "ou-mvlp": True, "grew-bnneck": True}


def _conv3d(in_channels: int, out_channels: int) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)


class GlobalLocalConv(nn.Module):
    """One convolution of the whole map and one of each strip: (N, C, T, H, W) -> (N, C', T, H or 2H, W).

    `stacked` puts the strips' result below the map's (type B), otherwise the two activations are added (type A).
    """

    def __init__(self, in_channels: int, out_channels: int, strips: int, *, stacked: bool = False) -> None:
        super().__init__()
        self.strips, self.stacked = strips, stacked
        self.whole = _conv3d(in_channels, out_channels)
        self.local = _conv3d(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole(x)
        local = unfold_strips(self.local(fold_strips(x, self.strips)), self.strips)
        if self.stacked:
            return F.leaky_relu(torch.cat((whole, local), 3), inplace=True)
        return F.leaky_relu(whole, inplace=True) + F.leaky_relu(local, inplace=True)


class GeneralizedMean(nn.Module):
    """Generalised mean of each row: (N, C, H, W) -> (N, C, H), with one learnable exponent.

    In float32 at least, and relative to the row's maximum, on which the result does not depend: the sixth power of the
    clamp 1e-6 would otherwise be a denormal number, and its root's gradient NaN where these are flushed to zero.
    """

    INITIAL = 6.5

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.full((1,), self.INITIAL))

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        rows, exponent = x.to(precise).clamp(min=1e-6), self.exponent.to(precise)
        top = rows.detach().amax(-1, keepdim=True)
        mean = (rows / top).pow(exponent).mean(-1).pow(1 / exponent) * top.squeeze(-1)
        return mean.to(x.dtype)


class GaitGL(Backbone):
    """Features (N, C, 64), one part per row of the last map.

    Time is pooled by threes: the last one or two frames of a clip whose length is no multiple of 3 are dropped. A clip
    of one frame is shown three times and a clip of two frames twice, as in OpenGait.
    """

    sampling = ("ordered", 0)

    def __init__(self, channels: tuple[int, ...], *, large: bool) -> None:
        super().__init__()
        c1, c2, c3 = channels[:3]
        last = channels[-1]
        self.stem = nn.ModuleList([_conv3d(1, c1), _conv3d(c1, c1)] if large else [_conv3d(1, c1)])
        self.time_pool = nn.Conv3d(c1, c1, (3, 1, 1), stride=(3, 1, 1), bias=False)
        if large:
            self.stage1 = nn.Sequential(GlobalLocalConv(c1, c2, 2), GlobalLocalConv(c2, c2, 2))
            self.stage2 = nn.Sequential(GlobalLocalConv(c2, c3, 2), GlobalLocalConv(c3, c3, 2))
            self.stage3 = nn.Sequential(GlobalLocalConv(c3, last, 2), GlobalLocalConv(last, last, 2, stacked=True))
        else:
            self.stage1 = nn.Sequential(GlobalLocalConv(c1, c2, 8))
            self.stage2 = nn.Sequential(GlobalLocalConv(c2, c3, 8))
            self.stage3 = nn.Sequential(GlobalLocalConv(c3, last, 8, stacked=True))
        self.row_pool = GeneralizedMean()
        self.feature_channels = last
        self.feature_parts = PARTS

    def maps(self, clips: Tensor) -> Tensor:
        """(n, S, 64, 44) -> (n, C, 64, 22), the maximum over time."""
        frames = clips.shape[1]
        repeats = (frames + 2) // frames  # 3, 2, and 1 from three frames on; a branch would be frozen in an export
        x = clips.repeat(1, repeats, 1, 1).unsqueeze(1)
        for conv in (*self.stem, self.time_pool):
            x = F.leaky_relu(conv(x), inplace=True)
        x = F.max_pool3d(self.stage1(x), (1, 2, 2))
        return max_over(self.stage3(self.stage2(x)), 2)

    def extract(self, silhouettes: Tensor, lengths: Lengths) -> Tensor:
        return self.row_pool(over_clips(self.maps, silhouettes.flatten(0, 1), lengths))


class GaitGLHead(nn.Module):
    """GaitGL's own head: the embedding is taken after a batch norm whose statistics the parts share; linear logits."""

    def __init__(self, parts: int, channels: int, num_classes: int | None) -> None:
        super().__init__()
        self.embed = SeparateFCs(parts, channels, channels)
        self.norm = nn.BatchNorm1d(channels)
        self.classifier = None if num_classes is None else SeparateFCs(parts, channels, num_classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding = self.norm(self.embed(features))
        return embedding, None if self.classifier is None else self.classifier(embedding)


def build(variant: str, num_classes: int | None, width: float) -> tuple[GaitGL, GaitGLHead | Head]:
    large = LARGE[variant]
    channels = (32, 64, 128, 256) if large else (32, 64, 128)
    backbone = GaitGL(tuple(scale_channels(c, width) for c in channels), large=large)
    last = backbone.feature_channels
    if variant == "grew-bnneck":
        return backbone, Head(PARTS, last, last, num_classes)
    return backbone, GaitGLHead(PARTS, last, num_classes)
