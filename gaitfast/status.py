"""What a run is doing: its step, speed, time to go, last checkpoint and health.

    gaitfast status RUN [--json]

It reads what the run writes and asks whether its process still holds the folder. Exit code 0 while the run is well
(running, stopped on request, finished), 1 when somebody should look (failed, killed, stalled).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from gaitfast.config import UserError
from gaitfast.engine import checkpoint, events

QUIET = 300.0
"""Seconds without a sign of life after which a run may be called stalled, unless its steps take long."""
WELL = ("running", "stopped", "finished")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    found = status(args.run)
    print(json.dumps(found) if args.json else describe(args.run, found))
    return 0 if found["health"] in WELL else 1


def status(run: Path) -> dict[str, Any]:
    """The state of a run; figures that it has not produced yet are None. UserError if the folder holds no run."""
    happened = events.read(run)
    if not happened:
        raise UserError(f"{run}: no run of this version (it has no {events.NAME}); name the folder of a run")
    starts = [event for event in happened if event["event"] in ("start", "resume")]
    rows = _rows(run / "metrics.jsonl")
    last_row = rows[-1] if rows else {}
    saved = checkpoint.listing(run)
    alive = events.is_alive(run)
    begun = starts[-1] if starts else {}
    step = max(int(last_row.get("step", 0)), int(begun.get("step", 0)))
    iterations = begun.get("iterations")
    pace = _pace(rows)
    quiet = time.time() - _last_sign(run)
    health, why = _health(happened, alive, quiet, pace)
    return {
        "health": health,
        "why": why,
        "step": step,
        "iterations": iterations,
        "processes": begun.get("processes"),
        "loss": last_row.get("loss"),
        "steps_per_s": 1 / pace[0] if pace else None,
        "clips_per_s": last_row.get("clips_per_s"),
        "data_wait": last_row.get("data_wait"),
        "seconds_to_go": (iterations - step) * pace[0] if pace and iterations and alive else None,
        "seconds_since_sign": round(quiet, 1),
        "checkpoint_step": checkpoint.step_of(saved[0]) if saved else None,
        "checkpoint_age": round(time.time() - saved[0].stat().st_mtime, 1) if saved else None,
        "starts": len(starts),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    """The logged rows; a line that is being written is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise UserError(f"{path}: a line is not a JSON object; mend or delete it") from None


def _pace(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """(seconds per step, seconds per row) of the last rows: the median, without evaluations and checkpoints."""
    recent = rows[-21:]
    steps = [(b["seconds"] - a["seconds"], b["step"] - a["step"]) for a, b in itertools.pairwise(recent)]
    steps = [(seconds, count) for seconds, count in steps if seconds > 0 and count > 0]
    if not steps:
        return None
    return statistics.median(s / n for s, n in steps), statistics.median(s for s, _ in steps)


def _last_sign(run: Path) -> float:
    """When the run last wrote a row or an event."""
    names = ("metrics.jsonl", "evaluations.jsonl", events.NAME)
    return max((run / name).stat().st_mtime for name in names if (run / name).exists())


def _health(
    happened: list[dict[str, Any]], alive: bool, quiet: float, pace: tuple[float, float] | None
) -> tuple[str, str]:
    """One word, and the reason in words."""
    last = happened[-1]
    if alive:
        patience = max(QUIET, 20 * pace[1] if pace else 0.0)
        if last["event"] == "evaluate" and quiet < 12 * patience:
            return "running", f"evaluating since {_duration(quiet)}"
        if last["event"] in ("stop", "finish", "failure") and quiet <= patience:
            return "running", f"starting since {_duration(quiet)}"
        if quiet > patience:
            return "stalled", f"its process lives, but wrote nothing for {_duration(quiet)}"
        return "running", f"last sign {_duration(quiet)} ago"
    if last["event"] == "finish":
        return "finished", "all steps are done"
    if last["event"] == "stop":
        return "stopped", "stopped on request; the same command goes on"
    if last["event"] == "failure":
        return "failed", f"rank {last['rank']}: {last['error']}"
    return "killed", "its process is gone without a word; the same command goes on from the last checkpoint"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def describe(run: Path, found: dict[str, Any]) -> str:
    """The state in a few lines."""
    of = f" of {found['iterations']:,} ({found['step'] / found['iterations']:.0%})" if found["iterations"] else ""
    lines = [f"{run}: {found['health']} ({found['why']})", f"  step        {found['step']:,}{of}"]
    if found["loss"] is not None:
        lines.append(f"  loss        {found['loss']:.4f}")
    if found["steps_per_s"] is not None:
        lines.append(
            f"  speed       {found['steps_per_s']:.2f} steps/s, {found['clips_per_s']:.1f} clips/s, "
            f"{found['data_wait']:.1%} of it waiting for data, {found['processes']} processes"
        )
    if found["seconds_to_go"] is not None:
        end = datetime.datetime.now() + datetime.timedelta(seconds=found["seconds_to_go"])
        lines.append(f"  to go       {_duration(found['seconds_to_go'])}, until {end:%Y-%m-%d %H:%M}")
    if found["checkpoint_step"] is None:
        lines.append("  checkpoint  none yet")
    else:
        lines.append(f"  checkpoint  step {found['checkpoint_step']:,}, {_duration(found['checkpoint_age'])} ago")
    if found["starts"] > 1:
        lines.append(f"  started     {found['starts']} times")
    return "\n".join(lines)
