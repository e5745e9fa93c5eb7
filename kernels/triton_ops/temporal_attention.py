"""Attention over frames, from the qkv projection to the heads' outputs in one kernel each way.

Floor: forward reads (B,T,S,3ND) and writes (B,T,S,ND), 4 B T S N D elements; backward reads the projection and the
gradient and writes the projection's gradient, 7 B T S N D. At B = 64, 8 x 8 sites, 30 frames, 8 x 32 features in
bfloat16: 0.25 GB and 0.44 GB. Arithmetic is 4 T and 10 T operations per element of the output, far below the ridge.

A program takes one head of one sample and walks over sites, whose frames lie S * 3ND elements apart, each a piece of
D features, 64 bytes: two whole sectors. Programs of the heads of one site are neighbours, so that pieces of one row
are read together. The bias stays in registers over the walk, and so does its gradient, which every program stores for
itself; summing these partial results is the second stage, without atomics and in a fixed order. Scores, at most
64 x 64, never leave the chip; backward computes them again.

Features are rotated in adjacent pairs, which lie in one thread: split, turn, join, without exchange between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, dot_type, launch, power_of_two, register, settled, type_refusal

_MOST_FRAMES = 64
_HEAD_WIDTHS = (16, 32, 64)


@triton.jit
def _turned(tile, cos, sin):
    """Interleaved pairs of (T, D) turned by the angles (T, D / 2)."""
    even, odd = tl.split(tl.reshape(tile, (cos.shape[0], cos.shape[1], 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), tile.shape)


@triton.jit(do_not_specialize=["SITES"])
def temporal_attention_fwd_kernel(
    qkv,  # (B, T, S, 3 * N * D)
    bias,  # (N, T, T), any strides
    rotation,  # (T, D / 2, 2)
    out,  # (B, T, S, N * D)
    frames,  # T
    sites,  # S
    bias_stride_n,
    bias_stride_q,
    bias_stride_k,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SITES,  # of a program
):
    head = tl.program_id(0) % HEADS
    walks = tl.cdiv(sites, SITES)
    walk = tl.program_id(0) // HEADS % walks
    batch = (tl.program_id(0) // HEADS // walks).to(tl.int64)
    width: tl.constexpr = HEADS * D
    frame, key, feature, pair = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_T), tl.arange(0, D), tl.arange(0, D // 2)
    mask = (frame < frames)[:, None] & (feature < D)[None, :]
    angle = frame[:, None] * D + pair[None, :] * 2
    known = (frame < frames)[:, None] & (pair < D // 2)[None, :]
    cos = tl.load(rotation + angle, known, 0.0)
    sin = tl.load(rotation + angle + 1, known, 0.0)
    cell = head * bias_stride_n + frame[:, None] * bias_stride_q + key[None, :] * bias_stride_k
    square = (frame < frames)[:, None] & (key < frames)[None, :]
    shift = tl.load(bias + cell, square, 0.0).to(tl.float32)
    shift = tl.where((key < frames)[None, :], shift, float("-inf"))
    for site in range(walk * SITES, tl.minimum(walk * SITES + SITES, sites)):
        row = qkv + (batch * frames * sites + site) * 3 * width + head * D
        place = frame[:, None] * (sites * 3 * width) + feature[None, :]
        query = _turned(tl.load(row + place, mask, 0.0).to(tl.float32), cos, sin) * scale
        keys = _turned(tl.load(row + width + place, mask, 0.0).to(tl.float32), cos, sin)
        values = tl.load(row + 2 * width + place, mask, 0.0).to(DOT)
        scores = tl.dot(query.to(DOT), tl.trans(keys.to(DOT)), input_precision="ieee") + shift
        weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        # Divided first: the products then round as the definition's do.
        weights = weights * (1.0 / tl.sum(weights, axis=1))[:, None]
        result = tl.dot(weights.to(DOT), values, input_precision="ieee")
        target = out + (batch * frames * sites + site) * width + head * D
        tl.store(target + frame[:, None] * (sites * width) + feature[None, :], result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["SITES"])
def temporal_attention_bwd_kernel(
    grad,  # (B, T, S, N * D)
    qkv,  # (B, T, S, 3 * N * D)
    bias,  # (N, T, T), any strides
    rotation,  # (T, D / 2, 2)
    grad_qkv,  # (B, T, S, 3 * N * D)
    grad_bias,  # (B * walks, N, T, T): each program's part
    frames,
    sites,
    bias_stride_n,
    bias_stride_q,
    bias_stride_k,
    scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEEP_BIAS: tl.constexpr,  # in registers, or read it again for each site
    SITES,
):
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS
    walks = tl.cdiv(sites, SITES)
    walk = part % walks
    batch = (part // walks).to(tl.int64)
    width: tl.constexpr = HEADS * D
    frame, key, feature, pair = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_T), tl.arange(0, D), tl.arange(0, D // 2)
    mask = (frame < frames)[:, None] & (feature < D)[None, :]
    angle = frame[:, None] * D + pair[None, :] * 2
    known = (frame < frames)[:, None] & (pair < D // 2)[None, :]
    cos = tl.load(rotation + angle, known, 0.0)
    sin = tl.load(rotation + angle + 1, known, 0.0)
    cell = head * bias_stride_n + frame[:, None] * bias_stride_q + key[None, :] * bias_stride_k
    square = (frame < frames)[:, None] & (key < frames)[None, :]
    if KEEP_BIAS:
        shift = tl.load(bias + cell, square, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for site in range(walk * SITES, tl.minimum(walk * SITES + SITES, sites)):
        base = (batch * frames * sites + site) * 3 * width + head * D
        place = frame[:, None] * (sites * 3 * width) + feature[None, :]
        row = qkv + base
        query = (_turned(tl.load(row + place, mask, 0.0).to(tl.float32), cos, sin) * scale).to(DOT)
        keys = _turned(tl.load(row + width + place, mask, 0.0).to(tl.float32), cos, sin).to(DOT)
        values = tl.load(row + 2 * width + place, mask, 0.0).to(DOT)
        source = grad + (batch * frames * sites + site) * width + head * D
        # Rows beyond the last frame are zero here, so they add nothing to any product below.
        outer = tl.load(source + frame[:, None] * (sites * width) + feature[None, :], mask, 0.0).to(DOT)
        if not KEEP_BIAS:
            shift = tl.load(bias + cell, square, 0.0).to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") + shift
        scores = tl.where((key < frames)[None, :], scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        weights = weights * (1.0 / tl.sum(weights, axis=1))[:, None]
        target = grad_qkv + base
        change = tl.dot(tl.trans(weights.to(DOT)), outer, input_precision="ieee")
        tl.store(target + 2 * width + place, change.to(grad_qkv.dtype.element_ty), mask)
        slope = tl.dot(outer, tl.trans(values), input_precision="ieee")
        slope = weights * (slope - tl.sum(weights * slope, axis=1)[:, None])
        total += slope
        slope = slope.to(DOT)
        # Turning back is turning by the opposite angle.
        change = _turned(tl.dot(slope, keys, input_precision="ieee"), cos, -sin) * scale
        tl.store(target + place, change.to(grad_qkv.dtype.element_ty), mask)
        change = _turned(tl.dot(tl.trans(slope), query, input_precision="ieee"), cos, -sin)
        tl.store(target + width + place, change.to(grad_qkv.dtype.element_ty), mask)
    cell = (part.to(tl.int64) * HEADS + head) * frames * frames + frame[:, None] * frames + key[None, :]
    tl.store(grad_bias + cell, total, square)


def config(qkv: Tensor, heads: int, *, backward: bool) -> Config:
    """As many sites to a program as still leave thousands of them; warps and stages so that nothing spills.

    Products of float32 go without the matrix units and want twice the warps.
    """
    batch, frames, sites, _ = qkv.shape
    block, full = power_of_two(frames, least=16), qkv.dtype == torch.float32
    programs = 2048 if backward else 4096
    chosen = {
        "BLOCK_T": block,
        "SITES": max(1, min(sites, batch * heads * sites // programs)),
        "num_warps": {16: 1, 32: 2, 64: 8}[block] * (2 if full and block < 64 else 1),
        "num_stages": 1 if full and backward else 2,
    }
    return {**chosen, "KEEP_BIAS": block < 64 or full} if backward else chosen


def _arguments(qkv: Tensor, bias: Tensor, heads: int, chosen: Config) -> tuple[tuple, dict]:
    """What both kernels take last, and their constants."""
    dim_head = qkv.shape[3] // (3 * heads)
    numbers = (qkv.shape[1], qkv.shape[2], *bias.stride(), dim_head**-0.5)
    return numbers, {"HEADS": heads, "D": dim_head, "DOT": dot_type(qkv), **chosen}


def _forward(qkv: Tensor, bias: Tensor, rotation: Tensor, heads: int) -> Tensor:
    qkv, rotation = qkv.contiguous(), rotation.contiguous()
    batch, _, sites, width = qkv.shape
    chosen = settled("temporal_attention_fwd", config(qkv, heads, backward=False))
    numbers, constants = _arguments(qkv, bias, heads, chosen)
    out = torch.empty((*qkv.shape[:3], width // 3), dtype=qkv.dtype, device=qkv.device)
    programs = batch * heads * triton.cdiv(sites, chosen["SITES"])
    launch(temporal_attention_fwd_kernel, programs, qkv, bias, rotation, out, *numbers, **constants)
    return out


def _backward(grad: Tensor, qkv: Tensor, bias: Tensor, rotation: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    grad, qkv, rotation = grad.contiguous(), qkv.contiguous(), rotation.contiguous()
    batch, frames, sites, _ = qkv.shape
    chosen = settled("temporal_attention_bwd", config(qkv, heads, backward=True))
    numbers, constants = _arguments(qkv, bias, heads, chosen)
    walks = triton.cdiv(sites, chosen["SITES"])
    grad_qkv = torch.empty_like(qkv)
    parts = torch.empty((batch * walks, heads, frames, frames), dtype=torch.float32, device=qkv.device)
    launch(
        temporal_attention_bwd_kernel,
        batch * heads * walks,
        *(grad, qkv, bias, rotation, grad_qkv, parts, *numbers),
        **constants,
    )
    return grad_qkv, parts.sum(dim=0)


def _fake_forward(qkv, bias, rotation, heads):
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _fake_backward(grad, qkv, bias, rotation, heads):
    grad_bias = bias.new_empty(bias.shape, dtype=torch.float32)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), grad_bias


def _save(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    qkv, bias, rotation = ctx.saved_tensors
    grad_qkv, grad_bias = _backward_op(grad, qkv, bias, rotation, ctx.heads)
    return grad_qkv, grad_bias.to(bias.dtype), None, None


_backward_op = register(
    "temporal_attention_backward(Tensor grad, Tensor qkv, Tensor bias, Tensor rotation, int heads) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
run = register(
    "temporal_attention(Tensor qkv, Tensor bias, Tensor rotation, int heads) -> Tensor",
    _forward,
    _fake_forward,
    _save,
    _gradients,
)


def refusal(qkv, bias, rotation, heads) -> str | None:
    dim_head = qkv.shape[3] // (3 * heads)
    if qkv.shape[1] > _MOST_FRAMES:
        return f"more than {_MOST_FRAMES} frames"
    if dim_head not in _HEAD_WIDTHS:
        return f"heads of {dim_head} features, not {', '.join(map(str, _HEAD_WIDTHS))}"
    if rotation.dtype != torch.float32:
        return "rotation is not float32"
    if rotation.requires_grad and torch.is_grad_enabled():
        return "no gradient of the rotation"
    return type_refusal(qkv, bias)
