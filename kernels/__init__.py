"""Fused operations of the video denoiser: one signature each, whatever backend runs it.

B batch, T frames, S = H*W sites, C channels, N heads, D features of a head. Activations are contiguous, channels last,
in float64, float32, bfloat16 or float16; results have their type and layout. Parameters may have another floating
type. Statistics, angles and softmax sums are float32, or float64 for float64 activations. Every operation is
differentiable in all its floating arguments and ignores autocast.
"""

from __future__ import annotations

from torch import Tensor

from . import _dispatch
from ._dispatch import OPERATIONS, BackendError, backend_of, may_run_compiled

__all__ = [
    "OPERATIONS",
    "BackendError",
    "backend_of",
    "film",
    "group_norm_film_silu",
    "layer_norm",
    "linear_attention",
    "may_run_compiled",
    "spatial_attention",
    "temporal_attention",
]


def film(
    time: Tensor, condition: Tensor, weight: Tensor, bias: Tensor, channels: tuple[int, ...]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """All scale and shift vectors of a network from one product: SiLU([time, condition]) @ weight^T + bias.

    Args:
        time: (B, E) embedding of the timestep.
        condition: (B, K) condition.
        weight: (2 * sum(channels), E + K), ordered layer by layer, a layer's scale before its shift.
        bias: (2 * sum(channels),).
        channels: C of each layer.

    Returns:
        For each layer (scale (B, C), shift (B, C)) in the type of `weight`: views with rows far apart.
    """
    assert weight.shape == (2 * sum(channels), time.shape[1] + condition.shape[1]), weight.shape
    return _dispatch.run("film", time, condition, weight, bias, channels)


def layer_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise `x` (..., C) over its channels (biased variance) and multiply by `weight` (C,)."""
    assert weight.shape == x.shape[-1:], (weight.shape, x.shape)
    return _dispatch.run("layer_norm", x, weight, eps)


def group_norm_film_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """SiLU(GroupNorm(x) * (scale + 1) + shift), statistics over (C / groups, T, H, W).

    Args:
        x: (B, T, H, W, C).
        weight, bias: (C,), the affine part of the norm.
        groups: divides C; C / groups may be 1.
        scale, shift: (B, C), any row stride, or both None.
        eps: added to the biased variance.
    """
    assert x.dim() == 5 and x.shape[-1] % groups == 0, (x.shape, groups)
    assert (scale is None) == (shift is None), "scale and shift come together"
    assert scale is None or scale.shape == shift.shape == (x.shape[0], x.shape[-1]), (scale.shape, shift.shape)
    return _dispatch.run("group_norm_film_silu", x, weight, bias, groups, scale, shift, eps)


def temporal_attention(qkv: Tensor, bias: Tensor, rotation: Tensor, heads: int) -> Tensor:
    """Attention of every site over the frames, with rotary positions and a learned bias shared by all sites.

    softmax(rot(q * D^-0.5) rot(k)^T + bias) v for each sample, site and head. Rotary features are interleaved:
    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        qkv: (B, T, S, 3 * N * D): queries, keys and values, each ordered head by head.
        bias: (N, T, T), row = query frame, column = key frame.
        rotation: (T, D / 2, 2), cosine and sine of each frame's angles; float32, or float64 for float64 activations.
        heads: N.

    Returns:
        (B, T, S, N * D).
    """
    frames, dim_head = qkv.shape[1], qkv.shape[-1] // (3 * heads)
    assert qkv.dim() == 4 and qkv.shape[-1] == 3 * heads * dim_head, (qkv.shape, heads)
    assert bias.shape == (heads, frames, frames), (bias.shape, heads, frames)
    assert rotation.shape == (frames, dim_head // 2, 2), (rotation.shape, frames, dim_head)
    return _dispatch.run("temporal_attention", qkv, bias, rotation, heads)


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of every frame over its sites, softmax(q k^T D^-0.5) v: (B, T, S, 3 * N * D) -> (B, T, S, N * D)."""
    assert qkv.dim() == 4 and qkv.shape[-1] % (3 * heads) == 0, (qkv.shape, heads)
    return _dispatch.run("spatial_attention", qkv, heads)


def linear_attention(qkv: Tensor, heads: int) -> Tensor:
    """Linear attention of every frame over its sites: (B, T, S, 3 * N * D) -> (B, T, S, N * D).

    softmax_D(q) D^-0.5 (softmax_S(k)^T v), Shen et al., "Efficient Attention", 2021: cost linear in S.
    """
    assert qkv.dim() == 4 and qkv.shape[-1] % (3 * heads) == 0, (qkv.shape, heads)
    return _dispatch.run("linear_attention", qkv, heads)
