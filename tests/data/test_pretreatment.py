"""OpenGait's pretreatment, against numbers from its own code and against its five rules."""

import json
from pathlib import Path

import numpy as np
import pytest

from gaitfast.data import pretreatment

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pretreatment.json").read_text())


def ellipse(cx, cy, rx, ry, height=120, width=90):
    y, x = np.mgrid[:height, :width]
    return ((((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) <= 1).astype(np.uint8) * 255


def block(height, width, rows, columns, value=255):
    picture = np.zeros((height, width), np.uint8)
    picture[slice(*rows), slice(*columns)] = value
    return picture


def test_golden_case():
    speck = block(120, 90, (10, 16), (10, 16))
    pictures = [ellipse(45, 60, 18, 50), ellipse(20, 55, 15, 40), ellipse(70, 70, 12, 45), speck]
    frames = [pretreatment.normalise(picture) for picture in pictures]
    assert frames[3] is None
    frames = np.stack(frames[:3])
    assert frames.dtype == GOLDEN["dtype"] and list(frames.shape) == GOLDEN["out_shape"]
    assert frames.sum(axis=(1, 2), dtype=np.int64).tolist() == GOLDEN["frame_sums"]
    assert frames.sum(axis=2, dtype=np.int64)[:, ::8].tolist() == GOLDEN["row_sums_every8"]
    columns = [np.flatnonzero(frame.any(axis=0))[[0, -1]].tolist() for frame in frames]
    assert columns == GOLDEN["col_first_last_nonzero"]


@pytest.mark.parametrize(("pixels", "kept"), [(39, False), (40, True)])  # 39 * 255 <= 10000 < 40 * 255
def test_drops_pictures_with_little_foreground(pixels, kept):
    assert (pretreatment.normalise(block(80, 80, (20, 20 + pixels), (40, 41))) is not None) == kept


def test_the_sum_that_is_just_the_limit_is_dropped():
    picture = block(80, 80, (20, 60), (30, 31), value=250)
    assert picture.sum() == pretreatment.MIN_SUM
    assert pretreatment.normalise(picture) is None
    picture[0, 0] = 1
    assert pretreatment.normalise(picture) is not None


def test_a_centre_in_column_zero_is_dropped_as_by_opengait():
    assert pretreatment.normalise(block(64, 64, (0, 64), (0, 1))) is None
    assert pretreatment.normalise(block(64, 64, (0, 64), (1, 2))) is not None


def test_pads_when_the_window_touches_either_edge():
    """64 rows: no scaling, so the columns can be followed by hand."""
    for centre, width in ((10, 100), (32, 100), (33, 100), (67, 100), (68, 100), (95, 100), (20, 30)):
        frame = pretreatment.normalise(block(64, width, (0, 64), (centre, centre + 1)))
        assert frame.shape == (64, 64)
        assert np.flatnonzero(frame.any(axis=0)).tolist() == [32]  # the centre of mass lands in the middle


def test_rows_are_cropped_to_the_person_and_fill_the_height():
    frame = pretreatment.normalise(block(200, 200, (50, 114), (90, 110)))
    assert frame.any(axis=1).all()
    assert np.array_equal(np.flatnonzero(frame.any(axis=0)), np.arange(22, 42))  # column 100 is beyond half


def test_a_crop_too_thin_to_scale_is_dropped():
    assert pretreatment.normalise(block(200, 2, (0, 200), (0, 2))) is None
