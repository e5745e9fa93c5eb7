"""Whole sequences of a dataset through a model: one feature (C, P) each, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from gaitfast.config import UserError

CUT = slice(10, 54)
"""Columns of a 64-pixel frame that a model sees: OpenGait's cut of 10 on each side."""
Batch = tuple[np.ndarray, list[int]]


def embed(
    model: Callable[[torch.Tensor, list[int]], torch.Tensor],
    dataset: Any,
    sequences: Sequence[int] | np.ndarray,
    *,
    frames_limit: int = 720,
    batch_frames: int | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    title: str = "embed",
) -> torch.Tensor:
    """Embed whole sequences: all frames in order, the first `frames_limit` of longer ones (OpenGait's evaluation).

    Sequences are packed one after the other into batches of variable length, so an embedding does not depend on its
    neighbours beyond float rounding. The next batch is decoded while the model works.

    Args:
        model: takes silhouettes float32 (1, sum(lengths), 64, 44) in [0, 1] and lengths, returns (len(lengths), C, P).
            The caller puts it into eval mode, on `device`.
        dataset: a PackedDataset.
        sequences: S sequence numbers.
        batch_frames: frames of a batch; one sequence may exceed it alone. By default 2,000 on a GPU, 250 on a CPU,
            where larger batches only cost memory.
        progress, title: draw a progress bar of that name.
        rank, world_size: with more than one rank each embeds its share, and all call this and get the whole result.

    Returns:
        float32 (S, C, P) on the CPU, in the order of `sequences`.

    Raises:
        UserError: no sequence; NaN or infinity in an embedding, naming the sequence; a corrupt dataset.
    """
    sequences = np.asarray(sequences, np.int64)
    if not len(sequences):
        raise UserError(f"{dataset.path}: no sequence to embed")
    device = torch.device(device)
    if batch_frames is None:
        batch_frames = 250 if device.type == "cpu" else 2000
    # Every rank takes part in the gathering with equally many rows, so the last rounds wrap around.
    rounds = -(-len(sequences) // world_size)
    share = (np.arange(rounds) * world_size + rank) % len(sequences)
    outputs = []
    bar = tqdm(total=rounds, desc=title, unit="seq", disable=None if progress and rank == 0 else True, leave=False)
    with bar, torch.no_grad():
        for frames, lengths in _ahead(_batches(dataset, sequences[share], frames_limit, batch_frames)):
            silhouettes = torch.from_numpy(frames).to(device).float().div_(255.0)[None]
            output = model(silhouettes, lengths)
            assert output.ndim == 3 and len(output) == len(lengths), (
                f"expected {len(lengths)} (C, P), got {output.shape}"
            )
            outputs.append(output.float().cpu())
            bar.update(len(lengths))
    result = torch.cat(outputs)
    if world_size > 1:
        result = _gather(result, device, world_size)[: len(sequences)]
    # Checked after the gathering: then every rank stops, instead of one leaving the others to wait.
    finite = torch.isfinite(result).flatten(1).all(1)
    if not finite.all():
        name = dataset.sequence_name(int(sequences[int((~finite).nonzero()[0])]))
        raise UserError(f"{dataset.path}: the embedding of {name} is not finite; rank in float32, with finite weights")
    return result


def _batches(dataset: Any, sequences: np.ndarray, frames_limit: int, batch_frames: int) -> Iterator[Batch]:
    """Frames uint8 (sum(lengths), 64, 44) and lengths of one batch after the other."""
    starts = np.asarray(dataset.starts)[sequences]
    lengths = np.minimum(np.asarray(dataset.lengths)[sequences], frames_limit)
    first = 0
    while first < len(sequences):
        inside = int(np.searchsorted(np.cumsum(lengths[first : first + batch_frames]), batch_frames, side="right"))
        part = slice(first, first + max(1, inside))
        numbers = np.concatenate([np.arange(s, s + n) for s, n in zip(starts[part], lengths[part])])
        frames = np.ascontiguousarray(dataset.frames(numbers)[:, :, CUT])
        yield frames, lengths[part].tolist()
        first = part.stop


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each read in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = reader.submit(next, batches, None)
            yield batch


def _gather(own: torch.Tensor, device: torch.device, world_size: int) -> torch.Tensor:
    """Row i of rank r becomes row i * world_size + r, on every rank."""
    own = own.to(device)
    rows = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(rows, own)
    return torch.stack(rows, 1).flatten(0, 1).cpu()
