"""The compressed frames of a dataset, where the run wants them: in mapped files, in memory, on a GPU.

mapped  pages of the files are read when they are used, and the system keeps them while it has the room
host    copied into memory once, page-locked where the clips go to a GPU; only shards that hold frames of the split
device  copied into the GPU's memory once, checked on the way; on a CPU the same as host

A packed split is small: docs/data.md has the arithmetic for Gait3D and GREW, and says when residency pays.
"""

from __future__ import annotations

import re
import warnings

import numpy as np
import torch

from gaitfast.config import UserError
from gaitfast.data import codec
from gaitfast.data.packed import PackedDataset


def compiled() -> bool:
    """Whether the compiled operators are there (torch.ops.gaitfast.augment_clips and gather_chunks)."""
    return codec.compiled() and hasattr(torch.ops.gaitfast, "augment_clips")


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():  # the mapping is read-only, and so is every use of this tensor
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class ChunkStore:
    """Frames by global number, compressed. Without the compiled operators it only gathers, and only what is mapped."""

    def __init__(
        self,
        dataset: PackedDataset,
        sequences: np.ndarray,
        residency: str = "mapped",
        device: torch.device | None = None,
    ) -> None:
        """`sequences` int64 (n): those that will be asked for; `device`: where the clips are made. UserError if the
        memory does not suffice, or if a frame is corrupt that goes to a GPU."""
        assert residency in ("mapped", "host", "device")
        self.dataset, self._on_device, self._shards = dataset, None, None
        if not compiled():
            if residency != "mapped":
                raise UserError(
                    f"data.residency: {residency} needs the compiled extension; run `make setup`, or use mapped"
                )
            return
        cuda = device is not None and device.type == "cuda"
        shards = dataset.shards()
        first = np.array(dataset.first_frame, np.int64)
        frames = [_tensor(shard.data) for shard in shards]
        offsets, sums = ([_tensor(getattr(shard, name)) for shard in shards] for name in ("offsets", "crc"))
        if residency != "mapped":
            used = np.unique(np.searchsorted(first, dataset.starts[sequences], side="right") - 1)
            bytes_ = sum(frames[k].numel() for k in used)
            try:
                for k in used:
                    frames[k], offsets[k], sums[k] = (t[k].clone() for t in (frames, offsets, sums))
                    if cuda and residency == "host":
                        frames[k] = frames[k].pin_memory()
            except (RuntimeError, MemoryError) as error:
                raise UserError(
                    f"data.residency: {residency} needs {bytes_ / 2**30:.1f} GiB of memory ({error}); use mapped"
                ) from None
        self._shards = frames, offsets, sums, torch.from_numpy(first)
        if residency == "device" and cuda:
            self._on_device, self._shards = _DeviceChunks(self, sequences, device), None

    @property
    def on_device(self) -> bool:
        """Whether `gather` gives memory of the GPU."""
        return self._on_device is not None

    def augment(self, numbers: np.ndarray, width: int, threads: int, **parameters: torch.Tensor) -> torch.Tensor:
        """Frames `numbers` int64 (B, T) -> uint8 (B, T, 64, width) on the CPU. `parameters`: see csrc/library.cpp."""
        numbers = torch.from_numpy(np.ascontiguousarray(numbers))
        return self._located(torch.ops.gaitfast.augment_clips, numbers, width, **parameters, threads=threads)

    def gather(self, numbers: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Frames `numbers` int64 (n) -> their chunks back to back, uint8 (any), and the sizes, int64 (n) on the CPU."""
        if self._on_device is not None:
            return self._on_device.gather(numbers)
        if self._shards is None:
            chunks, _, sizes = self.dataset.chunk_bytes(numbers)
            return _tensor(chunks), sizes
        chunks, sizes = self._located(torch.ops.gaitfast.gather_chunks, torch.from_numpy(np.ascontiguousarray(numbers)))
        return chunks, sizes.numpy()

    def _located(self, operator, *arguments, **options):
        """`operator` on the shards. UserError names dataset, sequence and frame of a corrupt chunk."""
        try:
            return operator(*self._shards, *arguments, **options)
        except RuntimeError as error:
            found = re.search(r"frame (\d+): (.*)", str(error))
            if found is None:
                raise
            raise UserError(self.dataset.complaint(int(found.group(1)), found.group(2))) from None


class _DeviceChunks:
    """All chunks of the sequences in a GPU's memory, back to back in the order of their frame numbers."""

    _AT_ONCE = 1 << 16  # frames that are checked and copied together

    def __init__(self, store: ChunkStore, sequences: np.ndarray, device: torch.device) -> None:
        starts = store.dataset.starts
        wanted = np.zeros(len(starts) - 1, bool)
        wanted[sequences] = True
        own = np.repeat(wanted, np.diff(starts))  # of each frame of the dataset, whether it is kept
        numbers = np.flatnonzero(own)
        self._place = np.cumsum(own) - own  # of a frame that is kept: its place among those
        sizes = np.empty(len(numbers), np.int64)
        pieces = []
        try:
            for begin in range(0, len(numbers), self._AT_ONCE):
                part = slice(begin, begin + self._AT_ONCE)
                chunks, sizes[part] = store.gather(numbers[part])
                pieces.append(chunks.to(device))
            self._bytes = torch.cat(pieces)
        except torch.cuda.OutOfMemoryError:
            raise UserError("data.residency: the packed split does not fit the GPU's memory; use host") from None
        self._start = np.concatenate([[0], np.cumsum(sizes)])
        self._device = device

    def gather(self, numbers: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        place = self._place[numbers]
        start = self._start[place]
        size = self._start[place + 1] - start
        total = int(size.sum())
        # Byte j of the result comes from j + (where its chunk starts here - where it starts in the result).
        shift = torch.from_numpy(np.stack([start - (np.cumsum(size) - size), size])).pin_memory()
        shift, repeats = shift.to(self._device, non_blocking=True)
        index = torch.repeat_interleave(shift, repeats, output_size=total)
        index += torch.arange(total, device=self._device)
        return self._bytes[index], size
