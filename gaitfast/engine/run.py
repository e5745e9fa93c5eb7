"""A training run as such: its folder, resuming, evaluations, checkpoints and summary, whatever it trains.

RUN/config.resolved.yaml   every option
RUN/metrics.jsonl          a row every log_every steps
RUN/evaluations.jsonl      a row per evaluation
RUN/checkpoints/           what the same command resumes from
RUN/summary.json           of a complete run, with the portable networks beside it
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from gaitfast import files
from gaitfast.config import PretrainConfig, TransferConfig, UserError, batch_per_rank, dump, load, to_dict
from gaitfast.engine import checkpoint, loop
from gaitfast.engine.memory import keep_freed_memory
from gaitfast.engine.meters import Meters, Records
from gaitfast.engine.portable import source_commit
from gaitfast.engine.profiling import windowed
from gaitfast.engine.world import World
from gaitfast.engine.zero import ZeroEngine

WITHOUT_EFFECT = {
    *("run", "log_every", "train.stop_after", "checkpoint.every", "checkpoint.keep"),
    *("train.keep_memory", "train.encode_ahead", "profile.start", "profile.steps"),
    *("data.path", "data.threads", "data.prefetch"),  # the dataset is known by its fingerprint, wherever it lies
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
        self._require_same_config()
        self.found = checkpoint.newest(self.folder, report=process.is_main)
        """The checkpoint to resume from; its weights replace any that are loaded before."""

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
        self.start, pending = checkpoint.load(engine, found, process, dataset.fingerprint) if found else (0, [])
        self._make_folder()
        if process.is_main:
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
            losses=pending,
            **options,
        )
        if found:
            self.meters.say(f"resumed from {found.path} at step {self.start}")

    def _require_same_config(self) -> None:
        path = self.folder / "config.resolved.yaml"
        if not path.exists() or not any(self.folder.glob("checkpoints/step_*")):
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
        """The run folder and the config in it, once everything that the config names was found."""
        if not self.world.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run: cannot create {self.folder} ({error.strerror})") from None
        path = self.folder / "config.resolved.yaml"
        files.write_atomically(path, lambda temporary: temporary.write_text(dump(self.config), encoding="utf-8"))

    def evaluate(self, step: int) -> None:
        """Measure after `step` steps, unless a previous start of this run already did."""
        known = self.evaluations.at(step) if self.world.is_main else None
        if self.world.any(known is not None):
            return
        objective = self.engine.whole()
        objective.eval()
        row = {"step": step, **self.measure(objective)}
        objective.train()
        if self.world.is_main:
            self.evaluations.add(row)
            self.meters.evaluation(step, row)
            self.meters.say(f"step {step}: {self.describe(row)}")

    def save(self, step: int) -> None:
        """Checkpoint and portable networks after `step` steps."""
        pending = self.meters.pending_losses()
        checkpoint.save(self.engine, self.folder, step, self.config, self.world, pending, self.dataset.fingerprint)
        self.export(step)
        self.world.barrier()

    def metadata(self, step: int) -> dict[str, Any]:
        """Of a portable network: the config, the step, and its evaluation if there is one. On the main rank."""
        return {"config": to_dict(self.config), "step": step, "metrics": self.evaluations.at(step) or {}}

    def go(self, build_loader: Callable[..., Any]) -> None:
        """Train to the end, or until asked to stop, on what `build_loader` (gaitfast.data.pipeline) yields."""
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
        try:
            done = loop.train(
                self.engine,
                iter(loader),
                windowed(self.train_step, config.profile, self.folder, self.meters.say),
                config=config,
                world=process,
                meters=self.meters,
                start=self.start,
                evaluate=self.evaluate,
                save=self.save,
                describe=lambda step: [self.dataset.sequence_name(i) for i in self._sequences(step)],
            )
        finally:
            loader.close()
        if done == config.train.iterations:
            self.evaluate(done)
            self.export(done)
            self._summarize(done)
        else:
            self.meters.say(f"stopped cleanly after step {done}; the same command continues")
        self.meters.close()

    def _summarize(self, step: int) -> None:
        own = self.finish(step)
        if not self.world.is_main:
            return
        before, after = self.evaluations.at(0), self.evaluations.at(step)
        device = self.world.device
        backend = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "loader": "dali-gpu" if device.type == "cuda" else "dali-cpu",
            "optimizer": f"deepspeed-zero{self.config.train.zero_stage}",
            "precision": self.config.train.precision,
            **own.pop("backend", {}),
        }
        summary = {
            "rank1_before": before["rank1"],
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
