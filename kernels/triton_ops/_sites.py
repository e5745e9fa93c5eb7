"""What attention over the sites of a frame shares: which rows a program holds, and the host's part of a launch.

A program takes one head of a few frames, so many that the matrix units have at least 32 rows. Frames share a square of
scores in which only the blocks of one frame count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, dot_type, launch, power_of_two, register, settled, type_refusal

_MOST_SITES = 64
_HEAD_WIDTHS = (16, 32, 64)


@triton.jit
def rows_of(frames, sites, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, FRAMES: tl.constexpr):
    """Of this program: element (FRAMES * BLOCK_S, D) of a (frames, S, N * D) tensor, whether it exists, and the same
    for a (frames, S, 3 * N * D) tensor; then (rows, rows) whether a key exists in a query's frame.
    """
    width: tl.constexpr = HEADS * D
    head = tl.program_id(0) % HEADS
    row = tl.arange(0, FRAMES * BLOCK_S)
    frame = (tl.program_id(0) // HEADS).to(tl.int64) * FRAMES + row // BLOCK_S
    site = row % BLOCK_S
    place = frame * sites + site
    feature = tl.arange(0, D)
    exists = ((frame < frames) & (site < sites))[:, None] & (feature < D)[None, :]
    narrow = place[:, None] * width + (head * D + feature)[None, :]
    wide = place[:, None] * (3 * width) + (head * D + feature)[None, :]
    key, key_site = row // BLOCK_S, row % BLOCK_S
    meets = ((row // BLOCK_S)[:, None] == key[None, :]) & (key_site < sites)[None, :]
    return narrow, wide, exists, meets


def config(qkv: Tensor, *, rows: int = 32) -> Config:
    """Whole frames in about `rows` rows; a warp for every 16 of them, two in float32 where scores go without mma."""
    sites = power_of_two(qkv.shape[2])
    frames = max(1, max(rows, 16) // sites)
    held = frames * sites
    warps = max(1, held // 16) * (2 if qkv.dtype == torch.float32 else 1)
    return {"BLOCK_S": sites, "FRAMES": frames, "num_warps": warps, "num_stages": 1}


def refusal(qkv: Tensor, heads: int) -> str | None:
    dim_head = qkv.shape[3] // (3 * heads)
    if qkv.shape[2] > _MOST_SITES:
        return f"more than {_MOST_SITES} sites"
    if dim_head not in _HEAD_WIDTHS:
        return f"heads of {dim_head} features, not {', '.join(map(str, _HEAD_WIDTHS))}"
    return type_refusal(qkv)


def operation(name: str, forward_kernel: triton.JITFunction, backward_kernel: triton.JITFunction) -> Callable:
    """torch.ops.gaitfast_triton.NAME(qkv, heads) and its gradient from kernels that take (..., frames, S, scale)."""

    def start(kernel: triton.JITFunction, direction: str, qkv: Tensor, heads: int, *tensors: Tensor) -> None:
        chosen = settled(f"{name}_{direction}", config(qkv))
        frames, sites, dim_head = qkv.shape[0] * qkv.shape[1], qkv.shape[2], qkv.shape[3] // (3 * heads)
        constants = {"HEADS": heads, "D": dim_head, "DOT": dot_type(qkv), **chosen}
        programs = heads * triton.cdiv(frames, chosen["FRAMES"])
        launch(kernel, programs, *tensors, frames, sites, dim_head**-0.5, **constants)

    def forward(qkv: Tensor, heads: int) -> Tensor:
        qkv = qkv.contiguous()
        out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
        start(forward_kernel, "fwd", qkv, heads, qkv, out)
        return out

    def backward(grad: Tensor, qkv: Tensor, heads: int) -> Tensor:
        grad, qkv = grad.contiguous(), qkv.contiguous()
        grad_qkv = torch.empty_like(qkv)
        start(backward_kernel, "bwd", qkv, heads, grad, qkv, grad_qkv)
        return grad_qkv

    def save(ctx, inputs, output):
        qkv, ctx.heads = inputs
        ctx.save_for_backward(qkv)

    def gradients(ctx, grad):
        return backward_op(grad, *ctx.saved_tensors, ctx.heads), None

    backward_op = register(
        f"{name}_backward(Tensor grad, Tensor qkv, int heads) -> Tensor",
        backward,
        lambda grad, qkv, heads: torch.empty_like(qkv, memory_format=torch.contiguous_format),
    )
    return register(
        f"{name}(Tensor qkv, int heads) -> Tensor",
        forward,
        lambda qkv, heads: qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3)),
        save,
        gradients,
    )
