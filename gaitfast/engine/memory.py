"""Memory: what the C library does with freed memory, and what a step will need before it starts."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt (glibc's malloc.h)
_LARGEST = 2**31 - 1
_USUAL = 32 * 2**20
"""What glibc's own threshold reaches in a program that frees large blocks."""


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep the memory that a step frees for the next step, instead of handing it back to the system; whether it could.

    Every large block would otherwise be a mapping of its own: unmapped when it is freed, and cleared page by page when
    the next layer asks for as much. `keep=False` restores what glibc does on its own. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped, trimmed = (_LARGEST, _LARGEST) if keep else (_USUAL, 2 * _USUAL)
    return bool(mallopt(_MMAP_THRESHOLD, mapped) and mallopt(_TRIM_THRESHOLD, trimmed))


def hand_back_freed_memory() -> None:
    """Give the system the pages that lie free between blocks in use: what building took and training will not."""
    if trim := sys.platform.startswith("linux") and getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class Estimate(NamedTuple):
    """Bytes that one process of a run needs at its peak, by what they are for."""

    states: int
    """Weights, gradients, the optimizer's state and ZeRO's own copy of the weights."""
    activations: int
    """What the forward pass of a micro-batch keeps for the backward pass."""
    transient: int
    """Batches in flight, the encoder's maps and what a backward pass holds besides."""
    base: int
    """Interpreter, libraries, the device's context."""

    @property
    def total(self) -> int:
        return sum(self)


BASE = {"cpu": 900 * 2**20, "cuda": 700 * 2**20}
"""A process that has imported everything and built nothing (measured on a CPU: 0.83 GiB; on a GPU: a CUDA context with
its libraries, an assumption)."""


def saved_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for backward, each memory counted once and without the weights `own`."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in own}
    seen: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> None:
        # Nothing is left to the graph, which no backward pass will follow and which may outlive this call: a result
        # that is saved by its own node is freed with neither.
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    seen.clear()
    return total


def states(parameters: Iterable[Tensor], stage: int, ranks: int) -> int:
    """Bytes of weights, gradients, two moments and ZeRO's float32 copy, which the stages divide among the ranks; and at
    stage 3 of one more copy of the weights."""
    sizes = [(p.numel(), p.requires_grad) for p in parameters]
    every, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
    shares = [1 if stage < first else ranks for first in (3, 2, 1)]  # weights; gradients; optimizer and copy
    copies = 12 if stage else 8
    whole = 4 * every if stage == 3 else 0  # the copy that evaluations use (ZeroEngine.whole)
    return whole + 4 * every // shares[0] + 4 * trained // shares[1] + copies * trained // shares[2]


def describe(needed: Estimate, free: int, batch: int, ways: Mapping[str, int]) -> str:
    """One line: what a batch needs, whether it fits into `free` bytes, and which `ways` (setting -> bytes) would."""
    gib = 2**30
    parts = ", ".join(f"{name} {value / gib:.1f}" for name, value in needed._asdict().items() if value >= 0.05 * gib)
    text = f"needs about {needed.total / gib:.1f} GiB at batch {batch} ({parts}); {free / gib:.1f} GiB are free"
    if needed.total <= free:
        return text
    fitting = [f"{setting} ({size / gib:.1f} GiB)" for setting, size in ways.items() if size <= free]
    if not fitting:
        return f"{text}: too much, and halving the batch of a rank is not enough"
    count = f"{len(fitting)} ways" if len(fitting) > 1 else "one way"
    return f"{text}: too much; fits {count}: {', '.join(fitting)}"


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take on `device`: what the system, or the container, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files that nobody has used lately (mapped shards) count, but go when somebody needs the memory.
        taken = int((group / "memory.current").read_text()) - int(counts.get("inactive_file", 0))
        free = min(free, limit - taken)
    return free
