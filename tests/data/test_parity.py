"""DALI against NumPy/OpenCV against first principles, for one operator and for all of them composed.

Tolerances in grey levels. Measured with DALI 2.4 and OpenCV 5.0 on figures and on noise: DALI's CPU warp equals
cv2.warpPerspective in every pixel and lies within 0.502 of float64 bilinear interpolation (0.5 is rounding); the part
operations are exact. OpenCV 4 interpolates with coordinates rounded to 1/32 pixel; pinned versions avoid it.
"""

from types import SimpleNamespace

import cv2
import numpy as np
import nvidia.dali.fn as fn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import pipeline_def

from gaitfast.config import AugmentConfig
from gaitfast.data import augment, part_ops, reference
from gaitfast.data import dali as graphs
from gaitfast.data.augment import KERNELS, draw_parameters
from tests.data.silhouettes import walk

WARP_TOLERANCE = 1
"""Largest difference of a pixel between two backends' warps."""
EXACT_TOLERANCE = 0.51
"""Largest distance of a warped pixel from float64 interpolation: rounding to whole levels, and a little."""
CLIPS, FRAMES = 8, 3

if torch.cuda.is_available():
    DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
else:
    DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skip(reason="needs a CUDA device")])]

seeds = st.integers(0, 2**32)
examples = settings(max_examples=25, deadline=None)


def clips(seed: int) -> np.ndarray:
    """uint8 (CLIPS, FRAMES, 64, 64): figures, noise, and black and white noise."""
    rng = np.random.default_rng(seed)
    figures = np.stack([walk(int(rng.integers(100)), FRAMES) for _ in range(CLIPS)])
    figures[-1] = rng.integers(0, 256, figures[-1].shape)
    figures[-2] = rng.integers(0, 2, figures[-2].shape) * 255
    return figures


def parameters(seed: int, width: int, **probabilities) -> augment.ClipParameters:
    config = AugmentConfig(
        **{**dict.fromkeys(("affine", "perspective", "part_dilate", "part_blur"), 0.5), **probabilities}
    )
    return draw_parameters(config, seed=seed, purpose="test", step=0, sample=np.arange(CLIPS), width=width)


def bilinear(frames: np.ndarray, matrix: np.ndarray, width: int) -> np.ndarray:
    """Frames (T, 64, 64) at the points that `matrix` gives for the centres of the output, float64 (T, 64, width)."""
    y, x = np.mgrid[:64, :width].reshape(2, -1).astype(np.float64)
    u, v, w = matrix @ np.stack([x, y, np.ones_like(x)])
    u, v = u / w, v / w
    left, above = np.floor(u).astype(int), np.floor(v).astype(int)
    padded = np.pad(frames.astype(np.float64), ((0, 0), (1, 1), (1, 1)))

    def pixel(row, column):
        return padded[:, np.clip(row + 1, 0, 65), np.clip(column + 1, 0, 65)]

    along_top = pixel(above, left) * (1 - (u - left)) + pixel(above, left + 1) * (u - left)
    along_bottom = pixel(above + 1, left) * (1 - (u - left)) + pixel(above + 1, left + 1) * (u - left)
    return (along_top * (1 - (v - above)) + along_bottom * (v - above)).reshape(-1, 64, width)


class Dali:
    """A pipeline that stays alive between examples: `graph` on the inputs of the moment."""

    def __init__(self, device, layouts, graph):
        self.inputs = ()
        gpu = device == "cuda"

        @pipeline_def(
            batch_size=CLIPS,
            num_threads=1,
            device_id=0 if gpu else None,
            prefetch_queue_depth=1,
            enable_conditionals=True,
        )
        def definition():
            clip, *rest = fn.external_source(lambda: self.inputs, num_outputs=len(layouts), layout=layouts)
            return graph(clip.gpu() if gpu else clip, *rest)

        self._pipeline, self._device = definition(), torch.device(device)

    def __call__(self, *inputs) -> np.ndarray:
        self.inputs = inputs
        return graphs._owned(self._pipeline.run()[0], self._device).cpu().numpy()


@pytest.fixture(scope="module", params=DEVICES)
def dali(request):
    """The graphs of dali.py on one device, alone."""
    device = request.param
    strip = ["FHWC", "", "", ""]
    return SimpleNamespace(
        device=device,
        geometry={w: Dali(device, strip, lambda *inputs, w=w: graphs.geometry(*inputs, w)) for w in (64, 44)},
        blur=Dali(device, strip, graphs.blur_part),
        dilate=Dali(device, [*strip, "", ""], graphs.dilate_part) if device == "cuda" else None,
    )


def expected(frames, p):
    return np.stack([reference.augment_clip(frames[i], p, i) for i in range(CLIPS)])


def difference(a, b):
    return np.abs(a.astype(np.float64) - b.astype(np.float64)).max()


# --- the warp ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 44])
@examples
@given(seed=seeds)
def test_warp_agrees_with_opencv_and_with_float64(dali, width, seed):
    frames, p = clips(seed), parameters(seed, width, part_dilate=0.0, part_blur=0.0)
    result = dali.geometry[width](*graphs.cpu_inputs(frames, p))
    assert difference(result, expected(frames, p)) <= WARP_TOLERANCE
    for i in range(CLIPS):
        exact = bilinear(frames[i], p.matrix[i], width)
        assert difference(result[i], exact) <= EXACT_TOLERANCE
        assert difference(reference.augment_clip(frames[i], p, i), exact) <= EXACT_TOLERANCE


@pytest.mark.parametrize("width", [64, 44])
def test_what_is_not_warped_is_copied_exactly(dali, width):
    frames, p = clips(0), parameters(0, width, affine=0.0, perspective=0.0, part_dilate=0.0, part_blur=0.0)
    margin = (64 - width) // 2
    cut = frames[..., margin : 64 - margin]
    mirrored = np.where(p.flip[:, None, None, None], cut[..., ::-1], cut)
    assert 0 < p.flip.sum() < CLIPS
    inputs = graphs.cpu_inputs(frames, p)
    np.testing.assert_array_equal(dali.geometry[width](*inputs), mirrored)
    through_the_warp = (*inputs[:2], np.ones(CLIPS, bool), inputs[3])
    np.testing.assert_array_equal(dali.geometry[width](*through_the_warp), mirrored)


# --- the part operations ----------------------------------------------------------------------------------------------


def opengait_dilate(frames, kernel, rows):
    """As OpenGait does it: frames in the channel axis, OpenCV's own structuring element."""
    element = cv2.getStructuringElement(getattr(cv2, f"MORPH_{kernel.shape}"), (kernel.width, kernel.height))
    result = frames.transpose(1, 2, 0).copy()
    strip = result[rows[0] : rows[1]].astype(np.float64)
    result[rows[0] : rows[1]] = cv2.dilate(strip, element).reshape(strip.shape)
    return result.transpose(2, 0, 1)


def opengait_blur(frames, rows):
    """As OpenGait does it: in 0..1, blurred by OpenCV; also where the blurred value lies on the threshold."""
    result = frames.astype(np.float64) / 255
    on_threshold = np.zeros(frames.shape, bool)
    for frame, tie in zip(result, on_threshold):
        blurred = cv2.GaussianBlur(frame[rows[0] : rows[1]], (3, 3), 0)
        frame[rows[0] : rows[1]] = blurred > 0.2
        tie[rows[0] : rows[1]] = np.abs(blurred - 0.2) < 1e-9
    return np.round(result * 255).astype(np.uint8), on_threshold


@pytest.mark.parametrize("width", [64, 44])
@examples
@given(seed=seeds, kernel=st.integers(0, 8), first=st.integers(0, 63), rows=st.integers(1, 64))
def test_reference_part_operations_are_opengaits(width, seed, kernel, first, rows):
    frames = np.concatenate(clips(seed))[..., :width]
    rows = (first, min(first + rows, 64))
    np.testing.assert_array_equal(
        reference.dilate_part(frames, kernel, rows), opengait_dilate(frames, KERNELS[kernel], rows)
    )
    expected, on_threshold = opengait_blur(frames, rows)
    np.testing.assert_array_equal(np.where(on_threshold, expected, reference.blur_part(frames, rows)), expected)


def test_a_blurred_value_on_the_threshold_is_background():
    frame = np.full((1, 64, 64), 51, np.uint8)  # exactly 0.2
    assert not reference.blur_part(frame, (0, 64)).any()
    assert (reference.blur_part(frame + 1, (0, 64)) == 255).all()


@pytest.mark.parametrize("backend", ["compiled", "plain"])
@pytest.mark.parametrize("width", [64, 44])
def test_cpu_part_operations_equal_the_reference(backend, width):
    if backend == "compiled" and not part_ops.compiled():
        pytest.skip("the extension is not built")
    for seed in range(40):
        frames = np.ascontiguousarray(clips(seed)[..., :width])
        p = parameters(seed, width, part_dilate=0.7, part_blur=0.7)
        result = torch.from_numpy(frames.copy())
        part_ops.apply(result, p, backend)
        for i in range(CLIPS):
            dilated = reference.dilate_part(frames[i], p.kernel[i], p.dilate_rows[i])
            np.testing.assert_array_equal(result[i], reference.blur_part(dilated, p.blur_rows[i]))


@pytest.mark.parametrize("rows", [(0, 64), (0, 1), (63, 64), (31, 33)])
def test_cpu_part_operations_at_the_edges_of_the_frame(rows):
    if not part_ops.compiled():
        pytest.skip("the extension is not built")
    for kernel in range(9):
        for frames in (clips(kernel)[..., :44], clips(kernel)):
            clip = torch.from_numpy(frames.copy())
            both = torch.tensor([rows] * CLIPS)
            half_widths = torch.tensor([KERNELS[kernel].half_widths] * CLIPS)
            torch.ops.gaitfast.part_ops_(clip, half_widths, both, both)
            for result, frame in zip(clip.numpy(), frames):
                expected = reference.blur_part(reference.dilate_part(frame, kernel, rows), rows)
                np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clips": torch.zeros(2, 3, 64, 44)}, "contiguous uint8"),
        ({"clips": torch.zeros(2, 3, 44, 64, dtype=torch.uint8).transpose(2, 3)}, "contiguous uint8"),
        ({"blur_rows": torch.tensor([[0, 0], [5, 65]])}, r"blur_rows\[1\]"),
        ({"dilate_rows": torch.tensor([[-1, 4], [0, 0]])}, r"dilate_rows\[0\]"),
        ({"dilate_rows": torch.zeros(3, 2, dtype=torch.int64)}, r"dilate_rows must be int64 \(2, 2\)"),
        ({"half_widths": torch.full((2, 5), 3)}, r"lie in -1\.\.2"),
        ({"half_widths": torch.zeros(2, 4, dtype=torch.int64)}, r"half_widths must be int64 \(2, 5\)"),
    ],
)
def test_cpu_part_operations_refuse_what_would_leave_the_frame(change, message):
    if not part_ops.compiled():
        pytest.skip("the extension is not built")
    rows = torch.zeros(2, 2, dtype=torch.int64)
    arguments = {
        "clips": torch.zeros(2, 3, 64, 44, dtype=torch.uint8),
        "half_widths": torch.zeros(2, 5, dtype=torch.int64),
        "dilate_rows": rows,
        "blur_rows": rows,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gaitfast.part_ops_(**{**arguments, **change})


@examples
@given(seed=seeds, first=st.integers(0, 63), count=st.integers(1, 64))
def test_dali_blur_equals_the_reference(dali, seed, first, count):
    """On the CPU too, although CPU batches take the compiled form: the graph is the GPU's."""
    frames, drawn = clips(seed), np.random.default_rng(seed).random(CLIPS) < 0.5
    last = min(first + count, 64)
    bounds = np.full((CLIPS, 1), first, np.int32), np.full((CLIPS, 1), last, np.int32)
    result = dali.blur(frames[..., None], drawn, *bounds)
    for i in range(CLIPS):
        expected = reference.blur_part(frames[i], (first, last)) if drawn[i] else frames[i]
        np.testing.assert_array_equal(result[i], expected)


@examples
@given(seed=seeds, kernel=st.integers(0, 8), first=st.integers(0, 63), count=st.integers(1, 64))
def test_dali_dilation_equals_the_reference(dali, seed, kernel, first, count):
    if dali.dilate is None:
        pytest.skip("DALI dilates on GPUs only; the CPU's form is part_ops_")
    frames, rows = clips(seed), (first, min(first + count, 64))
    bounds = [np.full((CLIPS, 1), row, np.int32) for row in rows]
    boxes = [np.tile(np.array(box, np.int32), (CLIPS, 1)) for box in KERNELS[kernel].boxes]
    result = dali.dilate(frames[..., None], np.ones(CLIPS, bool), *bounds, *boxes)
    for i in range(CLIPS):
        np.testing.assert_array_equal(result[i], reference.dilate_part(frames[i], kernel, rows))


# --- composition ------------------------------------------------------------------------------------------------------


@examples
@given(seed=seeds, flip=st.booleans(), width=st.sampled_from([64, 44]))
def test_one_warp_equals_opengaits_steps_where_one_geometric_operation_was_drawn(seed, flip, width):
    """Same interpolation, then whole pixels. Measured: a level at most."""
    rng = np.random.default_rng(seed)
    frames = np.concatenate(clips(seed))
    cut = augment.cut_and_flip_matrix(np.array([flip]), width)

    source, target = augment.affine_points(rng.random((1, 12)))
    forward = cv2.getAffineTransform(np.float32(source[0]), np.float32(target[0]))
    steps = np.stack([cv2.warpAffine(frame, forward, (64, 64)) for frame in frames])
    composed = reference.warp(frames, (augment.affine_matrix(target, source) @ cut)[0], width)
    assert difference(composed, reference.cut_and_flip(steps, flip, width)) <= WARP_TOLERANCE

    (top,), (bottom,) = sides = augment.perspective_sides(rng.random((1, 4)))
    corners = np.float32([[top[0], 0], [top[1], 0], [bottom[1], 64], [bottom[0], 64]])
    forward = cv2.getPerspectiveTransform(corners, np.float32([[0, 0], [64, 0], [64, 64], [0, 64]]))
    steps = np.stack([cv2.warpPerspective(frame, forward, (64, 64)) for frame in frames])
    composed = reference.warp(frames, (augment.perspective_matrix(*sides) @ cut)[0], width)
    assert difference(composed, reference.cut_and_flip(steps, flip, width)) <= WARP_TOLERANCE


def test_one_warp_is_close_to_opengaits_two():
    """Affine and perspective both drawn, 4 % of clips: OpenGait interpolates and cuts off twice. Measured: mean 1.6."""
    rng = np.random.default_rng(0)
    frames = walk(3, 60)
    differences = []
    for frame in frames:
        source, target = augment.affine_points(rng.random((1, 12)))
        top, bottom = augment.perspective_sides(rng.random((1, 4)))
        affine, perspective = augment.affine_matrix(target, source)[0], augment.perspective_matrix(top, bottom)[0]
        twice = reference.warp(reference.warp(frame[None], affine, 64), perspective, 64)
        once = reference.warp(frame[None], affine @ perspective, 64)
        differences.append(np.abs(once.astype(int) - twice).mean())
    assert np.mean(differences) < 2.0


@pytest.mark.parametrize("width", [64, 44])
def test_all_operations_composed_agree_with_the_reference(dali, width):
    for seed in range(10):
        frames, p = clips(seed), parameters(seed, width)
        result = torch.from_numpy(dali.geometry[width](*graphs.cpu_inputs(frames, p)))
        part_ops.apply(result, p)
        unequal = result.numpy() != expected(frames, p)
        # A level of difference in front of the threshold may become 255 behind it, so shares are compared.
        assert unequal.mean() < 1e-3
