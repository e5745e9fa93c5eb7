"""Attention over the sites of a frame, from the qkv projection to the heads' outputs in one kernel each way.

Floor: 4 B T S N D elements forward, 7 backward. Only the middle of the network uses it, over 2 x 2 sites: at B = 64 and
30 frames 16 MB and 28 MB in bfloat16, a few microseconds; what it saves are launches. Eight such frames share a 32 x 32
square of scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sites import operation, refusal, rows_of

__all__ = ["refusal", "run"]


@triton.jit
def spatial_attention_fwd_kernel(
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
    query = (tl.load(qkv + wide, exists, 0.0).to(tl.float32) * scale).to(DOT)
    keys = tl.load(qkv + HEADS * D + wide, exists, 0.0).to(DOT)
    values = tl.load(qkv + 2 * HEADS * D + wide, exists, 0.0).to(DOT)
    scores = tl.where(meets, tl.dot(query, tl.trans(keys), input_precision="ieee"), float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights * (1.0 / tl.sum(weights, axis=1))[:, None]
    result = tl.dot(weights.to(DOT), values, input_precision="ieee")
    tl.store(out + narrow, result.to(out.dtype.element_ty), exists)


@triton.jit
def spatial_attention_bwd_kernel(
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
    query = (tl.load(qkv + wide, exists, 0.0).to(tl.float32) * scale).to(DOT)
    keys = tl.load(qkv + HEADS * D + wide, exists, 0.0).to(DOT)
    values = tl.load(qkv + 2 * HEADS * D + wide, exists, 0.0).to(DOT)
    outer = tl.load(grad + narrow, exists, 0.0).to(DOT)
    scores = tl.where(meets, tl.dot(query, tl.trans(keys), input_precision="ieee"), float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights * (1.0 / tl.sum(weights, axis=1))[:, None]
    change = tl.dot(tl.trans(weights.to(DOT)), outer, input_precision="ieee")
    tl.store(grad_qkv + 2 * HEADS * D + wide, change.to(grad_qkv.dtype.element_ty), exists)
    slope = tl.dot(outer, tl.trans(values), input_precision="ieee")
    slope = (weights * (slope - tl.sum(weights * slope, axis=1)[:, None])).to(DOT)
    change = tl.dot(slope, keys, input_precision="ieee") * scale
    tl.store(grad_qkv + wide, change.to(grad_qkv.dtype.element_ty), exists)
    change = tl.dot(tl.trans(slope), query, input_precision="ieee")
    tl.store(grad_qkv + HEADS * D + wide, change.to(grad_qkv.dtype.element_ty), exists)


run = operation("spatial_attention", spatial_attention_fwd_kernel, spatial_attention_bwd_kernel)
