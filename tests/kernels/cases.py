"""The operations on random arguments, compared with float64 and with plain PyTorch.

The rule: a result's distance to float64 is at most twice that of the reference operation in the same type.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gaitfast import kernels

FLOOR = 4 * 2**-23
"""Relative distance that is no fault: four roundings of float32, in which every kernel accumulates. It decides where a
result is a handful of numbers, on which plain PyTorch can be right by luck."""


class Side(NamedTuple):
    """An implementation in one type, and how many times plain PyTorch's distance to float64 it may have."""

    name: str
    level: str | None
    """GAITFAST_CPU of a compiled one."""
    device: str
    dtype: torch.dtype
    factor: float = 2.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation_table(frames: int, dim_head: int) -> Tensor:
    angle = torch.arange(frames)[:, None] * 100.0 ** -(torch.arange(0, dim_head, 2).double() / dim_head)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def group_norm_film_silu(batch=2, frames=3, height=2, width=2, channels=64, groups=32, modulated=True) -> tuple:
    """Activations around 1, so that a mean is there to be lost."""
    x = normal(batch, frames, height, width, channels, seed=1) * 2 + 1
    rows = (normal(batch, channels, seed=4), normal(batch, channels, seed=5)) if modulated else (None, None)
    return (x, normal(channels, seed=2), normal(channels, seed=3), groups, *rows, 1e-5)


def temporal_attention(batch=1, frames=7, sites=4, heads=2, dim_head=32) -> tuple:
    qkv = normal(batch, frames, sites, 3 * heads * dim_head, seed=1)
    return qkv, normal(heads, frames, frames, seed=2), rotation_table(frames, dim_head), heads


def site_attention(batch=1, frames=3, sites=4, heads=2, dim_head=32) -> tuple:
    return normal(batch, frames, sites, 3 * heads * dim_head, seed=1), heads


def layer_norm(rows=5, channels=64) -> tuple:
    return normal(rows, 2, channels, seed=1) * 2 + 3, normal(channels, seed=2), 1e-5


def film(batch=3, time=20, condition=12, channels=(8, 6)) -> tuple:
    rows = 2 * sum(channels)
    return (
        normal(batch, time, seed=1),
        normal(batch, condition, seed=2),
        normal(rows, time + condition, seed=3),
        normal(rows, seed=4),
        channels,
    )


ARGUMENTS: dict[str, Callable[..., tuple]] = {
    "film": film,
    "group_norm_film_silu": group_norm_film_silu,
    "layer_norm": layer_norm,
    "linear_attention": site_attention,
    "spatial_attention": site_attention,
    "temporal_attention": temporal_attention,
}


def typed(operation: str, arguments: tuple, dtype: torch.dtype, device: str) -> tuple:
    """`arguments` as a training step has them: activations in `dtype`, parameters and tables in float32."""
    activations = {"film": 0}.get(operation, 1)
    out = []
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            value = value.to(device, dtype if i < activations or dtype == torch.float64 else torch.float32)
        out.append(value)
    if operation == "film":
        # One type for the whole product.
        out[2], out[3] = (arguments[i].to(device, dtype) for i in (2, 3))
    return tuple(out)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    previous = os.environ.get("GAITFAST_BACKEND")
    os.environ["GAITFAST_BACKEND"] = name
    try:
        yield
    finally:
        if previous is None:
            del os.environ["GAITFAST_BACKEND"]
        else:
            os.environ["GAITFAST_BACKEND"] = previous


def call(operation: str, arguments: tuple) -> Tensor:
    """The operation's result as one tensor."""
    out = getattr(kernels, operation)(*arguments)
    return out if isinstance(out, Tensor) else torch.cat([t for pair in out for t in pair], dim=1)


def results(operation: str, arguments: tuple, name: str, compile_with: Callable | None = None) -> list[Tensor]:
    """Output and the gradient of every floating argument but the rotation, on backend `name`."""
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    if operation == "temporal_attention":
        tensors.remove(2)
    leaves = {i: arguments[i].detach().requires_grad_() for i in tensors}
    with backend(name):
        function = compile_with(call) if compile_with else call
        out = function(operation, tuple(leaves.get(i, a) for i, a in enumerate(arguments)))
        # The gradient that arrives is the same numbers in every type: those that bfloat16 has.
        outer = normal(*out.shape, seed=9).to(torch.bfloat16).to(out)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), outer)]


def distance(ours: Tensor, truth: Tensor) -> float:
    truth = truth.to(ours.device)
    return ((ours.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good_as_pytorch(operation: str, side: Side, arguments: tuple) -> None:
    """Output and every gradient within `factor` times plain PyTorch's distance to float64, and of the right type."""
    given = typed(operation, arguments, side.dtype, side.device)
    exact = tuple(a.double() if isinstance(a, Tensor) else a for a in given)
    truth = results(operation, exact, "reference")
    plain = results(operation, given, "reference")
    ours = results(operation, given, side.name)
    for i, (t, p, o) in enumerate(zip(truth, plain, ours)):
        assert o.shape == t.shape and o.dtype == p.dtype and torch.isfinite(o).all(), (i, o.dtype, p.dtype)
        allowed = side.factor * distance(p, t) + FLOOR
        assert distance(o, t) <= allowed, f"result {i}: {distance(o, t):.2e} of at most {allowed:.2e}"
