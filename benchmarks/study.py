"""From scratch against pretrained, at equal supervised iterations: `python -m benchmarks.study --data walkers`.

Per seed one pretraining, then the arms (scratch, finetuned with r = 0.1, 0.5, 1.0, frozen, and a frozen random backbone
as control), every one a process of the normal command with the same iterations, seed and batches. The same command goes
on where it was stopped; a finished run is not repeated. At the end: the table, OUT/study.png (the paper's Fig. 4) and,
with --json, the rows. Reading: docs/study.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import study_features
from benchmarks.environment import envelope
from benchmarks.study_plan import DATA, SIZES, Plan, Run, plan
from benchmarks.study_results import arm_results, headline, picture, pretraining_table, row, table
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import TransferConfig, UserError, load

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"walkers": "Synthetic walkers", "usf17": "USF HumanID"}


def execute(arguments: Sequence[str], log: Path) -> None:
    """`gaitfast ARGUMENTS` as a process of its own, its output appended to `log`. UserError if it fails.

    Ctrl-C and SIGTERM are passed on, and waited for: a training run saves before it ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "gaitfast.cli", *arguments]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise UserError(f"gaitfast {arguments[0]} ended with exit code {code}; see {log} ({lines[-1][:200]})")


def remaining(runs: Sequence[Run], seconds: dict[Run, float]) -> float | None:
    """Seconds that the runs without an entry in `seconds` will take: each as the mean of its arm, or else of its stage;
    None while a stage has no finished run."""
    total = 0.0
    for run in runs:
        if run in seconds:
            continue
        alike = [s for other, s in seconds.items() if (other.stage, other.arm) == (run.stage, run.arm)]
        alike = alike or [s for other, s in seconds.items() if other.stage == run.stage]
        if not alike:
            return None
        total += statistics.fmean(alike)
    return total


def progress(runs: Sequence[Run], run: Run, seconds: dict[Run, float], rank1: float, again: bool) -> str:
    """One line about a run that is finished, now or (`again`) before."""
    left = remaining(runs, seconds)
    eta = f", about {left / 60:.0f} min left" if left else ""
    took = "finished before" if again else f"{seconds[run]:.0f} s"
    return f"[{runs.index(run) + 1}/{len(runs)}] seed {run.seed}, {run.label}: {took}, rank-1 {rank1:.1f} %{eta}"


def carry_out(study: Plan, usf17: Path) -> list[dict]:
    """Make the dataset and do the runs that are not finished; their rows in the plan's order."""
    study.out.mkdir(parents=True, exist_ok=True)
    known = {run for run in study.runs if run.finished()}  # before anything is computed: a wrong folder is said at once
    for arguments in study.preparation(usf17):
        print(f"gaitfast {' '.join(arguments)}", flush=True)
        execute(arguments, study.out / "logs/dataset.log")
    seconds, rows = {run: row(run)["seconds"] for run in known}, []
    for run in study.runs:
        if run not in known:
            started = time.perf_counter()
            execute(run.command, study.out / f"logs/{run.folder.name}.log")
            if not run.finished():
                raise UserError(f"{run.folder}: stopped before its end; the same command continues")
            seconds[run] = time.perf_counter() - started
        rows.append(row(run))
        print(progress(study.runs, run, seconds, rows[-1]["curve"][-1]["rank1"], run in known), flush=True)
    return rows


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="SEED")
    size = parser.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "minutes: shows that it runs, nothing else"),
        ("default", "about 40 minutes on one CPU core"),
        ("large", "hours on a GPU: the published networks, near the paper's settings"),
    ):
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (runs/study/DATA-SIZE)")
    parser.add_argument(
        "--usf17",
        type=Path,
        default=Path(os.environ.get("GAITFAST_USF17", "usf17-release")),
        metavar="DIR",
        help="folder of Gal.mat and the probe sets ($GAITFAST_USF17)",
    )
    parser.add_argument("--configs", type=Path, metavar="DIR", help="pretrain.yaml and transfer.yaml of your own")
    arguments = parser.parse_args(argv)
    chosen = SIZES[arguments.size or "default"]
    out = arguments.out or Path("runs/study") / f"{arguments.data}-{chosen.name}"
    study = plan(arguments.data, chosen, out, arguments.seeds, arguments.configs)
    rows = carry_out(study, arguments.usf17)
    limit = load(TransferConfig, study.runs[1].config).eval.frames_limit
    for found in rows:
        if found["arm"] in ("", "frozen-random"):  # after and before pretraining
            file = out / found["run"] / "backbone.safetensors"
            found["features"] = study_features.measure(file, study.dataset, limit)
    results = arm_results(rows)
    picture(results, out / "study.png", TITLES[arguments.data])
    if arguments.json:
        facts = {"data": arguments.data, "size": chosen.name, "seeds": list(arguments.seeds)}
        files.write_json(arguments.json, {**envelope(headline(results), rows), "study": facts})
    print(f"\n{pretraining_table(rows)}\n\n{table(results)}\n\n{out / 'study.png'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    with user_errors():
        sys.exit(main())
