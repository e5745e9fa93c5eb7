"""The operations as C++ for the CPU (csrc/cpu/denoiser), registered as torch.ops.gaitfast.*, gradients included.

Imported only where the compiled extension is (kernels/_dispatch.py). Here stand what PyTorch must know to trace them,
and which arguments they do not take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gaitfast._C  # noqa: F401  registers the operators

_ops = torch.ops.gaitfast

_MOST_PER_GROUP = 512
_MOST_CHANNELS = 4096
_MOST_ROWS = 64
_FEATURES = 32


def group_norm_film_silu(x, weight, bias, groups, scale, shift, eps) -> Tensor:
    return _ops.group_norm_film_silu(x, weight, bias, groups, scale, shift, eps)[0]


def film(time, condition, weight, bias, channels) -> tuple[tuple[Tensor, Tensor], ...]:
    rows = _ops.film(time, condition, weight, bias).split([c for c in channels for _ in range(2)], dim=1)
    return tuple(zip(rows[0::2], rows[1::2]))


RUN: dict[str, Callable] = {
    "film": film,
    "group_norm_film_silu": group_norm_film_silu,
    "layer_norm": _ops.layer_norm.default,
    "linear_attention": _ops.linear_attention.default,
    "spatial_attention": _ops.spatial_attention.default,
    "temporal_attention": _ops.temporal_attention.default,
}
"""Each operation, as gaitfast.kernels calls it."""


def refusal(operation: str, x: Tensor, *arguments) -> str | None:
    """Why `operation` does not take these arguments, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"no compiled kernel for {str(x.dtype).removeprefix('torch.')}"
    if operation == "group_norm_film_silu" and x.shape[-1] // arguments[2] > _MOST_PER_GROUP:
        return f"more than {_MOST_PER_GROUP} channels in a group"
    if operation == "layer_norm" and x.shape[-1] > _MOST_CHANNELS:
        return f"more than {_MOST_CHANNELS} channels"
    if operation.endswith("_attention"):
        return _attention_refusal(operation, x, arguments)
    return None


def _attention_refusal(operation: str, qkv: Tensor, arguments: tuple) -> str | None:
    dim_head = qkv.shape[3] // (3 * arguments[-1])
    if dim_head != _FEATURES:
        return f"heads of {dim_head} features, not {_FEATURES}"
    rows, kind = (qkv.shape[1], "frames") if operation == "temporal_attention" else (qkv.shape[2], "sites")
    if rows > _MOST_ROWS:
        return f"more than {_MOST_ROWS} {kind}"
    if operation == "temporal_attention" and arguments[1].requires_grad and torch.is_grad_enabled():
        return "no gradient of the rotation"
    return None


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register_fakes() -> None:
    """Shapes and types of the results, for torch.compile."""
    fake = torch.library.register_fake

    @fake("gaitfast::group_norm_film_silu")
    def _(x, weight, bias, groups, scale, shift, eps):
        return _like(x), x.new_empty((x.shape[0], 2, groups), dtype=torch.float32)

    @fake("gaitfast::group_norm_film_silu_backward")
    def _(grad, x, weight, bias, groups, scale, shift, stats):
        parameters = x.new_empty((2, x.shape[-1]), dtype=torch.float32)
        rows = x.new_empty((0 if scale is None else 2, x.shape[0], x.shape[-1]), dtype=torch.float32)
        return _like(x), parameters, rows

    @fake("gaitfast::layer_norm")
    def _(x, weight, eps):
        return _like(x)

    @fake("gaitfast::layer_norm_backward")
    def _(grad, x, weight, eps):
        return _like(x), weight.new_empty(weight.shape, dtype=torch.float32)

    def attention(qkv, *_):
        return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))

    def attention_backward(grad, qkv, *_):
        return _like(qkv)

    for name in ("temporal_attention", "spatial_attention", "linear_attention"):
        fake(f"gaitfast::{name}", attention)
    for name in ("spatial_attention", "linear_attention"):
        fake(f"gaitfast::{name}_backward", attention_backward)

    @fake("gaitfast::temporal_attention_backward")
    def _(grad, qkv, bias, rotation, heads):
        return _like(qkv), bias.new_empty(bias.shape, dtype=torch.float32)

    @fake("gaitfast::film")
    def _(time, condition, weight, bias):
        return weight.new_empty((time.shape[0], weight.shape[0]))


_register_fakes()
