import cv2
import numpy as np
import pytest

from gaitfast.config import AugmentConfig
from gaitfast.data import augment
from gaitfast.data.augment import KERNELS, draw_pair, draw_parameters
from gaitfast.data.reference import augmentation_sheet
from tests.data.silhouettes import walk

SAMPLES = np.arange(4000)
OFF = {"affine": 0.0, "perspective": 0.0, "flip": 0.0, "part_dilate": 0.0, "part_blur": 0.0}


def draw(width=64, sample=SAMPLES, seed=1, step=0, purpose="test", **probabilities):
    config = AugmentConfig(**{**OFF, **probabilities})
    return draw_parameters(config, seed=seed, purpose=purpose, step=step, sample=sample, width=width)


def apply(matrix, points):
    """(B, 3, 3) on one point (x, y) -> (B, 2)."""
    mapped = matrix @ np.array([*points, 1.0])
    return mapped[:, :2] / mapped[:, 2:]


def test_each_augmentation_has_its_probability():
    p = draw(affine=0.2, perspective=0.3, flip=0.5, part_dilate=0.1, part_blur=0.4)
    shares = {
        "affine or perspective": (p.warp.mean(), 1 - 0.8 * 0.7),
        "flip": (p.flip.mean(), 0.5),
        "dilate": ((p.dilate_rows[:, 1] > 0).mean(), 0.1),
        "blur": ((p.blur_rows[:, 1] > 0).mean(), 0.4),
    }
    for name, (share, expected) in shares.items():
        assert abs(share - expected) < 0.03, name


def test_draws_of_different_augmentations_are_independent():
    p = draw(affine=0.5, flip=0.5, part_dilate=0.5, part_blur=0.5)
    flags = np.stack([p.warp, p.flip, p.dilate_rows[:, 1] > 0, p.blur_rows[:, 1] > 0])
    correlation = np.corrcoef(flags) - np.eye(4)
    assert np.abs(correlation).max() < 0.08


def test_nothing_drawn_is_the_exact_identity():
    p = draw()
    np.testing.assert_array_equal(p.matrix, np.broadcast_to(np.eye(3), p.matrix.shape))
    assert not p.warp.any() and not p.flip.any() and not p.dilate_rows.any() and not p.blur_rows.any()


def test_cut_and_flip_move_whole_pixels():
    for width, flip, first, last in ((64, 0.0, 0, 63), (64, 1.0, 63, 0), (44, 0.0, 10, 53), (44, 1.0, 53, 10)):
        matrix = draw(width=width, sample=SAMPLES[:3], flip=flip).matrix
        assert (apply(matrix, (0, 5)) == (first, 5)).all() and (apply(matrix, (width - 1, 5)) == (last, 5)).all()


def test_affine_points_have_opengaits_ranges():
    source, target = augment.affine_points(np.random.default_rng(0).random((4000, 12)))
    for points in (source, target):
        columns = points.reshape(-1, 6).T
        for values, low in zip(columns, (0, 0, 55, 0, 0, 55)):
            assert np.unique(values).tolist() == list(range(low, low + 10))
    assert np.unique(np.concatenate([source, target], axis=1).reshape(-1, 12), axis=0).shape[0] > 3990


def test_affine_matrix_is_opencvs_inverse():
    source, target = augment.affine_points(np.random.default_rng(0).random((200, 12)))
    for matrix, a, b in zip(augment.affine_matrix(target, source), source, target):
        forward = cv2.getAffineTransform(a.astype(np.float32), b.astype(np.float32))
        np.testing.assert_allclose(matrix[:2], cv2.invertAffineTransform(forward), atol=1e-9)
        assert matrix[2].tolist() == [0, 0, 1]


def test_perspective_keeps_rows_and_moves_corners_by_opengaits_ranges():
    matrix = draw(perspective=1.0).matrix
    for corner, low in (((0, 0), 0), ((64, 0), 54), ((0, 64), 0), ((64, 64), 54)):
        x, y = apply(matrix, corner).T
        np.testing.assert_allclose(y, corner[1], atol=1e-9)
        np.testing.assert_allclose(x, np.round(x), atol=1e-9)
        assert np.unique(np.round(x)).tolist() == list(range(low, low + 10))


def test_perspective_matrix_is_opencvs_inverse():
    top, bottom = augment.perspective_sides(np.random.default_rng(0).random((200, 4)))
    canvas = np.float32([[0, 0], [64, 0], [64, 64], [0, 64]])
    for matrix, (tl, tr), (bl, br) in zip(augment.perspective_matrix(top, bottom), top, bottom):
        forward = cv2.getPerspectiveTransform(np.float32([[tl, 0], [tr, 0], [br, 64], [bl, 64]]), canvas)
        expected = np.linalg.inv(forward)
        np.testing.assert_allclose(matrix, expected / expected[2, 2], atol=1e-9)


def test_operations_compose_in_opengaits_order():
    """Affine, perspective, cut, flip of a frame; so backwards for the matrix, which leads from output to input."""
    both = draw(affine=1.0, perspective=1.0, flip=1.0, width=44).matrix
    affine, perspective = draw(affine=1.0).matrix, draw(perspective=1.0).matrix  # same draws: the purpose is the same
    cut = draw(flip=1.0, width=44).matrix
    np.testing.assert_allclose(both, affine @ perspective @ cut, rtol=1e-12)


def test_part_rows_cover_the_configured_ranges():
    p = draw(part_dilate=1.0, part_blur=1.0)
    for rows in (p.dilate_rows, p.blur_rows):
        assert np.unique(rows[:, 0]).tolist() == list(range(9, 21))
        assert np.unique(rows[:, 1]).tolist() == list(range(39, 51))
    assert (p.dilate_rows != p.blur_rows).any()
    p = draw_parameters(
        AugmentConfig(part_blur=1.0, part_top=(0, 0), part_bottom=(64, 64)),
        seed=1, purpose="test", step=0, sample=SAMPLES, width=64,
    )  # fmt: skip
    assert (p.blur_rows == (0, 64)).all()


def test_kernels_are_equally_likely_and_are_opencvs():
    counts = np.bincount(draw(part_dilate=1.0).kernel, minlength=9)
    assert len(counts) == 9 and np.abs(counts - len(SAMPLES) / 9).max() < 5 * np.sqrt(len(SAMPLES) / 9)
    sizes = {(k.shape, k.width, k.height) for k in KERNELS}
    small = {(3, 3), (3, 5), (5, 3)}
    assert sizes == {("RECT", w, h) for w, h in ((5, 3), (5, 5), (3, 5))} | {
        (shape, w, h) for shape in ("CROSS", "ELLIPSE") for w, h in small
    }
    for kernel in KERNELS:
        element = np.zeros((5, 5), np.uint8)
        y, x = (5 - kernel.height) // 2, (5 - kernel.width) // 2
        element[y : y + kernel.height, x : x + kernel.width] = cv2.getStructuringElement(
            getattr(cv2, f"MORPH_{kernel.shape}"), (kernel.width, kernel.height)
        )
        rows = np.abs(np.arange(-2, 3)) <= np.array(kernel.half_widths)[:, None]
        np.testing.assert_array_equal(rows, element, err_msg=str(kernel))
        boxes = np.zeros((5, 5), bool)
        for w, h in kernel.boxes:
            boxes[2 - h // 2 : 3 + h // 2, 2 - w // 2 : 3 + w // 2] = True
        np.testing.assert_array_equal(boxes, element, err_msg=str(kernel))


def test_a_draw_depends_on_seed_step_sample_and_clip_alone():
    config = AugmentConfig()
    both = draw_pair(config, seed=1, step=3, sample=np.arange(12))
    later = draw_pair(config, seed=1, step=3, sample=np.arange(6, 12))
    for whole, part in zip(both, later):
        np.testing.assert_array_equal(whole.matrix[6:], part.matrix)
        np.testing.assert_array_equal(whole.dilate_rows[6:], part.dilate_rows)
    assert (both[0].flip != both[1].flip).any()
    for other in (
        draw_pair(config, seed=2, step=3, sample=np.arange(12)),
        draw_pair(config, seed=1, step=4, sample=np.arange(12)),
    ):
        assert (other[0].flip != both[0].flip).any()


def test_the_same_clip_gets_the_same_augmentation_cut_to_44_columns():
    e, g = draw_pair(AugmentConfig(), seed=1, step=0, sample=np.arange(200), same_clip=True)
    for name in ("warp", "flip", "kernel", "dilate_rows", "blur_rows"):
        np.testing.assert_array_equal(getattr(e, name), getattr(g, name))
    shift = np.eye(3)
    shift[0, 2] = 10
    np.testing.assert_allclose(g.matrix, e.matrix @ shift, atol=1e-9)


def test_the_sheet_shows_each_augmentation_alone():
    frames = walk(1, 8)
    sheet = augmentation_sheet(frames, seed=7)
    assert list(sheet) == ["original", "affine", "perspective", "flip", "part_dilate", "part_blur"]
    for name, pictures in sheet.items():
        assert pictures.shape == frames.shape and pictures.dtype == np.uint8
        assert name == "original" or all((a != b).any() for a, b in zip(pictures, frames)), name
    np.testing.assert_array_equal(sheet["flip"], frames[..., ::-1])
    assert (sheet["part_dilate"] >= frames).all()
    for name in ("part_dilate", "part_blur"):  # rows that no draw reaches
        np.testing.assert_array_equal(sheet[name][:, :9], frames[:, :9])
        np.testing.assert_array_equal(sheet[name][:, 50:], frames[:, 50:])
    np.testing.assert_array_equal(augmentation_sheet(frames, seed=7)["affine"], sheet["affine"])
    assert (augmentation_sheet(frames, seed=8)["affine"] != sheet["affine"]).any()


@pytest.mark.parametrize("name", ["affine", "perspective", "flip", "part_dilate", "part_blur"])
def test_probability_one_is_always_and_zero_is_never(name):
    config = {"affine": "warp", "perspective": "warp", "flip": "flip"}
    for probability in (0.0, 1.0):
        p = draw(**{name: probability})
        rows = p.dilate_rows if name == "part_dilate" else p.blur_rows
        drawn = getattr(p, config[name]) if name in config else rows[:, 1] > 0
        assert (drawn == bool(probability)).all()
