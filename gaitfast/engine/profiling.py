"""A window of steps under PyTorch's profiler, as a trace that chrome://tracing and Perfetto open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gaitfast.config import ProfileConfig

Step = Callable[[Any, int], torch.Tensor]


def windowed(step: Step, config: ProfileConfig, folder: Path, say: Callable[[str], None]) -> Step:
    """`step`, with steps start .. start + steps - 1 (0-based) recorded into folder/profile_START.json.

    The step itself is returned where config.steps is 0. A resumed run that begins inside the window records the rest.
    """
    if not config.steps:
        return step
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    end = config.start + config.steps
    recorder: list[profile] = []

    def recorded(batch: Any, number: int) -> torch.Tensor:
        if not config.start <= number < end:
            return step(batch, number)
        if not recorder:
            recorder.append(profile(activities=activities))
            recorder[0].start()
        with torch.profiler.record_function(f"step {number}"):
            result = step(batch, number)
        if number == end - 1:
            recorder[0].stop()
            path = folder / f"profile_{config.start:08d}.json"
            recorder[0].export_chrome_trace(str(path))
            say(f"profile of steps {config.start}-{end - 1}: {path}")
        return result

    return recorded
