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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gaitfast.config import UserError
from gaitfast.data import codec

if TYPE_CHECKING:
    import torch

_DTYPES = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 1 << 20
_REMEDY = "copy the dataset again, or prepare it again"
_CHANGED = "was changed while it was in use; let whatever writes it finish, then run the same command again"
_LOOK_EVERY = 1.0
"""Seconds between two looks at whether the files are still the ones that were opened."""
_CHECKSUM, _BLOCK, _UNREADABLE = 1, 2, 3  # csrc/cpu/shards.cpp
_REASONS = {_CHECKSUM: "does not match its checksum", _BLOCK: "is not an LZ4 block of one frame"}
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
            length = int.from_bytes(file.read(8), "little")
            if length > min(_HEADER_LIMIT, size - 8):
                raise UserError(f"{path}: the safetensors header claims {length} bytes of a file of {size}; {_REMEDY}")
            header = file.read(length)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: emptied in between
        raise UserError(f"{path}: cannot be opened ({getattr(error, 'strerror', error)}); {_REMEDY}") from None
    return _tensors(path, header, mapping, size)


def read_tensors(path: Path, expected: str) -> dict[str, np.ndarray]:
    """A safetensors file of checksum `expected`, read into memory, where no later change reaches it. UserError if it is
    another, missing or malformed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); {_REMEDY}") from None
    if hashlib.blake2b(data, digest_size=32).hexdigest() != expected:
        raise UserError(f"{path}: does not match its checksum in dataset.json; {_REMEDY}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_HEADER_LIMIT, len(data) - 8):
        raise UserError(f"{path}: its {len(data)} bytes hold no whole safetensors header; {_REMEDY}")
    return _tensors(path, data[8 : 8 + length], data, len(data))


def _tensors(path: Path, header: bytes, data: mmap.mmap | bytes, size: int) -> dict[str, np.ndarray]:
    try:
        return _views(data, 8 + len(header), size, json.loads(header))
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"{path}: bad safetensors header ({error}); {_REMEDY}") from None


def _views(mapping: mmap.mmap | bytes, data: int, size: int, entries: dict) -> dict[str, np.ndarray]:
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

    def append(self, chunks: codec.Chunks) -> None:
        """Add compressed frames."""
        self._file.write(chunks.data)
        self._sizes.append(chunks.size)
        self._sums.append(chunks.crc)
        self.num_frames += len(chunks.size)

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
        """Let go of the file, also where the disk refuses what is still buffered."""
        with suppress(OSError):
            self._file.close()


class Shards:
    """Mapped shards, of which any frames are read in one call: frame `number` of `shard`, int64 (n) each.

    Every block is checked by its CRC-32 as it is read. A file that changes or shrinks meanwhile gives an error: the
    compiled reader survives what was cut off, the plain one looks at the sizes before. `counts`: frames of each.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], backend: str = "auto") -> None:
        self._paths = paths
        self._stamps = [_stamp(path) for path in paths]  # before the mapping, so that no change is missed
        self._looked = time.monotonic()
        self._tensors = [_shard_tensors(path, count) for path, count in zip(paths, counts)]
        self.compiled: bool = codec.compiled() if backend == "auto" else backend == "compiled"
        if self.compiled:
            import torch

            with codec.quiet_about_read_only():
                self._mapped = [tuple(map(torch.from_numpy, (d, o, c.view(np.int32)))) for d, o, c in self._tensors]

    def frames(self, shard: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Inflated frames uint8 (n, 4096). CorruptChunk names the row."""
        self._check_unchanged()
        if self.compiled:
            import torch

            frames, problem = torch.ops.gaitfast.read_frames(*self._arguments(shard, number), codec.FRAME_BYTES)
            self._raise(problem, shard)
            return frames.numpy()
        frames = np.empty((len(number), codec.FRAME_BYTES), np.uint8)
        for which, rows in _groups(shard):
            with _row_of(rows):
                offset, size = self._locate(which, number[rows])
                frames[rows] = codec.ChunkReader(self._tensors[which][0], "plain").inflate(offset, size)
        return frames

    def chunks(self, shard: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks as they are: bytes uint8 (back to back) and size int64 (n). CorruptChunk names the row."""
        self._check_unchanged()
        if self.compiled:
            import torch

            data, size, problem = torch.ops.gaitfast.read_chunks(*self._arguments(shard, number))
            self._raise(problem, shard)
            return data.numpy(), size.numpy()
        sizes = np.empty(len(number), np.int64)
        pieces: list = [b""] * len(number)
        for which, rows in _groups(shard):
            with _row_of(rows):
                offset, sizes[rows] = self._locate(which, number[rows])
            data = memoryview(self._tensors[which][0])
            for row, begin in zip(rows.tolist(), offset.tolist()):
                pieces[row] = data[begin : begin + int(sizes[row])]
        return np.frombuffer(b"".join(pieces), np.uint8), sizes

    def clips(self, shard: np.ndarray, number: np.ndarray, **options: Any) -> torch.Tensor:
        """The frames augmented, uint8 (B, T, 64, width); `options` are augment_clips'. CorruptChunk names the row."""
        import torch

        self._check_unchanged()
        clips, problem = torch.ops.gaitfast.augment_clips(*self._arguments(shard, number), **options)
        self._raise(problem, shard)
        return clips

    def hold(self, used: np.ndarray, pinned: bool) -> None:
        """Read shards `used` int64 (n) from copies in memory from now on. UserError if that does not suffice."""
        if not self.compiled:
            return
        try:
            for which in used.tolist():
                data, *index = (tensor.clone() for tensor in self._mapped[which])
                self._mapped[which] = (data.pin_memory() if pinned else data, *index)
        except (RuntimeError, MemoryError) as error:
            size = sum(self._tensors[which][0].nbytes for which in used.tolist())
            raise UserError(
                f"data.residency: {self._paths[0].parent} needs {size / 2**30:.1f} GiB of memory ({error}); use mapped"
            ) from None

    def _arguments(self, shard: np.ndarray, number: np.ndarray) -> tuple:
        """What the compiled readers take: the shards that are asked for, and each row's place among them."""
        import torch

        used = np.flatnonzero(np.bincount(shard, minlength=len(self._mapped)))
        place = np.zeros(len(self._mapped), np.int64)
        place[used] = np.arange(len(used))
        columns = zip(*(self._mapped[which] for which in used.tolist())) if len(used) else ((), (), ())
        rows = torch.from_numpy(place[shard]), torch.from_numpy(np.ascontiguousarray(number))
        return *map(list, columns), *rows

    def _raise(self, problem, shard: np.ndarray) -> None:
        row, kind = problem.tolist()
        if kind == _UNREADABLE:
            raise UserError(
                f"{self._paths[shard[row]]}: cannot be read any more (cut short, or the disk fails); {_REMEDY}"
            )
        if row >= 0:
            raise codec.CorruptChunk(row, _REASONS[kind])

    def _locate(self, which: int, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        data, offsets, crc = self._tensors[which]
        if _stamp(self._paths[which]).bytes != self._stamps[which].bytes:
            raise UserError(f"{self._paths[which]}: {_CHANGED}")
        offset = offsets[number]
        size = offsets[number + 1] - offset
        bad = np.flatnonzero(codec.ChunkReader(data, "plain").checksums(offset, size) != crc[number])
        if len(bad):
            raise codec.CorruptChunk(int(bad[0]), _REASONS[_CHECKSUM])
        return offset, size

    def _check_unchanged(self) -> None:
        """Once a second: other bytes under an old name may still be sound by their own checksums."""
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return
        for path, stamp in zip(self._paths, self._stamps):
            if _stamp(path) != stamp:
                raise UserError(f"{path}: {_CHANGED}")
        self._looked = time.monotonic()


class _Stamp(NamedTuple):
    """Another one means another content."""

    device: int
    inode: int
    bytes: int
    modified: int


def _stamp(path: Path) -> _Stamp:
    try:
        facts = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {_REMEDY}") from None
    return _Stamp(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _shard_tensors(path: Path, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """data, offsets, crc of a shard of `count` frames. UserError if it is none."""
    tensors = map_tensors(path)
    if set(tensors) != {"frames", "offsets", "crc"}:
        raise UserError(f"{path}: holds {sorted(tensors)}, not a shard's frames, offsets, crc; {_REMEDY}")
    data, offsets, crc = tensors["frames"], tensors["offsets"], tensors["crc"]
    typed = data.dtype == np.uint8 and offsets.dtype == np.int64 and crc.dtype == np.uint32
    if not typed or len(offsets) != count + 1 or len(crc) != count:
        raise UserError(f"{path}: its index does not hold the {count} frames of dataset.json; {_REMEDY}")
    return data, offsets, crc


def _groups(shard: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(shard, its rows)."""
    order = np.argsort(shard, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
        if len(rows):
            yield int(shard[rows[0]]), rows


@contextmanager
def _row_of(rows: np.ndarray) -> Iterator[None]:
    """A CorruptChunk of one shard's rows becomes one of the whole request's."""
    try:
        yield
    except codec.CorruptChunk as error:
        raise codec.CorruptChunk(int(rows[error.row]), error.reason) from None
