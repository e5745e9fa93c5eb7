"""What all Triton operations share: launching, configurations that a measurement may replace, registration.

There is no autotuning. A configuration follows from shapes and type by the `*_config` function beside each kernel, so
that two runs of a program launch the same code; `replaced` lets a sweep try others (python -m benchmarks.sweep).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether Triton was imported under TRITON_INTERPRET=1: its kernels then run on the CPU, slowly, to be checked."""

Config = dict[str, int]
"""Block sizes by the name of the kernel's parameter, `num_warps` and `num_stages`."""

_replacements: dict[str, Config] = {}
_recorder: list | None = None

_library = torch.library.Library("gaitfast_triton", "FRAGMENT")


def settled(kernel: str, config: Config) -> Config:
    """`config`, with what a measurement wants to try instead."""
    return {**config, **_replacements.get(kernel, {})}


@contextlib.contextmanager
def replaced(kernel: str, config: Config) -> Iterator[None]:
    """Inside, launches of `kernel` take these values instead of their own."""
    _replacements[kernel] = config
    try:
        yield
    finally:
        del _replacements[kernel]


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[triton.JITFunction, tuple, dict]]]:
    """Inside, kernels are listed as (kernel, arguments, constants and options) instead of launched."""
    global _recorder
    _recorder, previous = [], _recorder
    try:
        yield _recorder
    finally:
        _recorder = previous


def launch(kernel: triton.JITFunction, programs: int, *arguments, **constants) -> None:
    """Run `programs` instances of `kernel` on the device of its first argument."""
    if _recorder is not None:
        _recorder.append((kernel, arguments, constants))
        return
    device = arguments[0].device
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, triton.next_power_of_2(n))


def dot_type(x: Tensor) -> tl.dtype:
    """What the matrix units are fed. The interpreter takes bfloat16 for bit patterns, so it multiplies float32."""
    if x.dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16
    return tl.float16 if x.dtype == torch.float16 else tl.float32


def type_refusal(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why no kernel takes tensors of these types, or None."""
    for tensor in (x, *parameters):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"no kernel for {str(tensor.dtype).removeprefix('torch.')}"
    return None


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """torch.ops.gaitfast_triton.NAME by its schema "NAME(...) -> ...".

    Args:
        implementation: launches the kernels; the same for every device that they run on.
        fake: the results' shapes and types, for torch.compile.
        save, backward: of an operation with gradients, as torch.library.register_autograd takes them.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA", "Meta"):
        _library.impl(name, fake if key == "Meta" else implementation, key)
    qualified = f"gaitfast_triton::{name}"
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=save, lib=_library)
    return getattr(torch.ops.gaitfast_triton, name).default
