"""What goes wrong with silhouettes outside the laboratory: in time, along the path, and in the segmentation.

Everything in the picture is done to the raw silhouette, before it is normalised: a walker whose legs are hidden is
stretched to full height, as it would be in a real data set.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from gaitfast.data.walker_identity import Draws
from gaitfast.randomness import uniform

LEVELS = ("none", "mild", "wild")
ROWS = 128
"""Height of the raw silhouette of a near walker, in pixels."""
_TILE = 512  # side of the noise picture that ragged edges are cut from
_LEAST = 0.2  # share of the figure that must stay visible


@dataclass(frozen=True, kw_only=True)
class _Strength:
    dropped: float
    """Probability that the frame before a frame is lost."""
    pace: float
    """Largest change of speed, as a share."""
    turn: float
    """Largest change of heading over the walk, degrees."""
    rows: int
    """Fewest rows of a raw silhouette: how small a far walker gets."""
    level: tuple[float, float]
    """Where the edge lies in the blurred silhouette, 0 to 255: below the middle it bleeds, above it wears thin."""
    ragged: float
    """Standard deviation of the noise on that edge."""
    holes: int
    occluded: float
    """Probability that something stands between the walker and the camera for a while."""
    legs: float
    """Probability that the segmentation loses the feet or legs for a while."""
    shadow: float
    """Probability that a shadow on the ground is taken for a part of the walker."""


STRENGTHS = {
    "mild": _Strength(
        dropped=0.02,
        pace=0.05,
        turn=15,
        rows=96,
        level=(90, 140),
        ragged=24,
        holes=1,
        occluded=0.0,
        legs=0.0,
        shadow=0.0,
    ),
    "wild": _Strength(
        dropped=0.08,
        pace=0.15,
        turn=120,
        rows=36,
        level=(40, 150),
        ragged=48,
        holes=3,
        occluded=0.4,
        legs=0.3,
        shadow=0.3,
    ),
}


@dataclass(frozen=True)
class Journey:
    """Per frame: strides walked (T,); heading (T,) in radians and position (T, 2) in strides, both 0 in mid-walk."""

    strides: np.ndarray
    heading: np.ndarray
    position: np.ndarray


def journey(level: str, draws: Draws, lost: np.ndarray, rate: float) -> Journey:
    """The way of a walk with `rate` strides per frame. `lost` are uniform numbers (T,), one per frame.

    Everywhere the same draws are taken, so that a level changes nothing but what it stands for.
    """
    amount, period, start = draws.between(-1.0, 1.0), draws.between(3.0, 8.0), draws.between(0.0, 1.0)
    turn, where, sharp = draws.between(-1.0, 1.0), draws.between(-0.25, 0.25), draws.between(4.0, 12.0)
    ticks = np.arange(len(lost), dtype=np.float64)
    if level == "none":
        strides, heading = ticks * rate, np.zeros_like(ticks)
    else:
        strength = STRENGTHS[level]
        gap = lost < strength.dropped
        gap[0] = False
        ticks += np.cumsum(gap * (1 + np.floor(lost / strength.dropped * 3)))
        wave = 2 * np.pi / (period / rate)
        swing = np.sin(wave * ticks + 2 * np.pi * start) - math.sin(2 * math.pi * start)
        # Speed is rate (1 + pace amount cos(...)); strides are its integral.
        strides = rate * (ticks + strength.pace * amount / wave * swing)
        share = ticks / max(ticks[-1], 1.0) - 0.5
        heading = math.radians(strength.turn) * turn / (1 + np.exp(-sharp * (share - where)))
    middle = len(ticks) // 2
    heading = heading - heading[middle]
    steps = np.diff(strides, prepend=strides[0])[:, None] * np.stack((np.cos(heading), np.sin(heading)), -1)
    position = np.cumsum(steps, 0)
    return Journey(strides, heading, position - position[middle])


@functools.lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """float32 (_TILE, _TILE), smooth over a few pixels, about standard normal."""
    white = uniform(0, "walker-noise", 0, np.arange(_TILE), _TILE).astype(np.float32) - 0.5
    smooth = cv2.GaussianBlur(white, (0, 0), 1.6, borderType=cv2.BORDER_REFLECT)
    return smooth / smooth.std()


@dataclass(frozen=True)
class _Hole:
    """Missing in the frames start <= t < end: an ellipse, in shares of the body height, x from the middle."""

    start: float
    end: float
    x: float
    y: float
    size: float
    aspect: float
    angle: float


class Damage:
    """Spoils raw silhouettes (H, W) uint8 0 or 255 of one walk, in place; frame by frame, in any order."""

    def __init__(self, level: str, draws: Draws, jitter: np.ndarray) -> None:
        """`jitter`: uniform numbers (T, 4)."""
        self._strength = STRENGTHS[level]
        self._jitter = jitter
        frames = len(jitter)

        def stretch(share: float) -> tuple[float, float]:
            length = share * frames
            start = draws.between(-0.3 * length, frames - 0.7 * length)
            return start, start + length

        self._holes = [
            _Hole(
                *stretch(draws.between(0.1, 0.6)),
                x=draws.between(-0.1, 0.1),
                y=draws.between(0.15, 0.95),
                size=draws.between(0.012, 0.04),
                aspect=draws.between(0.5, 2.0),
                angle=draws.between(0.0, 180.0),
            )
            for _ in range(3)
        ][: self._strength.holes]
        self._occluder = draws.between(0.0, 1.0) < self._strength.occluded
        self._occluder_time = stretch(draws.between(0.2, 0.6))
        self._occluder_width, self._occluder_top = draws.between(0.05, 0.22), draws.between(-0.6, 0.8)
        self._occluder_way = draws.choice((-1.0, 1.0))
        self._legs = draws.between(0.0, 1.0) < self._strength.legs
        self._legs_time, self._legs_row = stretch(draws.between(0.15, 0.5)), draws.between(0.68, 0.95)
        self._shadow = draws.between(0.0, 1.0) < self._strength.shadow
        self._shadow_at, self._shadow_long = draws.between(-0.25, 0.25), draws.between(0.1, 0.3)
        self._level = draws.between(*self._strength.level)
        self.rows = round(ROWS * math.exp(draws.between(math.log(self._strength.rows / ROWS), 0.0)))
        """Height of the raw silhouettes in pixels."""
        self._offset = (draws.between(0.0, _TILE), draws.between(0.0, _TILE))

    def __call__(self, mask: np.ndarray, frame: int) -> None:
        height, width = mask.shape
        jitter = self._jitter[frame]
        whole = mask.copy()
        if self._shadow:
            centre = (round(width / 2 + self._shadow_at * height), round(height * 0.985))
            axes = (round(self._shadow_long * height * (0.9 + 0.2 * jitter[2])), max(round(0.015 * height), 1))
            cv2.ellipse(mask, centre, axes, 0, 0, 360, 255, -1)
        for hole in self._holes:
            if hole.start <= frame < hole.end:
                size = hole.size * (0.7 + 0.6 * jitter[2])
                centre = (round(width / 2 + (hole.x + 0.02 * (jitter[3] - 0.5)) * height), round(hole.y * height))
                axes = (max(round(size * height), 1), max(round(size * hole.aspect * height), 1))
                cv2.ellipse(mask, centre, axes, hole.angle, 0, 360, 0, -1)
        start, end = self._legs_time
        if self._legs and start <= frame < end:
            mask[round((self._legs_row + 0.06 * (jitter[3] - 0.5)) * height) :] = 0
        start, end = self._occluder_time
        if self._occluder and start <= frame < end:
            # It passes the walker from one side to the other; low ones (a car, a bench) leave the head free.
            along = self._occluder_way * (2 * (frame - start) / (end - start) - 1)
            left = width / 2 + (0.4 * along - self._occluder_width / 2) * height
            right = left + self._occluder_width * height
            mask[max(round(self._occluder_top * height), 0) :, max(round(left), 0) : max(round(right), 0)] = 0
        self._ragged(mask, jitter)
        if np.count_nonzero(mask) < _LEAST * np.count_nonzero(whole):
            mask[:] = whole  # a real data set would lack the frame

    def _ragged(self, mask: np.ndarray, jitter: np.ndarray) -> None:
        height, width = mask.shape
        row = int(self._offset[0] + jitter[0] * _TILE) % (_TILE - height)
        column = int(self._offset[1] + jitter[1] * _TILE) % (_TILE - width)
        width_of_blur = 5 if height > 0.6 * ROWS else 3
        soft = cv2.blur(mask, (width_of_blur, width_of_blur), borderType=cv2.BORDER_CONSTANT).astype(np.float32)
        noisy = soft + self._strength.ragged * _noise()[row : row + height, column : column + width]
        np.multiply((noisy > self._level) & (soft > 0), np.uint8(255), out=mask, casting="unsafe")
