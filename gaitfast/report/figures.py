"""The curves of a run: loss, rank-1 (Fig. 2), distances (Fig. 3), the direct measure, throughput.

Each function takes the run and a theme, and returns a figure, or None where the run logged nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gaitfast.report.headline import digits, identity
from gaitfast.report.run import Run
from gaitfast.report.style import Theme, canvas, finish, label_ends, line

RANK_SPAN = 5.0
"""Percentage points that the rank-1 axis spans at least, so that a flat curve looks flat."""


@dataclass(frozen=True)
class Curve:
    """A figure of the report: file stem, how it is drawn, what to see in it, where its data come from."""

    name: str
    title: str
    draw: Callable[[Run, Theme], Figure | None]
    caption: str
    source: str


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` points, over fewer at both ends; float64 (n,)."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def smoothed(run: Run, theme: Theme, key: str, title: str, unit: str, scale: float = 1.0) -> Figure | None:
    """A logged quantity and, of many points, its running mean; logarithmic where it spans a factor of ten."""
    series = run.metrics.series(key)
    if series is None:
        return None
    figure, axes = canvas(theme, title, unit)
    values = mean = scale * series.values
    window = len(values) // 20
    if window > 1:
        mean = smooth(values, window)
        axes.plot(series.steps, values, color=theme.same, alpha=0.25, linewidth=0.8)
    line(axes, series.steps, mean, theme.same)
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    finish(axes, series.steps)
    label_ends(axes, [(mean[-1], f"mean {digits(mean[-1])}" if window > 1 else digits(mean[-1]), theme.same)])
    return figure


def loss(run: Run, theme: Theme) -> Figure | None:
    return smoothed(run, theme, "loss", "Denoising loss in training", "weighted squared error of the noise")


def learning_rate(run: Run, theme: Theme) -> Figure | None:
    figure, axes = canvas(theme, "Learning rates", "in units of 10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FOUR}")
    labels, steps = [], []
    for key, name, colour in (
        ("lr_backbone", "backbone", theme.same),
        ("lr_denoiser", "denoiser", theme.other),
        ("lr_head", "head", theme.third),
    ):
        series = run.metrics.series(key)
        if series is not None:
            line(axes, series.steps, 1e4 * series.values, colour)
            labels.append((1e4 * series.last, name, colour))
            steps.append(series.steps)
    if not labels:
        return None
    axes.set_ylim(bottom=0)
    finish(axes, np.concatenate(steps))
    label_ends(axes, labels)
    return figure


def rank1(run: Run, theme: Theme) -> Figure | None:
    figure, axes = canvas(theme, "Rank-1 on unseen people", "probes identified, %")
    labels, steps = [], []
    pairs = (
        ("rank1_euclidean", "Euclidean", theme.third, "--"),
        ("rank1", run.option("eval.metric") or "cosine", theme.same, "-"),
    )
    for key, name, colour, style in pairs:
        series = run.evaluations.series(key)
        if series is not None:
            line(axes, series.steps, series.values, colour, linestyle=style)
            labels.append((series.last, f"{name} {series.last:.1f}%", colour))
            steps.append(series.steps)
    if not labels:
        return None
    low, high = axes.get_ylim()
    room = max(0.0, RANK_SPAN - (high - low)) / 2
    axes.set_ylim(low - room, high + room)
    finish(axes, np.concatenate(steps))
    label_ends(axes, labels)
    return figure


def distances(run: Run, theme: Theme) -> Figure | None:
    rows = [r for r in run.evaluations.rows if "distance_positive" in r and "distance_negative" in r]
    if not rows:
        return None
    steps, positive, negative = np.array([(r["step"], r["distance_positive"], r["distance_negative"]) for r in rows]).T
    figure, axes = canvas(theme, "Distance between features", "mean cosine distance")
    axes.fill_between(steps, positive, negative, color=theme.other, alpha=0.1, linewidth=0)
    line(axes, steps, negative, theme.other)
    line(axes, steps, positive, theme.same)
    finish(axes, steps)
    show = partial(digits, scale=max(positive[-1], negative[-1]))
    label_ends(
        axes,
        [
            (negative[-1], f"negative {show(negative[-1])}", theme.other),
            (0.5 * (positive[-1] + negative[-1]), f"gap {show(negative[-1] - positive[-1])}", theme.muted),
            (positive[-1], f"positive {show(positive[-1])}", theme.same),
        ],
    )
    return figure


def conditions(run: Run, theme: Theme) -> Figure | None:
    figure, axes = canvas(theme, "Loss on held-out people, by condition", "denoising loss, fixed noise")
    labels, steps = [], []
    for key, colour, style in (
        ("null", theme.third, ":"),
        ("self", theme.third, "-"),
        ("other", theme.other, "-"),
        ("same", theme.same, "-"),
    ):
        series = run.evaluations.series(f"loss_{key}")
        if series is not None:
            line(axes, series.steps, series.values, colour, linestyle=style)
            labels.append((series.last, key, colour))
            steps.append(series.steps)
    if not labels:
        return None
    finish(axes, np.concatenate(steps))
    count = _digits_apart([value for value, _, _ in labels])
    label_ends(axes, [(value, f"{key} {digits(value, count)}", colour) for value, key, colour in labels])
    return figure


def _digits_apart(values: list[float]) -> int:
    """Significant digits, 4 to 7, with which different values look different."""
    apart = (count for count in range(4, 7) if len({digits(v, count) for v in values}) == len(set(values)))
    return next(apart, 7)


def identity_carried(run: Run, theme: Theme) -> Figure | None:
    series = identity(run)
    if series is None:
        return None
    figure, axes = canvas(theme, "Identity that the feature carries", "(other \N{MINUS SIGN} same) / same loss, %")
    values = 100 * series.values
    error = run.evaluations.series("identity_error")
    if error is not None and np.array_equal(error.steps, series.steps):
        low, high = values - 100 * error.values, values + 100 * error.values
        axes.fill_between(series.steps, low, high, color=theme.other, alpha=0.12, linewidth=0)
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    line(axes, series.steps, values, theme.other)
    finish(axes, series.steps)
    label_ends(axes, [(values[-1], f"{digits(values[-1], 2)}%", theme.other)])
    return figure


def throughput(run: Run, theme: Theme) -> Figure | None:
    series = run.metrics.series("clips_per_s")
    if series is None:
        return None
    figure, axes = canvas(
        theme, "Throughput", "clip pairs per second" if run.stage == "pretraining" else "clips per second"
    )
    median = float(np.median(series.values))
    axes.axhline(median, color=theme.muted, linewidth=0.8, linestyle=":")
    line(axes, series.steps, series.values, theme.same)
    axes.set_ylim(0, 1.15 * float(series.values.max()) or 1.0)
    finish(axes, series.steps)
    label_ends(axes, [(median, f"median {digits(median)}", theme.muted)])
    return figure


def data_wait(run: Run, theme: Theme) -> Figure | None:
    series = run.metrics.series("data_wait")
    if series is None:
        return None
    figure, axes = canvas(theme, "Time spent waiting for data", "share of the step, %")
    values = 100 * series.values
    axes.fill_between(series.steps, 0, values, color=theme.other, alpha=0.12, linewidth=0)
    line(axes, series.steps, values, theme.other)
    axes.set_ylim(0, max(10.0, 1.15 * float(values.max())))
    finish(axes, series.steps)
    median = float(np.median(values))
    label_ends(axes, [(median, f"median {median:.1f}%", theme.muted)])
    return figure


CURVES = {
    curve.name: curve
    for curve in (
        Curve(
            "loss",
            "Denoising loss in training",
            loss,
            "The weighted noise-prediction loss at the logged steps; of many (pale) also the running mean (dark).",
            "metrics.jsonl: loss",
        ),
        Curve(
            "learning_rate",
            "Learning rates",
            learning_rate,
            "Linear warm-up, then cosine annealing, of the two parameter groups.",
            "metrics.jsonl: lr_backbone, lr_denoiser",
        ),
        Curve(
            "rank1",
            "Rank-1 on unseen people",
            rank1,
            "Share of probe walks whose nearest gallery walk, by the raw feature, is of the same person (the paper's"
            " Fig. 2); no label was used.",
            "evaluations.jsonl: rank1, rank1_euclidean",
        ),
        Curve(
            "distances",
            "Distance between features",
            distances,
            "Mean cosine distance of two clips of one walk (positive) and of different walks (negative); in the paper's"
            " Fig. 3 the shaded gap opens.",
            "evaluations.jsonl: distance_positive, distance_negative",
        ),
        Curve(
            "conditions",
            "Loss on held-out people, by condition",
            conditions,
            "The same noised clips denoised with four conditions: from the same clip (self), another walk of the person"
            " (same), another person (other), or none (null).",
            "evaluations.jsonl: loss_self, loss_same, loss_other, loss_null",
        ),
        Curve(
            "identity",
            "Identity that the feature carries",
            identity_carried,
            "How much worse denoising gets when the condition comes from another person; it grows as the feature"
            " comes to tell people apart. Shaded, where it was measured: the standard error over people.",
            "evaluations.jsonl: loss_other, loss_same",
        ),
        Curve(
            "throughput",
            "Throughput",
            throughput,
            "Clip pairs through the whole step per second of wall time, all ranks together.",
            "metrics.jsonl: clips_per_s",
        ),
        Curve(
            "data_wait",
            "Time spent waiting for data",
            data_wait,
            "Share of each step in which the model stood still because the next batch was not there yet.",
            "metrics.jsonl: data_wait",
        ),
    )
}
