"""Batches, prepared ahead of the step that consumes them: who reads, decodes and augments, and where.

Pretraining has two clips of each sequence, s_E and s_G; supervised training has one (plan.py). Two engines carry out a
plan. On a GPU it is NVIDIA DALI (dali.py). On a CPU it is one compiled operator (compiled.py) where the extension is
built, because it was measured to be several times as fast as DALI's operators there, and DALI otherwise (docs/data.md).
Either engine gives the same bytes for any number of threads, ranks, restarts and batches ahead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from gaitfast.config import ClipConfig, DataConfig, UserError
from gaitfast.data import compiled, residency
from gaitfast.data.batch import PretrainBatch, RecognitionBatch
from gaitfast.data.packed import PackedDataset
from gaitfast.data.plan import make_plan
from gaitfast.data.prefetch import Prefetcher

Batch = PretrainBatch | RecognitionBatch


def resolve_engine(engine: str, dataset: PackedDataset, device: torch.device) -> str:
    """data.engine as what it stands for on `device`: "dali" or "compiled". UserError where that cannot run."""
    if engine == "compiled":
        if device.type == "cuda":
            raise UserError("data.engine: compiled works on CPUs; use auto or dali on a GPU")
        if not dataset.compiled:
            raise UserError("data.engine: the compiled extension is not there; run `make setup`, or use dali")
    if engine == "auto":
        return "compiled" if device.type == "cpu" and dataset.compiled else "dali"
    return engine


class Loader:
    """Infinite iterator of batches from a step on, prepared `prefetch` ahead."""

    def __init__(self, batches: Iterator[tuple[Batch, Any]], prefetch: int, name: str) -> None:
        """`batches` come with a CUDA event behind which they are complete, or with None. `name` is for summaries."""
        self.name = name
        self._ahead = Prefetcher(batches, prefetch)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        batch, complete = next(self._ahead)
        if complete is not None:
            for value in (getattr(batch, name) for name in batch.__slots__):
                if isinstance(value, torch.Tensor) and value.is_cuda:
                    stream = torch.cuda.current_stream(value.device)
                    stream.wait_event(complete)  # the stream waits, not the host
                    # Allocated on the loader's stream: its memory must outlive this stream's use of it.
                    value.record_stream(stream)
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
    engine = resolve_engine(config.engine, dataset, device)
    plan = make_plan(dataset, config, sampling=sampling, seed=seed, batch=batch, rank=rank, world_size=world_size)
    if config.residency != "mapped" and not dataset.compiled:
        raise UserError(
            f"data.residency: {config.residency} needs the compiled extension; run `make setup`, or use mapped"
        )
    chunks = residency.settle(dataset, dataset.split(config.split), config.residency, device)
    threads = config.threads or min(len(os.sched_getaffinity(0)), 16)
    if engine == "compiled":
        batches = compiled.batches(dataset, plan, start_step, threads)
    else:
        from gaitfast.data import dali  # a second of import, so only where it works

        batches = dali.batches(dataset, chunks, plan, device, start_step, threads)
    return Loader(batches, config.prefetch, "dali-gpu" if device.type == "cuda" else f"{engine}-cpu")
