"""Raw silhouette pictures -> normalised 64x64 frames, exactly as OpenGait's pretreatment (datasets/pretreatment.py).

What OpenGait does is kept even where it is odd: pretrained models have seen its output. Resizing is OpenCV's bicubic
one; the golden case holds for opencv 4.13 and 5.0.
"""

from __future__ import annotations

import cv2
import numpy as np

SIZE = 64
MIN_SUM = 10_000
"""A picture whose grey values add up to no more than this is dropped (40 white pixels)."""


def normalise(picture: np.ndarray, size: int = SIZE) -> np.ndarray | None:
    """One greyscale picture uint8 (H, W) -> uint8 (size, size), or None where OpenGait drops it.

    Dropped: too little foreground; a centre of mass in column 0 (OpenGait tests the column number for truth); a crop so
    tall and thin that it scales to no width at all (OpenGait would stop with an error).
    """
    assert picture.dtype == np.uint8 and picture.ndim == 2
    if picture.sum(dtype=np.int64) <= MIN_SUM:
        return None
    rows = np.flatnonzero(picture.any(axis=1))
    crop = picture[rows[0] : rows[-1] + 1]
    width = int(size * (crop.shape[1] / crop.shape[0]))
    if width == 0:
        return None
    scaled = cv2.resize(crop, (width, size), interpolation=cv2.INTER_CUBIC)

    column_sums = scaled.sum(axis=0, dtype=np.int64).cumsum()
    beyond_half = np.flatnonzero(column_sums > column_sums[-1] / 2)
    if len(beyond_half) == 0 or beyond_half[0] == 0:
        return None
    left = int(beyond_half[0]) - size // 2
    if left <= 0 or left + size >= width:
        scaled = np.pad(scaled, ((0, 0), (size // 2, size // 2)))
        left += size // 2
    return scaled[:, left : left + size]
