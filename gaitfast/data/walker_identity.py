"""Who a synthetic walker is: body measures, and joint-angle Fourier series around normative gait curves.

Body measures are shares of stature (Drillis and Contini 1966, as tabulated by Winter, "Biomechanics and Motor Control
of Human Movement"), girths are those of an average adult. The curves below are key points of normal adult gait, every
5 % of the cycle from heel strike: leg and pelvis after Perry and Burnfield, "Gait Analysis" (2010) and Winter (1991);
arms and trunk after Murray, Sepic and Barnard (1967). A subject scales, shifts and delays every harmonic of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from gaitfast.randomness import uniform

HARMONICS = 6
"""Constant term and five harmonics: what is left of the normative curves beyond the fifth is below a degree."""

# Degrees. Flexion, dorsiflexion, abduction and forward are positive. `thigh` and `abduction` are the inclination of the
# thigh to the vertical, pelvic tilt and drop included; `obliquity` lifts the own side, `rotation` brings it forward.
NORMATIVE = {
    "thigh": (27, 26, 23, 20, 15, 9, 2, -5, -11, -17, -20, -19, -12, -2, 9, 18, 25, 28, 29, 28),
    "knee": (5, 10, 16, 19, 18, 14, 10, 7, 6, 7, 10, 17, 31, 47, 58, 61, 53, 37, 18, 6),
    "ankle": (0, -5, -4, 0, 3, 5.5, 7.5, 9, 10, 10, 7, -2, -14, -17, -10, -4, 0, 2, 2, 1),
    "abduction": (-2, -2.5, -3, -3.5, -4, -4, -4, -3.5, -3, -2.5, -2, -1, 0, 0.5, 0.5, 0, -0.5, -1, -1.5, -2),
    "obliquity": (0.5, 2, 4, 4.5, 4, 3, 2, 1.5, 1, 0.5, -0.5, -2, -4, -4.5, -4, -3, -2, -1.5, -1, -0.5),
    "rotation": (5, 4.5, 3.5, 2.5, 1.5, 0.5, -0.5, -1.5, -3, -4.5, -5, -4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 3, 4.5),
    "shoulder": (-22, -22, -20, -17, -12, -6, 0, 5, 10, 13, 14, 14, 12, 9, 4, -2, -8, -13, -17, -20),
    "elbow": (12, 12, 13, 14, 16, 19, 22, 26, 29, 31, 32, 32, 30, 28, 26, 23, 20, 17, 15, 13),
}
CURVES = tuple(NORMATIVE)


def _series(points: Sequence[float]) -> np.ndarray:
    """Complex coefficients c of sum_k Re(c[k] exp(2 pi i k phase)), in radians."""
    coefficients = np.fft.rfft(np.radians(points))[:HARMONICS] / len(points)
    coefficients[1:] *= 2
    return coefficients


_SERIES = np.stack([_series(points) for points in NORMATIVE.values()])  # (curve, harmonic)


class Draws:
    """A fixed list of uniform numbers, taken one after another. Adding a draw at the end changes none before it."""

    def __init__(self, seed: int, purpose: str, step: int, sample: int, count: int) -> None:
        self._numbers = iter(uniform(seed, purpose, step, np.array([sample]), count)[0].tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def normal(self, mean: float = 0.0, deviation: float = 1.0, limit: float = 2.2) -> float:
        """Normal, cut at `limit` deviations: no giants, no knees that bend forward."""
        number = NormalDist().inv_cdf(min(max(next(self._numbers), 1e-9), 1 - 1e-9))
        return mean + deviation * min(max(number, -limit), limit)

    def choice(self, options: Sequence) -> object:
        return options[min(int(next(self._numbers) * len(options)), len(options) - 1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """One person. Lengths in metres, angles in radians, `..._factor` relative to the average adult."""

    number: int
    height: float
    hip_height: float
    thigh: float
    shank: float
    ankle_height: float
    foot: float
    trunk: float
    """Hip joints to the middle of the shoulders."""
    neck: float
    shoulder_width: float
    """Between the shoulder joints."""
    hip_width: float
    """Between the hip joints."""
    upper_arm: float
    forearm: float
    head_factor: float
    girth_factor: float
    limb_factor: float
    waist_factor: float
    seat_factor: float
    bust: float
    belly: float
    trousers: float
    """How far loose trousers stand off the shank."""
    hair: str
    hair_size: float
    cycle: float
    """Seconds of a stride at the preferred speed."""
    lean: float
    stoop: float
    """Bend between the lower and the upper trunk."""
    head_forward: float
    head_pitch: float
    sway: float
    """Half the lateral excursion of the pelvis over the supporting leg."""
    trunk_twist: float
    """Rotation of the shoulders against the pelvis."""
    nod: float
    """Pitch of the trunk, twice per stride."""
    arm_abduction: tuple[float, float]
    toe_out: tuple[float, float]
    series: np.ndarray
    """complex128 (curve, side, harmonic): the joint angles, left side first, phase 0 at that side's heel strike."""

    @property
    def scale(self) -> float:
        """Stature relative to the adult for whom widths are written in metres."""
        return self.height / 1.72


def _motion(draws: Draws) -> np.ndarray:
    """Perturb gain, delay and offset of every curve, then a little of it per side."""
    series = np.repeat(_SERIES[:, None], 2, axis=1)
    step = np.arange(HARMONICS)
    spread = {"shoulder": 0.38, "elbow": 0.45, "rotation": 0.4, "obliquity": 0.4, "abduction": 0.25, "ankle": 0.18}
    offset = {"shoulder": 5.0, "elbow": 9.0, "knee": 2.0, "ankle": 1.5, "thigh": 1.5, "abduction": 1.2}
    for curve, name in enumerate(CURVES):
        gain = np.array([1.0, *(draws.normal(1.0, 0.12) for _ in range(HARMONICS - 1))])
        gain[1:] *= max(draws.normal(1.0, spread.get(name, 0.1)), 0.15)
        delay = draws.normal(0.0, 0.012)
        rise = math.radians(draws.normal(0.0, offset.get(name, 0.0)))
        for side in range(2):
            series[curve, side] *= gain * np.exp(-2j * np.pi * step * (delay + draws.normal(0.0, 0.004)))
            series[curve, side, 1:] *= draws.normal(1.0, 0.12 if name in ("shoulder", "elbow") else 0.035)
            series[curve, side, 0] += rise + math.radians(draws.normal(0.0, offset.get(name, 0.0) / 4))
    series.flags.writeable = False
    return series


@functools.lru_cache(maxsize=64)
def sample_subject(seed: int, subject: int) -> Subject:
    """The person with number `subject` (0 <= subject < 2^32) of world `seed`; depends on nothing else."""
    draws = Draws(seed, "walker-subject", 0, subject, 320)
    # One continuous trait from -1 (typical woman) to 1 (typical man) couples the measures that go together.
    frame = 0.8 * draws.choice((-1.0, 1.0)) + draws.normal(0.0, 0.25)
    height = draws.normal(1.70 + 0.065 * frame, 0.065)
    hip_height = height * draws.normal(0.53, 0.011)
    ankle_height = 0.039 * height
    thigh_share = draws.normal(0.5, 0.012)
    leg = hip_height - ankle_height
    build = draws.normal(0.0, 1.0)
    heavy = max(build, 0.0)
    return Subject(
        number=subject,
        height=height,
        hip_height=hip_height,
        thigh=thigh_share * leg,
        shank=(1 - thigh_share) * leg,
        ankle_height=ankle_height,
        foot=height * draws.normal(0.152, 0.006),
        trunk=height * draws.normal(0.815, 0.008) - hip_height,
        neck=height * draws.normal(0.042, 0.007),
        shoulder_width=height * draws.normal(0.2 + 0.011 * frame, 0.011),
        hip_width=height * draws.normal(0.104 - 0.002 * frame, 0.006),
        upper_arm=height * draws.normal(0.184, 0.006),
        forearm=height * draws.normal(0.148, 0.005),
        head_factor=draws.normal(1.0, 0.05),
        girth_factor=math.exp(0.09 * build + draws.normal(0.0, 0.04)),
        limb_factor=math.exp(0.08 * build + draws.normal(0.03 * frame, 0.06)),
        waist_factor=draws.normal(0.97 + 0.04 * frame + 0.06 * heavy, 0.05),
        seat_factor=draws.normal(1.02 - 0.05 * frame, 0.06),
        bust=max(draws.normal(0.018 - 0.022 * frame, 0.012), 0.0),
        belly=max(draws.normal(0.0 + 0.03 * heavy, 0.018), 0.0),
        trousers=draws.between(0.0, 0.028),
        hair=draws.choice(("short", "short", "full", "long", "bun", "tail", "cap")),
        hair_size=draws.between(0.75, 1.3),
        cycle=draws.normal(1.12, 0.075) * math.sqrt(hip_height / 0.9),
        lean=math.radians(draws.normal(3.0, 2.6)),
        stoop=math.radians(draws.normal(4.0, 5.0)),
        head_forward=math.radians(draws.normal(14.0, 7.0)),
        head_pitch=math.radians(draws.normal(2.0, 6.0)),
        sway=draws.normal(0.02, 0.008),
        trunk_twist=math.radians(max(draws.normal(6.0, 3.0), 0.0)),
        nod=math.radians(draws.normal(1.5, 1.0)),
        arm_abduction=tuple(
            math.radians(a + draws.normal(0.0, 1.5)) for a in [max(draws.normal(7.0 + 3.0 * heavy, 3.0), 1.5)] * 2
        ),
        toe_out=tuple(math.radians(a + draws.normal(0.0, 2.0)) for a in [draws.normal(8.0, 6.0)] * 2),
        series=_motion(draws),
    )
