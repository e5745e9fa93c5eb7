"""Batches through NVIDIA DALI, on a GPU or on the CPU: all clips of a step in one pipeline.

Pretraining has two clips of each sequence, s_E and s_G; supervised training has one (plan.py).

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

import os
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

from gaitfast.config import ClipConfig, DataConfig, UserError
from gaitfast.data import part_ops
from gaitfast.data.augment import KERNELS, SIZE, ClipParameters
from gaitfast.data.batch import PretrainBatch, RecognitionBatch
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import Clip, Plan, make_plan
from gaitfast.data.prefetch import Prefetcher

Batch = PretrainBatch | RecognitionBatch
_IN_FLIGHT = 2
"""Batches within DALI: one is computed while the next is read."""
_BOXES = np.array([kernel.boxes for kernel in KERNELS], np.int32)
_BLUR = np.outer((1, 2, 1), (1, 2, 1)).astype(np.float32) / 16
_BLUR_THRESHOLD = 51.0
"""0.2 of full scale."""


# --- the pipeline -----------------------------------------------------------------------------------------------------


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
    """Compressed chunks of a clip, one per frame and back to back -> FHWC uint8 (T, 64, 64, 1) on the GPU."""
    return fn.decoders.inflate(chunks.gpu(), chunk_sizes=sizes, shape=(SIZE, SIZE, 1), layout="HWC", algorithm="LZ4")


@pipeline_def(enable_conditionals=True)
def cpu_clips(source, widths: tuple[int, ...]):
    """The clips of a step after the geometric augmentations. `source` yields what `cpu_inputs` gives for each."""
    layout = ["FHWC", "", "", ""] * len(widths)
    inputs = fn.external_source(source, num_outputs=4 * len(widths), layout=layout, no_copy=True)
    return tuple(geometry(*inputs[4 * k : 4 * k + 4], width) for k, width in enumerate(widths))


@pipeline_def(enable_conditionals=True)
def gpu_clips(source, widths: tuple[int, ...]):
    """The clips of a step, decoded and augmented. `source` yields what `gpu_inputs` gives for each."""
    inputs = fn.external_source(source, num_outputs=13 * len(widths))
    clips = []
    for k, width in enumerate(widths):
        chunks, sizes, *rest = inputs[13 * k : 13 * k + 13]
        clip = geometry(inflate(chunks, sizes), *rest[:3], width)
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


def gpu_inputs(chunks: tuple[np.ndarray, ...], parameters: ClipParameters, frames: int) -> tuple:
    """Compressed chunks (PackedDataset.chunk_bytes of B x `frames` frames) and parameters as `gpu_clips` takes them."""
    data, offset, size = chunks
    first = offset[::frames]
    clips = [data[a:b] for a, b in zip(first, [*first[1:], len(data)])]
    boxes = _BOXES[parameters.kernel]
    return (
        clips,
        size.reshape(-1, frames).astype(np.int32),
        parameters.matrix.astype(np.float32),
        parameters.warp,
        parameters.flip.astype(np.int32),
        *_strip_inputs(parameters.dilate_rows),
        np.ascontiguousarray(boxes[:, 0]),
        np.ascontiguousarray(boxes[:, 1]),
        *_strip_inputs(parameters.blur_rows),
    )


# --- the loader -------------------------------------------------------------------------------------------------------


class _Source:
    """What DALI asks for the next inputs. Ends at the first failure, which the loader raises once its step is due."""

    def __init__(self, dataset: PackedDataset, plan: Plan, step: int, gpu: bool):
        self._dataset, self._plan, self._gpu = dataset, plan, gpu
        self.step = step
        """The step that is read next."""
        self.failure: Exception | None = None
        self.pending: deque[tuple[Any, Sequence[Clip]]] = deque()
        """Steps that DALI has not yet returned, oldest first."""
        self._lent: deque[tuple] = deque(maxlen=_IN_FLIGHT + 2)
        """Inputs that DALI reads without a copy (no_copy=True), kept alive until it has."""

    def __call__(self) -> tuple:
        try:
            inputs = self._read(self.step)
        except Exception as error:
            self.failure = error
            raise StopIteration from None
        self.step += 1
        self._lent.append(inputs)
        return inputs

    def _read(self, step: int) -> tuple:
        selection = self._plan.select(step)
        clips = self._plan.clips(selection)
        wanted = {id(clip.frames): clip.frames for clip in clips}  # clips of the same frames are read once
        if self._gpu:
            read = {key: self._dataset.chunk_bytes(frames.ravel()) for key, frames in wanted.items()}
            inputs = [gpu_inputs(read[id(clip.frames)], clip.parameters, clip.frames.shape[1]) for clip in clips]
        else:
            frames = self._dataset.frames(np.concatenate([frames.ravel() for frames in wanted.values()]))
            parts = np.split(frames, np.cumsum([frames.size for frames in wanted.values()])[:-1])
            read = {key: part.reshape(*wanted[key].shape, SIZE, SIZE) for key, part in zip(wanted, parts)}
            inputs = [cpu_inputs(read[id(clip.frames)], clip.parameters) for clip in clips]
        self.pending.append((selection, clips))
        return tuple(chain.from_iterable(inputs))


def _owned(output, device: torch.device) -> torch.Tensor:
    """A batch of clips (T, H, W, 1) in DALI's memory -> uint8 (B, T, H, W) in memory of its own."""
    dense = output.as_tensor()
    clips = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
    feed_ndarray(dense, clips, cuda_stream=torch.cuda.current_stream(device) if device.type == "cuda" else None)
    return clips.squeeze(-1)


def _batches(source: _Source, plan: Plan, device: torch.device, threads: int) -> Iterator[Batch]:
    """Runs DALI over `source` for ever. Everything of DALI's lives and dies in the thread that advances this."""
    gpu = device.type == "cuda"
    pipeline = (gpu_clips if gpu else cpu_clips)(
        source,
        plan.widths,
        batch_size=plan.size,
        num_threads=threads,
        device_id=device.index if gpu else None,
        prefetch_queue_depth=_IN_FLIGHT,
    )
    # Copies run on a stream of their own and are waited for here, in the background: the step never waits for them.
    stream = torch.cuda.Stream(device) if gpu else None
    with torch.cuda.stream(stream):
        while True:
            due = source.pending[0][0].step if source.pending else source.step
            try:
                outputs = pipeline.run()
            except StopIteration:
                raise _located(source.failure, due) from source.failure
            except Exception as error:
                raise _located(error, due) from error
            tensors = [_owned(output, device) for output in outputs]
            selection, clips = source.pending.popleft()
            if not gpu:
                for tensor, clip in zip(tensors, clips):
                    part_ops.apply(tensor, clip.parameters)
            batch = plan.batch(selection, tensors)
            if stream is not None:
                stream.synchronize()
            yield batch


def _located(error: Exception, step: int) -> Exception:
    if isinstance(error, UserError):
        return UserError(f"{error} (read for step {step})")
    return RuntimeError(f"reading the batch of step {step} failed: {error!r}")


class Loader:
    """Infinite iterator of batches from a step on, prepared `prefetch` ahead."""

    def __init__(self, batches: Iterator[Batch], prefetch: int) -> None:
        self._ahead = Prefetcher(batches, prefetch)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        for name in batch.__slots__:
            value = getattr(batch, name)
            # Allocated on the loader's stream: its memory must outlive this stream's use of it.
            if isinstance(value, torch.Tensor) and value.is_cuda:
                value.record_stream(torch.cuda.current_stream(value.device))
        return batch

    def close(self) -> None:
        """Ends the background thread. Further requests end the iteration."""
        self._ahead.close()


def build_loader(
    dataset: PackedDataset,
    config: DataConfig | ClipConfig,
    *,
    sampling: tuple[str, int] = ("unordered", 0),
    seed: int,
    batch: int | tuple[int, int],
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    start_step: int = 0,
) -> Loader:
    """The loader of one rank: samples rank * B .. (rank + 1) * B - 1 of the global `batch`.

    A DataConfig gives PretrainBatch, with `batch` pairs in all; a ClipConfig gives RecognitionBatch, with `batch` =
    (P, K). `sampling`: the rule of the model in use, which config.sampler overrides unless it is "auto". UserError if
    the split cannot fill a batch or the batch does not divide. A corrupt frame is a UserError from the iterator, once
    its step is due, that names dataset, sequence and step; steps before it are delivered.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    plan = make_plan(dataset, config, sampling=sampling, seed=seed, batch=batch, rank=rank, world_size=world_size)
    source = _Source(dataset, plan, start_step, device.type == "cuda")
    threads = config.threads or min(len(os.sched_getaffinity(0)), 16)
    return Loader(_batches(source, plan, device, threads), config.prefetch)
