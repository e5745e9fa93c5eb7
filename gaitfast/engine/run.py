"""A training run as such: its folder, resuming, evaluations, checkpoints and summary, whatever it trains.

RUN/config.resolved.yaml   every option
RUN/metrics.jsonl          a row every log_every steps
RUN/events.jsonl           what happened when: starts, checkpoints, stops, failures
RUN/evaluations.jsonl      a row per evaluation
RUN/checkpoints/           what the same command resumes from
RUN/summary.json           of a complete run, with the portable networks beside it
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from gaitfast import files
from gaitfast.config import PretrainConfig, TransferConfig, UserError, batch_per_rank, dump, load, to_dict
from gaitfast.engine import checkpoint, loop, state
from gaitfast.engine.events import PATIENCE, Events
from gaitfast.engine.memory import hand_back_freed_memory, keep_freed_memory
from gaitfast.engine.meters import Meters, Records
from gaitfast.engine.portable import source_commit
from gaitfast.engine.profiling import Window
from gaitfast.engine.watchdog import Watchdog
from gaitfast.engine.world import World, is_lost_contact, lost_contact
from gaitfast.engine.zero import ZeroEngine

WITHOUT_EFFECT = {
    *("run", "log_every", "train.stop_after", "train.timeout"),
    *("train.keep_memory", "train.encode_ahead", "profile.start", "profile.steps"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every"),
    "train.zero_stage",  # nor does the number of processes: to float rounding, as the order of sums differs
    "data.path",  # the dataset is known by its fingerprint, wherever it lies
    *("data.threads", "data.prefetch", "data.residency"),
    "data.corrupt",  # a run that a corrupt frame stopped may go on without it
}
"""Keys that may change when a run goes on: they do not change what is trained."""


class TrainingRun:
    """What the stages share. A stage builds its objective, calls `begin` and then `go`, and implements the rest."""

    results: ClassVar[tuple[str, ...]] = ("summary.json",)
    """Files of a complete run: what a run that died before its first checkpoint left of them is not this run's."""

    sampling: Any
    """How the recognizer takes its clips (gaitfast.data.sampling); a stage sets it before `go`."""

    def __init__(self, config: PretrainConfig | TransferConfig, process: World):
        """UserError if the run folder holds checkpoints of a run with another config, or only broken ones."""
        self.config, self.world = config, process
        self.started = time.perf_counter()
        if process.device.type == "cpu" and config.train.keep_memory:
            keep_freed_memory()
        self.folder = Path(config.run)
        self.per_rank = batch_per_rank(config.train, process.size)
        self.events = Events(self.folder, process.rank)
        self.meters: Meters | None = None
        self.writer: checkpoint.Writer | None = None
        self.watchdog = Watchdog(config.train.timeout, self._last_words) if process.size > 1 else None
        self.found = process.agree(self._look)
        """The checkpoint to resume from; its weights replace any that are loaded before."""
        self.origin: str | None = self.found.manifest.get("origin") if self.found else None
        """Digest of the weights that the run began with, where a stage took them from a file and noted it; it goes from
        checkpoint to checkpoint."""

    # --- what a stage brings ---

    def train_step(self, batch: Any, step: int) -> torch.Tensor:
        """Forward, backward and optimizer step on this rank's slice of the global batch; the quantities it logs."""
        raise NotImplementedError

    def measure(self, objective: nn.Module) -> dict[str, float]:
        """A row of evaluations.jsonl without its step; the objective is in eval mode. Every rank calls it."""
        raise NotImplementedError

    def describe(self, row: dict[str, float]) -> str:
        """The row in words."""
        raise NotImplementedError

    def export(self, step: int) -> None:
        """Write the portable networks after `step` steps. Every rank calls it."""
        raise NotImplementedError

    def finish(self, step: int) -> dict[str, Any]:
        """Last files of a complete run, and what the stage adds to its summary. Every rank calls it."""
        return {}

    # --- what is the same for every stage ---

    def begin(
        self, engine: ZeroEngine, dataset: Any, sequences: Callable[[int], Sequence[int]], **options: Any
    ) -> None:
        """Resume where there is something to resume, and claim the run folder.

        `dataset`: the packed dataset trained on; `sequences`: step -> the sequence numbers of the global batch, for
        messages; `options` go to the meters.
        """
        self.engine, self.dataset, self._sequences = engine, dataset, sequences
        config, process, found = self.config, self.world, self.found
        self._beat()
        if found:
            self._resume(found, engine, dataset.fingerprint)
        if process.device.type == "cpu":
            hand_back_freed_memory()
        self.start = found.step if found else 0
        process.agree(self._make_folder)
        self._beat()
        if process.is_main:
            self.writer = checkpoint.Writer()
            if not found:
                for stale in self.results:
                    (self.folder / stale).unlink(missing_ok=True)
            self.evaluations = Records(self.folder / "evaluations.jsonl", self.start if found else -1)
        self.meters = Meters(
            self.folder,
            process,
            start=self.start,
            iterations=config.train.iterations,
            log_every=config.log_every,
            batch=config.train.sequences,
            losses=found.manifest["pending_losses"] if found else [],
            **options,
        )
        if found:
            self.meters.say(f"resumed from {found.path} at step {self.start}")
        if process.is_main:
            self.events.add(
                "resume" if found else "start",
                step=self.start,
                iterations=config.train.iterations,
                processes=process.size,
                pid=os.getpid(),
                commit=source_commit(),
            )

    def _beat(self) -> None:
        if self.watchdog:
            self.watchdog.beat()

    def _patient(self) -> contextlib.AbstractContextManager:
        """Inside, ranks work on their own for long."""
        return self.watchdog.patient() if self.watchdog else contextlib.nullcontext()

    def _last_words(self) -> str:
        """Of a process at a standstill: what was handed over is written, and the log says what happened."""
        if self.writer:
            self.writer.finish(60)
        step = self.meters.done if self.meters else 0
        told = lost_contact(TimeoutError(f"no answer within {self.config.train.timeout} s"), self.world, step)
        with contextlib.suppress(OSError):
            self.events.add("failure", step=step, error=f"{type(told).__name__}: {told}")
        return str(told)

    def _look(self) -> checkpoint.Checkpoint | None:
        """Claim the folder if there is one, and find what to resume from. On the main rank."""
        if self.folder.is_dir():
            self.events.claim(PATIENCE)
            checkpoint.sweep(self.folder)
        self._require_same_config()
        return checkpoint.newest(self.folder)

    def _resume(self, found: checkpoint.Checkpoint, engine: ZeroEngine, dataset: str) -> None:
        """Restore weights, optimizer and loss scaler; UserError for another dataset (by fingerprint)."""
        if found.manifest["dataset"] != dataset:
            raise UserError(
                f"{found.path}: was trained on a dataset with another content; "
                "restore that dataset, or begin anew in another run folder"
            )
        state.restore(engine, found.tensors() if self.world.is_main else {}, self.world)
        if (scaler := engine.scaler) and found.manifest["scaler"]:
            scaler.load_state_dict(found.manifest["scaler"])

    def _require_same_config(self) -> None:
        path = self.folder / "config.resolved.yaml"
        if not path.exists() or not checkpoint.listing(self.folder):
            return
        try:
            theirs = to_dict(load(type(self.config), path))
        except UserError:
            raise UserError(
                f"{path}: this folder holds a run of another stage or version; choose another with --set run=FOLDER"
            ) from None
        changed = _differences(to_dict(self.config), theirs) - WITHOUT_EFFECT
        if changed:
            raise UserError(
                f"{path}: this folder holds a run with another {', '.join(sorted(changed))}; "
                "choose another folder with --set run=FOLDER, or delete this one"
            )

    def _make_folder(self) -> None:
        """The run folder and the config in it, once everything that the config names was found. On the main rank."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run: cannot create {self.folder} ({error.strerror})") from None
        if not self.events.claimed:
            self.events.claim()
        path = self.folder / "config.resolved.yaml"
        files.write_atomically(path, lambda temporary: temporary.write_text(dump(self.config), encoding="utf-8"))

    def evaluate(self, step: int) -> None:
        """Measure after `step` steps, unless a previous start of this run already did."""
        if self.world.agree(lambda: self.evaluations.at(step) is not None):
            return
        if self.world.is_main:
            self.events.add("evaluate", step=step)
        objective = self.engine.whole()
        objective.eval()
        with self._patient():
            row = {"step": step, **self.measure(objective)}
        objective.train()
        if self.world.is_main:
            self.evaluations.add(row)
            self.meters.evaluation(step, row)
            self.meters.say(f"step {step}: {self.describe(row)}")

    def save(self, step: int) -> None:
        """Copy the state after `step` steps and have it written in the background, the portable networks with it.

        UserError if a weight is not finite, or an earlier checkpoint could not be written. Every rank calls it.
        """
        self.world.agree(lambda: self.writer.wait())
        pending = self.meters.pending_losses()
        tensors = state.collect(self.engine, self.world)
        scaler = self.engine.scaler
        manifest = {
            "step": step,
            "world_size": self.world.size,
            "dataset": self.dataset.fingerprint,
            "config": to_dict(self.config),
            "pending_losses": pending,
            "scaler": scaler.state_dict() if scaler else {},
            **({"origin": self.origin} if self.origin else {}),
        }
        self.world.agree(lambda: self._hand_over(tensors, manifest))
        self.export(step)
        self._beat()

    def _hand_over(self, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        # A loss can be finite whose gradients were not; such weights must not become the checkpoint to resume from.
        bad = next((name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
        if bad:
            raise UserError(
                f"step {manifest['step']}: {bad} is not finite, nothing was saved; begin anew with lower learning rates"
            )

        def job() -> None:
            started = time.perf_counter()
            path = checkpoint.write(self.folder, tensors, manifest, self.config.checkpoint)
            seconds = round(time.perf_counter() - started, 3)
            self.events.add("checkpoint", step=manifest["step"], bytes=path.stat().st_size, seconds=seconds)

        self.writer.submit(job)

    def later(self, write: Callable[[], object]) -> None:
        """Have a file written in the background, after the checkpoints handed over before it. On the main rank."""
        self.writer.submit(write)

    def metadata(self, step: int) -> dict[str, Any]:
        """Of a portable network: the config, the step, and its evaluation if there is one. On the main rank."""
        return {"config": to_dict(self.config), "step": step, "metrics": self.evaluations.at(step) or {}}

    def go(self, build_loader: Callable[..., Any]) -> None:
        """Train to the end, or until asked to stop, on what `build_loader` (gaitfast.data.pipeline) yields.

        UserError if the processes lose each other. Whatever ends the run is an event.
        """
        try:
            self._go(build_loader)
        except BaseException as error:
            step = self.meters.done
            lost = self.world.size > 1 and is_lost_contact(error)
            full = files.is_full(error)
            told: BaseException = error
            if lost:
                told = lost_contact(error, self.world, step)
            elif full:
                told = UserError(f"{self.folder}: no space left on the disk; free some and run the same command again")
            if self.writer and not isinstance(error, KeyboardInterrupt):
                with contextlib.suppress(Exception):  # what was handed over is whole; what went wrong is said here
                    self.writer.close()
            if not isinstance(error, SystemExit):  # of a rank that leaves because the main one failed
                with contextlib.suppress(OSError):  # a full disk
                    self.events.add("failure", step=step, error=f"{type(told).__name__}: {told}"[:1000])
            if told is not error:
                raise told from None
            raise
        finally:
            self.meters.close()  # the bar ends its line before anybody writes the next one
            if self.watchdog:
                self.watchdog.close()
            self.events.close()

    def _go(self, build_loader: Callable[..., Any]) -> None:
        config, process = self.config, self.world
        loader = build_loader(
            self.dataset,
            config.data,
            sampling=self.sampling,
            seed=config.seed,
            batch=config.train.batch,
            rank=process.rank,
            world_size=process.size,
            device=process.device,
            start_step=self.start,
        )
        self.loader_name = loader.name
        step: Callable[..., torch.Tensor] = self._watched_step
        if process.is_main:
            step = window = Window(step, config.profile, self.folder, self.meters.say)
        try:
            done = loop.train(
                self.engine,
                iter(loader),
                step,
                config=config,
                world=process,
                meters=self.meters,
                start=self.start,
                evaluate=self.evaluate,
                save=self.save,
                failed=lambda: process.is_main and self.writer.failed,
                describe=lambda step: [self.dataset.sequence_name(i) for i in self._sequences(step)],
            )
        finally:
            loader.close()
            if process.is_main:
                window.close()
        if done == config.train.iterations:
            self.evaluate(done)
            self.export(done)
            process.agree(lambda: self.writer.close())
            self._summarize(done)
        else:
            process.agree(lambda: self.writer.close())
            self.meters.say(f"stopped cleanly after step {done}; the same command continues")
        if process.is_main:
            self.events.add("finish" if done == config.train.iterations else "stop", step=done)

    def _watched_step(self, batch: Any, step: int) -> torch.Tensor:
        values = self.train_step(batch, step)
        self._beat()
        return values

    def _summarize(self, step: int) -> None:
        with self._patient():
            own = self.finish(step)
        if not self.world.is_main:
            return
        before, after = self.evaluations.at(0) or {}, self.evaluations.at(step)
        device = self.world.device
        backend = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "loader": self.loader_name,
            "optimizer": f"deepspeed-zero{self.engine.stage}",
            "precision": self.config.train.precision,
            **own.pop("backend", {}),
        }
        summary = {
            "rank1_before": before.get("rank1"),
            "rank1_after": after["rank1"],
            **own,
            "steps": step,
            "seconds": self.meters.seconds,
            "seconds_this_start": time.perf_counter() - self.started,
            "seed": self.config.seed,
            "backend": backend,
            "world_size": self.world.size,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "commit": source_commit(),
            "before": before,
            "after": after,
        }
        files.write_json(self.folder / "summary.json", summary)
        self.meters.say(f"done: {self.folder / 'summary.json'}; draw the report with: gaitfast report {self.folder}")


def _differences(ours: dict, theirs: dict, prefix: str = "") -> set[str]:
    """Dotted keys whose values differ."""
    changed = set()
    for key in ours.keys() | theirs.keys():
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.add(f"{prefix}{key}")
    return changed
