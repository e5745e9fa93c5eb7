"""Checkpoints: one safetensors file each, complete or absent, that carries its config and a checksum.

    RUN/checkpoints/step_00005000.safetensors   what engine/state.py collects, and as metadata the manifest: step,
                                                ranks, dataset, config, losses not yet logged, loss scaler, checksum

The state is copied to the host between two steps; a thread writes it while training goes on: aside, flushed, renamed,
so the name alone says that it is whole (invariant 8). Nothing but the step has to be restored beside the weights and
the optimizer: batches, noise and the learning rate are functions of the step. It holds no rank's share: any number of
processes goes on from it, at any ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gaitfast import files
from gaitfast.config import CheckpointConfig, UserError

FORMAT = "gaitfast-checkpoint-2"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.manifest["step"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `state.collect` gave: float32 weights and moments, buffers in their own types, on the host."""
        return load_file(self.path)


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def _path(run: Path, step: int) -> Path:
    return folder_of(run) / f"step_{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The steps done that the name of a checkpoint says."""
    return int(path.stem.removeprefix("step_"))


def listing(run: Path) -> list[Path]:
    """Checkpoints of a run, the newest first; not opened. Whatever else lies in the folder is not ours."""
    named = re.compile(r"step_\d{8,}(\.safetensors)?")  # without the ending: a folder of an older version
    found = [path for path in folder_of(run).glob("step_*") if named.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def _digest(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> str:
    """blake2b over the manifest and every tensor with its name, type and shape."""
    state = hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def write(run: Path, tensors: dict[str, torch.Tensor], manifest: dict[str, Any], policy: CheckpointConfig) -> Path:
    """Write the checkpoint of `manifest["step"]` and delete those that the policy does not keep.

    UserError if the disk is full; the checkpoints that are there stay.
    """
    path = _path(run, manifest["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    files.require_space(path.parent, size + (1 << 20))
    metadata = {"format": FORMAT, "manifest": json.dumps(manifest), "checksum": _digest(tensors, manifest)}
    files.write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    _prune(run, manifest["step"], policy)
    return path


def _prune(run: Path, saved: int, policy: CheckpointConfig) -> None:
    """Keep `saved`, the `keep` - 1 before it and every `keep_every`-th step.

    Later ones are broken: the run would have resumed from them.
    """
    older = []
    for path in listing(run):
        step = step_of(path)
        if path.is_dir():
            continue
        if step > saved:
            path.unlink()
        elif step < saved and not (policy.keep_every and step % policy.keep_every == 0):
            older.append(path)
    for path in older[policy.keep - 1 :]:
        path.unlink()


def _inspect(path: Path) -> Checkpoint:
    """The checkpoint in `path`, or ValueError that says what is wrong with it."""
    if path.is_dir():
        raise ValueError("a folder of an older version; this one reads safetensors files")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')}, this version reads {FORMAT}")
            manifest = json.loads(metadata["manifest"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if _digest(tensors, manifest) != metadata["checksum"]:
            raise ValueError("it does not match its checksum")
        if manifest["step"] != step_of(path):
            raise ValueError(f"it holds step {manifest['step']}")
        return Checkpoint(path, manifest)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{error.__class__.__name__}: {error}") from None


def newest(run: Path) -> Checkpoint | None:
    """The newest good checkpoint of a run, or None where there is none; broken ones are named on stderr.

    UserError if there are checkpoints and none is good: a run must not begin anew by itself.
    """
    problems = []
    for path in listing(run):
        try:
            found = _inspect(path)
        except ValueError as problem:
            problems.append(f"{path} is broken ({problem})")
            continue
        if problems:
            print(f"gaitfast: {'; '.join(problems)}; going on from step {found.step}", file=sys.stderr)
        return found
    if problems:
        raise UserError(f"{'; '.join(problems)}; delete {folder_of(run)} to begin anew")
    return None


def sweep(run: Path) -> None:
    """Delete the unfinished files that a killed process left in a run folder."""
    for folder in (run, folder_of(run)):
        for path in folder.glob(".*.partial"):
            path.unlink(missing_ok=True)


class Writer:
    """A thread that writes files in the order in which they are handed over, one at a time.

    A failure is kept and raised by the next `submit` or `close`; what follows it is not written.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._closed = False
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        return self.error is not None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self.error is None:
                    job()
            except Exception as error:  # reported by whoever trains
                self.error = error
            del job  # and with it the state that it holds
            self._jobs.task_done()

    def wait(self) -> None:
        """Until everything is written; raises what went wrong."""
        self._jobs.join()
        if self.error is not None:
            raise self.error

    def submit(self, job: Callable[[], object]) -> None:
        """Hand over a file, given as the function that writes it. Raises what went wrong before."""
        if self.error is not None:
            raise self.error
        self._jobs.put(job)

    def finish(self, seconds: float) -> None:
        """Until everything is written or failed, but no longer than `seconds`; raises nothing."""
        deadline = time.monotonic() + seconds
        while self._jobs.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """Write what is left and end the thread; raises what went wrong. Once closed it stays so."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._jobs.put(None)
            self._thread.join()
