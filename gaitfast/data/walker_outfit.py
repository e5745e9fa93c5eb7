"""Coats and bags: what a walk's condition adds to a synthetic walker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gaitfast.data.walker_flesh import LEFT, RIGHT, SIGN, Builder, Segment
from gaitfast.data.walker_identity import Subject

BAGS = ("backpack", "shoulder", "hand", "satchel")


@dataclass(frozen=True, kw_only=True)
class Outfit:
    """What the walk's condition adds to the body."""

    coat: float = 0.0
    """Hem of the coat: share of the way from hip to ankle; 0: no coat."""
    coat_width: float = 1.0
    bag: str = "none"
    """none or one of BAGS."""
    bag_side: int = LEFT
    bag_size: float = 1.0


def add_coat(
    subject: Subject, build: Builder, outfit: Outfit, trunk: Sequence[int], thighs: list[Segment], shanks: list[Segment]
) -> None:
    """A wider trunk, and a skirt from the waist to hems that follow the legs at half their swing.

    `trunk`: the ellipsoids of chest, waist, hips and shoulder caps; the others by side.
    """
    chest, waist, hips, *caps = trunk
    width = outfit.coat_width
    yoke, middle, seat = (build.enlarged(e, f * width) for e, f in ((chest, 1.08), (waist, 1.16), (hips, 1.1)))
    build.part(yoke, *(build.enlarged(cap, 1.2) for cap in caps))
    build.part(yoke, middle, seat)
    length = outfit.coat * (subject.thigh + subject.shank)
    hems = []
    for side in (LEFT, RIGHT):
        below_knee = length - subject.thigh
        on_leg = thighs[side].at(z=-length) if below_knee < 0 else shanks[side].at(z=-below_knee)
        hanging = thighs[side].origin - np.array((0.0, 0.0, length))  # cloth lags behind the leg
        hems.append(build.ellipsoid((on_leg + hanging) / 2, (0.1 * width, 0.1 * width, 0.03), np.eye(3)))
    build.part(middle, seat, *hems)


def add_bag(
    subject: Subject, build: Builder, outfit: Outfit, loin: Segment, thorax: Segment, hands: list[np.ndarray]
) -> None:
    """A bag on the back, at the hip or in a hand. `loin`: the lower trunk from between the hips, `thorax`: from the
    middle of the shoulders; `hands` (T, 3) by side."""
    scale, side, size = subject.scale, SIGN[outfit.bag_side], outfit.bag_size
    if outfit.bag == "backpack":
        back = -(0.1 * subject.girth_factor + 0.06 * size) * scale
        build.part(
            build.ellipsoid(thorax.at(x=back, z=-0.1), (0.075 * size, 0.13 * size, 0.07), thorax.frame),
            build.ellipsoid(thorax.at(x=back - 0.01, z=-0.36 * size), (0.095 * size, 0.145 * size, 0.09), thorax.frame),
        )
    elif outfit.bag in ("shoulder", "satchel"):
        # A shoulder bag hangs at the hip of its own side, a satchel across the body on the other, a little behind.
        out = (subject.hip_width / 2 + 0.1 * scale * subject.girth_factor) * (1 if outfit.bag == "shoulder" else -1)
        mouth, floor = (loin.at(x=-0.06, y=side * out, z=z) for z in (0.08, 0.08 - 0.17 * size))
        build.part(
            build.ellipsoid(mouth, (0.14 * size, 0.05 * size, 0.05), loin.frame),
            build.ellipsoid(floor, (0.15 * size, 0.06 * size, 0.06), loin.frame),
        )
        shoulder = thorax.at(y=side * subject.shoulder_width * 0.36, z=0.045)
        build.part(build.sphere(shoulder, 0.012), build.sphere(mouth, 0.012))
    else:
        assert outfit.bag == "hand", outfit.bag
        hand, down = hands[outfit.bag_side], np.array((0.0, 0.0, -1.0))
        handle, upright = hand + 0.1 * down, np.eye(3)
        build.part(build.sphere(hand, 0.015), build.ellipsoid(handle, (0.1 * size, 0.03, 0.02), upright))
        build.part(
            build.ellipsoid(handle, (0.14 * size, 0.04 * size, 0.03), upright),
            build.ellipsoid(handle + 0.2 * size * down, (0.16 * size, 0.06 * size, 0.04), upright),
        )
