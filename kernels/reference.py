"""The fused operations in plain PyTorch: the definition that every other backend is tested against.

Shapes: B batch, T frames, S = H*W sites, C channels, N heads, D features of a head. Activations are contiguous with
their channels last. Statistics and angles are float32, or float64 where the input is.

Source: video-diffusion-pytorch 0.6.3, after Ho et al., "Video Diffusion Models", 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def film(time: Tensor, condition: Tensor, weight: Tensor, bias: Tensor, channels: tuple[int, ...]):
    """One product for all layers; rows of `weight` are ordered layer by layer, scale before shift."""
    embedding = torch.cat((time, condition), dim=-1).to(weight.dtype)
    rows = F.linear(F.silu(embedding), weight, bias).split([width for c in channels for width in (c, c)], dim=-1)
    return tuple(zip(rows[0::2], rows[1::2]))


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None, eps)


def group_norm_film_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    batch, channels = x.shape[0], x.shape[-1]
    precise = _precise(x)

    def group_mean(per_channel: Tensor) -> Tensor:
        mean = per_channel.view(batch, groups, -1).mean(dim=-1, keepdim=True)
        return mean.expand(-1, -1, channels // groups).reshape(batch, 1, channels)

    flat = x.reshape(batch, -1, channels).to(precise)
    # Centred before squaring: E[x^2] - E[x]^2 cancels where the mean is large.
    centred = flat - group_mean(flat.mean(dim=1))
    inverse = torch.rsqrt(group_mean(centred.square().mean(dim=1)) + eps)
    weight, bias = weight.to(precise), bias.to(precise)
    if scale is not None:
        # (n * weight + bias) * (scale + 1) + shift, folded into one multiply-add on the large tensor
        weight = (weight * (scale + 1))[:, None]
        bias = (bias * (scale + 1) + shift)[:, None]
    return F.silu(torch.addcmul(bias, centred, inverse * weight)).to(x.dtype).view_as(x)


def temporal_attention(qkv: Tensor, bias: Tensor, rotation: Tensor, heads: int) -> Tensor:
    batch, frames, sites, width = qkv.shape
    width //= 3
    dim_head = width // heads
    # An interleaved pair of features is a complex number, and turning it by its angle is a product with cos + i sin.
    # The scale of the queries rides along, so that queries and keys take one pass together.
    turn = torch.view_as_complex(rotation)
    turn = torch.stack((turn * dim_head**-0.5, turn), dim=1)[:, :, None]
    turn = turn.expand(-1, -1, heads, -1).reshape(frames, 1, width)
    turned, values = qkv.split((2 * width, width), dim=-1)
    pairs = torch.view_as_complex(turned.to(rotation.dtype).unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turn).to(qkv.dtype).flatten(-2)
    queries, keys, values = (
        part.unflatten(-1, (heads, dim_head)).permute(0, 2, 3, 1, 4) for part in (*turned.split(width, dim=-1), values)
    )  # (B, S, N, T, D)
    weights = torch.softmax(queries @ keys.transpose(-1, -2) + bias.to(qkv.dtype), dim=-1)
    return (weights @ values).permute(0, 3, 1, 2, 4).reshape(batch, frames, sites, width)


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    queries, keys, values = _split_heads(qkv, heads)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return _join_heads(scores.softmax(dim=-1) @ values, qkv)


def linear_attention(qkv: Tensor, heads: int) -> Tensor:
    queries, keys, values = _split_heads(qkv, heads)
    context = keys.softmax(dim=-2).transpose(-1, -2) @ values * queries.shape[-1] ** -0.5
    return _join_heads(queries.softmax(dim=-1) @ context, qkv)


def _split_heads(qkv: Tensor, heads: int) -> list[Tensor]:
    """(B,T,S,3*N*D) -> queries, keys, values (B*T,N,S,D)."""
    parts = qkv.flatten(0, 1).chunk(3, dim=-1)
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]


def _join_heads(x: Tensor, qkv: Tensor) -> Tensor:
    """(B*T,N,S,D) -> (B,T,S,N*D)."""
    return x.transpose(1, 2).reshape(*qkv.shape[:3], -1)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
