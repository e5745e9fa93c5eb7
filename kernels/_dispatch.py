"""Which implementation of an operation runs: the one place that decides.

`GAITFAST_BACKEND=reference|compiled|triton` forces a backend for every operation. Otherwise a CUDA device runs Triton
wherever a kernel takes the arguments, and everything else runs the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import torch

from . import reference

BACKENDS = ("reference", "compiled", "triton")
_VARIABLE = "GAITFAST_BACKEND"

_REFERENCE: dict[str, Callable] = {
    operation.__name__: operation
    for operation in (
        reference.film,
        reference.group_norm_film_silu,
        reference.layer_norm,
        reference.linear_attention,
        reference.spatial_attention,
        reference.temporal_attention,
    )
}

OPERATIONS = tuple(_REFERENCE)

# Triton's package on first use: (it, "") or (None, why not). Importing it takes half a second and a working Triton.
_triton: tuple[ModuleType | None, str] | None = None


class BackendError(RuntimeError):
    """The forced backend does not exist, or not for this operation, these arguments or this machine."""


def backend_of(operation: str, *arguments) -> tuple[str, str]:
    """(backend that `operation` runs on, the reason in a few words).

    Args:
        arguments: the operation's, in order; without them the answer is for a float32 batch on this machine's best
            device.

    BackendError if what is forced cannot run.
    """
    device = arguments[0].device.type if arguments else "cuda" if torch.cuda.is_available() else "cpu"
    forced = os.environ.get(_VARIABLE)
    if not forced:
        return _measured(operation, device, arguments)
    if forced not in BACKENDS:
        raise BackendError(f"{_VARIABLE}={forced}: unknown backend; choose one of {', '.join(BACKENDS)}")
    if forced == "compiled":
        raise BackendError(f"{_VARIABLE}=compiled: {operation} has no such implementation; it has reference, triton")
    if forced == "triton":
        refused = _triton_refusal(operation, device, arguments)
        if refused:
            raise BackendError(f"{_VARIABLE}=triton: {operation}: {refused}; unset it or choose reference")
    return forced, f"forced by {_VARIABLE}"


def run(operation: str, x: torch.Tensor, *arguments):
    """Call `operation` on the backend in force; the device is that of `x`.

    Autocast is off inside: an operation's types follow from its arguments alone, on every backend alike.
    """
    name, _ = backend_of(operation, x, *arguments)
    call = _REFERENCE[operation] if name == "reference" else _triton_module(operation).run
    with torch.autocast(x.device.type, enabled=False):
        return call(x, *arguments)


def _measured(operation: str, device: str, arguments: tuple) -> tuple[str, str]:
    """The choice where nothing is forced."""
    if device != "cuda":
        return "reference", "the only one for the CPU so far"
    refused = _triton_refusal(operation, device, arguments)
    return ("reference", refused) if refused else ("triton", "a CUDA device")


def _triton_module(operation: str) -> ModuleType:
    package, why = _triton_package()
    assert package is not None, why
    return package.MODULES[operation]


def _triton_refusal(operation: str, device: str, arguments: tuple) -> str | None:
    """Why Triton cannot run this, or None."""
    package, why = _triton_package()
    if package is None:
        return why
    if package.INTERPRETED and device == "cuda":
        return "Triton interprets its kernels (TRITON_INTERPRET=1)"
    if not package.INTERPRETED and device != "cuda":
        return f"no Triton on {device} without TRITON_INTERPRET=1"
    return package.MODULES[operation].refusal(*arguments) if arguments else None


def _triton_package() -> tuple[ModuleType | None, str]:
    global _triton
    if _triton is None:
        try:
            from . import triton_ops

            _triton = triton_ops, ""
        except Exception as error:  # absent, or it does not suit this torch, this Python or this driver
            _triton = None, f"Triton does not import ({error.__class__.__name__}: {error})"[:150]
    return _triton
