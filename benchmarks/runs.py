"""Finished pretraining runs as rows: `python -m benchmarks.runs RUN [RUN ...] --json FILE`.

A row holds the run's summary and every evaluation, so that the README's figures can be traced. The headline is the
median over the runs of (loss_other - loss_same) / loss_same after training, of the change of the gap, and of clips/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.environment import envelope
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import UserError


def row(run: Path) -> dict:
    """Summary, evaluations and median throughput of a finished run."""
    try:
        summary = json.loads((run / "summary.json").read_text())
        evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a finished run ({error})") from None
    return {
        "run": run.name,
        "identity": summary["loss_other"] / summary["loss_same"] - 1,
        "clips_per_s": statistics.median(step["clips_per_s"] for step in steps),
        "data_wait": statistics.median(step["data_wait"] for step in steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "summary": {key: value for key, value in summary.items() if key not in ("before", "after")},
        "evaluations": evaluations,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runs", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    rows = [row(run) for run in arguments.runs]
    headline = {
        "identity": statistics.median(r["identity"] for r in rows),
        "gap_opened": statistics.median(r["summary"]["gap_after"] - r["summary"]["gap_before"] for r in rows),
        "clips_per_s": statistics.median(r["clips_per_s"] for r in rows),
    }
    files.write_json(arguments.json, envelope(headline, rows))
    for r in rows:
        summary = r["summary"]
        print(
            f"{r['run']}: seed {summary['seed']}, loss {r['first_loss']:.3f} -> {r['last_loss']:.3f}, "
            f"other/same - 1 {r['identity']:.5f}, gap {summary['gap_before']:.5f} -> {summary['gap_after']:.5f}, "
            f"rank-1 {summary['rank1_before']:.1f} -> {summary['rank1_after']:.1f}, {r['clips_per_s']:.1f} clips/s"
        )
    return 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
