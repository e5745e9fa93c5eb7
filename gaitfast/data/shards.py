"""Shards and index of a packed dataset: safetensors files, written in one pass and read through a memory map.

A shard holds `frames` (LZ4 chunks back to back, zero-padded to 8 bytes), `offsets` int64 (frames + 1) into it and `crc`
uint32 (frames), the CRC-32 of each chunk. The header is parsed here, strictly, because a map needs byte positions and
because the bytes may be foreign (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from pathlib import Path

import numpy as np

from gaitfast.config import UserError
from gaitfast.data import codec

_DTYPES = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 1 << 20
_REMEDY = "copy the dataset again, or prepare it again"
_SHARD_HEADER = 512  # fixed, so that the frames can be streamed behind it before their number is known


def checksum(path: Path) -> str:
    """BLAKE2b-256 of a file, as hex."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=32)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _header(tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], length: int = 0) -> bytes:
    """Eight bytes of length and the JSON header, padded with spaces to `length` bytes in all or to a multiple of 8."""
    entries, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = position + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = length - 8 if length else -(-len(text) // 8) * 8
    assert len(text) <= padded
    return padded.to_bytes(8, "little") + text.ljust(padded)


def write_text(path: Path, text: str) -> None:
    """A small UTF-8 file, synced."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of `tensors` (uint8, int32, uint32, int64), synced. Wider types first keep all aligned."""
    with open(path, "wb") as file:
        file.write(_header({name: (array.dtype, array.shape) for name, array in tensors.items()}))
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read-only views into a memory-mapped safetensors file. UserError if it is missing or malformed."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise UserError(f"{path}: truncated: {size} bytes hold no safetensors header; {_REMEDY}")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); {_REMEDY}") from None
    length = int.from_bytes(mapping[:8], "little")
    if length > min(_HEADER_LIMIT, size - 8):
        raise UserError(f"{path}: the safetensors header claims {length} bytes of a file of {size}; {_REMEDY}")
    try:
        entries = json.loads(mapping[8 : 8 + length])
        return _views(mapping, 8 + length, size, entries)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"{path}: bad safetensors header ({error}); {_REMEDY}") from None


def _views(mapping: mmap.mmap, data: int, size: int, entries: dict) -> dict[str, np.ndarray]:
    views, position = {}, 0
    entries.pop("__metadata__", None)
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n <= size for n in [*shape, begin, end]) or len(shape) != 1:
            raise ValueError(f"{name}: shape {shape} at {begin}..{end}")
        if begin != position or end - begin != shape[0] * dtype.itemsize or data + end > size:
            raise ValueError(f"{name}: {shape} {dtype} does not fit {begin}..{end}")
        if (data + begin) % dtype.itemsize:
            raise ValueError(f"{name}: not aligned")
        views[name] = np.frombuffer(mapping, dtype, shape[0], data + begin)
        position = end
    if data + position != size:
        raise ValueError(f"{size - data - position} bytes too many")
    return views


class ShardWriter:
    """Streams sequences into one shard. `close` makes it complete and durable; until then the file is unreadable."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self._file.write(bytes(_SHARD_HEADER))
        self._sizes: list[np.ndarray] = []
        self._sums: list[np.ndarray] = []
        self.num_frames = 0

    def append(self, frames: np.ndarray) -> None:
        """Add uint8 frames (T, 64, 64)."""
        chunks = [codec.compress(frame) for frame in frames]
        self._file.write(b"".join(chunks))
        self._sizes.append(np.array([len(c) for c in chunks], np.int64))
        self._sums.append(np.array([zlib.crc32(c) for c in chunks], np.uint32))
        self.num_frames += len(chunks)

    def close(self) -> None:
        offsets = np.zeros(self.num_frames + 1, np.int64)
        if self._sizes:
            np.cumsum(np.concatenate(self._sizes), out=offsets[1:])
        sums = np.concatenate(self._sums) if self._sums else np.zeros(0, np.uint32)
        padding = -int(offsets[-1]) % 8
        with self._file as file:
            file.write(bytes(padding) + offsets.tobytes() + sums.tobytes())
            tensors = {
                "frames": (_DTYPES["U8"], (int(offsets[-1]) + padding,)),
                "offsets": (offsets.dtype, offsets.shape),
                "crc": (sums.dtype, sums.shape),
            }
            file.seek(0)
            file.write(_header(tensors, _SHARD_HEADER))
            file.flush()
            os.fsync(file.fileno())

    def abort(self) -> None:
        self._file.close()


class Shard:
    """One mapped shard: `num_frames` frames, addressed 0..num_frames-1."""

    def __init__(self, path: Path, num_frames: int, backend: str = "auto") -> None:
        tensors = map_tensors(path)
        if set(tensors) != {"frames", "offsets", "crc"}:
            raise UserError(f"{path}: holds {sorted(tensors)}, not a shard's frames, offsets, crc; {_REMEDY}")
        self.data, self.offsets, self.crc = tensors["frames"], tensors["offsets"], tensors["crc"]
        if (
            self.data.dtype != np.uint8
            or self.offsets.dtype != np.int64
            or self.crc.dtype != np.uint32
            or len(self.offsets) != num_frames + 1
            or len(self.crc) != num_frames
        ):
            raise UserError(f"{path}: its index does not hold the {num_frames} frames of dataset.json; {_REMEDY}")
        self._reader = codec.ChunkReader(self.data, backend)

    def locate(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size int64 (n) of the chunks of `frames`, each checked by its CRC. CorruptChunk names the row."""
        offset = self.offsets[frames]
        size = self.offsets[frames + 1] - offset
        bad = np.flatnonzero(self._reader.checksums(offset, size) != self.crc[frames])
        if len(bad):
            raise codec.CorruptChunk(int(bad[0]), "does not match its checksum")
        return offset, size

    def inflate(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (n, 4096) of `frames` int64 (n). CorruptChunk names the row."""
        return self._reader.inflate(*self.locate(frames))
