"""A sheet of synthetic walkers to look at."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from gaitfast.config import UserError
from gaitfast.data.walker_camera import SIZE
from gaitfast.data.walker_scene import render_walk, sample_walk

_SHOTS = (  # condition, azimuth, camera height
    ("nm", 90, 1.2),
    ("nm", 0, 1.2),
    ("nm", 135, 1.5),
    ("nm", 300, 3.8),
    ("bg", 270, 1.5),
    ("cl", 80, 2.0),
)
_PEOPLE, _INSTANTS, _FRAMES = 6, 4, 26


def draw_preview(path: str | Path, seed: int = 0, nuisances: str = "none") -> None:
    """Write a labelled sheet (PNG): people by row; condition, camera and instants of the stride by column.

    Raises UserError if the file cannot be written.
    """
    zoom, gutter, top, side = 2, 12, 30, 60
    cell = SIZE * zoom
    step = round(cell * 0.6)  # figures are narrow: the empty margins of neighbours overlap
    block = step * (_INSTANTS - 1) + cell
    sheet = np.full((top + _PEOPLE * cell, side + len(_SHOTS) * (block + gutter)), 24, np.uint8)
    font = (cv2.FONT_HERSHEY_SIMPLEX, 0.45, 220, 1, cv2.LINE_AA)
    for column, (condition, azimuth, height) in enumerate(_SHOTS):
        left = side + column * (block + gutter)
        cv2.putText(sheet, f"{condition} {azimuth} deg, {height} m", (left + 8, 20), *font)
        for row in range(_PEOPLE):
            frames = render_walk(
                sample_walk(
                    seed,
                    row,
                    column,
                    condition=condition,
                    azimuth=azimuth,
                    height=height,
                    frames=_FRAMES,
                    nuisances=nuisances,
                )
            )
            for instant, frame in enumerate(frames[:: _FRAMES // _INSTANTS][:_INSTANTS]):
                place = sheet[top + row * cell :, left + instant * step :][:cell, :cell]
                np.maximum(place, cv2.resize(frame, (cell, cell), interpolation=cv2.INTER_LINEAR), out=place)
    for row in range(_PEOPLE):
        cv2.putText(sheet, f"{row:04d}", (12, top + row * cell + cell // 2), *font)
    try:
        Path(path).write_bytes(cv2.imencode(".png", sheet)[1].tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
