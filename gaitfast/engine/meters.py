"""What a run writes while it goes: JSON lines, TensorBoard, a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gaitfast import files
from gaitfast.config import UserError
from gaitfast.engine.world import World


class Records:
    """A file of JSON objects, one a line, that a resumed run continues as if it had never stopped."""

    def __init__(self, path: Path, keep_until: int):
        """Drop the rows of steps after `keep_until` (they will be done again) and a last line that was cut off."""
        self.path = path
        self.rows = [row for row in self._read() if row["step"] <= keep_until]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        files.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    break
                raise UserError(
                    f"{self.path}: line {number} is not a JSON object with a step; mend or delete the line"
                ) from None
            rows.append(row)
        return rows

    def add(self, row: dict[str, Any]) -> None:
        bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        assert not bad, f"non-finite {bad} in a record of {self.path.name}"
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def at(self, step: int) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["step"] == step), None)

    def close(self) -> None:
        self._file.close()


class Meters:
    """Losses and times since the last logged step; the device is read only when they are logged (invariant 6)."""

    def __init__(
        self,
        run: Path,
        world: World,
        *,
        start: int,
        iterations: int,
        log_every: int,
        batch: int,
        losses: list[list[float]],
        quantities: tuple[str, ...] = ("loss",),
    ):
        """`losses` are those that the checkpoint at `start` had not logged yet (`pending_losses`).

        `quantities` name what each step brings; `loss` is the first.
        """
        self.world = world
        self.log_every = log_every
        self.batch = batch
        self.seconds = 0.0
        self.quantities = quantities
        self.done = start
        """Steps done."""
        self._earlier = losses
        self._losses: list[torch.Tensor] = []
        self._waited = 0.0
        self._elapsed = 0.0
        self._timed_steps = 0
        self._clock = time.perf_counter()
        self.records = self.board = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.records = Records(run / "metrics.jsonl", start or -1)
            self.seconds = self.records.rows[-1].get("seconds", 0.0) if self.records.rows else 0.0
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None, flush_secs=10)
        self.bar = tqdm(
            total=iterations, initial=start, unit="step", dynamic_ncols=True, disable=not world.is_main, mininterval=0.5
        )

    def pending_losses(self) -> list[list[float]]:
        """The quantities (means over the ranks) of each step not yet logged, for the checkpoint: a resumed run logs the
        same rows.

        Synchronizes; every rank must call it.
        """
        if not self._losses:
            return list(self._earlier)
        return self._earlier + self.world.mean(self._stacked().double()).tolist()

    def _stacked(self) -> torch.Tensor:
        """(steps, quantities) of this rank."""
        return torch.stack(self._losses).view(len(self._losses), len(self.quantities))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (an evaluation, a checkpoint) out of the throughput."""
        self._lap()
        yield
        self._clock = time.perf_counter()

    def _lap(self) -> None:
        now = time.perf_counter()
        self._elapsed += now - self._clock
        self._clock = now

    def step(self, values: torch.Tensor, waited: float) -> None:
        """Count one step: its quantities, a detached tensor of that many, and the seconds it waited for its batch."""
        self._losses.append(values)
        self._waited += waited
        self._timed_steps += 1
        self.done += 1
        self.bar.update()

    def first_non_finite(self) -> int | None:
        """The 0-based step of the first non-finite loss since the last log; synchronizes."""
        if not self._losses:
            return None
        finite = torch.isfinite(self._stacked()).all(1).tolist()
        return self.done - len(finite) + finite.index(False) if False in finite else None

    def log(self, rates: dict[str, float]) -> None:
        """Write the row of the steps done."""
        done = self.done
        rows = self.pending_losses()
        means = {name: sum(column) / len(rows) for name, column in zip(self.quantities, zip(*rows))}
        self._lap()
        elapsed = max(self._elapsed, 1e-9)
        self.seconds += self._elapsed
        row = {
            "step": done,
            **means,
            **rates,
            "clips_per_s": self._timed_steps * self.batch / elapsed,
            "data_wait": min(1.0, self._waited / elapsed),
            "seconds": self.seconds,
        }
        self._earlier, self._losses = [], []
        self._waited, self._elapsed, self._timed_steps = 0.0, 0.0, 0
        if self.world.is_main:
            self.records.add(row)
            for key in (*means, "clips_per_s", "data_wait", *rates):
                self.board.add_scalar(f"train/{key}", row[key], done)
            self.bar.set_postfix_str(
                f"loss {means['loss']:.4f}, {row['clips_per_s']:.1f} clips/s, data wait {row['data_wait']:.0%}",
                refresh=False,
            )

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        """Show an evaluation in TensorBoard and above the progress bar."""
        if not self.world.is_main:
            return
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                self.board.add_scalar(f"eval/{key}", value, step)

    def say(self, text: str) -> None:
        if self.world.is_main:
            self.bar.write(text)

    def close(self) -> None:
        """End the bar and the files; once closed they stay so."""
        self.bar.close()
        if self.world.is_main:
            self.records.close()
            self.board.close()
