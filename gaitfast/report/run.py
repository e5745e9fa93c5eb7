"""Reads a run folder as pretraining or transfer leaves it, finished or not.

Whatever cannot be read becomes a notice that names the file and the line, and is left out: a number on the page was
in the folder, or it is not on the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gaitfast.config import UserError

METRICS = (
    *("loss", "lr_denoiser", "lr_backbone", "lr_head", "clips_per_s", "data_wait", "seconds"),
    *("triplet", "identity", "active", "accuracy"),
)
EVALUATIONS = (
    *("rank1", "rank5", "rank10", "mAP", "mINP", "rank1_euclidean"),
    *("distance_positive", "distance_negative", "gap"),
    *("loss_self", "loss_same", "loss_other", "loss_null", "identity", "identity_error", "seconds"),
)
SUMMARY = (
    *("rank1_before", "rank1_after", "gap_before", "gap_after"),
    *("loss_self", "loss_same", "loss_other", "loss_null", "seconds"),
)
TEXT_LIMIT = 1 << 28
"""Bytes of a text file that are read at most: a hundred times the longest run of the paper."""


def finite(value: Any) -> float | None:
    """`value` as a finite float, or None where it is none (booleans and numbers in strings are none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Series:
    """One quantity over the run: `steps` and `values`, float64 (n,), steps increasing, n >= 1."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Table:
    """The readable lines of a .jsonl file, by increasing step; each row holds its finite numbers and nothing else."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def series(self, key: str) -> Series | None:
        """The quantity `key` where it was logged, or None where it never was."""
        points = [(row["step"], row[key]) for row in self.rows if key in row]
        if not points:
            return None
        steps, values = np.asarray(points, dtype=np.float64).T
        return Series(steps, values)


@dataclass
class Run:
    """A run folder. Absent parts are empty, and `notices` says what was found unreadable."""

    path: Path
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    metrics: Table = field(default_factory=Table)
    evaluations: Table = field(default_factory=Table)
    notices: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name or str(self.path)

    @property
    def stage(self) -> str:
        """pretraining, or transfer."""
        supervised = isinstance(self.config.get("triplet"), dict) or self.metrics.series("triplet") is not None
        return "transfer" if supervised else "pretraining"

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def step(self) -> int | None:
        """The last step that anything was logged for."""
        steps = [int(table.rows[-1]["step"]) for table in (self.metrics, self.evaluations) if len(table)]
        return max(steps, default=None)

    def option(self, key: str) -> Any:
        """The value of `section.name` in the resolved config, or None."""
        node: Any = self.config
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node


def read_run(path: str | Path) -> Run:
    """Read a run folder. UserError where it is not a folder or holds nothing that a run writes."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; give the folder that a run wrote (its --set run=... value)")
    run = Run(path)
    run.config = _mapping(run, "config.resolved.yaml", yaml.safe_load)
    run.summary = _mapping(run, "summary.json", json.loads)
    for key in SUMMARY:
        if run.summary.get(key) is not None and finite(run.summary[key]) is None:
            run.notices.append(f"summary.json: {key} is {_short(run.summary.pop(key))}, not a finite number; left out")
    run.metrics = _table(run, "metrics.jsonl", METRICS)
    run.evaluations = _table(run, "evaluations.jsonl", EVALUATIONS)
    written = ("config.resolved.yaml", "summary.json", "metrics.jsonl", "evaluations.jsonl", "pictures.safetensors")
    if not any((path / name).exists() for name in written):
        raise UserError(f"{path}: not a run folder: holds none of {', '.join(written)}")
    return run


def _bytes(run: Run, name: str) -> bytes:
    """Content of a file of the run; empty, with a notice unless it is merely absent, where it cannot be read."""
    try:
        with open(run.path / name, "rb") as file:
            content = file.read(TEXT_LIMIT + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        run.notices.append(f"{name}: cannot be read ({error.strerror})")
        return b""
    if len(content) > TEXT_LIMIT:
        run.notices.append(f"{name}: longer than {TEXT_LIMIT >> 20} MiB, so it is left out")
        return b""
    return content


def _mapping(run: Run, name: str, parse: Any) -> dict:
    content = _bytes(run, name)
    if not content.strip():
        if (run.path / name).is_file():
            run.notices.append(f"{name}: empty")
        return {}
    try:
        value = parse(content.decode("utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        run.notices.append(f"{name}: {_why(error)}, so it is left out")
        return {}
    if not isinstance(value, dict):
        run.notices.append(f"{name}: keys and values are expected, so it is left out")
        return {}
    return value


def _why(error: Exception) -> str:
    """One phrase for a parser's error, with the line where it knows one."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1} is not valid YAML"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} is not valid JSON ({error.msg})"
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8 text"
    return f"cannot be parsed ({error.__class__.__name__})"


def _table(run: Run, name: str, keys: tuple[str, ...]) -> Table:
    rows: list[dict[str, float]] = []
    content = _bytes(run, name)
    lines = content.split(b"\n")
    superseded = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            cut = number == len(lines) and not run.finished
            run.notices.append(
                f"{where}: {'cut off, the run may be writing it' if cut else 'not valid JSON'}; left out"
            )
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            run.notices.append(f"{where}: no object with a whole number `step`; left out")
            continue
        # A resumed run logs again from its checkpoint's step on: what the interrupted run logged after it was undone.
        while rows and rows[-1]["step"] >= step:
            rows.pop()
            superseded += 1
        rows.append({"step": float(step), **dict(_numbers(run, where, record, keys))})
    if superseded:
        run.notices.append(f"{name}: {superseded} lines were logged again after a resume; the later ones are shown")
    return Table(rows)


def _short(value: Any) -> str:
    return repr(value)[:40]


def _numbers(run: Run, where: str, record: dict, keys: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for key in keys:
        value = record.get(key)
        if value is None:
            continue
        number = finite(value)
        if number is None:
            run.notices.append(f"{where}: {key} is {_short(value)}, not a finite number; left out")
        else:
            yield key, number
