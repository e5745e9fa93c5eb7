"""How figures look: two themes, one font size, direct labels at the ends of lines instead of legends."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

DPI = 220
"""Twice the resolution at which the page shows a figure."""
SIZE = (4.2, 2.7)
"""Inches of a curve figure; two stand side by side on the page."""
FONTS = ("Inter", "Source Sans 3", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
TICK_STEPS = [1, 2, 2.5, 5, 10]
LABEL_PITCH = 0.088
"""Least distance between two labels at the ends of lines, as a share of the axes' height."""


@dataclass(frozen=True)
class Theme:
    """Colours of one mode; `same` is also positive pairs and cosine, `other` also negative pairs, everywhere."""

    paper: str
    ink: str
    muted: str
    grid: str
    same: str
    other: str
    third: str


LIGHT = Theme("#ffffff", "#1d2026", "#6b7280", "#e6e7ea", "#1f6fb2", "#c8640a", "#8a8f99")
DARK = Theme("#191b1f", "#e8e9ec", "#9aa0aa", "#2e3138", "#6db3f2", "#f0a04b", "#8d939e")


def _rc(theme: Theme) -> dict[str, Any]:
    installed = set(font_manager.get_font_names())
    return {
        "font.family": [name for name in FONTS if name in installed],
        "font.size": 9,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "ytick.left": False,
        "ytick.minor.left": False,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "text.color": theme.ink,
        "lines.linewidth": 1.7,
        "lines.markersize": 3.6,
        "lines.solid_capstyle": "round",
    }


def render(draw: Callable[[Theme], Figure | None], theme: Theme) -> bytes | None:
    """The figure that `draw(theme)` makes, as PNG; None where it has nothing to draw."""
    with matplotlib.rc_context(_rc(theme)):
        figure = draw(theme)
        if figure is None:
            return None
        FigureCanvasAgg(figure)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": "gaitfast"})
        return out.getvalue()


def canvas(theme: Theme, title: str, unit: str) -> tuple[Figure, Axes]:
    """A figure with one axes whose horizontal axis is the optimizer step; `unit` names the vertical axis."""
    figure = Figure(figsize=SIZE, facecolor=theme.paper, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, rect=(0, 0, 1, 0.85))
    figure.text(0.013, 0.925, title, color=theme.ink, weight="bold", size=10)
    figure.text(0.013, 0.865, unit, color=theme.muted)
    axes = figure.add_subplot()
    axes.set_xlabel("optimizer step", loc="right")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    return figure, axes


def finish(axes: Axes, steps: np.ndarray) -> None:
    """Set the horizontal axis for `steps`, of which there may be one only."""
    low, high = float(np.min(steps)), float(np.max(steps))
    pad = 0.02 * (high - low) or max(1.0, 0.05 * high)
    axes.set_xlim(low - pad, high + pad)
    thousands = high >= 10_000
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: "" if x < 0 else f"{x / 1000:g}k" if thousands and x else f"{x:,.0f}")
    )


def line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, **style: Any) -> None:
    """A line, with markers where the points are few enough to be told apart."""
    axes.plot(steps, values, color=colour, marker="o" if len(steps) <= 40 else None, markeredgewidth=0, **style)


def label_ends(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) right of the axes at the height of `value`, pushed apart where they would collide.

    Call it last: heights depend on the limits of the vertical axis.
    """
    transform = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    entries = sorted((float(transform.transform((x, value))[1]), text, colour) for value, text, colour in labels)
    heights = spread([height for height, _, _ in entries], LABEL_PITCH)
    for height, (_, text, colour) in zip(heights, entries):
        axes.annotate(
            text,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def spread(heights: list[float], pitch: float) -> list[float]:
    """Increasing heights moved so that neighbours are `pitch` apart: groups around their mean, none below 0."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], pitch) - _top(groups[-2], pitch) < pitch:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, pitch) + i * pitch for group in groups for i in range(len(group))]


def _bottom(group: list[float], pitch: float) -> float:
    return max(0.0, sum(group) / len(group) - (len(group) - 1) / 2 * pitch)


def _top(group: list[float], pitch: float) -> float:
    return _bottom(group, pitch) + (len(group) - 1) * pitch
