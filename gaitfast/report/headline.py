"""The figures of merit of a run, and how they read in words. Used by the page and by the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from gaitfast.report.run import Run, Series, finite


@dataclass(frozen=True)
class Change:
    """A quantity at two points of the run; None where it was not measured. The labels say when.

    kind: "percent" (shown with one decimal), "share" (of 1, shown in percent) or "number". error: the standard error
    of `last`, where it is known.
    """

    kind: str
    first: float | None = None
    last: float | None = None
    first_label: str = "before"
    last_label: str = "after"
    error: float | None = None

    @property
    def known(self) -> bool:
        return self.first is not None or self.last is not None

    @property
    def difference(self) -> float | None:
        return None if self.first is None or self.last is None else self.last - self.first

    def text(self, value: float) -> str:
        """`value` with as many decimals as suit both ends of the change, and the error."""
        if self.kind == "percent":
            return f"{value:.1f}%"
        scale = max(abs(end) for end in (self.first, self.last, self.error, 0.0) if end is not None)
        return f"{digits(100 * value, 2, 100 * scale)}%" if self.kind == "share" else digits(value, 3, scale)

    def give_or_take(self) -> str:
        """Plus-minus and the error, to follow the last value; empty where it is not known."""
        if self.error is None:
            return ""
        return f" \N{PLUS-MINUS SIGN} {Change(self.kind, last=self.error).text(self.error)}"

    def verb(self, verbs: tuple[str, str, str], still: float) -> str:
        """How a known change went: up, down or, below `still`, neither: "rose from 1 to 2", "stayed at 1"."""
        up, down, same = verbs
        if abs(self.difference) < still:
            return f"{same} at {self.text(self.last)}"
        return f"{up if self.difference > 0 else down} from {self.text(self.first)} to {self.text(self.last)}"


@dataclass(frozen=True)
class Headline:
    """rank1 in percent; gap: mean anchor-negative minus mean anchor-positive cosine distance; identity:
    (other - same) / same of the denoising loss on held-out people; loss: the weighted training loss."""

    rank1: Change
    gap: Change
    identity: Change
    loss: Change

    def sentence(self) -> str:
        """What happened, in one sentence without praise; empty where nothing was measured twice."""
        parts = []
        rank1, gap, identity = self.rank1, self.gap, self.identity
        if rank1.difference is not None:
            parts.append(f"rank-1 on unseen people {rank1.verb(('rose', 'fell', 'stayed'), still=0.05)}")
        if gap.difference is not None:
            still = 0.01 * max(abs(gap.first), abs(gap.last))
            verb = gap.verb(("opened", "closed", "stayed"), still)
            parts.append(f"the gap between negative and positive distance {verb}")
        if identity.last is not None:
            size = identity.text(abs(identity.last)) + identity.give_or_take()
            side = f"{size} higher" if identity.last > 0 else f"{size} lower" if identity.last < 0 else "no higher"
            earlier = "" if identity.first is None else f" ({identity.first_label}: {identity.text(identity.first)})"
            doubt = identity.error is not None and 0 < abs(identity.last) <= identity.error
            parts.append(
                f"the denoising loss is {side} with another person's feature than with the same person's"
                f"{', which is within its standard error' * doubt}{earlier}"
            )
        if not parts:
            return ""
        text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]
        return text[0].upper() + text[1:] + "."


def headline(run: Run) -> Headline:
    """From summary.json where it has the figure, else from the first and last evaluation, labelled by their steps."""
    return Headline(
        rank1=_change(run, "rank1", "percent"),
        gap=_change(run, "gap", "number"),
        identity=_identity(run),
        loss=ends("number", run.metrics.series("loss")),
    )


def _change(run: Run, key: str, kind: str) -> Change:
    before, after = finite(run.summary.get(f"{key}_before")), finite(run.summary.get(f"{key}_after"))
    if before is not None or after is not None:
        return Change(kind, before, after)
    return ends(kind, run.evaluations.series(key))


def ends(kind: str, series: Series | None) -> Change:
    """First and last value of a series; a single value is the last, unless it was measured before the first step."""
    if series is None:
        return Change(kind)
    labels = ["before" if step == 0 else f"step {step:,.0f}" for step in series.steps[[0, -1]]]
    if len(series.steps) > 1:
        return Change(kind, float(series.values[0]), series.last, *labels)
    return (
        Change(kind, series.last, None)
        if series.steps[0] == 0
        else Change(kind, None, series.last, "before", labels[0])
    )


def identity(run: Run) -> Series | None:
    """(loss_other - loss_same) / loss_same at each evaluation that has both, or None."""
    rows = _with_both_losses(run)
    if not rows:
        return None
    shares = [(r["loss_other"] - r["loss_same"]) / r["loss_same"] for r in rows]
    return Series(np.array([r["step"] for r in rows]), np.array(shares))


def _with_both_losses(run: Run) -> list[dict[str, float]]:
    return [row for row in run.evaluations.rows if "loss_other" in row and row.get("loss_same", 0) > 0]


def _identity(run: Run) -> Change:
    measured = ends("share", identity(run))
    if measured.last is not None:
        measured = replace(measured, error=_with_both_losses(run)[-1].get("identity_error"))
    same, other = finite(run.summary.get("loss_same")), finite(run.summary.get("loss_other"))
    if same is None or other is None or same <= 0:
        return measured
    first = measured.first if measured.first_label == "before" else None
    after = run.summary.get("after")
    error = finite(after.get("identity_error")) if isinstance(after, dict) else None
    return Change("share", first, (other - same) / same, error=error)


def digits(value: float, count: int = 3, scale: float = 0.0) -> str:
    """`value` without an exponent, with the decimals that give it, or a larger `scale`, `count` significant digits.

    digits(0.01234) is 0.0123; digits(0.007, scale=0.138) is 0.007, to stand beside 0.138.
    """
    largest = max(abs(value), abs(scale))
    if largest == 0:
        return "0"
    decimals = count - 1 - math.floor(math.log10(largest))
    return f"{value:,.{min(max(decimals, 0), 8)}f}"


def duration(seconds: float) -> str:
    """45 s, 12 min 30 s, 3 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"
