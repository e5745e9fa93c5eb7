"""Timing that compares: interleaved in one process, medians with spread, on a GPU by graph replay over fresh inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        place = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * place)], ordered[round(0.8 * place)])


Body = Callable[[], object]


def graph_of(bodies: Sequence[Body], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """All bodies one after another as one graph; each has run twice before."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for body in bodies:
                body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for body in bodies:
            body()
    return graph


def timed(body: Body, device: str) -> float:
    """Milliseconds of one call, by the device's clock where it has one."""
    if device != "cuda":
        started = time.perf_counter()
        body()
        return (time.perf_counter() - started) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    body()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def interleaved(
    sides: dict[str, Sequence[Body]], device: str, *, seconds: float = 1.0, least: int = 5, graphs: bool = True
) -> dict[str, Timing]:
    """Time the sides in turn until `seconds` are over, each at least `least` times.

    Args:
        sides: per name the same call on several sets of inputs, so that on a GPU none finds its input in the cache.
        graphs: on a GPU, replay each side as one graph, which leaves out the host's launches.

    Returns:
        Per name the time of one call. A side that cannot be made a graph is told of and left out.
    """
    stream = torch.cuda.Stream() if device == "cuda" else None
    replays: dict[str, tuple[Body, int]] = {}
    for name, bodies in sides.items():
        if stream is not None and graphs:
            try:
                replays[name] = graph_of(bodies, stream).replay, len(bodies)
            except Exception as error:  # the other sides' figures are worth having all the same
                print(f"{name}: no graph: {error.__class__.__name__}: {error}"[:300], flush=True)
        else:
            for body in bodies:
                body()
            replays[name] = (lambda own=bodies: [body() for body in own]), len(bodies)
    for body, _ in replays.values():
        timed(body, device)
    samples: dict[str, list[float]] = {name: [] for name in replays}
    started = time.perf_counter()
    while samples and (time.perf_counter() - started < seconds or min(map(len, samples.values())) < least):
        for name, (body, calls) in replays.items():
            samples[name].append(timed(body, device) / calls)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def copy_ceiling(device: str, mebibytes: int | None = None) -> float:
    """GB/s of a copy inside the device's memory, bytes read plus bytes written."""
    size = (mebibytes or (2048 if device == "cuda" else 256)) * 2**20
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    taken = interleaved({"copy": [lambda: target.copy_(source)]}, device, seconds=0.5)["copy"]
    return 2 * size / taken.median / 1e6


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product in `dtype`, on random data."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    taken = interleaved({"matmul": [lambda: torch.mm(a, b)]}, device, seconds=0.5)["matmul"]
    return 2 * n**3 / taken.median / 1e9
