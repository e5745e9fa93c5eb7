"""Synthetic walkers: determinism, normalisation, geometry, gait, identity, and the tree on disk."""

import argparse
import dataclasses
import json
import pickle
import resource
import shutil
import time

import cv2
import numpy as np
import pytest

from gaitfast.config import UserError
from gaitfast.data import walkers
from gaitfast.data.walker_body import joint_angles, pose, stride_length
from gaitfast.data.walker_camera import View, look_at, outlines, pretreat, rasterise
from gaitfast.data.walker_flesh import LEFT, RIGHT, Builder
from gaitfast.data.walker_identity import CURVES, NORMATIVE, sample_subject
from gaitfast.data.walker_outfit import BAGS, Outfit
from gaitfast.data.walker_scene import FRAME_RATE, Walk, clips, render_walk, sample_walk

SIDE = {"azimuth": 90, "height": 1.5}


def opengait_pretreatment(picture: np.ndarray) -> np.ndarray:
    """The published rule, step by step, on one raw silhouette."""
    rows = np.flatnonzero(picture.sum(1))
    picture = picture[rows[0] : rows[-1] + 1]
    picture = cv2.resize(picture, (int(64 * picture.shape[1] / picture.shape[0]), 64), interpolation=cv2.INTER_CUBIC)
    running = picture.sum(0).astype(np.int64).cumsum()
    centre = int(np.flatnonzero(running > running[-1] / 2)[0])
    picture = np.pad(picture, ((0, 0), (32, 32)))
    return picture[:, centre : centre + 64]


def steady_walk(subject: int, stride: int, **options) -> Walk:
    """A walk in which a stride lasts exactly `stride` frames, past a camera so far away that the view stays."""
    walk = sample_walk(0, subject, 0, **options)
    vigour = walk.subject.cycle * FRAME_RATE / stride
    return dataclasses.replace(walk, pace=vigour**2, distance=200.0)


def fixed_view(position: tuple[float, ...], frames: int) -> View:
    """A camera at `position` that looks at the middle of the body."""
    axes = look_at(np.array(position), np.array((0.0, 0.0, 0.9)))
    return View(np.tile(position, (frames, 1)), np.tile(axes, (frames, 1, 1)))


def fit(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two clips, at the best shift by at most one column (the centre is a whole number)."""
    a = a > 127
    shares = []
    for shift in (-1, 0, 1):
        c = np.roll(b > 127, shift, -1)
        shares.append((a & c).sum() / (a | c).sum())
    return max(shares)


# --- what comes out


@pytest.mark.parametrize("nuisances", ["none", "mild", "wild"])
def test_frames_are_uint8_silhouettes_that_depend_on_their_own_number_alone(nuisances):
    a = clips(5, 4, 12, nuisances=nuisances)
    assert a.shape == (4, 12, 64, 64) and a.dtype == np.uint8
    assert a.min() == 0 and a.max() == 255
    assert a.any((2, 3)).all(), "an empty frame"
    np.testing.assert_array_equal(a[2:], clips(5, 2, 12, first=2, nuisances=nuisances))
    assert (clips(6, 4, 12, nuisances=nuisances) != a).any((1, 2, 3)).all(), "the seed changes every clip"


@pytest.mark.parametrize("nuisances", ["none", "mild", "wild"])
def test_every_frame_is_full_height_and_centred_by_the_median_column(nuisances):
    for frame in clips(1, 8, 6, nuisances=nuisances).reshape(-1, 64, 64):
        assert frame[0].any() and frame[63].any()
        running = frame.sum(0, dtype=np.int64).cumsum()
        # Parts outside the window (a shadow, say) count for the centre but are cut off.
        assert abs(np.flatnonzero(running > running[-1] / 2)[0] - 32) <= (0 if nuisances == "none" else 4)


def raw_picture(corners: np.ndarray, rows: int) -> np.ndarray:
    """A binary silhouette of `rows` rows somewhere in a wide picture, on the grid of columns that `rasterise` has."""
    picture = np.zeros((rows * 3 // 2, rows * 2), np.uint8)
    origin = (corners[..., 0].mean(), corners[..., 1].min())
    pixels = (corners - origin) * ((rows - 1) / np.ptp(corners[..., 1])) + (rows - 0.5, rows // 5)
    for part in np.rint(pixels * 16).astype(np.int32):
        cv2.fillConvexPoly(picture, part, 255, shift=4)
    return picture


def test_direct_rendering_equals_opengaits_pretreatment_of_a_raw_picture():
    offsets = []
    for number, (azimuth, height) in enumerate([(90, 1.2), (0, 2.0), (140, 3.8), (300, 1.0)]):
        angle = np.radians(azimuth)
        view = fixed_view((7 * np.cos(angle), 7 * np.sin(angle), height), 6)
        seen = outlines(pose(sample_subject(2, number), np.arange(6) / 6, Outfit()), view)
        for corners, frame in zip(seen, rasterise(seen)):
            assert np.abs(pretreat(raw_picture(corners, 256)).astype(int) - frame).mean() < 1.0
            # At twice the size bicubic samples, which OpenGait takes, are about area means.
            expected = opengait_pretreatment(raw_picture(corners, 128)).astype(int)
            errors = [np.abs(np.roll(expected, shift, 1) - frame).mean() for shift in (-1, 0, 1)]
            assert min(errors) < 3.0
            offsets.append(np.argmin(errors) - 1)
    assert np.mean(np.array(offsets) == 0) > 0.8, "the centre is the same column, but for rounding"


def test_without_nuisances_a_frame_is_one_figure_with_soft_edges():
    for frame in clips(9, 12, 4).reshape(-1, 64, 64):
        assert cv2.connectedComponents((frame > 127).astype(np.uint8))[0] == 2, "background and one figure"
        soft = ((frame > 0) & (frame < 255)).mean()
        assert 0.01 < soft < 0.2, "anti-aliased edges, and nothing but edges"


def test_nuisances_spoil_the_picture_and_wild_ones_more():
    options = {"frames": 40, "condition": "nm", **SIDE}
    harm = {level: 0.0 for level in ("none", "mild", "wild")}
    for subject in range(8):
        clean = render_walk(sample_walk(0, subject, 0, **options)).astype(int)
        for level in harm:
            spoilt = render_walk(sample_walk(0, subject, 0, nuisances=level, **options))
            harm[level] += np.abs(spoilt.astype(int) - clean).mean()
    assert harm["none"] == 0.0
    assert 0 < harm["mild"] < harm["wild"]


@pytest.mark.parametrize("condition", ["bg", "cl"])
def test_conditions_add_to_the_figure_seen_from_the_side(condition):
    more = []
    for subject in range(12):
        normal = render_walk(sample_walk(0, subject, 0, condition="nm", frames=30, **SIDE)) / 255
        other = render_walk(sample_walk(0, subject, 0, condition=condition, frames=30, **SIDE)) / 255
        assert np.abs(normal - other).mean() > 0.003
        more.append((other - normal).mean() / normal.mean())
    assert np.mean(more) > 0.04


@pytest.mark.parametrize("bag", BAGS)
def test_every_bag_is_seen(bag):
    subject = sample_subject(0, 3)
    view = fixed_view((0.0, 9.0, 1.5), 8)
    phase = np.arange(8) / 8
    plain, loaded = (
        rasterise(outlines(pose(subject, phase, outfit), view)) for outfit in (Outfit(), Outfit(bag=bag, bag_side=LEFT))
    )
    assert (loaded.mean((1, 2)) - plain.mean((1, 2))).mean() > 1.5


# --- geometry


def test_outline_of_an_ellipsoid_is_its_perspective_picture():
    build = Builder(1)
    centre, radii = np.array([[0.3, -0.4, 1.3]]), (0.1, 0.15, 0.2)
    build.part(build.ellipsoid(centre, radii, np.eye(3)))
    camera = np.array((4.0, 2.0, 3.0))
    axes = look_at(camera, np.array((0.0, 0.0, 0.9)))
    corners = outlines(build.finish(np.zeros(1)), View(camera[None], axes[None]))[0, 0]
    sphere = np.random.default_rng(0).normal(size=(200_000, 3))
    surface = centre + sphere / np.linalg.norm(sphere, axis=1, keepdims=True) * radii
    seen = (surface - camera) @ axes.T
    seen = seen[:, :2] / seen[:, 2:]
    size = np.ptp(seen, axis=0).max()
    np.testing.assert_allclose(corners.min(0), seen.min(0), atol=0.01 * size)
    np.testing.assert_allclose(corners.max(0), seen.max(0), atol=0.01 * size)


def test_camera_is_upright_and_sees_a_walker_from_the_left_go_to_the_left():
    right, down, forward = look_at(np.array((0.0, 5.0, 1.0)), np.array((0.0, 0.0, 1.0)))
    np.testing.assert_allclose(right, (-1, 0, 0), atol=1e-12)  # x, where the walker goes, is to the left
    np.testing.assert_allclose(down, (0, 0, -1), atol=1e-12)
    np.testing.assert_allclose(forward, (0, -1, 0), atol=1e-12)


@pytest.mark.parametrize("azimuth", [30, 90, 150])
def test_the_mirrored_walker_from_the_mirrored_camera_is_the_mirrored_picture(azimuth):
    walk = steady_walk(4, 28, condition="nm", azimuth=azimuth, height=1.5, frames=28)
    subject = walk.subject
    mirrored = dataclasses.replace(
        subject,
        series=subject.series[:, ::-1],
        arm_abduction=subject.arm_abduction[::-1],
        toe_out=subject.toe_out[::-1],
    )
    other = dataclasses.replace(walk, subject=mirrored, azimuth=-azimuth, phase=walk.phase + 0.5)
    a, b = render_walk(walk), render_walk(other)[..., ::-1]
    assert min(fit(x, y) for x, y in zip(a, b)) > 0.97
    # One and the same walker is nearly symmetric: the picture from the other side is roughly the flipped one.
    c = render_walk(dataclasses.replace(walk, azimuth=-azimuth, phase=walk.phase + 0.5))[..., ::-1]
    assert fit(a, c) > 0.85


def test_a_stride_repeats_and_half_a_step_does_not():
    for subject in range(4):
        frames = render_walk(steady_walk(subject, 28, condition="nm", frames=60, **SIDE))
        assert fit(frames[:28], frames[28:56]) > 0.97
        assert fit(frames[:28], frames[7:35]) < 0.85


# --- gait


def test_feet_stand_on_the_ground_and_people_walk_at_human_speed():
    for number in range(40):
        subject = sample_subject(3, number)
        flesh = pose(subject, np.linspace(0, 1, 40), Outfit())
        bottom = flesh.centres[..., 2] - np.linalg.norm(flesh.axes[..., 2, :], axis=-1)
        assert abs(bottom.min(1)).max() < 1e-3
        top = (flesh.centres[..., 2] + np.linalg.norm(flesh.axes[..., 2, :], axis=-1)).max()
        assert abs(top - subject.height) < 0.15
        assert 20 <= subject.cycle * FRAME_RATE <= 38
        assert 0.7 < stride_length(subject, 1.0) / subject.cycle < 1.9, "metres per second"


def test_joint_angles_follow_the_normative_curves():
    phase = np.arange(20) / 20
    everyone = [joint_angles(sample_subject(0, number), phase, 1.0) for number in range(150)]
    for name in CURVES:
        for side in (LEFT, RIGHT):
            mean = np.degrees(np.mean([angles[name][:, side] for angles in everyone], 0))
            expected = np.roll(NORMATIVE[name], -10 * side)
            assert np.abs(mean - expected).max() < 5, name
    assert min(angles["knee"].min() for angles in everyone) > 0, "a knee bends forward"


def test_arms_swing_against_the_legs():
    opposite = []
    for number in range(60):
        angles = joint_angles(sample_subject(0, number), np.arange(20) / 20, 1.0)
        opposite.append(np.corrcoef(angles["thigh"][:, LEFT], angles["shoulder"][:, LEFT])[0, 1])
    assert np.mean(opposite) < -0.6 and max(opposite) < 0


# --- identity


def test_walks_of_one_person_are_alike_and_people_differ():
    count = 30

    def mean_silhouettes(walk: int) -> np.ndarray:
        options = {"condition": "nm", "frames": 32, **SIDE}
        return np.stack([render_walk(sample_walk(0, s, walk, **options)).mean(0).ravel() for s in range(count)]) / 255

    a, b = mean_silhouettes(0), mean_silhouettes(1)
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
    same, different = np.diag(distance), distance[~np.eye(count, dtype=bool)]
    assert same.mean() < 0.4 * different.mean()
    assert (distance.argmin(1) == np.arange(count)).mean() > 0.9


def test_identity_lies_in_motion_too():
    """With everyone in the same body, only the joint-angle series tell people apart."""
    count, body = 16, sample_subject(0, 0)

    def clip(number: int, walk: int) -> np.ndarray:
        moving = dataclasses.replace(body, series=sample_subject(0, number).series)
        walk = sample_walk(0, number, walk, condition="nm", frames=32, **SIDE)
        return render_walk(dataclasses.replace(walk, subject=moving)).mean(0).ravel() / 255

    a, b = (np.stack([clip(number, walk) for number in range(count)]) for walk in (0, 1))
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
    assert (distance.argmin(1) == np.arange(count)).mean() > 0.7


# --- speed


def test_rendering_is_fast():
    clips(0, 2, 30, nuisances="wild")
    best = 0.0
    for _ in range(3):
        started = time.process_time()
        clips(0, 10, 30)
        best = max(best, 300 / (time.process_time() - started))
    assert best > 500, f"{best:.0f} frames/s; over 4,000 were measured"


# --- the tree on disk


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    walkers.configure(parser)
    return walkers.main(parser.parse_args([str(argument) for argument in arguments]))


def files(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_tree_has_opengaits_layout(tmp_path):
    out = tmp_path / "out"
    assert run(out, "--subjects", 3, "--test-subjects", 2, "--walks", 4, "--frames", 5, 9, "--workers", 1) == 0
    partition = json.loads((out / "partition.json").read_text())
    assert partition["TRAIN_SET"] == ["0000", "0001", "0002"]
    assert partition["TEST_SET"] == ["0003", "0004"]
    assert [name[:4] for name in partition["PROBE_SET"]] == partition["TEST_SET"]
    names, lengths = [], set()
    for path in sorted((out / "sequences").rglob("*.*")):
        subject, kind, view, file = path.relative_to(out / "sequences").parts
        assert file == f"{view}.pkl" and kind[:3] in ("nm-", "bg-", "cl-")
        assert 0 <= int(view[1:4]) < 360 and view[4:6] == "-h"
        frames = pickle.loads(path.read_bytes())
        assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64)
        lengths.add(len(frames))
        names.append(f"{subject}-{kind}-{view}")
    assert len(names) == 5 * 4 and set(partition["PROBE_SET"]) < set(names)
    assert lengths <= set(range(5, 10)) and len(lengths) > 1


def test_files_depend_neither_on_workers_nor_on_the_number_of_people(tmp_path):
    walkers.generate(tmp_path / "one", 2, 1, 3, (4, 6), seed=7, nuisances="wild", workers=1)
    walkers.generate(tmp_path / "two", 2, 1, 3, (4, 6), seed=7, nuisances="wild", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    walkers.generate(tmp_path / "more", 4, 1, 3, (4, 6), seed=7, nuisances="wild", workers=1)
    one, more = files(tmp_path / "one" / "sequences"), files(tmp_path / "more" / "sequences")
    assert one.items() <= more.items()


def test_own_folder_is_written_again_and_a_foreign_one_is_refused(tmp_path):
    out = tmp_path / "out"
    walkers.generate(out, 1, 1, 2, (4, 4), workers=1)
    before = files(out)
    next((out / "sequences").rglob("*.pkl")).unlink()
    walkers.generate(out, 1, 1, 2, (4, 4), workers=1)
    assert files(out) == before
    with pytest.raises(UserError, match="other settings"):
        walkers.generate(out, 3, 1, 2, (4, 4), workers=1)
    assert files(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        walkers.generate(foreign, 1, 1, 2, (4, 4), workers=1)
    with pytest.raises(UserError, match="is a file"):
        walkers.generate(foreign / "precious.txt", 1, 1, 2, (4, 4), workers=1)
    assert files(foreign) == {"precious.txt": b"mine"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_write_that_fails_leaves_no_half_pickle_and_one_clear_line(tmp_path, workers):
    # The largest file that this process may write is smaller than a walk of 40 frames: the kernel refuses, as a full
    # disk would. Two workers are told by a folder that cannot be made instead, as limits are not theirs.
    out = tmp_path / "out"
    if workers == 1:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                walkers.generate(out, 1, 1, 2, (40, 40), workers=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        walkers.generate(out, 1, 1, 2, (4, 4), workers=1)
        shutil.rmtree(out / "sequences")
        (out / "sequences").symlink_to("/dev/full")
        with pytest.raises(UserError, match="cannot be written"):
            walkers.generate(out, 1, 1, 2, (4, 4), workers=2)
    assert not list(out.rglob("*.pkl*")) and not (out / "partition.json").exists()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((), "OUT"),
        (("OUT", "--subjects", 0), "--subjects"),
        (("OUT", "--walks", 1), "--walks"),
        (("OUT", "--frames", 9, 5), "--frames"),
        (("OUT", "--seed", -1), "--seed"),
        (("OUT", "--workers", -2), "--workers"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, arguments, key):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=key):
        run(*arguments)
    assert not any(tmp_path.iterdir())


def test_preview_is_a_picture(tmp_path):
    assert run("--preview", tmp_path / "sheet.png", "--nuisances", "none") == 0
    sheet = cv2.imread(str(tmp_path / "sheet.png"), cv2.IMREAD_GRAYSCALE)
    assert sheet.shape[0] > 500 and (sheet == 255).mean() > 0.05
    with pytest.raises(UserError, match="cannot be written"):
        run("--preview", tmp_path / "nowhere" / "sheet.png")


def test_fixed_cameras_are_passed_in_turn_by_everyone(tmp_path):
    walkers.generate(tmp_path / "out", 2, 1, 6, (4, 4), workers=1, cameras=3)
    views = [
        sorted(path.parent.name for path in (tmp_path / "out/sequences" / name).rglob("*.pkl"))
        for name in ("0000", "0001", "0002")
    ]
    assert views == [["a000-h1"] * 2 + ["a120-h2"] * 2 + ["a240-h3"] * 2] * 3
