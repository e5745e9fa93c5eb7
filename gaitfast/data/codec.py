"""Frames as independently decodable LZ4 blocks, each with a CRC-32: lossless, and any one frame can be read alone.

Both ways go through torch.ops.gaitfast when the extension is built, else through `lz4` (compression: its level 3). The
two encoders write different blocks of the same frames, and either decoder reads both. The same blocks are what DALI's
`decoders.inflate` takes on a GPU.
"""

from __future__ import annotations

import functools
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import lz4.block
import numpy as np

FRAME_SHAPE = (64, 64)
FRAME_BYTES = 64 * 64


class CorruptChunk(Exception):
    """A chunk that is not what was written. `row` is its place in the request."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


class Chunks(NamedTuple):
    """Compressed frames."""

    data: np.ndarray
    """uint8 (any): blocks back to back."""
    size: np.ndarray
    """int64 (n)."""
    crc: np.ndarray
    """uint32 (n)."""


def encoder() -> str:
    """Names what `compress` goes through: equal names give equal bytes."""
    return "gaitfast-1" if compiled() else f"lz4-{lz4.VERSION}-hc3"


def compress(frames: np.ndarray, backend: str = "auto") -> Chunks:
    """Frames uint8 (n, 64, 64), each an LZ4 block without size header. `backend`: "compiled", "plain" or "auto"."""
    assert frames.dtype == np.uint8 and frames.shape[1:] == FRAME_SHAPE and backend in ("auto", "compiled", "plain")
    rows = np.ascontiguousarray(frames).reshape(len(frames), FRAME_BYTES)
    if backend == "compiled" or (backend == "auto" and compiled()):
        import torch

        with quiet_about_read_only():
            found = torch.ops.gaitfast.compress_frames(torch.from_numpy(rows))
        data, size, crc = (tensor.numpy() for tensor in found)
        return Chunks(data, size, crc.astype(np.uint32))
    options = {"mode": "high_compression", "compression": 3, "store_size": False}
    blocks = [lz4.block.compress(row, **options) for row in rows]
    sums = np.array([zlib.crc32(block) for block in blocks], np.uint32)
    return Chunks(np.frombuffer(b"".join(blocks), np.uint8), np.array([len(b) for b in blocks], np.int64), sums)


@contextmanager
def quiet_about_read_only() -> Iterator[None]:
    """For torch.from_numpy of arrays that are read-only, and that nobody will write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        yield


@functools.cache
def compiled() -> bool:
    """Whether the extension is built, with what this part needs of it."""
    try:
        import torch

        import gaitfast._C  # noqa: F401
    except ImportError:
        return False
    operators = ("inflate_frames", "chunk_crc32", "compress_frames", "read_frames", "read_chunks", "augment_clips")
    return all(hasattr(torch.ops.gaitfast, name) for name in operators)


class ChunkReader:
    """Chunks inside one buffer: `checksums` and `inflate` for any offsets and sizes, in any order.

    `data`: uint8 (any), for instance a mapped file; not copied. `backend`: "compiled", "plain" or "auto".
    Both give the same frames; on foreign bytes the compiled one is the stricter (lz4 lets a match of distance 0 pass).
    """

    def __init__(self, data: np.ndarray, backend: str = "auto") -> None:
        assert data.dtype == np.uint8 and data.ndim == 1 and backend in ("auto", "compiled", "plain")
        self.backend = ("compiled" if compiled() else "plain") if backend == "auto" else backend
        assert self.backend == "plain" or compiled(), "the extension is not built"
        self._data = data
        if self.backend == "compiled":
            import torch

            with quiet_about_read_only():
                self._tensor = torch.from_numpy(data)

    def checksums(self, offset: np.ndarray, size: np.ndarray) -> np.ndarray:
        """CRC-32 of each chunk as int64 (n); -1 for a chunk that leaves the buffer."""
        if self.backend == "compiled":
            import torch

            sums = torch.ops.gaitfast.chunk_crc32(self._tensor, torch.from_numpy(offset), torch.from_numpy(size))
            return sums.numpy()
        inside = self._inside(offset, size)
        data = memoryview(self._data)
        pairs = zip(offset.tolist(), size.tolist(), inside.tolist())
        return np.array([zlib.crc32(data[o : o + s]) if ok else -1 for o, s, ok in pairs], np.int64)

    def inflate(self, offset: np.ndarray, size: np.ndarray, frame_bytes: int = FRAME_BYTES) -> np.ndarray:
        """Chunks at `offset`, `size` int64 (n) -> uint8 (n, frame_bytes). CorruptChunk names the first bad row."""
        if self.backend == "compiled":
            return self._inflate_compiled(offset, size, frame_bytes)
        inside = self._inside(offset, size)
        data = memoryview(self._data)
        frames = np.empty((len(offset), frame_bytes), np.uint8)
        for row, (o, s) in enumerate(zip(offset.tolist(), size.tolist())):
            try:
                if not inside[row]:
                    raise lz4.block.LZ4BlockError("out of range")
                block = lz4.block.decompress(data[o : o + s], uncompressed_size=frame_bytes)
                if len(block) != frame_bytes:
                    raise lz4.block.LZ4BlockError("too short")
            except lz4.block.LZ4BlockError:
                raise CorruptChunk(row, "is not an LZ4 block of one frame") from None
            frames[row] = np.frombuffer(block, np.uint8)
        return frames

    def _inflate_compiled(self, offset: np.ndarray, size: np.ndarray, frame_bytes: int) -> np.ndarray:
        import torch

        try:
            return torch.ops.gaitfast.inflate_frames(
                self._tensor, torch.from_numpy(offset), torch.from_numpy(size), frame_bytes
            ).numpy()
        except RuntimeError as error:
            row = re.search(r"row (\d+) is not an LZ4 block", str(error))
            if row is None:
                raise
            raise CorruptChunk(int(row.group(1)), "is not an LZ4 block of one frame") from None

    def _inside(self, offset: np.ndarray, size: np.ndarray) -> np.ndarray:
        return (offset >= 0) & (size >= 0) & (size <= len(self._data)) & (offset <= len(self._data) - size)
