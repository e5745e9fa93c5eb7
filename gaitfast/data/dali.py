"""Decoding and augmentation by NVIDIA DALI, on a GPU or on the CPU: all clips of a step in one pipeline.

Every operator is given explicit parameters, one set per clip (a DALI sample is a whole clip, FHWC), which augment.py
draws; DALI's own random numbers are not used. So a batch depends on the step alone, not on threads or look-ahead.

    step             CPU                                        GPU
    decode           PackedDataset.frames (C++, LZ4)            fn.decoders.inflate of the compressed chunks
    geometry         fn.experimental.warp_perspective where an affine or perspective was drawn, else fn.crop, fn.flip
    part dilation    part_ops.apply, in place on the output:    two fn.experimental.dilate by boxes, their maximum
    part blur          DALI dilates on GPUs only                fn.filter of the part, threshold

On the CPU, DALI warps with OpenCV. The geometry and the graph of the blur are held against reference.py there too
(tests/data/test_parity.py); inflation, dilation and everything else on a GPU under the `gpu` marker. Between CPU, GPU
and reference the warp alone may differ, by rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
import torch
from nvidia.dali import pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from gaitfast.data import part_ops
from gaitfast.data.augment import KERNELS, SIZE, ClipParameters
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import Clip, Plan, located
from gaitfast.data.residency import DeviceChunks, MappedChunks

_IN_FLIGHT = 2
"""Batches within DALI: one is computed while the next is read."""
_BOXES = np.array([kernel.boxes for kernel in KERNELS], np.int32)
_BLUR = np.outer((1, 2, 1), (1, 2, 1)).astype(np.float32) / 16
_BLUR_THRESHOLD = 51.0
"""0.2 of full scale."""


# --- the graphs -------------------------------------------------------------------------------------------------------


def geometry(clip, matrix, warp, flip, width: int):
    """One clip FHWC uint8 (T, 64, 64, 1) per sample -> (T, 64, width, 1), on the device of `clip`."""
    if warp:
        result = fn.experimental.warp_perspective(
            clip, matrix=matrix, size=(SIZE, width), inverse_map=True, pixel_origin="center", fill_value=0
        )
    else:
        cut = clip if width == SIZE else fn.crop(clip, crop=(SIZE, width))
        result = fn.flip(cut, horizontal=flip)
    return result


def replace_rows(clip, strip, first, last):
    """`clip` with its rows [first, last) taken from `strip`."""
    above = fn.slice(clip, end=first, axis_names="H")
    below = fn.slice(clip, start=last, axis_names="H")
    return fn.cat(above, strip, below, axis_name="H")


def blur_part(clip, drawn, first, last):
    """RandomPartBlur of the clips where `drawn`; exact, because float32 holds every sum of sixteenths."""
    if drawn:
        strip = fn.slice(clip, start=first, end=last, axis_names="H")
        blurred = fn.filter(strip, types.Constant(_BLUR), border="reflect_101", dtype=types.FLOAT)
        strip = fn.cast(blurred > _BLUR_THRESHOLD, dtype=types.UINT8) * types.Constant(255, dtype=types.UINT8)
        result = replace_rows(clip, strip, first, last)
    else:
        result = clip
    return result


def dilate_part(clip, drawn, first, last, box_a, box_b):
    """RandomPartDilate of the clips where `drawn`, GPU only: dilation by a union is the maximum of the dilations.

    Replicated borders leave a box's maximum as it is: the nearest pixel of the strip always lies within the box too.
    """
    if drawn:
        strip = fn.slice(clip, start=first, end=last, axis_names="H")
        by_a = fn.experimental.dilate(strip, mask_size=box_a, border_mode="replicate")
        by_b = fn.experimental.dilate(strip, mask_size=box_b, border_mode="replicate")
        result = replace_rows(clip, dali_math.max(by_a, by_b), first, last)
    else:
        result = clip
    return result


def inflate(chunks, sizes):
    """Compressed chunks of a clip on the GPU, one per frame and back to back -> FHWC uint8 (T, 64, 64, 1)."""
    return fn.decoders.inflate(chunks, chunk_sizes=sizes, shape=(SIZE, SIZE, 1), layout="HWC", algorithm="LZ4")


@pipeline_def(enable_conditionals=True)
def cpu_clips(source, widths: tuple[int, ...]):
    """The clips of a step after the geometric augmentations. `source` yields what `cpu_inputs` gives for each."""
    layout = ["FHWC", "", "", ""] * len(widths)
    inputs = fn.external_source(source, num_outputs=4 * len(widths), layout=layout, no_copy=True)
    return tuple(geometry(*inputs[4 * k : 4 * k + 4], width) for k, width in enumerate(widths))


_GPU_INPUTS = 12
"""What `gpu_inputs` gives for a clip besides its chunks."""


@pipeline_def(enable_conditionals=True)
def gpu_clips(source, chunks, widths: tuple[int, ...], on_device: bool):
    """The clips of a step, decoded and augmented. `chunks` yields the compressed bytes of each, in the GPU's memory if
    `on_device`, and `source` what `gpu_inputs` gives."""
    compressed = fn.external_source(chunks, num_outputs=len(widths), device="gpu" if on_device else "cpu")
    inputs = fn.external_source(source, num_outputs=_GPU_INPUTS * len(widths))
    clips = []
    for k, width in enumerate(widths):
        sizes, *rest = inputs[_GPU_INPUTS * k : _GPU_INPUTS * (k + 1)]
        clip = geometry(inflate(compressed[k].gpu(), sizes), *rest[:3], width)
        clip = dilate_part(clip, *rest[3:8])
        clips.append(blur_part(clip, *rest[8:]))
    return tuple(clips)


def cpu_inputs(frames: np.ndarray, parameters: ClipParameters) -> tuple[np.ndarray, ...]:
    """Clips uint8 (B, T, 64, 64) and their parameters as `geometry` takes them."""
    return (
        frames[..., None],
        parameters.matrix.astype(np.float32),
        parameters.warp,
        parameters.flip.astype(np.int32),
    )


def _strip_inputs(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows int64 (B, 2) -> whether drawn bool (B,), first and last int32 (B, 1)."""
    rows = rows.astype(np.int32)
    return rows[:, 0] < rows[:, 1], np.ascontiguousarray(rows[:, :1]), np.ascontiguousarray(rows[:, 1:])


def gpu_inputs(sizes: np.ndarray, parameters: ClipParameters) -> tuple[np.ndarray, ...]:
    """Sizes int64 (B, T) of compressed chunks and the parameters of the clips as `gpu_clips` takes them."""
    boxes = _BOXES[parameters.kernel]
    return (
        sizes.astype(np.int32),
        parameters.matrix.astype(np.float32),
        parameters.warp,
        parameters.flip.astype(np.int32),
        *_strip_inputs(parameters.dilate_rows),
        np.ascontiguousarray(boxes[:, 0]),
        np.ascontiguousarray(boxes[:, 1]),
        *_strip_inputs(parameters.blur_rows),
    )


# --- the engine -------------------------------------------------------------------------------------------------------


class _Source:
    """What DALI asks for the next inputs. Ends at the first failure, which the engine raises once its step is due."""

    def __init__(self, plan: Plan, step: int) -> None:
        self._plan = plan
        self.step = step
        """The step that is read next."""
        self.failure: Exception | None = None
        self.pending: deque[tuple[Any, Sequence[Clip]]] = deque()
        """Steps that DALI has not yet returned, oldest first."""
        self._lent: deque[tuple] = deque(maxlen=_IN_FLIGHT + 2)
        """Inputs that DALI reads without a copy (no_copy=True), kept alive until it has."""

    def __call__(self) -> tuple:
        try:
            selection = self._plan.select(self.step)
            clips = self._plan.clips(selection)
            inputs = self._inputs(clips)
        except Exception as error:
            self.failure = error
            raise StopIteration from None
        self.pending.append((selection, clips))
        self.step += 1
        self._lent.append(inputs)
        return inputs

    def _inputs(self, clips: Sequence[Clip]) -> tuple:
        """The external inputs of a batch, in the order of the graph; a CPU's and a GPU's differ."""
        raise NotImplementedError


class _CpuSource(_Source):
    def __init__(self, dataset: PackedDataset, plan: Plan, step: int) -> None:
        super().__init__(plan, step)
        self._dataset = dataset

    def _inputs(self, clips: Sequence[Clip]) -> tuple:
        wanted = {id(clip.frames): clip.frames for clip in clips}  # clips of the same frames are read once
        frames = self._dataset.frames(np.concatenate([frames.ravel() for frames in wanted.values()]))
        parts = np.split(frames, np.cumsum([frames.size for frames in wanted.values()])[:-1])
        read = {key: part.reshape(*wanted[key].shape, SIZE, SIZE) for key, part in zip(wanted, parts)}
        return tuple(chain.from_iterable(cpu_inputs(read[id(clip.frames)], clip.parameters) for clip in clips))


class _GpuSource(_Source):
    """The inputs but for the compressed bytes, which `chunks` gives to the graph's other source, step by step."""

    def __init__(self, store: MappedChunks | DeviceChunks, plan: Plan, step: int) -> None:
        super().__init__(plan, step)
        self._store = store
        self._chunks: deque[list] = deque()
        self._rest: deque[tuple] = deque()

    def chunks(self) -> tuple:
        """Per clip of the next step, the compressed bytes of each sample."""
        if not self._chunks:
            self._rest.append(super().__call__())
        return tuple(self._chunks.popleft())

    def __call__(self) -> tuple:
        """What `gpu_inputs` gives. DALI may ask for either part of a step first."""
        return self._rest.popleft() if self._rest else super().__call__()

    def _inputs(self, clips: Sequence[Clip]) -> tuple:
        read = {id(clip.frames): self._read(clip.frames) for clip in clips}
        self._chunks.append([read[id(clip.frames)][0] for clip in clips])
        return tuple(chain.from_iterable(gpu_inputs(read[id(clip.frames)][1], clip.parameters) for clip in clips))

    def _read(self, frames: np.ndarray) -> tuple[list[torch.Tensor], np.ndarray]:
        """Frames int64 (B, T) -> the compressed bytes of each sample, and the sizes of their chunks, int64 (B, T)."""
        data, size = self._store.gather(frames.ravel())
        size = size.reshape(frames.shape)
        return list(data.split(size.sum(axis=1).tolist())), size


def _owned(output, device: torch.device) -> torch.Tensor:
    """A batch of clips (T, H, W, 1) in DALI's memory -> uint8 (B, T, H, W) in memory of its own."""
    dense = output.as_tensor()
    clips = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
    feed_ndarray(dense, clips, cuda_stream=torch.cuda.current_stream(device) if device.type == "cuda" else None)
    return clips.squeeze(-1)


def batches(
    dataset: PackedDataset,
    store: MappedChunks | DeviceChunks,
    plan: Plan,
    device: torch.device,
    step: int,
    threads: int,
) -> Iterator[Any]:
    """Batches from `step` on, for ever. Everything of DALI's lives and dies in the thread that advances this.

    On a GPU, which reads the `store`, copies are made on a stream of this iterator's own: a batch comes with an event
    behind which it is complete, and nothing waits for it here.
    """
    gpu = device.type == "cuda"
    options = {
        "batch_size": plan.size,
        "num_threads": threads,
        "device_id": device.index if gpu else None,
        "prefetch_queue_depth": _IN_FLIGHT,
    }
    if gpu:
        source: _Source = _GpuSource(store, plan, step)
        pipeline = gpu_clips(source, source.chunks, plan.widths, store.on_device, **options)
    else:
        source = _CpuSource(dataset, plan, step)
        pipeline = cpu_clips(source, plan.widths, **options)
    stream = torch.cuda.Stream(device) if gpu else None
    with torch.cuda.stream(stream):
        while True:
            due = source.pending[0][0].step if source.pending else source.step
            try:
                outputs = pipeline.run(stream) if gpu else pipeline.run()
            except StopIteration:
                raise located(source.failure, due) from source.failure
            except Exception as error:
                raise located(error, due) from error
            tensors = [_owned(output, device) for output in outputs]
            selection, clips = source.pending.popleft()
            if not gpu:
                for tensor, clip in zip(tensors, clips):
                    part_ops.apply(tensor, clip.parameters)
            batch = plan.batch(selection, tensors)
            yield batch, stream.record_event() if gpu else None
