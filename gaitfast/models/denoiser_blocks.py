"""Layers of the video denoiser over activations (B, T, H, W, C), contiguous.

A (1,k,k) convolution is a 2-D convolution over B*T frames whose channels-last strides describe the same memory;
attention over time strides over T. So no layer moves activations merely to rearrange them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gaitfast import kernels
from gaitfast.kernels import convolution

HEADS = 8
DIM_HEAD = 32
GROUPS = 32
MAX_FRAMES = 64

Modulation = tuple[Tensor, Tensor]
"""Scale and shift (B, C) of a residual block."""


class FramePositions(NamedTuple):
    """What temporal attention knows about the order of frames; the same for all layers of a step."""

    bias: Tensor
    """(heads, T, T), query frame x key frame."""
    rotation: Tensor
    """(T, DIM_HEAD / 2, 2), cosine and sine of the rotary angles."""


class FramewiseConv(nn.Conv2d):
    """A convolution of each frame: (B,T,H,W,C) -> (B,T,H',W',C')."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, super().forward, x)


class FramewiseConvTranspose(nn.ConvTranspose2d):
    """A transposed convolution of each frame: (B,T,H,W,C) -> (B,T,H',W',C')."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, super().forward, x)


def _convolve(layer: FramewiseConv | FramewiseConvTranspose, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """By the compiled products where these take it, else as PyTorch does (`plain`)."""
    if x.device.type == "cpu":
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        if convolution.takes(x, layer.weight):
            return convolution.convolution(
                x, layer.weight, layer.bias, layer.stride[0], layer.padding[0], isinstance(layer, nn.ConvTranspose2d)
            )
    return _from_frames(plain(_to_frames(x)), x.shape[0])


def _to_frames(x: Tensor) -> Tensor:
    """View (B*T,C,H,W) with channels-last strides."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _from_frames(x: Tensor, batch: int) -> Tensor:
    return x.permute(0, 2, 3, 1).unflatten(0, (batch, -1))


class ResidualBlock(nn.Module):
    """Two (convolution, GroupNorm, SiLU), the first one modulated, plus a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = FramewiseConv(channels_in, channels_out, 3, padding=1)
        self.norm1 = NormSiLU(channels_out)
        self.conv2 = FramewiseConv(channels_out, channels_out, 3, padding=1)
        self.norm2 = NormSiLU(channels_out)
        self.shortcut = nn.Linear(channels_in, channels_out) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        hidden = self.norm1(self.conv1(x), modulation)
        return self.norm2(self.conv2(hidden)) + self.shortcut(x)


class NormSiLU(nn.Module):
    """GroupNorm(32), scale and shift where given, SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        scale, shift = modulation or (None, None)
        return kernels.group_norm_film_silu(x, self.weight, self.bias, GROUPS, scale, shift)


class Attention(nn.Module):
    """What the three kinds share: x + out(operation(qkv(LayerNorm(x))))."""

    def __init__(self, channels: int, *, out_bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(channels))
        self.qkv = nn.Linear(channels, 3 * HEADS * DIM_HEAD, bias=False)
        self.out = nn.Linear(HEADS * DIM_HEAD, channels, bias=out_bias)

    def _residual(self, x: Tensor, operation: Callable[..., Tensor], *arguments) -> Tensor:
        """`operation(qkv, *arguments)` takes (B, T, S, 3 * HEADS * DIM_HEAD) to (B, T, S, HEADS * DIM_HEAD)."""
        normalised = kernels.layer_norm(x, self.norm)
        with _recomputed(self.qkv, normalised) as project:
            out = operation(project(), *arguments)
        return x + self.out(out).view_as(x)


@contextlib.contextmanager
def _recomputed(layer: nn.Linear, x: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Inside, the result of `layer(x)` is not kept for the backward pass but computed again there.

    Queries, keys and values are up to twelve times as large as what they come from, and one product away. On a GPU and
    where a compiler plans the memory they are kept.

    Yields:
        What computes layer(x) (B, T, H, W, 3 * HEADS * DIM_HEAD) as (B, T, S, 3 * HEADS * DIM_HEAD).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        yield lambda: layer(x).flatten(2, 3)
        return
    found: list[Tensor] = []
    weight = layer.weight.detach()  # of this step: ZeRO-3 takes the parameter's memory away before the backward pass

    def project() -> Tensor:
        found.append(layer(x).flatten(2, 3))
        return found[0]

    def pack(kept: Tensor) -> Tensor | None:
        same = found and kept.data_ptr() == found[0].data_ptr() and kept.shape == found[0].shape
        # Without its graph: a result that its own node saves would keep that node, and all before it, for ever.
        return None if same else kept.detach()

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return nn.functional.linear(x.to(dtype), weight.to(dtype)).flatten(2, 3)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield project
        dtype = found[0].dtype
        del found[0]


class TemporalAttention(Attention):
    """Every site attends over the frames."""

    def forward(self, x: Tensor, positions: FramePositions) -> Tensor:
        return self._residual(x, kernels.temporal_attention, positions.bias, positions.rotation, HEADS)


class SpatialAttention(Attention):
    """Every frame attends over its sites."""

    def forward(self, x: Tensor) -> Tensor:
        return self._residual(x, kernels.spatial_attention, HEADS)


class LinearAttention(Attention):
    """Every frame attends over its sites at a cost linear in their number."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, out_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self._residual(x, kernels.linear_attention, HEADS)


class PositionEmbedding(nn.Module):
    """Relative bias over frame distances (T5's buckets: 8 exact, 8 logarithmic up to 32, per side) and rotary angles.

    Source: Raffel et al., 2020, Sec. 2.1; Su et al., "RoFormer", 2021, Eq. 15.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(32, HEADS)
        frequencies = 1.0 / 10_000 ** (torch.arange(0, DIM_HEAD, 2) / DIM_HEAD)
        # Frozen, yet a parameter, as in the networks whose checkpoints are exchanged: it counts and it is saved.
        self.frequencies = nn.Parameter(frequencies, requires_grad=False)
        distances = range(1 - MAX_FRAMES, MAX_FRAMES)
        self.register_buffer("buckets", torch.tensor([_bucket(d) for d in distances]), persistent=False)

    def forward(self, frames: int) -> FramePositions:
        frame = torch.arange(frames, device=self.buckets.device)
        distance = frame[None, :] - frame[:, None]  # key minus query
        bias = self.bias(self.buckets[distance + MAX_FRAMES - 1]).permute(2, 0, 1)
        precise = torch.promote_types(self.frequencies.dtype, torch.float32)
        angle = frame[:, None] * self.frequencies.to(precise)
        return FramePositions(bias, torch.stack((angle.cos(), angle.sin()), dim=-1))


def _bucket(distance: int) -> int:
    """T5's bucket of key frame minus query frame, in integers: future frames use the upper 16."""
    magnitude = abs(distance)
    if magnitude >= 8:
        # 8 + floor(8 * log(magnitude / 8) / log(32 / 8)), at most 15
        magnitude = 8 + sum(magnitude**8 >= 8**8 * 4**step for step in range(1, 8))
    return magnitude + 16 * (distance > 0)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through two linear layers: (B,) -> (B, 4 * dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.expand = nn.Linear(dim, 4 * dim)
        self.project = nn.Linear(4 * dim, 4 * dim)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.dim // 2
        precise = torch.promote_types(self.expand.weight.dtype, torch.float32)
        index = torch.arange(half, device=timestep.device, dtype=torch.float32)
        frequencies = torch.exp(index * (-math.log(10_000) / (half - 1)))
        angle = timestep.to(precise)[:, None] * frequencies
        sinusoids = torch.cat((angle.sin(), angle.cos()), dim=-1).to(self.expand.weight.dtype)
        return self.project(nn.functional.gelu(self.expand(sinusoids)))


class Film(nn.Module):
    """Scale and shift of all modulated blocks from (time, condition) in one product."""

    def __init__(self, embedding: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = channels
        layers = nn.Linear(embedding, 2 * sum(channels))
        self.weight, self.bias = layers.weight, layers.bias

    def forward(self, time: Tensor, condition: Tensor) -> tuple[Modulation, ...]:
        return kernels.film(time, condition, self.weight, self.bias, self.channels)
