"""Which implementation of an operation runs: the one place that decides.

`GAITFAST_BACKEND=reference|compiled|triton` forces a backend for every operation. Otherwise a CUDA device runs Triton
and a CPU the compiled kernels wherever these take the arguments, and everything else runs the reference.
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

# A backend's package on first use: (it, "") or (None, why not). Triton's takes half a second and a working Triton, the
# compiled one a built extension.
_packages: dict[str, tuple[ModuleType | None, str]] = {}


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
    refused = _REFUSALS[forced](operation, device, arguments)
    if refused:
        raise BackendError(f"{_VARIABLE}={forced}: {operation}: {refused}; unset it or choose reference")
    return forced, f"forced by {_VARIABLE}"


def may_run_compiled() -> bool:
    """Whether GAITFAST_BACKEND admits compiled operations, for those that have no entry in `OPERATIONS`."""
    return os.environ.get(_VARIABLE, "") in ("", "compiled")


def run(operation: str, x: torch.Tensor, *arguments):
    """Call `operation` on the backend in force; the device is that of `x`.

    Autocast is off inside: an operation's types follow from its arguments alone, on every backend alike.
    """
    name, _ = backend_of(operation, x, *arguments)
    call = _implementation(name, operation)
    with torch.autocast(x.device.type, enabled=False):
        return call(x, *arguments)


def _measured(operation: str, device: str, arguments: tuple) -> tuple[str, str]:
    """The choice where nothing is forced: what is measured to be the fastest on each device."""
    choice, reason = ("triton", "a CUDA device") if device == "cuda" else ("compiled", "C++ for the CPU")
    refused = _REFUSALS[choice](operation, device, arguments)
    if not refused and choice == "compiled" and _is_no_faster(operation, arguments):
        refused = "the compiled one is no faster"
    return ("reference", refused) if refused else (choice, reason)


def _is_no_faster(operation: str, arguments: tuple) -> bool:
    """Whether the compiled kernel loses or only ties (benchmarks/results/2026-11-22-xeon-2-cores-kernels.json).

    `film` is one product of the library's either way. In float32 few sites leave most of a padded square empty.
    """
    if operation == "film":
        return True
    if not arguments or arguments[0].dtype != torch.float32:
        return False
    x = arguments[0]
    return (operation == "spatial_attention" and x.shape[2] < 16) or (operation == "layer_norm" and x.shape[-1] > 128)


def _implementation(backend: str, operation: str) -> Callable:
    if backend == "reference":
        return _REFERENCE[operation]
    package, why = _package(backend)
    assert package is not None, why
    return package.MODULES[operation].run if backend == "triton" else package.RUN[operation]


def _triton_refusal(operation: str, device: str, arguments: tuple) -> str | None:
    """Why Triton cannot run this, or None."""
    package, why = _package("triton")
    if package is None:
        return why
    if package.INTERPRETED and device == "cuda":
        return "Triton interprets its kernels (TRITON_INTERPRET=1)"
    if not package.INTERPRETED and device != "cuda":
        return f"no Triton on {device} without TRITON_INTERPRET=1"
    return package.MODULES[operation].refusal(*arguments) if arguments else None


def _compiled_refusal(operation: str, device: str, arguments: tuple) -> str | None:
    """Why the compiled kernels cannot run this, or None."""
    if device != "cpu":
        return f"the compiled kernels are for the CPU, not for {device}"
    package, why = _package("compiled")
    return why if package is None else package.refusal(operation, *arguments) if arguments else None


_REFUSALS: dict[str, Callable[[str, str, tuple], str | None]] = {
    "reference": lambda operation, device, arguments: None,
    "compiled": _compiled_refusal,
    "triton": _triton_refusal,
}


def _package(backend: str) -> tuple[ModuleType | None, str]:
    if backend not in _packages:
        try:
            if backend == "triton":
                from . import triton_ops as package
            else:
                from . import compiled_ops as package
            _packages[backend] = package, ""
        except Exception as error:  # absent, or it does not suit this torch, this Python or this driver
            what = "Triton does not import" if backend == "triton" else "the compiled extension does not load"
            _packages[backend] = None, f"{what} ({error.__class__.__name__}: {error})"[:150]
    return _packages[backend]
