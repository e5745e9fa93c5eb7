"""Linear attention over the sites of a frame in one kernel each way.

Floor: 4 B T S N D elements forward, 7 backward: 0.25 GB and 0.44 GB at B = 64, 30 frames, 8 x 8 sites in bfloat16.

"Linear" is a matter of grouping: softmax(q) (softmax(k)^T v) = (softmax(q) softmax(k)^T) v. On at most 64 sites the
second form costs little more arithmetic, which is not the limit, and frames of few sites can share one square of
scores, where the first form would have a D x D context for each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sites import operation, refusal, rows_of

__all__ = ["refusal", "run"]


@triton.jit
def _over_features(tile):
    """Softmax of each row."""
    weights = tl.exp(tile - tl.max(tile, axis=1)[:, None])
    return weights * (1.0 / tl.sum(weights, axis=1))[:, None]


@triton.jit
def _over_sites(tile, sites, BLOCK_S: tl.constexpr, FRAMES: tl.constexpr):
    """Softmax of each feature over the sites of a frame; zero where there is no site."""
    cube = tl.reshape(tile, (FRAMES, BLOCK_S, tile.shape[1]))
    known = (tl.arange(0, BLOCK_S) < sites)[None, :, None]
    cube = tl.where(known, cube, float("-inf"))
    cube = tl.exp(cube - tl.max(cube, axis=1)[:, None, :])
    return tl.reshape(cube * (1.0 / tl.sum(cube, axis=1))[:, None, :], tile.shape)


@triton.jit
def _frame_sums(tile, BLOCK_S: tl.constexpr, FRAMES: tl.constexpr):
    """Sums over the sites of a frame, for each of its rows."""
    cube = tl.reshape(tile, (FRAMES, BLOCK_S, tile.shape[1]))
    total = tl.sum(cube, axis=1)[:, None, :]
    return tl.reshape(tl.broadcast_to(total, (FRAMES, BLOCK_S, tile.shape[1])), tile.shape)


@triton.jit
def linear_attention_fwd_kernel(
    qkv,  # (frames, S, 3 * N * D)
    out,  # (frames, S, N * D)
    frames,  # B * T
    sites,  # S
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FRAMES: tl.constexpr,  # of a program
):
    narrow, wide, exists, meets = rows_of(frames, sites, HEADS, D, BLOCK_S, FRAMES)
    query = _over_features(tl.load(qkv + wide, exists, 0.0).to(tl.float32)) * scale
    keys = _over_sites(tl.load(qkv + HEADS * D + wide, exists, 0.0).to(tl.float32), sites, BLOCK_S, FRAMES)
    values = tl.load(qkv + 2 * HEADS * D + wide, exists, 0.0).to(DOT)
    weights = tl.where(meets, tl.dot(query.to(DOT), tl.trans(keys.to(DOT)), input_precision="ieee"), 0.0)
    result = tl.dot(weights.to(DOT), values, input_precision="ieee")
    tl.store(out + narrow, result.to(out.dtype.element_ty), exists)


@triton.jit
def linear_attention_bwd_kernel(
    grad,  # (frames, S, N * D)
    qkv,  # (frames, S, 3 * N * D)
    grad_qkv,  # (frames, S, 3 * N * D)
    frames,
    sites,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FRAMES: tl.constexpr,
):
    narrow, wide, exists, meets = rows_of(frames, sites, HEADS, D, BLOCK_S, FRAMES)
    query = _over_features(tl.load(qkv + wide, exists, 0.0).to(tl.float32))
    keys = _over_sites(tl.load(qkv + HEADS * D + wide, exists, 0.0).to(tl.float32), sites, BLOCK_S, FRAMES)
    values = tl.load(qkv + 2 * HEADS * D + wide, exists, 0.0).to(DOT)
    outer = (tl.load(grad + narrow, exists, 0.0).to(tl.float32) * scale).to(DOT)
    weights = tl.where(meets, tl.dot(query.to(DOT), tl.trans(keys.to(DOT)), input_precision="ieee"), 0.0)
    change = tl.dot(tl.trans(weights.to(DOT)), outer, input_precision="ieee")
    tl.store(grad_qkv + 2 * HEADS * D + wide, change.to(grad_qkv.dtype.element_ty), exists)
    slope = tl.where(meets, tl.dot(outer, tl.trans(values), input_precision="ieee"), 0.0).to(DOT)
    # Softmax backward: y (dy - sum(y dy)), over features for queries and over sites for keys.
    change = tl.dot(slope, keys.to(DOT), input_precision="ieee")
    change = query * (change - tl.sum(query * change, axis=1)[:, None])
    tl.store(grad_qkv + wide, change.to(grad_qkv.dtype.element_ty), exists)
    change = tl.dot(tl.trans(slope), query.to(DOT), input_precision="ieee")
    change = keys * (change - _frame_sums(keys * change, BLOCK_S, FRAMES))
    tl.store(grad_qkv + HEADS * D + wide, change.to(grad_qkv.dtype.element_ty), exists)


run = operation("linear_attention", linear_attention_fwd_kernel, linear_attention_bwd_kernel)
