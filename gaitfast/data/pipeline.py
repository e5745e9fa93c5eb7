"""Batches for pretraining through NVIDIA DALI, on a GPU or on the CPU: s_E and s_G of each sequence in one pipeline.

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
from collections.abc import Iterator

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
import torch
from nvidia.dali import pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from gaitfast.config import DataConfig, UserError
from gaitfast.data import part_ops
from gaitfast.data.augment import KERNELS, SIZE, WIDTH_E, WIDTH_G, ClipParameters, draw_pair
from gaitfast.data.batch import PretrainBatch
from gaitfast.data.packed import PackedDataset
from gaitfast.data.prefetch import Prefetcher
from gaitfast.data.sampling import Sampler, Selection

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
def cpu_pair(source, widths: tuple[int, int]):
    """s_E and s_G after the geometric augmentations. `source` yields what `cpu_inputs` gives for both."""
    inputs = fn.external_source(source, num_outputs=8, layout=["FHWC", "", "", ""] * 2, no_copy=True)
    return tuple(geometry(*inputs[4 * k : 4 * k + 4], width) for k, width in enumerate(widths))


@pipeline_def(enable_conditionals=True)
def gpu_pair(source, widths: tuple[int, int]):
    """s_E and s_G, decoded and augmented. `source` yields what `gpu_inputs` gives for both."""
    inputs = fn.external_source(source, num_outputs=26)
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
    """Compressed chunks (PackedDataset.chunk_bytes of B x `frames` frames) and parameters as `gpu_pair` takes them."""
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

    def __init__(self, dataset: PackedDataset, config: DataConfig, select: Sampler, seed: int, step: int, gpu: bool):
        self._dataset, self._config, self._select, self._seed, self._gpu = dataset, config, select, seed, gpu
        self.step = step
        """The step that is read next."""
        self.failure: Exception | None = None
        self.pending: deque[tuple[Selection, tuple[ClipParameters, ClipParameters]]] = deque()
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
        selection = self._select(step)
        same = self._config.same_clip
        pair = draw_pair(self._config.augment, seed=self._seed, step=step, sample=selection.sample, same_clip=same)
        if self._gpu:
            count = self._config.frames
            chunks_e = self._dataset.chunk_bytes(selection.frames_e.ravel())
            chunks_g = chunks_e if same else self._dataset.chunk_bytes(selection.frames_g.ravel())
            inputs = (*gpu_inputs(chunks_e, pair[0], count), *gpu_inputs(chunks_g, pair[1], count))
        else:
            wanted = (selection.frames_e,) if same else (selection.frames_e, selection.frames_g)
            frames = self._dataset.frames(np.concatenate([w.ravel() for w in wanted]))
            frames = frames.reshape(len(wanted), *selection.frames_e.shape, SIZE, SIZE)
            inputs = (*cpu_inputs(frames[0], pair[0]), *cpu_inputs(frames[-1], pair[1]))
        self.pending.append((selection, pair))
        return inputs


def _owned(output, device: torch.device) -> torch.Tensor:
    """A batch of clips (T, H, W, 1) in DALI's memory -> uint8 (B, T, H, W) in memory of its own."""
    dense = output.as_tensor()
    clips = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
    feed_ndarray(dense, clips, cuda_stream=torch.cuda.current_stream(device) if device.type == "cuda" else None)
    return clips.squeeze(-1)


def _batches(source: _Source, device: torch.device, batch: int, threads: int) -> Iterator[PretrainBatch]:
    """Runs DALI over `source` for ever. Everything of DALI's lives and dies in the thread that advances this."""
    gpu = device.type == "cuda"
    pipeline = (gpu_pair if gpu else cpu_pair)(
        source,
        (WIDTH_E, WIDTH_G),
        batch_size=batch,
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
            clips = [_owned(output, device) for output in outputs]
            if stream is not None:
                stream.synchronize()
            selection, pair = source.pending.popleft()
            if not gpu:
                for clip, parameters in zip(clips, pair):
                    part_ops.apply(clip, parameters)
            yield PretrainBatch(selection.step, torch.from_numpy(selection.sequence), *clips)


def _located(error: Exception, step: int) -> Exception:
    if isinstance(error, UserError):
        return UserError(f"{error} (read for step {step})")
    return RuntimeError(f"reading the batch of step {step} failed: {error!r}")


class PretrainLoader:
    """Infinite iterator of PretrainBatch from `start_step` on, prepared `config.prefetch` batches ahead."""

    def __init__(self, batches: Iterator[PretrainBatch], prefetch: int) -> None:
        self._ahead = Prefetcher(batches, prefetch)

    def __iter__(self) -> PretrainLoader:
        return self

    def __next__(self) -> PretrainBatch:
        batch = next(self._ahead)
        for clip in (batch.clip_e, batch.clip_g):
            if clip.is_cuda:  # allocated on the loader's stream: its memory must outlive this stream's use of it
                clip.record_stream(torch.cuda.current_stream(clip.device))
        return batch

    def close(self) -> None:
        """Ends the background thread. Further requests end the iteration."""
        self._ahead.close()


def build_loader(
    dataset: PackedDataset,
    config: DataConfig,
    *,
    sampling: tuple[str, int] = ("unordered", 0),
    seed: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    start_step: int = 0,
) -> PretrainLoader:
    """The loader of one rank: samples rank * B .. (rank + 1) * B - 1 of the global `batch`, B = batch // world_size.

    `sampling`: the rule of the backbone in use for s_G, which config.sampler overrides unless it is "auto".
    UserError if the split is empty or the batch does not divide. A corrupt frame is a UserError from the iterator, once
    its step is due, that names dataset, sequence and step; steps before it are delivered.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    select = Sampler(
        dataset.starts,
        dataset.split(config.split),
        config,
        sampling=sampling,
        seed=seed,
        batch=batch,
        rank=rank,
        world_size=world_size,
    )
    source = _Source(dataset, config, select, seed, start_step, device.type == "cuda")
    threads = config.threads or min(len(os.sched_getaffinity(0)), 16)
    return PretrainLoader(_batches(source, device, batch // world_size, threads), config.prefetch)
