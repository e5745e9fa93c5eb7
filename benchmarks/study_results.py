"""What came out of the study: rows, the table of arms, and the curves of rank-1 (the paper's Fig. 4)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study_plan import ARMS, Run
from gaitfast.config import UserError
from gaitfast.report.style import LIGHT, Theme, canvas, finish, label_ends, line, render

COLOURS = {  # the three finetuned arms are shades of one colour, the frozen ones greys
    "scratch": "#c8640a",
    "finetune-0.1": "#86b9e3",
    "finetune-0.5": "#2f86cc",
    "finetune-1.0": "#0d3f73",
    "frozen": "#3d424b",
    "frozen-random": "#9aa0aa",
}
CURVE = ("step", "rank1", "rank5", "rank10", "mAP", "mINP")
PRETRAINING = ("step", "rank1", "mAP", "gap", "loss_same", "loss_other", "loss_null", "identity", "identity_error")


def row(run: Run) -> dict:
    """A finished run: what it was, its evaluations, its time and commit."""
    try:
        summary = json.loads((run.folder / "summary.json").read_text())
        evaluations = [json.loads(text) for text in (run.folder / "evaluations.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run.folder}: not a finished run ({error})") from None
    keys = CURVE if run.arm else PRETRAINING
    return {
        "run": run.folder.name,
        "stage": run.stage,
        "arm": run.arm,
        "seed": run.seed,
        "curve": [{key: e[key] for key in keys if key in e} for e in evaluations],
        "seconds": summary["seconds_this_start"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "device": summary["backend"]["device"],
        "commit": summary["commit"],
    }


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; of a single one there is none."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return self._with_deviation(f"{self.mean:.1f}")

    def signed(self) -> str:
        return self._with_deviation(f"{self.mean:+.1f}")

    def _with_deviation(self, text: str) -> str:
        return text if self.deviation is None else f"{text} +- {self.deviation:.1f}"


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds; a `gain` is the final figure minus that from scratch with the same seed."""

    name: str
    label: str
    steps: np.ndarray
    """int64 (E,): supervised iterations at the evaluations."""
    rank1: np.ndarray
    """float64 (seeds, E), in percent."""
    first: Spread
    final: Spread
    best: Spread
    mean_ap: Spread
    gain: Spread
    mean_ap_gain: Spread


def arm_results(rows: Sequence[dict]) -> list[ArmResult]:
    """The arms that have runs, in the order of ARMS. UserError where their evaluations do not lie at the same steps."""
    by_arm = {arm.name: {r["seed"]: r["curve"] for r in rows if r["arm"] == arm.name} for arm in ARMS}
    steps = {tuple(e["step"] for e in curve) for curves in by_arm.values() for curve in curves.values()}
    if len(steps) > 1:
        raise UserError("the runs were evaluated at different iterations; they are not of one study")
    scratch = by_arm["scratch"]
    found = []
    for arm in ARMS:
        curves = by_arm[arm.name]
        if not curves:
            continue
        rank1 = np.array([[e["rank1"] for e in curve] for curve in curves.values()])
        paired = [(curve[-1], scratch[seed][-1]) for seed, curve in curves.items() if seed in scratch]
        found.append(
            ArmResult(
                arm.name,
                arm.label,
                np.array(next(iter(steps))),
                rank1,
                Spread.of(rank1[:, 0]),
                Spread.of(rank1[:, -1]),
                Spread.of(rank1.max(1)),
                Spread.of(curve[-1]["mAP"] for curve in curves.values()),
                *(Spread.of(ours[key] - theirs[key] for ours, theirs in paired) for key in ("rank1", "mAP")),
            )
        )
    return found


def headline(results: Sequence[ArmResult]) -> dict:
    """Means and standard deviations, in percent."""
    return {
        r.name: {
            "first_rank1": [r.first.mean, r.first.deviation],
            "final_rank1": [r.final.mean, r.final.deviation],
            "best_rank1": [r.best.mean, r.best.deviation],
            "final_mAP": [r.mean_ap.mean, r.mean_ap.deviation],
            "final_rank1_minus_scratch": [r.gain.mean, r.gain.deviation],
            "final_mAP_minus_scratch": [r.mean_ap_gain.mean, r.mean_ap_gain.deviation],
        }
        for r in results
    }


def table(results: Sequence[ArmResult]) -> str:
    """Markdown: one line per arm, mean +- standard deviation over seeds, in percent."""
    lines = [
        "| arm | rank-1 before | final rank-1 | - scratch, same seed | best rank-1 | final mAP | - scratch |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        gain, mean_ap_gain = ("", "") if r.name == "scratch" else (r.gain.signed(), r.mean_ap_gain.signed())
        lines.append(f"| {r.label} | {r.first} | {r.final} | {gain} | {r.best} | {r.mean_ap} | {mean_ap_gain} |")
    return "\n".join(lines)


def pretraining_table(rows: Sequence[dict]) -> str:
    """Markdown: what each pretraining did to the raw feature, before -> after; before is the control's backbone."""
    names = ("seed", "denoising loss", "(other - same) / same, %", "gap", "raw rank-1", "effective rank", "spread")
    lines = [f"| {' | '.join(names)} | between people |", "|---|---|---|---|---|---|---|---|"]
    before = {r["seed"]: r["features"] for r in rows if r["arm"] == "frozen-random"}
    for r in rows:
        if r["stage"] == "pretrain":
            first, last, old, new = r["curve"][0], r["curve"][-1], before[r["seed"]], r["features"]
            cells = (
                f"{first['loss_same']:.2f} -> {last['loss_same']:.3f}",
                f"{100 * last['identity']:.3f} +- {100 * last['identity_error']:.3f}",
                f"{first['gap']:.4f} -> {last['gap']:.4f}",
                f"{first['rank1']:.1f} -> {last['rank1']:.1f}",
                f"{old['effective_rank']:.1f} -> {new['effective_rank']:.1f}",
                f"{old['spread']:.3f} -> {new['spread']:.3f}",
                f"{old['between_people']:.3f} -> {new['between_people']:.3f}",
            )
            lines.append(f"| {r['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(results: Sequence[ArmResult], theme: Theme, title: str, unit: str) -> Figure:
    """Rank-1 against supervised iterations: the mean of each arm as a line, the range over seeds as a band."""
    figure, axes = canvas(theme, title, unit)
    figure.set_size_inches(6.2, 3.8)
    axes.set_xlabel("supervised iteration", loc="right")
    for r in results:
        style = "--" if r.name == "frozen-random" else "-"
        axes.fill_between(r.steps, r.rank1.min(0), r.rank1.max(0), color=COLOURS[r.name], alpha=0.1, linewidth=0)
        line(axes, r.steps, r.rank1.mean(0), COLOURS[r.name], linestyle=style)
    finish(axes, results[0].steps)
    label_ends(axes, [(r.final.mean, f"{r.label}: {r.final.mean:.1f}%", COLOURS[r.name]) for r in results])
    return figure


def picture(results: Sequence[ArmResult], path: Path, title: str) -> None:
    """Write the curves as PNG."""
    seeds = len(results[0].rank1)
    unit = f"rank-1 on unseen people, %; mean and range of {seeds} seed{'s' * (seeds > 1)}"
    path.write_bytes(render(lambda theme: curves(results, theme, title, unit), LIGHT))
