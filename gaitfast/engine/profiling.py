"""A window of steps under PyTorch's profiler, as a trace that chrome://tracing and Perfetto open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gaitfast import files
from gaitfast.config import ProfileConfig

Step = Callable[[Any, int], torch.Tensor]


class Window:
    """A step, of which start .. start + steps - 1 (0-based) are recorded into folder/profile_START.json.

    A resumed run that begins inside the window records the rest, one that ends inside it what there is (`close`).

    Args:
        step: (batch, number) -> what the meters count.
        config: the window; no step of it where config.steps is 0.
        say: is told where the trace lies.
    """

    def __init__(self, step: Step, config: ProfileConfig, folder: Path, say: Callable[[str], None]) -> None:
        self._step, self._say = step, say
        self._window = range(config.start, config.start + config.steps)
        self._path = folder / f"profile_{config.start:08d}.json"
        self._recorder: profile | None = None
        self._recorded: list[int] = []

    def __call__(self, batch: Any, number: int) -> torch.Tensor:
        if number not in self._window:
            return self._step(batch, number)
        if self._recorder is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._recorder = profile(activities=activities)
            self._recorder.start()
        with torch.profiler.record_function(f"step {number}"):
            result = self._step(batch, number)
        self._recorded.append(number)
        if number == self._window[-1]:
            self.close()
        return result

    def close(self) -> None:
        """Write what was recorded, if anything was and it is not written yet."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        recorder.stop()
        if self._recorded:
            files.write_atomically(self._path, lambda temporary: recorder.export_chrome_trace(str(temporary)))
            self._say(f"profile of steps {self._recorded[0]}-{self._recorded[-1]}: {self._path}")
