"""What the five recognition models share: clips of frames, strips, pooling, the plain convolution stack, the heads.

Shapes: N clips, S frames, F = all frames of the batch, C channels, H x W map, P parts, E embedding, K classes.
Frames are folded into the batch of the 2-D convolutions; no function here needs the host in the fixed-length path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaitfast.models import stack
from gaitfast.models.stack import fold_strips, unfold_strips

FRAME_SIZE = (64, 44)
"""Height and width of a silhouette as every one of the five models takes it."""

PYRAMID = (16, 8, 4, 2, 1)
"""Bins of the horizontal pooling pyramid with 31 parts."""

Lengths = int | list[int]
"""Frames per clip: one number when all clips are equally long, else a list of N."""


def scale_channels(channels: int, width: float) -> int:
    """`channels` of the published network times `width`, rounded to a multiple of 8, at least 8."""
    return channels if width == 1 else max(8, 8 * int(channels * width / 8 + 0.5))


def arrange_clips(silhouettes: Tensor, lengths: Sequence[int] | Tensor | None) -> tuple[Tensor, Lengths]:
    """Check a batch and say how its frames form clips.

    silhouettes: float (N, S, 64, 44), or packed (1, sum(lengths), 64, 44) with `lengths` of N clips. A packed batch of
    equally long clips is returned as the fixed-length batch that it is. `lengths` on a GPU costs a synchronisation.
    """
    assert silhouettes.dim() == 4 and tuple(silhouettes.shape[2:]) == FRAME_SIZE, (
        f"silhouettes are (N, S, {FRAME_SIZE[0]}, {FRAME_SIZE[1]}), got {tuple(silhouettes.shape)}"
    )
    assert silhouettes.is_floating_point(), f"silhouettes are floats in [0, 1], got {silhouettes.dtype}"
    assert silhouettes.shape[0] >= 1 and silhouettes.shape[1] >= 1, "a batch needs at least one clip of one frame"
    if lengths is None:
        return silhouettes, silhouettes.shape[1]
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(lengths) == 1 and isinstance(lengths[0], (list, tuple)):
        lengths = lengths[0]  # OpenGait's seqL, a list in a list
    lengths = [int(length) for length in lengths]
    if lengths == [silhouettes.shape[1]] * len(silhouettes):
        return silhouettes, silhouettes.shape[1]  # a batch of fixed length that says so
    assert lengths and min(lengths) >= 1, f"every clip has at least one frame, got lengths {lengths}"
    assert silhouettes.shape[0] == 1 and sum(lengths) == silhouettes.shape[1], (
        f"packed silhouettes are (1, {sum(lengths)}, 64, 44) for these lengths, got {tuple(silhouettes.shape)}"
    )
    if len(set(lengths)) == 1:
        return silhouettes.reshape(len(lengths), lengths[0], *FRAME_SIZE), lengths[0]
    return silhouettes, lengths


def fold_frames(silhouettes: Tensor) -> Tensor:
    """(N, S, 64, 44) or packed (1, F, 64, 44) -> (F, 1, 64, 44), the batch of a 2-D convolution, in channels_last.

    One channel is channels_last for free, and convolutions keep the format of their input, so the whole network runs in
    it whatever the format of its weights (ZeRO keeps those flat).
    """
    return silhouettes.flatten(0, 1).unsqueeze(-1).movedim(-1, 1)


def over_clips(function: Callable[[Tensor], Tensor], frames: Tensor, lengths: Lengths) -> Tensor:
    """Apply a function of clips, (n, S, ...) -> (n, ...), to folded frames (F, ...) -> (N, ...).

    Clips of unequal length are taken one at a time, so nothing leaks from one into the padding of the next.
    """
    if isinstance(lengths, list):
        return torch.cat([function(clip.unsqueeze(0)) for clip in frames.split(lengths)])
    return function(frames.unflatten(0, (-1, lengths)))


def max_over(x: Tensor, dim: int) -> Tensor:
    """Maximum along `dim`; with ties the gradient goes to one of the tied entries, as in OpenGait.

    `amax` spreads that gradient evenly and is slow backwards, but several times faster when no gradient is needed.
    """
    return x.max(dim).values if torch.is_grad_enabled() and x.requires_grad else x.amax(dim)


def pool_set(frames: Tensor, lengths: Lengths) -> Tensor:
    """Set pooling: (F, ...) -> (N, ...), the maximum over the frames of each clip."""
    if isinstance(lengths, int) and stack.pools(frames, lengths):
        return stack.pool_frames(frames, lengths)
    return over_clips(lambda clips: max_over(clips, 1), frames, lengths)


def pool_strips(maps: Tensor, bins: Sequence[int]) -> Tensor:
    """Horizontal pooling pyramid: (N, C, H, W) -> (N, C, sum(bins)).

    Each b of `bins` cuts the map into b strips of H/b rows; the feature of a strip is its mean plus its maximum.
    """
    features = []
    for count in bins:
        strips = maps.unflatten(2, (count, -1)).flatten(3)
        features.append(strips.mean(3) + max_over(strips, 3))
    return torch.cat(features, 2) if len(features) > 1 else features[0]


class Layer(NamedTuple):
    """One convolution of a `ConvStack`."""

    channels: int
    strips: int = 1
    """More than 1: a focal convolution (GaitPart), applied to so many strips of the height on their own."""
    pool: bool = False
    """Followed by a 2 x 2 maximum with stride 2."""


def scale_layers(layers: Sequence[Layer], width: float) -> tuple[Layer, ...]:
    """`layers` with every channel count scaled."""
    return tuple(layer._replace(channels=scale_channels(layer.channels, width)) for layer in layers)


class ConvStack(nn.Module):
    """3 x 3 convolutions without bias, each followed by LeakyReLU(0.01): (F, in, H, W) -> (F, C, H', W').

    With `stem` the first kernel is 5 x 5. Pooling comes before the activation: the activation is increasing, so the
    result is the published one (activation first), at a quarter of the activation's memory traffic. On a CPU stack.py
    computes it.
    """

    def __init__(self, in_channels: int, layers: Sequence[Layer], *, stem: bool = False) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.convs = nn.ModuleList()
        for number, layer in enumerate(self.layers):
            kernel = 5 if stem and number == 0 else 3
            self.convs.append(nn.Conv2d(in_channels, layer.channels, kernel, padding=kernel // 2, bias=False))
            in_channels = layer.channels
        self.out_channels = in_channels

    def forward(self, x: Tensor) -> Tensor:
        weights = [conv.weight for conv in self.convs]
        if stack.takes(x, weights):
            return stack.run(x, weights, self.layers)
        for conv, layer in zip(self.convs, self.layers):
            x = conv(x) if layer.strips == 1 else unfold_strips(conv(fold_strips(x, layer.strips)), layer.strips)
            if layer.pool:
                x = F.max_pool2d(x, 2)
            x = F.leaky_relu(x, stack.SLOPE, inplace=True)
        return x


class Backbone(nn.Module):
    """A gait feature extractor G: silhouettes -> features G(s_G) of shape (N, C, P).

    `forward(silhouettes, lengths=None)` takes float silhouettes in [0, 1], fixed length (N, S, 64, 44) or packed
    (1, sum(lengths), 64, 44), and can be used alone (pretraining). Subclasses implement `extract`.
    """

    feature_channels: int
    feature_parts: int
    sampling: tuple[str, int] = ("unordered", 0)
    """The authors' rule for the frames of s_G: "unordered" or "ordered", and the frames skipped by the ordered one."""

    def forward(self, silhouettes: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        return self.extract(*arrange_clips(silhouettes, lengths))

    def extract(self, silhouettes: Tensor, lengths: Lengths) -> Tensor:
        """Features (N, C, P) of what `arrange_clips` returned."""
        raise NotImplementedError


class SeparateFCs(nn.Module):
    """One matrix per part, no bias: (N, in, P) -> (N, out, P). `weight` is (P, in, out)."""

    def __init__(self, parts: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parts, in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.permute(2, 0, 1), self.weight).permute(1, 2, 0)


class SeparateBNNecks(nn.Module):
    """Batch norm over all channels and parts, then cosine logits per part: (N, E, P) -> (N, K, P), in [-1, 1].

    The batch norm's index is channel * P + part. `weight` is (P, E, K) and is used with unit columns.
    """

    def __init__(self, parts: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels * parts)
        self.weight = nn.Parameter(torch.zeros(parts, channels, num_classes))

    def forward(self, embedding: Tensor) -> Tensor:
        x = self.norm(embedding.flatten(1)).unflatten(1, embedding.shape[1:])
        x = F.normalize(x.permute(2, 0, 1), dim=2)
        return torch.matmul(x, F.normalize(self.weight, dim=1)).permute(1, 2, 0)


class Head(nn.Module):
    """Features (N, C, P) -> embedding (N, E, P) and, with `num_classes`, the logits of a BN neck, else None.

    The embedding serves the triplet loss and retrieval; it is taken before the neck.
    """

    def __init__(self, parts: int, channels: int, embedding: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.embed = SeparateFCs(parts, channels, embedding)
        self.neck = None if num_classes is None else SeparateBNNecks(parts, embedding, num_classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding = self.embed(features)
        return embedding, None if self.neck is None else self.neck(embedding)
