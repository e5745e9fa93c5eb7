"""GroupNorm, scale and shift, SiLU in one kernel each way.

Floor: N elements of activation cross device memory twice forward (x in, y out) and three times backward (x and dy in,
dx out); the rest, a few numbers per channel, is nothing. Eager PyTorch moves about 9 N and 15 N.

Channels lie last, so a group of C/G = 2 channels is a column of 4-byte pieces. A program therefore takes whole groups
that together fill 32 bytes, one memory sector, over all frames and sites of a sample: every sector is read by one
program. Where these fit its registers x is read once; else it comes in chunks of rows and is read again for the
result, from the cache, which holds the 60 KiB of a program at 30 x 8 x 8.

Statistics are sums of x - m and (x - m)^2 with m the mean of the first chunk. If that chunk is a part f of all rows,
(mean - m)^2 <= variance (1 - f) / f, so the difference of the sums loses at most a factor 1 / f: 2 to 8 here, whatever
the data. Without m it would lose everything where the mean is large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, launch, power_of_two, register, settled, type_refusal

_SECTOR = 32
_MOST_PER_GROUP = 64


@triton.jit
def _group_total(value, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per channel (BLOCK_C,) the sum of `value` over its group."""
    group = tl.arange(0, BLOCK_C) // PER_GROUP
    return tl.sum(tl.where(group[:, None] == group[None, :], value[None, :], 0.0), axis=1)


# A count of 1 would become a constant without a type.
@triton.jit(do_not_specialize=["positions"])
def group_norm_film_silu_fwd_kernel(
    x,  # (B, P, C)
    weight,  # (C,)
    bias,  # (C,)
    scale,  # (B, C), rows scale_stride apart
    shift,  # (B, C), rows shift_stride apart
    y,  # (B, P, C)
    stats,  # (B, 2, G): mean, 1 / deviation
    positions,  # P
    channels,  # C
    scale_stride,
    shift_stride,
    eps,
    PER_GROUP: tl.constexpr,
    MODULATED: tl.constexpr,
    ONE_CHUNK: tl.constexpr,  # BLOCK_P >= P
    CHANNELS: tl.constexpr,  # of a program, whole groups
    BLOCK_C: tl.constexpr,  # the power of two around them
    BLOCK_P: tl.constexpr,
):
    blocks = channels // CHANNELS
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    channel = (tl.program_id(0) % blocks) * CHANNELS + lane
    valid = lane < CHANNELS
    row = tl.arange(0, BLOCK_P)
    offsets = sample * positions * channels + row[:, None] * channels + channel[None, :]
    count = (positions * PER_GROUP).to(tl.float32)

    mask = (row < positions)[:, None] & valid[None, :]
    tile = tl.load(x + offsets, mask, 0.0)
    chunk = tl.minimum(positions, BLOCK_P) * PER_GROUP
    middle = _group_total(tl.sum(tile.to(tl.float32), axis=0), PER_GROUP, BLOCK_C) / chunk
    centred = tl.where(mask, tile.to(tl.float32) - middle[None, :], 0.0)
    first = tl.sum(centred, axis=0)
    second = tl.sum(centred * centred, axis=0)
    if not ONE_CHUNK:
        for start in range(BLOCK_P, positions, BLOCK_P):
            mask = (row < positions - start)[:, None] & valid[None, :]
            tile = tl.load(x + offsets + start * channels, mask, 0.0)
            centred = tl.where(mask, tile.to(tl.float32) - middle[None, :], 0.0)
            first += tl.sum(centred, axis=0)
            second += tl.sum(centred * centred, axis=0)
    rest = _group_total(first, PER_GROUP, BLOCK_C) / count
    variance = _group_total(second, PER_GROUP, BLOCK_C) / count - rest * rest
    mean = middle + rest
    inverse = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    # One lane of each group stores its statistics.
    group = stats + sample * 2 * (channels // PER_GROUP) + channel // PER_GROUP
    leads = valid & (lane % PER_GROUP == 0)
    tl.store(group, mean, leads)
    tl.store(group + channels // PER_GROUP, inverse, leads)

    gain = tl.load(weight + channel, valid, 0.0).to(tl.float32)
    offset = tl.load(bias + channel, valid, 0.0).to(tl.float32)
    if MODULATED:
        factor = tl.load(scale + sample * scale_stride + channel, valid, 0.0).to(tl.float32) + 1.0
        gain *= factor
        offset = offset * factor + tl.load(shift + sample * shift_stride + channel, valid, 0.0).to(tl.float32)
    gain *= inverse
    if ONE_CHUNK:
        z = (tile.to(tl.float32) - mean[None, :]) * gain[None, :] + offset[None, :]
        tl.store(y + offsets, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask)
    else:
        for start in range(0, positions, BLOCK_P):
            mask = (row < positions - start)[:, None] & valid[None, :]
            tile = tl.load(x + offsets + start * channels, mask, 0.0)
            z = (tile.to(tl.float32) - mean[None, :]) * gain[None, :] + offset[None, :]
            tl.store(y + offsets + start * channels, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask)


@triton.jit
def _backward_tile(x, grad, mean, inverse, gain, offset):
    """n = (x - mean) * inverse, and the gradient at n * gain + offset, the argument of the SiLU."""
    n = (x.to(tl.float32) - mean[None, :]) * inverse[None, :]
    z = n * gain[None, :] + offset[None, :]
    s = tl.sigmoid(z)
    return n, grad.to(tl.float32) * (s + z * s * (1.0 - s))


@triton.jit(do_not_specialize=["batch", "positions"])
def group_norm_film_silu_bwd_kernel(
    grad,  # (B, P, C)
    x,  # (B, P, C)
    weight,  # (C,)
    bias,  # (C,)
    scale,  # (B, C), rows scale_stride apart
    shift,  # (B, C), rows shift_stride apart
    stats,  # (B, 2, G)
    grad_x,  # (B, P, C)
    sums,  # (2 or 4, B, C): each sample's gradients of weight, bias, scale, shift
    batch,  # B
    positions,  # P
    channels,  # C
    scale_stride,
    shift_stride,
    PER_GROUP: tl.constexpr,
    MODULATED: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks = channels // CHANNELS
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    channel = (tl.program_id(0) % blocks) * CHANNELS + lane
    valid = lane < CHANNELS
    row = tl.arange(0, BLOCK_P)
    offsets = sample * positions * channels + row[:, None] * channels + channel[None, :]
    count = (positions * PER_GROUP).to(tl.float32)
    group = stats + sample * 2 * (channels // PER_GROUP) + channel // PER_GROUP
    mean = tl.load(group, valid, 0.0)
    inverse = tl.load(group + channels // PER_GROUP, valid, 0.0)
    gain = tl.load(weight + channel, valid, 0.0).to(tl.float32)
    offset = tl.load(bias + channel, valid, 0.0).to(tl.float32)
    weight_value, bias_value = gain, offset
    factor = tl.full((BLOCK_C,), 1.0, tl.float32)
    if MODULATED:
        factor = tl.load(scale + sample * scale_stride + channel, valid, 0.0).to(tl.float32) + 1.0
        gain *= factor
        offset = offset * factor + tl.load(shift + sample * shift_stride + channel, valid, 0.0).to(tl.float32)

    # Where nothing was loaded the gradient is zero, so rows and lanes beyond the end add nothing.
    mask = (row < positions)[:, None] & valid[None, :]
    n, dz = _backward_tile(
        tl.load(x + offsets, mask, 0.0), tl.load(grad + offsets, mask, 0.0), mean, inverse, gain, offset
    )
    sum_dz = tl.sum(dz, axis=0)
    sum_dz_n = tl.sum(dz * n, axis=0)
    if not ONE_CHUNK:
        for start in range(BLOCK_P, positions, BLOCK_P):
            mask = (row < positions - start)[:, None] & valid[None, :]
            place = offsets + start * channels
            n, dz = _backward_tile(
                tl.load(x + place, mask, 0.0), tl.load(grad + place, mask, 0.0), mean, inverse, gain, offset
            )
            sum_dz += tl.sum(dz, axis=0)
            sum_dz_n += tl.sum(dz * n, axis=0)
    plane = batch.to(tl.int64) * channels
    cell = sums + sample * channels + channel
    tl.store(cell, sum_dz_n * factor, valid)
    tl.store(cell + plane, sum_dz * factor, valid)
    if MODULATED:
        tl.store(cell + 2 * plane, sum_dz_n * weight_value + sum_dz * bias_value, valid)
        tl.store(cell + 3 * plane, sum_dz, valid)

    # d/dx = inverse * (dn - mean(dn) - n * mean(dn * n)) with dn = dz * gain and means over the group
    steep = gain * inverse
    level = _group_total(steep * sum_dz, PER_GROUP, BLOCK_C) / count
    slope = _group_total(steep * sum_dz_n, PER_GROUP, BLOCK_C) / count
    if ONE_CHUNK:
        result = dz * steep[None, :] - level[None, :] - n * slope[None, :]
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask)
    else:
        for start in range(0, positions, BLOCK_P):
            mask = (row < positions - start)[:, None] & valid[None, :]
            place = offsets + start * channels
            n, dz = _backward_tile(
                tl.load(x + place, mask, 0.0), tl.load(grad + place, mask, 0.0), mean, inverse, gain, offset
            )
            result = dz * steep[None, :] - level[None, :] - n * slope[None, :]
            tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask)


def config(x: Tensor, groups: int, *, per_thread: int) -> Config:
    """Channels that fill a sector or hold a group; rows and warps so that a thread holds `per_thread` elements.

    Up to 16 warps hold all rows at once. Otherwise 8 warps take them in chunks, so that two programs fit a
    multiprocessor and one reads while the other computes.
    """
    channels, positions = x.shape[-1], x[0].numel() // x.shape[-1]
    width = channels // groups
    while width * x.element_size() < _SECTOR and channels % (width * 2) == 0:
        width *= 2
    block_c = power_of_two(width)
    rows = power_of_two(positions)
    warps = max(1, rows * block_c // (per_thread * 32))
    if warps > 16:
        warps, rows = 8, max(1, 8 * 32 * per_thread // block_c)
    return {"CHANNELS": width, "BLOCK_C": block_c, "BLOCK_P": rows, "num_warps": warps, "num_stages": 1}


def _constants(chosen: Config, x: Tensor, groups: int, modulated: bool) -> dict:
    positions = x[0].numel() // x.shape[-1]
    return {
        **chosen,
        "PER_GROUP": x.shape[-1] // groups,
        "MODULATED": modulated,
        "ONE_CHUNK": chosen["BLOCK_P"] >= positions,
    }


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    batch, channels = x.shape[0], x.shape[-1]
    chosen = settled("group_norm_film_silu_fwd", config(x, groups, per_thread=32))
    y = torch.empty_like(x)
    stats = torch.empty((batch, 2, groups), dtype=torch.float32, device=x.device)
    scale, shift, modulated = _rows(weight, scale, shift)
    launch(
        group_norm_film_silu_fwd_kernel,
        batch * (channels // chosen["CHANNELS"]),
        *(x, weight.contiguous(), bias.contiguous(), scale, shift, y, stats),
        *(x[0].numel() // channels, channels, scale.stride(0), shift.stride(0), eps),
        **_constants(chosen, x, groups, modulated),
    )
    return y, stats


def _rows(weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """Scale and shift with adjacent channels; where there are none, something that the kernel never reads."""
    if scale is None or shift is None:
        return weight, weight, False
    return *(t if t.stride(1) == 1 else t.contiguous() for t in (scale, shift)), True


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    stats: Tensor,
) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    batch, channels = x.shape[0], x.shape[-1]
    chosen = settled("group_norm_film_silu_bwd", config(x, groups, per_thread=16))
    grad_x = torch.empty_like(x)
    scale, shift, modulated = _rows(weight, scale, shift)
    sums = torch.empty((4 if modulated else 2, batch, channels), dtype=torch.float32, device=x.device)
    launch(
        group_norm_film_silu_bwd_kernel,
        batch * (channels // chosen["CHANNELS"]),
        *(grad, x, weight.contiguous(), bias.contiguous(), scale, shift, stats, grad_x, sums),
        *(batch, x[0].numel() // channels, channels, scale.stride(0), shift.stride(0)),
        **_constants(chosen, x, groups, modulated),
    )
    return grad_x, sums


def _fake_forward(x, weight, bias, groups, scale, shift, eps):
    stats = x.new_empty((x.shape[0], 2, groups), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), stats


def _fake_backward(grad, x, weight, bias, groups, scale, shift, stats):
    sums = x.new_empty((2 if scale is None else 4, x.shape[0], x.shape[-1]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), sums


def _save(ctx, inputs, output):
    x, weight, bias, ctx.groups, scale, shift, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1])


def _gradients(ctx, grad, _):
    x, weight, bias, scale, shift, stats = ctx.saved_tensors
    grad_x, sums = _backward_op(grad, x, weight, bias, ctx.groups, scale, shift, stats)
    grad_weight, grad_bias = sums[:2].sum(dim=1).unbind()
    rows = (None, None) if scale is None else (sums[2].to(scale.dtype), sums[3].to(shift.dtype))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, *rows, None


_backward_op = register(
    "group_norm_film_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, int groups, "
    "Tensor? scale, Tensor? shift, Tensor stats) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_forward_op = register(
    "group_norm_film_silu(Tensor x, Tensor weight, Tensor bias, int groups, Tensor? scale, Tensor? shift, "
    "float eps) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _save,
    _gradients,
)


def refusal(x, weight, bias, groups, scale, shift, eps) -> str | None:
    if x.shape[-1] // groups > _MOST_PER_GROUP:
        return f"more than {_MOST_PER_GROUP} channels in a group"
    return type_refusal(x, weight, bias, scale, shift)


def run(x, weight, bias, groups, scale, shift, eps) -> Tensor:
    return _forward_op(x, weight, bias, groups, scale, shift, eps)[0]
