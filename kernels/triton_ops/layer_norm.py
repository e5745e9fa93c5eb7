"""Layer norm over channels, one kernel each way.

Floor: x in and y out forward, x and dy in and dx out backward: 2 N and 3 N elements. Rows lie one after another, so a
block of rows is one piece of memory. The gradient of the weight takes two stages: each program adds up its rows, then
the programs' sums are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, launch, power_of_two, register, settled, type_refusal

_MOST_CHANNELS = 2048
_PROGRAMS = 1024


@triton.jit
def _normalised(tile, known, channels, eps):
    """(x - mean) / deviation of each row, and 1 / deviation; zero where not known."""
    centred = tl.where(known, tile - (tl.sum(tile, axis=1) / channels)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def layer_norm_fwd_kernel(
    x,  # (R, C)
    weight,  # (C,)
    y,  # (R, C)
    rows,  # R
    channels,  # C
    eps,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    known = (row < rows)[:, None] & (channel < channels)[None, :]
    offsets = row[:, None] * channels + channel[None, :]
    n, _ = _normalised(tl.load(x + offsets, known, 0.0).to(tl.float32), known, channels, eps)
    gain = tl.load(weight + channel, channel < channels, 0.0).to(tl.float32)
    tl.store(y + offsets, (n * gain[None, :]).to(y.dtype.element_ty), known)


@triton.jit
def layer_norm_bwd_kernel(
    grad,  # (R, C)
    x,  # (R, C)
    weight,  # (C,)
    grad_x,  # (R, C)
    parts,  # (programs, C): gradients of the weight
    rows,
    channels,
    eps,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    channel = tl.arange(0, BLOCK_C)
    gain = tl.load(weight + channel, channel < channels, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        known = (row < rows)[:, None] & (channel < channels)[None, :]
        offsets = row[:, None] * channels + channel[None, :]
        n, inverse = _normalised(tl.load(x + offsets, known, 0.0).to(tl.float32), known, channels, eps)
        slope = tl.load(grad + offsets, known, 0.0).to(tl.float32)
        total += slope * n
        slope *= gain[None, :]
        level = tl.sum(slope, axis=1) / channels
        along = tl.sum(slope * n, axis=1) / channels
        result = (slope - level[:, None] - n * along[:, None]) * inverse[:, None]
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), known)
    place = tl.program_id(0) * channels + channel
    tl.store(parts + place, tl.sum(total, axis=0), channel < channels)


def config(x: Tensor) -> Config:
    """Sixteen elements to a thread of four warps, and at least one row."""
    block = power_of_two(x.shape[-1])
    return {"BLOCK_C": block, "BLOCK_R": max(1, 2048 // block), "num_warps": 4, "num_stages": 1}


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    chosen = settled("layer_norm_fwd", config(x))
    y = torch.empty_like(x)
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    programs = triton.cdiv(rows, chosen["BLOCK_R"])
    launch(layer_norm_fwd_kernel, programs, x, weight.contiguous(), y, rows, channels, eps, **chosen)
    return y


def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    chosen = settled("layer_norm_bwd", config(x))
    grad_x = torch.empty_like(x)
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    programs = min(_PROGRAMS, triton.cdiv(rows, chosen["BLOCK_R"]))
    parts = torch.empty((programs, channels), dtype=torch.float32, device=x.device)
    arguments = (grad, x, weight.contiguous(), grad_x, parts, rows, channels, eps)
    launch(layer_norm_bwd_kernel, programs, *arguments, **chosen)
    return grad_x, parts.sum(dim=0)


def _fake_forward(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad, x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(
        weight.shape, dtype=torch.float32
    )


def _save(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = _backward_op(grad, x, weight, ctx.eps)
    return grad_x, grad_weight.to(weight.dtype), None


_backward_op = register(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
run = register("layer_norm(Tensor x, Tensor weight, float eps) -> Tensor", _forward, _fake_forward, _save, _gradients)


def refusal(x, weight, eps) -> str | None:
    if x.shape[-1] > _MOST_CHANNELS:
        return f"more than {_MOST_CHANNELS} channels"
    return type_refusal(x, weight)
