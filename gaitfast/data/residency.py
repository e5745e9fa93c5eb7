"""Where the compressed frames of a split lie: in mapped files, in memory, on a GPU.

mapped  pages of the files are read when they are used, and the system keeps them while it has the room
host    copied into memory once, page-locked for a GPU: the shards that hold frames of the split
device  copied into the GPU's memory once, checked on the way; on a CPU the same as host

A packed split is small: docs/data.md has the arithmetic for Gait3D and GREW, and says when residency pays.
"""

from __future__ import annotations

import numpy as np
import torch

from gaitfast.config import UserError
from gaitfast.data.packed import PackedDataset

_AT_ONCE = 1 << 16
"""Frames that are checked and copied together."""


class MappedChunks:
    """Compressed frames in memory of the host, whether mapped or held."""

    on_device = False

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset

    def gather(self, numbers: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Frames `numbers` int64 (n) -> their chunks back to back, uint8 (any), and the sizes, int64 (n) on the CPU."""
        data, _, size = self._dataset.chunk_bytes(numbers)
        return torch.from_numpy(data if data.flags.writeable else data.copy()), size


class DeviceChunks:
    """The chunks of `sequences` in the memory of `device`, back to back in the order of their frame numbers."""

    on_device = True

    def __init__(self, dataset: PackedDataset, sequences: np.ndarray, device: torch.device) -> None:
        wanted = np.zeros(dataset.num_sequences, bool)
        wanted[sequences] = True
        own = np.repeat(wanted, np.diff(dataset.starts))  # of each frame of the dataset, whether it is kept
        numbers = np.flatnonzero(own)
        self._place = np.cumsum(own) - own  # of a frame that is kept: its place among those
        self._device, mapped = device, MappedChunks(dataset)
        sizes, pieces = np.empty(len(numbers), np.int64), []
        try:
            for begin in range(0, len(numbers), _AT_ONCE):
                part = slice(begin, begin + _AT_ONCE)
                chunks, sizes[part] = mapped.gather(numbers[part])
                pieces.append(chunks.to(device))
            self._bytes = torch.cat(pieces)
        except torch.cuda.OutOfMemoryError:
            raise UserError("data.residency: the packed split does not fit the GPU's memory; use host") from None
        self._start = np.concatenate([[0], np.cumsum(sizes)])

    def gather(self, numbers: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """As MappedChunks.gather, but the bytes are on the device; nothing waits for them."""
        place = self._place[numbers]
        start = self._start[place]
        size = self._start[place + 1] - start
        total = int(size.sum())
        # Byte j of the result comes from j + (where its chunk starts here - where it starts in the result).
        table = torch.from_numpy(np.stack([start - (np.cumsum(size) - size), size]))
        if self._device.type == "cuda":
            table = table.pin_memory()
        shift, repeats = table.to(self._device, non_blocking=True)
        index = torch.repeat_interleave(shift, repeats, output_size=total)
        index += torch.arange(total, device=self._device)
        return self._bytes[index], size


def settle(
    dataset: PackedDataset, sequences: np.ndarray, residency: str, device: torch.device
) -> MappedChunks | DeviceChunks:
    """Bring what a loader of `sequences` int64 (n) reads to where `residency` says. UserError if there is no room, or
    if a frame is corrupt that goes to a GPU."""
    if residency == "device" and device.type == "cuda":
        return DeviceChunks(dataset, sequences, device)
    if residency != "mapped":
        dataset.hold(sequences, pinned=device.type == "cuda")
    return MappedChunks(dataset)
