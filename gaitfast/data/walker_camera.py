"""What a camera sees of a posed body: perspective projection, filled outlines, and the 64x64 normalised silhouette.

A part's outline is taken from its support function. Close to its centre c, an ellipsoid {c + M s, |s| <= 1} projects to
the ellipse {p + B s} with B the 2x3 Jacobian of the projection times M; it reaches furthest in the image direction u
at p + B B'u / |B'u|. The hull of several ellipses takes, per direction, the point that reaches furthest of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from gaitfast.data.walker_flesh import Flesh

SIZE = 64
DIRECTIONS = 20
"""Corners of a part's outline; a multiple of 4, so that straight up, down, left and right are among them."""
SUPERSAMPLE = 4
_SHIFT = 4  # fractional bits of OpenCV's polygon corners

_ANGLE = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
_U = np.stack((np.cos(_ANGLE), np.sin(_ANGLE))).astype(np.float32)  # (2, K)


@dataclass(frozen=True)
class View:
    """A camera as seen from the body's own frame, per frame."""

    position: np.ndarray
    """float (T, 3), metres"""
    axes: np.ndarray
    """float (T, 3, 3): rows right, down, forward"""


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(3, 3) rows right, down, forward of an upright camera at `position` that looks at `target`, z up."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    return np.stack((right, np.cross(forward, right), forward))


def outlines(flesh: Flesh, view: View) -> np.ndarray:
    """float32 (T, P, K, 2): the corners of every part's convex outline, on the image plane at distance 1, y down."""
    axes = view.axes.astype(np.float32)
    seen = (flesh.centres - view.position[:, None].astype(np.float32)) @ axes.transpose(0, 2, 1)  # (T, E, 3)
    centre = seen[..., :2] / seen[..., 2:]
    matrix = axes[:, None] @ flesh.axes  # (T, E, 3, 3)
    spread = (matrix[..., :2, :] - centre[..., None] * matrix[..., 2:, :]) / seen[..., 2:, None]  # (T, E, 2, 3)
    along = spread.transpose(0, 1, 3, 2) @ _U  # (T, E, 3, K)
    reach = np.sqrt(np.einsum("tejk,tejk->tek", along, along)) + 1e-9
    support = centre @ _U + reach  # (T, E, K)
    corner = centre[..., None] + (spread @ along) / reach[:, :, None]  # (T, E, 2, K)
    furthest = np.argmax(support[:, flesh.parts], axis=2)  # (T, P, K)
    owner = flesh.parts[np.arange(len(flesh.parts))[:, None], furthest]  # (T, P, K)
    frames = np.arange(len(centre))[:, None, None]
    return corner[frames, owner, :, np.arange(DIRECTIONS)]


def _fill(corners: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Filled outlines, uint8 0 or 255, full height, roughly centred; one buffer (rows, 1.5 rows) for all frames."""
    low, high = corners[..., 1].min((1, 2)), corners[..., 1].max((1, 2))  # (T,)
    fine, wide = rows, rows + rows // 2
    scale = fine / (high - low)
    # Outlines have equally many corners each, so the mean corner is a rough centre; the picture then settles it.
    middle = corners[..., 0].mean((1, 2))
    pixels = np.empty(corners.shape, np.float32)
    pixels[..., 0] = (corners[..., 0] - middle[:, None, None]) * scale[:, None, None] + wide / 2
    pixels[..., 1] = (corners[..., 1] - low[:, None, None]) * scale[:, None, None]
    canvas = np.empty((fine, wide), np.uint8)
    for parts in np.rint((pixels - 0.5) * (1 << _SHIFT)).astype(np.int32):
        canvas[:] = 0
        for part in parts:
            cv2.fillConvexPoly(canvas, part, 255, cv2.LINE_8, _SHIFT)
        yield canvas


def rasterise(corners: np.ndarray) -> np.ndarray:
    """uint8 (T, 64, 64): filled outlines (T, P, K, 2), scaled to full height, the median column of mass at column 32.

    This is OpenGait's pretreatment (crop to the rows of the figure, resize to 64 rows, window around the first column
    at which the running sum passes half) without the large image: the scale comes from the outlines' extent, only the
    centre needs the picture.
    """
    out = np.empty((len(corners), SIZE, SIZE), np.uint8)
    for picture, canvas in zip(out, _fill(corners, SUPERSAMPLE * SIZE)):
        small = cv2.resize(canvas, (SIZE + SIZE // 2, SIZE), interpolation=cv2.INTER_AREA)
        picture[:] = _window(small, _median_column(small) - SIZE // 2)
    return out


def rasterise_damaged(corners: np.ndarray, rows: int, damage: Callable[[np.ndarray, int], None]) -> np.ndarray:
    """As `rasterise`, but `damage(silhouette, frame)` changes the raw silhouette, `rows` high, first."""
    out = np.empty((len(corners), SIZE, SIZE), np.uint8)
    for frame, canvas in enumerate(_fill(corners, rows)):
        damage(canvas, frame)
        out[frame] = pretreat(canvas)
    return out


def _median_column(picture: np.ndarray) -> int:
    """The first column at which the running sum of the columns exceeds half the total."""
    running = np.cumsum(cv2.reduce(picture, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0])
    return int(np.searchsorted(running, running[-1] / 2, side="right"))


def _window(picture: np.ndarray, left: int) -> np.ndarray:
    """64 columns from `left` on, zeros beyond the picture."""
    if 0 <= left <= picture.shape[1] - SIZE:
        return picture[:, left : left + SIZE]
    padded = np.pad(picture, ((0, 0), (SIZE, SIZE)))
    return padded[:, left + SIZE : left + 2 * SIZE]


def pretreat(picture: np.ndarray) -> np.ndarray:
    """OpenGait's pretreatment of one raw silhouette, uint8 (H, W), not empty -> (64, 64).

    Large pictures are reduced by area: bicubic samples, which OpenGait takes, would alias.
    """
    rows = np.flatnonzero(picture.any(1))
    cropped = picture[rows[0] : rows[-1] + 1]
    width = max(SIZE * cropped.shape[1] // cropped.shape[0], 1)
    method = cv2.INTER_AREA if len(cropped) > SIZE else cv2.INTER_CUBIC
    small = cv2.resize(cropped, (width, SIZE), interpolation=method)
    return _window(small, _median_column(small) - SIZE // 2)
