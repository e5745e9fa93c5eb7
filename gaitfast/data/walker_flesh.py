"""Flesh of a synthetic walker: ellipsoids, and the body parts that they span.

A part is the convex hull of up to four ellipsoids (two spheres make a tapered capsule), which a camera sees as the
convex hull of their ellipses; the union of the parts is the silhouette.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEFT, RIGHT = 0, 1
SIGN = (1.0, -1.0)
"""y of a side."""


@dataclass(frozen=True)
class Flesh:
    """Ellipsoids {centre + axes s, |s| <= 1} over T frames, and the parts that they span."""

    centres: np.ndarray
    """float32 (T, E, 3)"""
    axes: np.ndarray
    """float32 (T, E, 3, 3)"""
    parts: np.ndarray
    """int (P, 4): the ellipsoids of each part; shorter lists repeat their last."""


class Segment(NamedTuple):
    """A rigid segment of the body over T frames: where its joint lies, and how it is turned."""

    origin: np.ndarray  # (T, 3)
    frame: np.ndarray  # (T, 3, 3), columns: forward, left, up of the segment

    def at(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
        """(T, 3): a point that is fixed to the segment."""
        return self.origin + self.frame @ np.array((x, y, z))


def rotation(yaw=0.0, pitch=0.0, roll=0.0) -> np.ndarray:
    """(T, 3, 3) Rz(yaw) Ry(pitch) Rx(roll) of radians, (T,) or scalar: turn left, lean forward, lean right."""
    yaw, pitch, roll = np.broadcast_arrays(*np.atleast_1d(yaw, pitch, roll))
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


class Builder:
    """Collects ellipsoids and parts over T frames."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.centres: list[np.ndarray] = []
        self.axes: list[np.ndarray] = []
        self.parts: list[tuple[int, ...]] = []

    def sphere(self, centre: np.ndarray, radius: float) -> int:
        """A sphere around `centre` (T, 3)."""
        return self._add(centre, np.eye(3) * radius)

    def ellipsoid(self, centre: np.ndarray, radii: Sequence[float], frame: np.ndarray) -> int:
        """An ellipsoid around `centre` (T, 3) with semi-axes `radii` along the columns of `frame` ([T,] 3, 3)."""
        return self._add(centre, frame * np.asarray(radii))

    def enlarged(self, ellipsoid: int, factor: float) -> int:
        """A larger copy."""
        return self._add(self.centres[ellipsoid], self.axes[ellipsoid] * factor)

    def _add(self, centre: np.ndarray, axes: np.ndarray) -> int:
        self.centres.append(centre)
        self.axes.append(np.broadcast_to(axes, (self.frames, 3, 3)))
        return len(self.centres) - 1

    def part(self, *ellipsoids: int) -> None:
        """The hull of one to four ellipsoids belongs to the body."""
        self.parts.append(ellipsoids + ellipsoids[-1:] * (4 - len(ellipsoids)))

    def lowest(self, ellipsoids: Sequence[int]) -> np.ndarray:
        """z (T,) of the lowest point of some ellipsoids."""
        bottoms = [self.centres[e][:, 2] - np.linalg.norm(self.axes[e][:, 2], axis=-1) for e in ellipsoids]
        return np.min(bottoms, axis=0)

    def finish(self, lift: np.ndarray) -> Flesh:
        """Everything, raised by `lift` (T,)."""
        centres = np.stack(self.centres, 1).astype(np.float32)
        centres[..., 2] += lift[:, None].astype(np.float32)
        return Flesh(centres, np.stack(self.axes, 1).astype(np.float32), np.array(self.parts))
