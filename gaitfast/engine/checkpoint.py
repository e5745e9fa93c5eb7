"""Checkpoints: DeepSpeed's files inside a folder that is complete or absent, carries its config and checksums.

    RUN/checkpoints/step_00005000/            DeepSpeed's model and optimizer states, one file per rank
    RUN/checkpoints/step_00005000/manifest.json   step, ranks, config, size and checksum of every file

A checkpoint is written into a hidden folder beside, checksummed, flushed and renamed, so the name alone says that it
is whole (invariant 8). Nothing but the step has to be restored beside the weights and the optimizer: batches, noise and
the learning rate are functions of the step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from gaitfast import files
from gaitfast.config import PretrainConfig, TransferConfig, UserError, to_dict
from gaitfast.engine.world import World
from gaitfast.engine.zero import ZeroEngine

FORMAT = 1
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    step: int
    world_size: int
    dataset: str
    """Fingerprint of the dataset trained on."""


def _state_bytes(engine: ZeroEngine) -> int:
    """Upper bound of a checkpoint: float32 weights and two moments, twice over for what the format adds."""
    return 2 * 3 * 4 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.objective.parameters())


def save(
    engine: ZeroEngine,
    run: Path,
    step: int,
    config: PretrainConfig | TransferConfig,
    world: World,
    pending_losses: list[list[float]],
    dataset: str,
) -> None:
    """Write the checkpoint of `step` (steps done) and prune old ones. Every rank must call it.

    `pending_losses` are the losses since the last logged step, so that a resumed run logs the same means; `dataset` is
    the fingerprint of what is trained on, so that a resumed run sees the same batches.
    """
    folder = run / "checkpoints"
    final = folder / f"step_{step:08d}"
    partial = folder / _PARTIAL
    # A loss can be finite whose gradients were not; such weights must not become the checkpoint to resume from.
    finite = torch.stack([torch.isfinite(p).all() for p in engine.objective.parameters()]).all()
    if world.any(not bool(finite)):
        raise UserError(f"step {step}: a weight is not finite, nothing was saved; begin anew with lower learning rates")
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        files.require_space(folder, _state_bytes(engine))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    world.barrier()
    try:
        state = {"step": step, "pending_losses": pending_losses}
        engine.engine.save_checkpoint(str(partial), tag=final.name, client_state=state)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(
            f"{partial}: the checkpoint could not be written ({error}); the previous one is untouched"
        ) from None
    world.barrier()
    if world.is_main:
        written = partial / final.name
        entries = {}
        for path in sorted(p for p in written.rglob("*") if p.is_file()):
            files.sync(path)
            entries[str(path.relative_to(written))] = {"bytes": path.stat().st_size, "blake2b": files.digest(path)}
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": world.size,
            "zero_stage": config.train.zero_stage,
            "dataset": dataset,
            "config": to_dict(config),
            "files": entries,
        }
        files.write_json(written / "manifest.json", manifest)
        if final.exists():
            shutil.rmtree(final)
        os.replace(written, final)
        files.sync(folder)
        shutil.rmtree(partial, ignore_errors=True)
        _prune(folder, final.name, config.checkpoint.keep)
    world.barrier()


def _prune(folder: Path, saved: str, keep: int) -> None:
    """Keep `saved` and the `keep` - 1 before it. Later ones are broken: the run would have resumed from them."""
    older = [path for path in sorted(folder.glob("step_*")) if path.name < saved]
    newer = [path for path in folder.glob("step_*") if path.name > saved]
    for path in newer + older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)


def _inspect(path: Path) -> Checkpoint:
    """The checkpoint in `path`, or ValueError that says what is wrong with it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"] or files.digest(file) != entry["blake2b"]:
                raise ValueError(f"{name} does not match its checksum")
        return Checkpoint(path, int(manifest["step"]), int(manifest["world_size"]), str(manifest["dataset"]))
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{error.__class__.__name__}: {error}") from None


def newest(run: Path, report: bool = True) -> Checkpoint | None:
    """The newest good checkpoint of a run, or None where there is none; broken ones are named on stderr.

    UserError if there are checkpoints and none is good: a run must not begin anew by itself.
    """
    problems = []
    for path in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            found = _inspect(path)
        except ValueError as problem:
            problems.append(f"{path} is broken ({problem})")
            continue
        if report and problems:
            print(f"gaitfast: {'; '.join(problems)}; going on from step {found.step}", file=sys.stderr)
        return found
    if problems:
        raise UserError(f"{'; '.join(problems)}; delete {run / 'checkpoints'} to begin anew")
    return None


def load(engine: ZeroEngine, checkpoint: Checkpoint, world: World, dataset: str) -> tuple[int, list]:
    """Restore weights and optimizer; returns the steps done and the losses not yet logged.

    UserError if the run had another number of processes or another dataset (by fingerprint).
    """
    if checkpoint.dataset != dataset:
        raise UserError(
            f"{checkpoint.path}: was trained on a dataset with another content; "
            "restore that dataset, or begin anew in another run folder"
        )
    if checkpoint.world_size != world.size:
        raise UserError(
            f"{checkpoint.path}: written by {checkpoint.world_size} processes, this run has {world.size}; "
            f"start it with {checkpoint.world_size}, or begin anew in another run folder"
        )
    loaded, state = engine.engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if loaded is None or int(state["step"]) != checkpoint.step:
        raise UserError(f"{checkpoint.path}: DeepSpeed did not accept it; delete the folder to use an older checkpoint")
    return checkpoint.step, list(state["pending_losses"])
