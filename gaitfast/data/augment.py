"""The random parameters of the augmentations, one draw per clip: pure functions of (config, seed, step, sample).

Ranges are those of OpenGait's DA4GaitSSB recipe, which the paper's Table 6 names: RandomAffine, RandomPerspective,
the cut from 64 to 44 columns (s_G only), RandomHorizontalFlip, RandomPartDilate, RandomPartBlur, in this order.
Supervised training (the GaitBase paper's recipe) takes RandomPerspective, the cut, RandomHorizontalFlip, RandomRotate.
Everything geometric is composed into one homography per clip, so a frame is interpolated once; OpenGait rounds to
whole grey levels after each operation instead.

Matrices map output pixels to input pixels, (x, y, 1) columns, with (0, 0) the centre of the first pixel: what OpenCV
calls WARP_INVERSE_MAP and DALI inverse_map=True, pixel_origin="center".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gaitfast import randomness
from gaitfast.config import AugmentConfig, SupervisedAugmentConfig

SIZE = 64
"""Rows and columns of a stored frame."""
WIDTH_E, WIDTH_G = 64, 44
"""Columns of s_E and s_G; the cut takes the same number from each side."""

_DEGREES = 10
"""Largest angle of RandomRotate."""
_SHIFT = 10
"""Corners move by 0..9 pixels (OpenGait: int(dh // 64 * 10) for the affine, int(w // 44) * 10 for the perspective)."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A structuring element of RandomPartDilate, in the two forms that the backends take."""

    shape: str
    """RECT, CROSS or ELLIPSE, as in cv2.getStructuringElement."""
    width: int
    height: int
    half_widths: tuple[int, int, int, int, int]
    """Row dy = -2..2 reaches columns -h..h; -1: the row is empty."""
    boxes: tuple[tuple[int, int], tuple[int, int]]
    """Two centred boxes (width, height) whose union is the element."""


KERNELS = (
    Kernel("RECT", 5, 3, (-1, 2, 2, 2, -1), ((5, 3), (5, 3))),
    Kernel("RECT", 5, 5, (2, 2, 2, 2, 2), ((5, 5), (5, 5))),
    Kernel("RECT", 3, 5, (1, 1, 1, 1, 1), ((3, 5), (3, 5))),
    Kernel("CROSS", 3, 3, (-1, 0, 1, 0, -1), ((3, 1), (1, 3))),
    Kernel("CROSS", 3, 5, (0, 0, 1, 0, 0), ((3, 1), (1, 5))),
    Kernel("CROSS", 5, 3, (-1, 0, 2, 0, -1), ((5, 1), (1, 3))),
    Kernel("ELLIPSE", 3, 3, (-1, 0, 1, 0, -1), ((3, 1), (1, 3))),
    Kernel("ELLIPSE", 3, 5, (0, 1, 1, 1, 0), ((3, 3), (1, 5))),
    Kernel("ELLIPSE", 5, 3, (-1, 0, 2, 0, -1), ((5, 1), (1, 3))),
)
"""Three of each shape: a uniform draw over the nine is a uniform shape, then a uniform size of it."""


@dataclass(frozen=True, slots=True)
class ClipParameters:
    """Explicit parameters of the augmentation of B clips."""

    width: int
    """Columns that remain: 64 or 44."""
    matrix: np.ndarray
    """float64 (B, 3, 3): output pixel -> input pixel; affine, perspective, cut, flip and rotation in one."""
    warp: np.ndarray
    """bool (B,): whether affine, perspective or rotation was drawn. Else `matrix` is cut and flip: copying is exact."""
    flip: np.ndarray
    """bool (B,)."""
    kernel: np.ndarray
    """int64 (B,): index into KERNELS."""
    dilate_rows: np.ndarray
    """int64 (B, 2): first row and the row behind the last; (0, 0) where no dilation was drawn."""
    blur_rows: np.ndarray
    """int64 (B, 2): the same for the blur."""


def _integers(draws: np.ndarray, low: int, high: int) -> np.ndarray:
    """Uniform draws in [0, 1) -> int64 in low..high, both included."""
    return low + (draws * (high - low + 1)).astype(np.int64)


def affine_points(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RandomAffine: 12 uniform draws (B, 12) -> source and target points, float64 (B, 3, 2) as (x, y).

    Three corners of the frame, each coordinate moved inwards by an integer of its own in 0..9.
    """
    corner = np.array([[0, 0], [SIZE, 0], [0, SIZE]])
    inward = np.array([[1, 1], [-1, 1], [1, -1]])
    points = corner + inward * _integers(draws, 0, _SHIFT - 1).reshape(-1, 2, 3, 2)
    return points[:, 0].astype(np.float64), points[:, 1].astype(np.float64)


def perspective_sides(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RandomPerspective: 4 uniform draws (B, 4) -> (left, right) of the top and of the bottom side, float64 (B, 2).

    Left ends lie in 0..9, right ends in 54..63.
    """
    left, right = _integers(draws[:, :2], 0, _SHIFT - 1), _integers(draws[:, 2:], SIZE - _SHIFT, SIZE - 1)
    sides = np.stack([left, right], axis=2).astype(np.float64)
    return sides[:, 0], sides[:, 1]


def affine_matrix(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The affine maps that take three points to three others; both float64 (B, 3, 2), result (B, 3, 3)."""
    ones = np.ones((len(target), 3, 1))
    rows = np.linalg.solve(np.concatenate([target, ones], axis=2), np.concatenate([source, ones], axis=2))
    matrix = rows.transpose(0, 2, 1).copy()
    matrix[:, 2] = (0.0, 0.0, 1.0)  # exactly affine: rounding must not turn it into a homography
    return matrix


def perspective_matrix(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """The homographies that take the 64x64 canvas to trapezoids with horizontal sides at y = 0 and y = 64.

    `top`, `bottom` float64 (B, 2): left and right ends of the sides. Result (B, 3, 3). In closed form: with
    u = x / 64, v = y / 64 and g = top width / bottom width - 1, the point is
    (top_l + u (top_r - top_l) + v ((1+g) bottom_l - top_l), 64 (1+g) v) / (1 + g v).
    """
    growth = (top[:, 1] - top[:, 0]) / (bottom[:, 1] - bottom[:, 0]) - 1
    matrix = np.zeros((len(top), 3, 3))
    matrix[:, 0, 0] = (top[:, 1] - top[:, 0]) / SIZE
    matrix[:, 0, 1] = ((1 + growth) * bottom[:, 0] - top[:, 0]) / SIZE
    matrix[:, 0, 2] = top[:, 0]
    matrix[:, 1, 1] = 1 + growth
    matrix[:, 2, 1] = growth / SIZE
    matrix[:, 2, 2] = 1
    return matrix


def cut_and_flip_matrix(flip: np.ndarray, width: int) -> np.ndarray:
    """bool (B,) -> (B, 3, 3): the centred cut to `width` columns, then the mirror image where `flip`."""
    matrix = np.tile(np.eye(3), (len(flip), 1, 1))
    margin = (SIZE - width) // 2
    matrix[:, 0, 0] = np.where(flip, -1, 1)
    matrix[:, 0, 2] = np.where(flip, SIZE - 1 - margin, margin)
    return matrix


def rotation_matrix(draws: np.ndarray, width: int) -> np.ndarray:
    """RandomRotate: uniform draws (B,) -> (B, 3, 3), output pixel -> input pixel, by -10..10 degrees.

    The centre is OpenGait's, (32, width / 2) as (x, y): it confuses height and width, so a frame of 44 columns turns
    around a point right of its own centre (22, 32). Kept, because published models were trained so.
    """
    angle = np.deg2rad((2 * draws - 1) * _DEGREES)
    x, y = SIZE // 2, width // 2
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.zeros((len(draws), 3, 3))
    matrix[:, 0] = np.stack([cos, -sin, (1 - cos) * x + sin * y], axis=1)
    matrix[:, 1] = np.stack([sin, cos, (1 - cos) * y - sin * x], axis=1)
    matrix[:, 2, 2] = 1
    return matrix


def _rows(draws: np.ndarray, drawn: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """Two uniform draws (B, 2) -> int64 (B, 2): the rows of a part operation, (0, 0) where it was not drawn."""
    top, bottom = _integers(draws[:, 0], *config.part_top), _integers(draws[:, 1], *config.part_bottom)
    return np.where(drawn[:, None], np.stack([top, bottom], axis=1), 0)


def draw_parameters(
    config: AugmentConfig, *, seed: int, purpose: str, step: int, sample: np.ndarray, width: int
) -> ClipParameters:
    """The parameters of one clip for each of `sample`, int64 (B,) numbers within the global batch of `step`.

    The draw does not depend on `width`, so the same purpose gives the same augmentation of s_E and s_G.
    """
    draws = randomness.uniform(seed, purpose, step, sample, 28)
    affine, perspective, flip = draws[:, 0] < config.affine, draws[:, 1] < config.perspective, draws[:, 2] < config.flip
    rotate = draws[:, 26] < config.rotate

    source, target = affine_points(draws[:, 5:17])
    top, bottom = perspective_sides(draws[:, 17:21])

    identity = np.eye(3)
    first = np.where(affine[:, None, None], affine_matrix(target, source), identity)
    second = np.where(perspective[:, None, None], perspective_matrix(top, bottom), identity)
    last = np.where(rotate[:, None, None], rotation_matrix(draws[:, 27], width), identity)
    return ClipParameters(
        width=width,
        matrix=first @ second @ cut_and_flip_matrix(flip, width) @ last,
        warp=affine | perspective | rotate,
        flip=flip,
        kernel=_integers(draws[:, 21], 0, len(KERNELS) - 1),
        dilate_rows=_rows(draws[:, 22:24], draws[:, 3] < config.part_dilate, config),
        blur_rows=_rows(draws[:, 24:26], draws[:, 4] < config.part_blur, config),
    )


def draw_pair(
    config: AugmentConfig, *, seed: int, step: int, sample: np.ndarray, same_clip: bool = False
) -> tuple[ClipParameters, ClipParameters]:
    """Parameters of s_E and of s_G: independent draws, or with `same_clip` the same draw, s_G cut to 44 columns."""
    address = {"seed": seed, "step": step, "sample": sample}
    purpose_g = "augmentation of s_E" if same_clip else "augmentation of s_G"
    return (
        draw_parameters(config, purpose="augmentation of s_E", width=WIDTH_E, **address),
        draw_parameters(config, purpose=purpose_g, width=WIDTH_G, **address),
    )


def draw_supervised(config: SupervisedAugmentConfig, *, seed: int, step: int, sample: np.ndarray) -> ClipParameters:
    """Parameters of the clips of supervised training; without `config.enabled` the cut to 44 columns alone."""
    if not config.enabled:
        names = ("affine", "perspective", "flip", "rotate", "part_dilate", "part_blur")
        config = replace(config, **dict.fromkeys(names, 0.0))
    if config.per_batch:
        sample = np.zeros_like(sample)
    purpose = "augmentation of the training clip"
    return draw_parameters(config, seed=seed, purpose=purpose, step=step, sample=sample, width=WIDTH_G)
