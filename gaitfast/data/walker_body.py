"""The posed body of a synthetic walker: forward kinematics from joint angles, dressed in ellipsoids.

The body's own frame: x forward, y to the left, z up, metres; the origin on the ground below the middle of the hips.
"""

from __future__ import annotations

import numpy as np

from gaitfast.data.walker_flesh import LEFT, RIGHT, SIGN, Builder, Flesh, Segment, rotation
from gaitfast.data.walker_identity import CURVES, HARMONICS, Subject
from gaitfast.data.walker_outfit import Outfit, add_bag, add_coat


def joint_angles(subject: Subject, phase: np.ndarray, vigour: float) -> dict[str, np.ndarray]:
    """Angles (T, 2) in radians by curve name, for left and right, at `phase` (T,) in strides since a left heel strike.

    `vigour` scales every movement about its mean: brisk steps are long steps.
    """
    both = np.stack((phase, phase + 0.5), -1)
    waves = np.exp(2j * np.pi * both[..., None] * np.arange(HARMONICS))  # (T, 2, harmonic)
    waves[..., 1:] *= vigour
    angles = np.einsum("tsh,csh->cts", waves.real, subject.series.real)
    angles -= np.einsum("tsh,csh->cts", waves.imag, subject.series.imag)
    named = dict(zip(CURVES, angles))
    named["knee"] = np.maximum(named["knee"], 0.02)
    named["elbow"] = np.maximum(named["elbow"], 0.05)
    return named


def stride_length(subject: Subject, vigour: float) -> float:
    """Metres per stride: the distance between the ankles at the two heel strikes."""
    angles = joint_angles(subject, np.array([0.0, 0.5]), vigour)
    thigh, shank = angles["thigh"], angles["thigh"] - angles["knee"]
    ankle = subject.thigh * np.sin(thigh) + subject.shank * np.sin(shank)  # (2 instants, 2 sides)
    return float(np.abs(ankle[:, LEFT] - ankle[:, RIGHT]).sum())


def pose(subject: Subject, phase: np.ndarray, outfit: Outfit, vigour: float = 1.0) -> Flesh:
    """The body at `phase` (T,) strides, standing on the ground with its lower foot."""
    angles = joint_angles(subject, phase, vigour)
    build = Builder(len(phase))
    turn = 2 * np.pi * phase
    obliquity = (angles["obliquity"][:, LEFT] - angles["obliquity"][:, RIGHT]) / 2
    twist = -(angles["rotation"][:, LEFT] - angles["rotation"][:, RIGHT]) / 2
    nod = subject.nod * np.cos(2 * turn - 0.6)

    # The pelvis moves over the supporting leg: the left one stands alone around phase 0.3, the right around 0.8.
    middle = np.zeros((len(phase), 3))
    middle[:, 1] = subject.sway * np.cos(turn - 0.6 * np.pi)
    pelvis = Segment(middle, rotation(yaw=twist, pitch=subject.lean, roll=obliquity))
    loin = Segment(middle, rotation(yaw=0.4 * twist, pitch=subject.lean + nod, roll=0.2 * obliquity))
    waist = Segment(loin.at(z=0.45 * subject.trunk), loin.frame)
    # The shoulders turn against the pelvis: the right one is in front at the left heel strike.
    chest_frame = rotation(
        yaw=subject.trunk_twist * vigour * np.cos(turn),
        pitch=subject.lean + subject.stoop + nod,
        roll=-0.3 * obliquity,
    )
    thorax = Segment(Segment(waist.origin, chest_frame).at(z=0.55 * subject.trunk), chest_frame)

    feet, thighs, shanks = _legs(subject, build, angles, pelvis)
    trunk = _trunk(subject, build, pelvis, waist, thorax)
    _head(subject, build, thorax, nod)
    hands = _arms(subject, build, angles, thorax, outfit)
    if outfit.coat:
        add_coat(subject, build, outfit, trunk, thighs, shanks)
    if outfit.bag != "none":
        add_bag(subject, build, outfit, loin, thorax, hands)
    return build.finish(-build.lowest(feet))


def _legs(
    subject: Subject, build: Builder, angles: dict[str, np.ndarray], pelvis: Segment
) -> tuple[list[int], list[Segment], list[Segment]]:
    """Thighs, shanks and feet. Returns the ellipsoids that touch the ground, and thigh and shank by side."""
    scale, limb, loose = subject.scale, subject.limb_factor, subject.trousers
    soles, thighs, shanks = [], [], []
    for side, sign in enumerate(SIGN):
        forward = angles["thigh"][:, side]
        back = angles["knee"][:, side] - forward
        # The feet stay where they are while the pelvis sways.
        roll = sign * angles["abduction"][:, side] - pelvis.origin[:, 1] / (subject.thigh + subject.shank)
        thigh = Segment(pelvis.at(y=sign * subject.hip_width / 2), rotation(pitch=-forward, roll=roll))
        shank = Segment(thigh.at(z=-subject.thigh), rotation(pitch=back, roll=0.6 * roll))
        turned = rotation(yaw=sign * subject.toe_out[side], pitch=back - angles["ankle"][:, side])
        foot = Segment(shank.at(z=-subject.shank), turned)

        knee = build.sphere(shank.origin, 0.058 * scale * limb)
        calf = build.sphere(shank.at(x=-0.018, z=-0.3 * subject.shank), 0.057 * scale * limb + 0.4 * loose)
        cuff = build.sphere(shank.at(z=-0.93 * subject.shank), 0.041 * scale * limb**0.5 + loose)
        build.part(build.sphere(thigh.at(y=sign * 0.005, z=-0.04), 0.09 * scale * limb), knee)
        build.part(knee, calf, cuff)

        ground, length = -subject.ankle_height, subject.foot
        heel = build.sphere(foot.at(x=-0.13 * length, z=ground + 0.034 * scale), 0.034 * scale)
        ball = foot.at(x=0.42 * length, y=sign * 0.005, z=ground + 0.03 * scale)
        ball = build.ellipsoid(ball, (0.06 * scale, 0.046 * scale, 0.03 * scale), foot.frame)
        toes = foot.at(x=0.6 * length, z=ground + 0.022 * scale)
        toes = build.ellipsoid(toes, (0.13 * length, 0.036 * scale, 0.022 * scale), foot.frame)
        build.part(build.sphere(foot.at(x=0.005), 0.036 * scale), heel, ball, toes)

        soles += [heel, ball, toes]
        thighs.append(thigh)
        shanks.append(shank)
    return soles, thighs, shanks


def _trunk(subject: Subject, build: Builder, pelvis: Segment, waist: Segment, thorax: Segment) -> tuple[int, ...]:
    """Returns the ellipsoids of chest, waist, hips and the caps of the shoulders."""
    scale, girth = subject.scale, subject.girth_factor * subject.scale
    middle, seat = subject.waist_factor * girth, subject.seat_factor * girth
    hips = build.ellipsoid(
        pelvis.at(z=0.04 * scale), (0.1 * seat, subject.hip_width / 2 + 0.07 * seat, 0.1 * scale), pelvis.frame
    )
    buttocks = [
        build.sphere(pelvis.at(x=-0.035 * scale, y=0.07 * scale * sign, z=-0.03 * scale), 0.097 * seat) for sign in SIGN
    ]
    loin = build.ellipsoid(waist.at(x=0.005), (0.095 * middle, 0.132 * middle, 0.07), waist.frame)
    belly = build.ellipsoid(
        waist.at(x=0.02 + subject.belly, z=-0.06 * scale),
        (0.088 * middle, 0.115 * middle, 0.09 * scale),
        waist.frame,
    )
    chest = build.ellipsoid(
        thorax.at(x=0.012, z=-0.15 * scale), (0.114 * girth, 0.14 * girth, 0.15 * scale), thorax.frame
    )
    bust = build.ellipsoid(
        thorax.at(x=0.045 + subject.bust, z=-0.19 * scale), (0.07, 0.115 * scale, 0.065 * scale), thorax.frame
    )
    caps = [
        build.sphere(
            thorax.at(y=sign * subject.shoulder_width / 2, z=-0.047 * scale), 0.053 * scale * subject.limb_factor**0.5
        )
        for sign in SIGN
    ]
    build.part(hips, *buttocks, loin)
    build.part(loin, belly, hips)
    build.part(loin, chest, bust)
    build.part(chest, *caps)
    return (chest, loin, hips, *caps)


def _arms(
    subject: Subject, build: Builder, angles: dict[str, np.ndarray], thorax: Segment, outfit: Outfit
) -> list[np.ndarray]:
    """Arms that hang from the shoulders and swing against the legs. Returns where the hands are (T, 3), by side."""
    coat = outfit.coat > 0
    thick = subject.scale * subject.limb_factor * (1.25 if coat else 1.0)
    hands = []
    for side, sign in enumerate(SIGN):
        swing, bend = angles["shoulder"][:, side], angles["elbow"][:, side]
        if side == outfit.bag_side and outfit.bag in ("hand", "shoulder"):
            # A loaded arm swings little; it hangs straight, or holds the strap of a shoulder bag.
            swing, bend = 0.35 * swing, 0.4 * bend if outfit.bag == "hand" else bend + 0.35
        roll = sign * (subject.arm_abduction[side] + (0.05 if coat else 0.0))
        shoulder = thorax.at(y=sign * subject.shoulder_width / 2, z=-0.035 * subject.scale)
        upper = Segment(shoulder, rotation(pitch=-swing, roll=roll))
        # The forearm turns inwards as it bends.
        fore = Segment(upper.at(z=-subject.upper_arm), rotation(yaw=-0.25 * sign, pitch=-swing - bend, roll=0.4 * roll))
        hand = Segment(fore.at(z=-subject.forearm), fore.frame)
        elbow = build.sphere(fore.origin, 0.043 * thick)
        build.part(build.sphere(upper.at(y=sign * 0.008, z=-0.01), 0.052 * thick), elbow)
        build.part(elbow, build.sphere(hand.origin, 0.03 * thick))
        build.part(
            build.sphere(hand.origin, 0.024 * subject.scale),
            build.ellipsoid(hand.at(x=0.008, z=-0.065 * subject.scale), (0.034, 0.022, 0.05), hand.frame),
            build.ellipsoid(hand.at(x=0.025, z=-0.115 * subject.scale), (0.024, 0.018, 0.045), hand.frame),
        )
        hands.append(hand.at(z=-0.09))
    return hands


def _head(subject: Subject, build: Builder, thorax: Segment, nod: np.ndarray) -> None:
    """Neck, the slopes to the shoulders, head and hair."""
    scale, factor = subject.scale, subject.head_factor * subject.scale**0.5
    thick = scale * subject.girth_factor**0.5
    neck = Segment(thorax.origin, rotation(pitch=subject.lean + subject.stoop + subject.head_forward + nod))
    nape_at = neck.at(z=subject.neck + 0.02)
    nape = build.sphere(nape_at, 0.052 * thick)
    build.part(build.sphere(thorax.at(x=-0.01, z=0.005), 0.062 * thick), nape)
    slopes = [build.sphere(thorax.at(x=-0.01, y=sign * subject.shoulder_width * 0.36), 0.045 * scale) for sign in SIGN]
    build.part(build.sphere(neck.at(z=0.035), 0.05 * scale), *slopes)

    gaze = rotation(pitch=subject.head_pitch + 0.3 * nod)
    head = Segment(Segment(nape_at, gaze).at(x=0.02, z=0.115 * factor), gaze)
    skull = build.ellipsoid(head.at(x=-0.008, z=0.015), np.array((0.097, 0.079, 0.105)) * factor, gaze)
    chin = build.ellipsoid(head.at(x=0.045 * factor, z=-0.075 * factor), np.array((0.045, 0.045, 0.04)) * factor, gaze)
    build.part(skull, chin, nape)
    build.part(skull, build.sphere(head.at(x=0.092 * factor, z=-0.015), 0.016 * factor), chin)
    _hair(subject, build, head, skull, factor, nod)


def _hair(subject: Subject, build: Builder, head: Segment, skull: int, factor: float, nod: np.ndarray) -> None:
    size = subject.hair_size * factor
    if subject.hair == "full":
        radii = np.array((0.11, 0.095, 0.108)) * size**0.5
        build.part(build.ellipsoid(head.at(x=-0.02, z=0.03), radii, head.frame))
    elif subject.hair == "long":
        crown = build.ellipsoid(head.at(x=-0.02, z=0.02), np.array((0.1, 0.088, 0.105)) * factor, head.frame)
        tips = build.ellipsoid(head.at(x=-0.1, z=-0.19 * size), (0.04, 0.085, 0.06), head.frame)
        build.part(crown, tips)
    elif subject.hair == "bun":
        build.part(skull, build.sphere(head.at(x=-0.1 * factor, z=0.07 * factor), 0.045 * size))
    elif subject.hair == "tail":
        swinging = Segment(head.origin, rotation(pitch=4 * nod))
        tip = build.sphere(swinging.at(x=-0.12 * factor, z=-0.19 * size), 0.024 * size)
        build.part(build.sphere(head.at(x=-0.1 * factor, z=0.03), 0.028), tip)
    elif subject.hair == "cap":
        build.part(build.ellipsoid(head.at(x=-0.008, z=0.035), np.array((0.104, 0.086, 0.1)) * factor, head.frame))
        build.part(
            build.ellipsoid(head.at(x=0.12 * factor, z=0.04), (0.05 * size, 0.06, 0.012), head.frame),
            build.ellipsoid(head.at(x=0.05, z=0.055), (0.04, 0.07, 0.015), head.frame),
        )
    else:
        assert subject.hair == "short", subject.hair
