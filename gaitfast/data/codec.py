"""Frames as independently decodable LZ4 blocks, each with a CRC-32: lossless, and any one frame can be read alone.

A frame is compressed with LZ4's high-compression encoder (level 3: on silhouettes within a fifth of the size of level
12 at six times its speed). Decoding goes through torch.ops.gaitfast when the extension is built, else through `lz4`.
The same blocks are what DALI's `decoders.inflate` takes on a GPU.
"""

from __future__ import annotations

import functools
import re
import warnings
import zlib

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


def compress(frame: np.ndarray) -> bytes:
    """One uint8 frame (64, 64) -> an LZ4 block without size header."""
    assert frame.dtype == np.uint8 and frame.shape == FRAME_SHAPE
    return lz4.block.compress(
        np.ascontiguousarray(frame), mode="high_compression", compression=3, store_size=False, return_bytearray=False
    )


@functools.cache
def compiled() -> bool:
    """Whether the compiled decoder is there (torch.ops.gaitfast.inflate_frames)."""
    try:
        import torch

        import gaitfast._C  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops.gaitfast, "inflate_frames") and hasattr(torch.ops.gaitfast, "chunk_crc32")


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

            with warnings.catch_warnings():  # the mapping is read-only, and so is every use of this tensor
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
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
