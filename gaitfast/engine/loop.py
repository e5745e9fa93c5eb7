"""The training loop: batch, step, log, evaluate, save, stop. What a step computes is passed in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gaitfast.config import PretrainConfig, TransferConfig, UserError
from gaitfast.engine.meters import Meters
from gaitfast.engine.world import World
from gaitfast.engine.zero import ZeroEngine


def _parent_of(pid: int) -> int:
    """Its parent's number; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _launcher() -> tuple[int, int] | None:
    """(our parent, its parent) under the `deepspeed` command, or None without it."""
    parent = os.getppid()
    command = _parent_of(parent)
    try:
        words = Path(f"/proc/{command}/cmdline").read_text().split("\0")[:2]
    except OSError:
        return None
    return (parent, command) if any(Path(word).name == "deepspeed" for word in words) else None


class StopRequest:
    """SIGTERM or Ctrl-C asks for a clean stop after the step at hand; a second Ctrl-C stops at once.

    So does the end of the `deepspeed` command: it starts a process that starts us, and a SIGTERM ends the command
    alone; nothing else would tell us.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._family = _launcher()
        self._old = {sig: signal.signal(sig, self._handle) for sig in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: Any) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    @property
    def requested(self) -> bool:
        if self._family and not self._signalled:
            parent, command = self._family
            self._signalled = os.getppid() != parent or _parent_of(parent) != command
        return self._signalled

    def restore(self) -> None:
        for sig, handler in self._old.items():
            signal.signal(sig, handler)


def train(
    engine: ZeroEngine,
    batches: Iterator[Any],
    train_step: Callable[[Any, int], torch.Tensor],
    *,
    config: PretrainConfig | TransferConfig,
    world: World,
    meters: Meters,
    start: int,
    evaluate: Callable[[int], None],
    save: Callable[[int], None],
    failed: Callable[[], bool],
    describe: Callable[[int], Sequence[str]],
) -> int:
    """Train from step `start` to the config's last; returns the steps done (fewer when asked to stop).

    Args:
        batches: yields the batch of step start, start + 1, ...
        train_step: (batch, step) -> what the meters count, of this rank, detached, the loss first; does forward,
            backward and the optimizer step.
        evaluate: measures at a number of steps done, unless that was already recorded.
        save: hands over the checkpoint of a number of steps done.
        failed: whether an earlier one could not be written; then `save` is called, which says so.
        describe: names of the sequences in the batch of a step, for messages.

    Raises:
        UserError: a loss was not finite; the step and the sequences of its batch are named, nothing is saved.
    """
    iterations, every = config.train.iterations, config.eval.every
    # Reading the loss of every step is free on a CPU and a synchronization on a GPU, where it waits for the next log.
    checks_each_step = world.device.type == "cpu" and world.size == 1
    polling = 1 if world.size == 1 else min(10, config.log_every)
    stop = StopRequest()

    def require_finite(done: int) -> None:
        bad = meters.first_non_finite()
        bad = world.smallest(done if bad is None else bad)  # every rank stops, or one would leave the others to wait
        if bad < done:
            names = ", ".join(describe(bad))
            raise UserError(
                f"step {bad}: the loss is not finite; the batch held {names}. The last checkpoint is untouched; "
                "begin anew in another run folder with lower learning rates or train.precision=fp32"
            )

    try:
        if start == 0 or (every and start % every == 0 and start < iterations):
            with meters.paused():
                evaluate(start)
        done = start
        for step in range(start, iterations):
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            rates = engine.set_learning_rate(step)
            meters.step(train_step(batch, step), waited)
            done = step + 1

            logging = done % config.log_every == 0 or done == iterations
            planned = done - start == config.train.stop_after
            asked = planned or (done % polling == 0 and world.any(stop.requested or failed()))
            stopping = asked and done < iterations
            saving = done % config.checkpoint.every == 0 or stopping or done == iterations
            if checks_each_step or logging or saving:
                require_finite(done)
            if logging:
                meters.log(rates)
            if saving:
                with meters.paused():
                    save(done)
            if stopping:
                break
            if every and done % every == 0 and done < iterations:
                with meters.paused():
                    evaluate(done)
        return done
    finally:
        stop.restore()
