"""Which implementation of an operation runs: the one place that decides.

`GAITFAST_BACKEND=reference|compiled|triton` forces a backend for every operation.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from . import reference

BACKENDS = ("reference", "compiled", "triton")
_VARIABLE = "GAITFAST_BACKEND"

_IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    operation.__name__: {"reference": operation}
    for operation in (
        reference.film,
        reference.group_norm_film_silu,
        reference.layer_norm,
        reference.linear_attention,
        reference.spatial_attention,
        reference.temporal_attention,
    )
}

OPERATIONS = tuple(_IMPLEMENTATIONS)


class BackendError(RuntimeError):
    """The forced backend does not exist, or not for this operation."""


def backend_of(operation: str) -> tuple[str, str]:
    """(backend that `operation` runs on, the reason in a few words). BackendError if what is forced does not exist."""
    available = _IMPLEMENTATIONS[operation]
    forced = os.environ.get(_VARIABLE)
    if not forced:
        return "reference", "the only implementation so far"
    if forced not in BACKENDS:
        raise BackendError(f"{_VARIABLE}={forced}: unknown backend; choose one of {', '.join(BACKENDS)}")
    if forced not in available:
        raise BackendError(
            f"{_VARIABLE}={forced}: {operation} has no such implementation; it has {', '.join(available)}"
        )
    return forced, f"forced by {_VARIABLE}"


def run(operation: str, x: torch.Tensor, *arguments):
    """Call `operation` on the backend in force; the device is that of `x`.

    Autocast is off inside: an operation's types follow from its arguments alone, on every backend alike.
    """
    name, _ = backend_of(operation)
    with torch.autocast(x.device.type, enabled=False):
        return _IMPLEMENTATIONS[operation][name](x, *arguments)
