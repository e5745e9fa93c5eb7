"""SMPLGait without its 3-D branch (Zheng et al., CVPR 2022): OpenGait's `Baseline` on the plain convolution stack."""

from __future__ import annotations

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

# Only Gait3D's network was published; the other variants are the same one with that dataset's classes.
CHANNELS = dict.fromkeys(("gait3d", "grew", "casia-b", "ou-mvlp"), (64, 128, 256))


class SMPLGait(Backbone):
    """Features (N, C, 31): frames through the plain stack, set pooling, horizontal pyramid."""

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        c1, c2, c3 = channels
        layers = (Layer(c1), Layer(c1, pool=True), Layer(c2), Layer(c2, pool=True), Layer(c3), Layer(c3))
        self.frames = ConvStack(1, layers, stem=True)
        self.feature_channels = c3
        self.feature_parts = sum(PYRAMID)

    def extract(self, silhouettes: Tensor, lengths: Lengths) -> Tensor:
        return pool_strips(pool_set(self.frames(fold_frames(silhouettes)), lengths), PYRAMID)


def build(variant: str, num_classes: int | None, width: float) -> tuple[SMPLGait, Head]:
    backbone = SMPLGait(tuple(scale_channels(c, width) for c in CHANNELS[variant]))
    embedding = scale_channels(256, width)
    return backbone, Head(backbone.feature_parts, backbone.feature_channels, embedding, num_classes)
