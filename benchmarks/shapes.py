"""The calls that a denoiser makes to its fused operations, taken from the network itself, and arguments for them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from gaitfast import kernels
from gaitfast.models.denoiser import LATENT_CHANNELS, build_denoiser


class Call(NamedTuple):
    """One kind of call: shapes of tensors (None where there is none), other values as they are."""

    operation: str
    arguments: tuple
    """A tuple of sizes stands for a tensor."""
    count: int
    """How often a forward pass makes it."""

    @property
    def label(self) -> str:
        x = "x".join(map(str, self.arguments[0]))
        modulated = self.operation == "group_norm_film_silu" and self.arguments[4] is not None
        return f"{self.operation} {x}{' modulated' if modulated else ''}"


class _Size(tuple):
    """The sizes of a tensor, told apart from other tuples."""


def denoiser_calls(dim: int = 64, batch: int = 64, frames: int = 30, cond_dim: int = 256) -> list[Call]:
    """Every kind of call in a forward pass over (batch, 4, frames, 8, 8), in order of first use. Computes nothing."""
    seen: Counter = Counter()
    run = kernels._dispatch.run

    def note(operation, *arguments):
        seen[operation, tuple(_Size(a.shape) if isinstance(a, Tensor) else a for a in arguments)] += 1
        return getattr(kernels.reference, operation)(*arguments)

    kernels._dispatch.run = note
    try:
        with torch.no_grad():
            model = build_denoiser(dim, cond_dim).to("meta")
            latents = torch.empty(batch, LATENT_CHANNELS, frames, 8, 8, device="meta")
            model(latents, torch.empty(batch, device="meta"), torch.empty(batch, cond_dim, device="meta"))
    finally:
        kernels._dispatch.run = run
    return [Call(operation, arguments, count) for (operation, arguments), count in seen.items()]


def tensors(call: Call, dtype: torch.dtype, device: str, *, empty: bool = False, seed: int = 0) -> tuple:
    """Arguments of `call`: activations in `dtype`, parameters and tables in float32, as under autocast.

    Normal random numbers, or memory as it is with `empty`.
    """
    generator = torch.Generator("cpu" if device == "meta" else device).manual_seed(seed)
    out = []
    for i, value in enumerate(call.arguments):
        if isinstance(value, _Size):
            kind = dtype if i == 0 and call.operation != "film" else torch.float32
            if empty:
                value = torch.empty(value, dtype=kind, device=device)
            elif call.operation == "temporal_attention" and i == 2:
                angle = torch.rand(value[:2], device=device, generator=generator) * 6
                value = torch.stack((angle.cos(), angle.sin()), dim=-1)
            else:
                value = torch.randn(value, dtype=torch.float32, device=device, generator=generator).to(kind)
        out.append(value)
    return tuple(out)


def moved_elements(call: Call) -> tuple[int, int]:
    """Elements of activation that must cross device memory at least: forward, backward."""
    x = torch.Size(call.arguments[0]).numel()
    if call.operation.endswith("attention"):
        return x + x // 3, 2 * x + x // 3
    if call.operation == "film":
        weight = torch.Size(call.arguments[2]).numel()
        return weight, 2 * weight
    return 2 * x, 3 * x


def flops(call: Call) -> tuple[int, int]:
    """Operations of the matrix products that a call must do at least, two per multiply-add: forward, backward.

    Attention computes its weights again in the backward pass.
    """
    if call.operation == "film":
        once = 2 * call.arguments[0][0] * torch.Size(call.arguments[2]).numel()
        return once, 2 * once
    if not call.operation.endswith("attention"):
        return 0, 0
    batch, frames, sites, width = call.arguments[0]
    partners = {"temporal_attention": frames, "spatial_attention": sites}
    # Linear attention: each row of 32 features meets a context of 32 x 32, twice.
    dim_head = width // (3 * call.arguments[-1])
    once = 4 * batch * frames * sites * (width // 3) * partners.get(call.operation, dim_head)
    return once, 5 * once // 2
