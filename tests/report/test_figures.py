"""The curves show what was logged, and nothing where nothing was."""

import io
import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from gaitfast.report.figures import CURVES, smooth
from gaitfast.report.run import Run, Table, read_run
from gaitfast.report.style import DARK, LABEL_PITCH, LIGHT, render, spread
from tests.report.fake_run import fake_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return read_run(fake_run(tmp_path_factory.mktemp("runs") / "walk", with_pictures=False))


def lines(figure) -> dict[int, np.ndarray]:
    """Vertical data of the lines of a figure's axes, by number."""
    return [np.asarray(line.get_ydata(), dtype=float) for line in figure.axes[0].get_lines()]


@pytest.mark.parametrize(
    ("name", "key", "factor"),
    [
        ("loss", "loss", 1),
        ("learning_rate", "lr_backbone", 1e4),
        ("learning_rate", "lr_denoiser", 1e4),
        ("rank1", "rank1", 1),
        ("rank1", "rank1_euclidean", 1),
        ("distances", "distance_positive", 1),
        ("distances", "distance_negative", 1),
        *(("conditions", f"loss_{key}", 1) for key in ("self", "same", "other", "null")),
        ("throughput", "clips_per_s", 1),
        ("data_wait", "data_wait", 100),
    ],
)
def test_figure_draws_the_logged_values(run, name, key, factor):
    series = run.metrics.series(key) or run.evaluations.series(key)
    drawn = lines(CURVES[name].draw(run, LIGHT))
    assert any(len(y) == len(series.values) and np.allclose(y, factor * series.values) for y in drawn)


def test_identity_is_other_over_same(run):
    wanted = [100 * (r["loss_other"] - r["loss_same"]) / r["loss_same"] for r in run.evaluations.rows]
    assert any(len(y) == len(wanted) and np.allclose(y, wanted) for y in lines(CURVES["identity"].draw(run, LIGHT)))


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_at_no_point_and_at_one(run, name, tmp_path):
    curve = CURVES[name]
    assert curve.draw(Run(tmp_path), LIGHT) is None
    for step in (0, 12_345):
        one = Run(tmp_path)
        one.metrics = Table([{**run.metrics.rows[0], "step": float(step)}])
        one.evaluations = Table([{**run.evaluations.rows[0], "step": float(step)}])
        figure = curve.draw(one, LIGHT)
        low, high = figure.axes[0].get_xlim()
        assert low < step < high
        assert Image.open(io.BytesIO(render(lambda theme, c=curve, r=one: c.draw(r, theme), LIGHT))).size[0] > 800


@pytest.mark.parametrize("name", CURVES)
def test_source_in_the_caption_is_what_is_drawn(run, name, tmp_path):
    """Without the fields that `source` names there is nothing to draw; with them alone there is."""
    curve = CURVES[name]
    keys = re.split(r"[:,] ", curve.source)[1:]
    for kept, drawn in (({*keys, "step"}, True), ({*run.metrics.rows[0], *run.evaluations.rows[0]} - {*keys}, False)):
        other = Run(tmp_path)
        other.metrics = Table([{k: v for k, v in row.items() if k in kept} for row in run.metrics.rows])
        other.evaluations = Table([{k: v for k, v in row.items() if k in kept} for row in run.evaluations.rows])
        assert (curve.draw(other, LIGHT) is not None) == drawn


def test_themes_differ_in_background(run):
    corner = {}
    for theme in (LIGHT, DARK):
        png = render(lambda theme: CURVES["loss"].draw(run, theme), theme)
        corner[theme.paper] = "#{:02x}{:02x}{:02x}".format(*Image.open(io.BytesIO(png)).convert("RGB").getpixel((2, 2)))
    assert all(paper == seen for paper, seen in corner.items())


def test_loss_below_zero_has_a_linear_axis(run, tmp_path):
    other = Run(tmp_path)
    other.metrics = Table([{"step": 1.0, "loss": -1.0}, {"step": 2.0, "loss": 100.0}])
    assert CURVES["loss"].draw(other, LIGHT).axes[0].get_yscale() == "linear"
    assert CURVES["loss"].draw(run, LIGHT).axes[0].get_yscale() == "log" or run.metrics.series("loss").values.min() > 0


def test_smooth_keeps_constants_and_length():
    assert np.allclose(smooth(np.full(50, 3.0), 7), 3.0)
    ramp = smooth(np.arange(50.0), 5)
    assert len(ramp) == 50 and np.allclose(ramp[2:-2], np.arange(50.0)[2:-2])
    assert len(smooth(np.arange(3.0), 10)) == 3


@pytest.mark.parametrize("heights", [[0.5], [0.1, 0.9], [0.5, 0.5, 0.5], [0.0, 0.0, 0.01, 0.3], [0.2, 0.21, 0.29, 0.9]])
def test_spread_parts_labels_and_keeps_order(heights):
    moved = spread(heights, LABEL_PITCH)
    assert len(moved) == len(heights) and min(moved) >= 0
    assert all(b - a >= LABEL_PITCH - 1e-9 for a, b in pairwise(moved))
    if all(b - a >= LABEL_PITCH for a, b in pairwise(heights)):
        assert moved == pytest.approx(heights)


def test_labels_of_nearly_equal_losses_differ(run, tmp_path):
    other = Run(tmp_path)
    losses = {"loss_self": 1.0333193, "loss_same": 1.0333169, "loss_other": 1.0333847, "loss_null": 1.0345364}
    other.evaluations = Table([{"step": 24.0, **losses}])
    labels = [text.get_text() for text in CURVES["conditions"].draw(other, LIGHT).axes[0].texts]
    assert sorted(labels) == ["null 1.034536", "other 1.033385", "same 1.033317", "self 1.033319"]
