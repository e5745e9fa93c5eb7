"""SMPLGait without its 3-D branch (Zheng et al., CVPR 2022): OpenGait's `Baseline` on the plain convolution stack."""

from __future__ import annotations

from typing import NamedTuple

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
    scale_layers,
)


class Network(NamedTuple):
    """What the variants differ in."""

    layers: tuple[Layer, ...]
    bins: tuple[int, ...]


_PLAIN = (Layer(64), Layer(64, pool=True), Layer(128), Layer(128, pool=True), Layer(256), Layer(256))
_NARROW = (
    Layer(32),
    Layer(32, pool=True),
    Layer(64),
    Layer(64, pool=True),
    Layer(128),
    Layer(128),
    Layer(256),
    Layer(256),
)
NETWORKS = {
    # Only Gait3D's network was published under this name; for the other sets it is the same one with their classes.
    **dict.fromkeys(("gait3d", "grew", "casia-b", "ou-mvlp"), Network(_PLAIN, PYRAMID)),
    # OpenGait's configs baseline_GREW.yaml and baseline_OUMVLP.yaml: the same class, another network.
    "grew-baseline": Network(_NARROW, (16,)),
    "ou-mvlp-baseline": Network(_NARROW, PYRAMID),
}


class SMPLGait(Backbone):
    """Features (N, C, P), 31 parts or 16: frames through the plain stack, set pooling, horizontal pooling."""

    def __init__(self, layers: tuple[Layer, ...], bins: tuple[int, ...]) -> None:
        super().__init__()
        self.frames = ConvStack(1, layers, stem=True)
        self.bins = bins
        self.feature_channels = self.frames.out_channels
        self.feature_parts = sum(bins)

    def extract(self, silhouettes: Tensor, lengths: Lengths) -> Tensor:
        return pool_strips(pool_set(self.frames(fold_frames(silhouettes)), lengths), self.bins)


def build(variant: str, num_classes: int | None, width: float) -> tuple[SMPLGait, Head]:
    network = NETWORKS[variant]
    backbone = SMPLGait(scale_layers(network.layers, width), network.bins)
    embedding = scale_channels(256, width)
    return backbone, Head(backbone.feature_parts, backbone.feature_channels, embedding, num_classes)
