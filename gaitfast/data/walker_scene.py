"""One walk of one person past one camera, rendered to normalised silhouettes.

A walk depends on (seed, subject, walk) alone: not on how many others are made, in which order or by how many processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gaitfast.data.walker_body import pose, stride_length
from gaitfast.data.walker_camera import SIZE, View, look_at, outlines, rasterise, rasterise_damaged
from gaitfast.data.walker_flesh import LEFT, RIGHT, rotation
from gaitfast.data.walker_identity import Draws, Subject, sample_subject
from gaitfast.data.walker_nuisances import LEVELS as NUISANCES
from gaitfast.data.walker_nuisances import Damage, journey
from gaitfast.data.walker_outfit import BAGS, Outfit
from gaitfast.randomness import uniform

CONDITIONS = ("nm", "bg", "cl")
FRAME_RATE = 25.0


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One person's one walk past one camera."""

    seed: int
    subject: Subject
    number: int
    condition: str
    azimuth: float
    """Degrees from the walking direction to the camera, seen from above, in mid-walk: 0 ahead, 90 on the left."""
    height: float
    """Of the camera above the ground, metres."""
    distance: float
    """Of the camera from the middle of the path along the ground, metres."""
    frames: int
    nuisances: str
    phase: float
    """Strides since a left heel strike at the first frame."""
    pace: float
    """Speed relative to the subject's preferred one."""
    outfit: Outfit


def sample_walk(
    seed: int,
    subject: int,
    walk: int,
    *,
    condition: str | None = None,
    azimuth: float | None = None,
    height: float | None = None,
    frames: int = 30,
    nuisances: str = "none",
) -> Walk:
    """Walk number `walk` of a subject. What is None is drawn; the rest of the draws do not depend on what is given."""
    assert nuisances in NUISANCES, nuisances
    assert frames >= 1, frames
    draws = Draws(seed, "walker-walk", walk, subject, 24)
    phase, pace = draws.between(0.0, 1.0), draws.normal(1.0, 0.035)
    drawn_condition = draws.choice(CONDITIONS)
    drawn_azimuth, drawn_height = draws.between(0.0, 360.0), draws.between(1.0, 4.0)
    distance = draws.between(4.0, 12.0)
    coat, coat_width = draws.between(0.25, 0.62), draws.between(1.0, 1.15)
    bag = draws.choice(BAGS)
    side, size = draws.choice((LEFT, RIGHT)), draws.between(0.75, 1.2)
    condition = drawn_condition if condition is None else condition
    assert condition in CONDITIONS, condition
    outfit = Outfit()
    if condition == "cl":
        outfit = Outfit(coat=coat, coat_width=coat_width)
    elif condition == "bg":
        outfit = Outfit(bag=bag, bag_side=side, bag_size=size)
    return Walk(
        seed=seed,
        subject=sample_subject(seed, subject),
        number=walk,
        condition=condition,
        azimuth=drawn_azimuth if azimuth is None else azimuth,
        height=drawn_height if height is None else height,
        distance=distance,
        frames=frames,
        nuisances=nuisances,
        phase=phase,
        pace=pace,
        outfit=outfit,
    )


def _view(walk: Walk, position: np.ndarray, heading: np.ndarray) -> View:
    """The fixed camera, in the frame of a body that stands at `position` (T, 2) and looks along `heading` (T,)."""
    # Far enough that a long walk neither meets the camera nor turns every view into every other.
    distance = max(walk.distance, 1.5 * np.abs(position).max() + 2.0)
    angle = math.radians(walk.azimuth)
    camera = np.array((distance * math.cos(angle), distance * math.sin(angle), walk.height))
    axes = look_at(camera, np.array((0.0, 0.0, walk.subject.height / 2)))
    world = rotation(yaw=heading)  # of the body's frame
    offset = camera - np.concatenate((position, np.zeros((len(position), 1))), 1)
    return View(np.einsum("tij,ti->tj", world, offset), axes @ world)


def render_walk(walk: Walk) -> np.ndarray:
    """uint8 (T, 64, 64): the walk as a camera saw it, normalised as OpenGait's pretreatment does."""
    vigour = walk.pace**0.5
    numbers = uniform(walk.seed, "walker-frame", walk.number, np.array([walk.subject.number]), 5 * walk.frames)
    numbers = numbers.reshape(5, walk.frames).T
    draws = Draws(walk.seed, "walker-nuisance", walk.number, walk.subject.number, 64)
    rate = vigour / (walk.subject.cycle * FRAME_RATE)
    way = journey(walk.nuisances, draws, numbers[:, 4], rate)
    position = way.position * stride_length(walk.subject, vigour)
    flesh = pose(walk.subject, walk.phase + way.strides, walk.outfit, vigour)
    corners = outlines(flesh, _view(walk, position, way.heading))
    if walk.nuisances == "none":
        return rasterise(corners)
    damage = Damage(walk.nuisances, draws, numbers[:, :4])
    return rasterise_damaged(corners, damage.rows, damage)


def clips(seed: int, count: int, frames: int, *, first: int = 0, nuisances: str = "none") -> np.ndarray:
    """uint8 (count, T, 64, 64): clips `first`, `first` + 1, ..., each of another subject, in any condition and view."""
    out = np.empty((count, frames, SIZE, SIZE), np.uint8)
    for index in range(count):
        out[index] = render_walk(sample_walk(seed, first + index, 0, frames=frames, nuisances=nuisances))
    return out
