"""The dataset on disk: dataset.json, index.safetensors and a few shards of losslessly compressed frames.

dataset.json  format and version, name, protocol, counts, partition, size and BLAKE2b-256 of every other file
index.safetensors
    starts     int64 (N + 1)   frames of sequence i are the global frame numbers starts[i] .. starts[i + 1] - 1
    subject, condition, view   int32 (N) codes into the string tables (OpenGait's id, type, view)
    flags      uint8 (N)       bit 0: TRAIN_SET, bit 1: TEST_SET, bit 2: PROBE_SET
    subjects.offsets int64 (n + 1), subjects.bytes uint8: string table in UTF-8, in sorted order; likewise the others
shard-*.safetensors            consecutive sequences each (gaitfast/data/shards.py)

Sequences are sorted by id, then type, then view, each by Unicode code point. Opening reads the index, checked against
its checksum, and maps the shards; frames are checked chunk by chunk as they are read; `verify` checks everything.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gaitfast.config import UserError
from gaitfast.data import codec, shards

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "gaitfast-packed", 1
TRAIN, TEST, PROBE = 1, 2, 4
SPLITS = ("train", "test", "probe", "gallery", "all")
_TABLES = {"subject": "subjects", "condition": "conditions", "view": "views"}
_INDEX = {
    "starts": np.dtype(np.int64),
    "flags": np.dtype(np.uint8),
    **{key: np.dtype(np.int32) for key in _TABLES},
    **{f"{table}.offsets": np.dtype(np.int64) for table in _TABLES.values()},
    **{f"{table}.bytes": np.dtype(np.uint8) for table in _TABLES.values()},
}


class StringTable(Sequence):
    """Strings packed as UTF-8 bytes and offsets; decoded one at a time, so a million of them open at once."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self._data, self._offsets = data, offsets

    def sound(self) -> bool:
        """Whether the offsets cut the bytes into strings."""
        ends = len(self._offsets) >= 1 and self._offsets[0] == 0 and self._offsets[-1] == len(self._data)
        return bool(ends and (np.diff(self._offsets) >= 0).all())

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, code):
        if isinstance(code, slice):
            return [self[i] for i in range(*code.indices(len(self)))]
        code = range(len(self))[int(code)]  # negative codes count from the end; IndexError beyond
        return self._data[self._offsets[code] : self._offsets[code + 1]].tobytes().decode(errors="replace")

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """Code of `value`, by bisection (code points and UTF-8 bytes sort alike). ValueError if it is not there."""
        stop = len(self) if stop is None else stop
        code = bisect.bisect_left(self, value, start, stop)
        if code < stop and self[code] == value:
            return code
        raise ValueError(f"{value!r} is not in the table")

    def __contains__(self, value: object) -> bool:
        try:
            return isinstance(value, str) and self.index(value) >= 0
        except ValueError:
            return False


class ShardRecord(NamedTuple):
    """What dataset.json says about a file of the dataset."""

    file: str
    bytes: int
    blake2b: str
    sequences: int
    frames: int


class PackedDataset:
    """A mapped packed dataset; see the module for its arrays. Cheap to open, to fork and to pickle (it reopens)."""

    def __init__(self, path: str | Path, *, backend: str = "auto", corrupt: str = "refuse") -> None:
        assert corrupt in ("refuse", "skip")
        self.path, self.corrupt = Path(path), corrupt
        self._instead: dict[int, int] = {}
        text, facts = _read_facts(self.path)
        self.name: str = facts["name"]
        self.protocol: str = facts["protocol"]
        self.facts = facts
        self.fingerprint = hashlib.blake2b(text, digest_size=16).hexdigest()
        self.num_sequences: int = facts["sequences"]
        self.num_frames: int = facts["frames"]
        self._records = [ShardRecord(**record) for record in facts["shards"]]
        self._read_index(ShardRecord(**facts["index"]))
        paths = [self.path / record.file for record in self._records]
        for path, record in zip(paths, self._records):
            _check_size(path, record)
        self._shards = shards.Shards(paths, [record.frames for record in self._records], backend)
        self._first_frame = np.cumsum([0, *(record.frames for record in self._records)])

    @classmethod
    def open(cls, path: str | Path, *, backend: str = "auto", corrupt: str = "refuse") -> PackedDataset:
        """Open the folder `path`. UserError if it is not a packed dataset, or incomplete, or its index is corrupt.

        `backend`: the frame decoder, "compiled", "plain" or "auto". `corrupt`: what becomes of a frame that does not
        match its checksum; "refuse": UserError; "skip": a warning, and the nearest sound frame of its sequence instead.
        """
        return cls(path, backend=backend, corrupt=corrupt)

    def __reduce__(self):
        return functools.partial(PackedDataset, corrupt=self.corrupt), (self.path,)

    def _read_index(self, record: ShardRecord) -> None:
        path = self.path / record.file
        _check_size(path, record)
        tensors = shards.read_tensors(path, record.blake2b)
        wrong = [name for name, dtype in _INDEX.items() if name not in tensors or tensors[name].dtype != dtype]
        if wrong:
            raise UserError(f"{path}: has no array {wrong[0]} of {_INDEX[wrong[0]]}; prepare the dataset again")
        self.starts, self.flags = tensors["starts"], tensors["flags"]
        self.subject, self.condition, self.view = (tensors[key] for key in _TABLES)
        self.subjects, self.conditions, self.views = (
            StringTable(tensors[f"{table}.bytes"], tensors[f"{table}.offsets"]) for table in _TABLES.values()
        )
        self.lengths = np.diff(self.starts)
        codes = ((self.subject, self.subjects), (self.condition, self.conditions), (self.view, self.views))
        sound = (
            len(self.starts) == self.num_sequences + 1
            and self.starts[0] == 0
            and self.starts[-1] == self.num_frames
            and self.lengths.min() >= 1
            and len(self.flags) == self.num_sequences
            and all(table.sound() for _, table in codes)
            and all(len(c) == self.num_sequences and 0 <= c.min() and c.max() < len(table) for c, table in codes)
        )
        if not sound:
            raise UserError(f"{path}: the index contradicts itself or dataset.json; prepare the dataset again")

    def sequence_name(self, i: int) -> str:
        """`id-type-view`, as OpenGait's PROBE_SET writes it."""
        return f"{self.subjects[self.subject[i]]}-{self.conditions[self.condition[i]]}-{self.views[self.view[i]]}"

    @property
    def has_partition(self) -> bool:
        return self.facts["partition"] is not None

    def split(self, name: str) -> np.ndarray:
        """Sequence numbers int64, ascending. `train`: TRAIN_SET, or every sequence where the dataset has no partition;
        `test`: TEST_SET; `probe`: its PROBE_SET sequences; `gallery`: the rest of it; `all`. UserError if unknown, or
        if the dataset has no partition to take it from."""
        if name not in SPLITS:
            raise UserError(f"split {name}: unknown; choose one of {', '.join(SPLITS)}")
        if name == "all" or (name == "train" and not self.has_partition):
            return np.arange(self.num_sequences)
        if not self.has_partition:
            raise UserError(
                f"{self.path}: has no partition, so no {name} split; run `gaitfast prepare` again with --partition FILE"
            )
        test, probe = (self.flags & TEST) > 0, (self.flags & PROBE) > 0
        chosen = {"train": (self.flags & TRAIN) > 0, "test": test, "probe": test & probe, "gallery": test & ~probe}
        return np.flatnonzero(chosen[name])

    def sequence(self, i: int) -> np.ndarray:
        """All frames of sequence i, uint8 (T, 64, 64)."""
        return self.frames(np.arange(self.starts[i], self.starts[i + 1]))

    def frames(self, numbers: np.ndarray) -> np.ndarray:
        """Decode frames by global number int64 (n) -> uint8 (n, 64, 64). UserError names a corrupt frame, unless
        `corrupt` says to skip it."""
        return self._read(numbers, self._shards.frames).reshape(-1, *codec.FRAME_SHAPE)

    def chunk_bytes(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The compressed chunks of frames `numbers` int64 (n), for a decoder on the device.

        Returns bytes uint8 (chunks back to back), and offset and size int64 (n) into them. Checked against their
        checksums: UserError names a corrupt frame, unless `corrupt` says to skip it.
        """
        data, size = self._read(numbers, self._shards.chunks)
        return data, np.cumsum(size) - size, size

    def clips(self, numbers: np.ndarray, width: int, threads: int, **parameters: torch.Tensor) -> torch.Tensor:
        """Frames `numbers` int64 (B, T), decoded and augmented: uint8 (B, T, 64, width). Needs the compiled operators;
        where a frame is corrupt, as `frames`. `parameters`: augment_clips in csrc/library.cpp."""
        return self._read(
            numbers.ravel(), functools.partial(self._shards.clips, width=width, threads=threads, **parameters)
        )

    @property
    def compiled(self) -> bool:
        """Whether the compiled operators read this dataset, so that `clips` can be had."""
        return self._shards.compiled

    def hold(self, sequences: np.ndarray, *, pinned: bool = False) -> None:
        """From now on read the shards that hold frames of `sequences` int64 (n) from memory, page-locked if `pinned`.

        UserError if there is too little of it. Does nothing without the compiled operators.
        """
        used = np.unique(np.searchsorted(self._first_frame, self.starts[sequences], side="right") - 1)
        self._shards.hold(used, pinned)

    def _read(self, numbers: np.ndarray, read: Callable[[np.ndarray, np.ndarray], Any]) -> Any:
        """`read(shard, number within it)` of frames by global number."""
        numbers = np.asarray(numbers, np.int64)
        assert numbers.ndim == 1
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.num_frames):
            raise IndexError(f"frame numbers lie in 0..{self.num_frames - 1}, got {numbers.min()}..{numbers.max()}")
        while True:
            wanted = self._without_corrupt(numbers) if self._instead else numbers
            shard = np.searchsorted(self._first_frame, wanted, side="right") - 1
            try:
                return read(shard, wanted - self._first_frame[shard])
            except codec.CorruptChunk as error:
                self._skip_or_refuse(int(wanted[error.row]), error.reason)

    def _without_corrupt(self, numbers: np.ndarray) -> np.ndarray:
        found = numbers.copy()
        for corrupt, instead in self._instead.items():
            found[found == corrupt] = instead
        return found

    def _skip_or_refuse(self, corrupt: int, reason: str) -> None:
        """UserError, or from now on the nearest sound frame of the same sequence, the earlier of two, instead."""
        complaint = self._complaint(corrupt, reason)
        if self.corrupt == "refuse":
            raise UserError(f"{complaint}; copy the shard or prepare the dataset again")
        i = int(np.searchsorted(self.starts, corrupt, side="right")) - 1
        others = np.delete(np.arange(self.starts[i], self.starts[i + 1]), corrupt - self.starts[i])
        for number in others[np.argsort(np.abs(others - corrupt), kind="stable")]:
            shard = np.searchsorted(self._first_frame, [number], side="right") - 1
            try:
                self._shards.frames(shard, number - self._first_frame[shard])
            except codec.CorruptChunk:
                continue
            instead = int(number)
            self._instead[corrupt] = instead
            warnings.warn(f"{complaint}; frame {instead - self.starts[i]} is taken instead", stacklevel=4)
            return
        raise UserError(f"{complaint}, and no other frame of it is sound; copy the shard or prepare the dataset again")

    def _complaint(self, number: int, reason: str) -> str:
        i = int(np.searchsorted(self.starts, number, side="right")) - 1
        shard = int(np.searchsorted(self._first_frame, number, side="right")) - 1
        file = self.path / self._records[shard].file
        return f"{file}: frame {number - int(self.starts[i])} of sequence {self.sequence_name(i)} {reason}"

    def verify(self) -> Iterator[str]:
        """Check every file against its checksum and decode every frame; yields one line per problem found."""
        for k, record in enumerate(self._records):
            path = self.path / record.file
            if shards.checksum(path) != record.blake2b:
                yield f"{path}: does not match its checksum in dataset.json"
            for begin in range(0, record.frames, 8192):
                pending = np.arange(begin, min(begin + 8192, record.frames))
                while len(pending):
                    try:
                        self._shards.frames(np.full(len(pending), k), pending)
                        break
                    except codec.CorruptChunk as error:
                        yield self._complaint(int(self._first_frame[k] + pending[error.row]), error.reason)
                        pending = pending[error.row + 1 :]


def _check_size(path: Path, record: ShardRecord) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the dataset is incomplete: copy it or prepare it again") from None
    if size != record.bytes:
        raise UserError(f"{path}: has {size} bytes where dataset.json says {record.bytes}; copy or prepare it again")


def _read_facts(path: Path) -> tuple[bytes, dict]:
    """dataset.json as bytes and as a dict of the expected types. UserError otherwise."""
    file = path / "dataset.json"
    if not path.is_dir():
        partial = path.with_name(path.name + ".partial").is_dir()
        hint = "run the same `gaitfast prepare` again: it resumes" if partial else "write it with `gaitfast prepare`"
        raise UserError(f"{path}: no such dataset folder; {hint}")
    try:
        text = file.read_bytes()
    except OSError:
        raise UserError(f"{path}: not a packed dataset (no dataset.json); write one with `gaitfast prepare`") from None
    try:
        facts = json.loads(text)
        if facts.get("format") != FORMAT:
            raise UserError(f"{file}: not the description of a packed dataset; write one with `gaitfast prepare`")
        if facts.get("version") != VERSION:
            raise UserError(
                f"{file}: format version {facts.get('version')}, this gaitfast reads {VERSION}; prepare again"
            )
        records = [ShardRecord(**record) for record in [facts["index"], *facts["shards"]]]
        for record in records:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", record.file):
                raise ValueError(f"file name {record.file!r}")
            if not all(type(n) is int and n >= 0 for n in (record.bytes, record.sequences, record.frames)):
                raise ValueError(f"counts of {record.file}")
        counts = {key: sum(getattr(record, key) for record in records[1:]) for key in ("sequences", "frames")}
        if counts != {key: facts[key] for key in counts} or counts["sequences"] < 1:
            raise ValueError(f"the shards hold {counts}")
        if facts["frame"] != {"dtype": "uint8", "shape": list(codec.FRAME_SHAPE), "codec": "lz4-block"}:
            raise ValueError(f"frame {facts['frame']}")
        if not all(isinstance(facts[key], str) for key in ("name", "protocol")):
            raise ValueError("name and protocol must be strings")
        if not isinstance(facts["partition"], dict | None):
            raise ValueError("partition must be an object or null")
        if not isinstance(facts.get("findings", {}), dict):
            raise ValueError("findings must be an object")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error}); copy the dataset again") from None
    return text, facts


# --- writing ----------------------------------------------------------------------------------------------------------


def _table(strings: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Codes int32 of `strings`, and the arrays of their sorted table."""
    names = sorted(set(strings))
    code = {name: i for i, name in enumerate(names)}
    encoded = [name.encode() for name in names]
    offsets = np.zeros(len(names) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    codes = np.fromiter((code[s] for s in strings), np.int32, len(strings))
    return codes, {"offsets": offsets, "bytes": np.frombuffer(b"".join(encoded), np.uint8)}


def write_index(
    folder: Path, keys: Sequence[tuple[str, str, str]], lengths: Sequence[int], flags: np.ndarray
) -> ShardRecord:
    """Write index.safetensors for sequences `keys` (id, type, view), already in order, of `lengths` frames."""
    starts = np.zeros(len(keys) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    wide, narrow = {"starts": starts}, {}
    for column, (key, table) in enumerate(_TABLES.items()):
        codes, arrays = _table([k[column] for k in keys])
        wide[f"{table}.offsets"] = arrays["offsets"]
        narrow[key] = codes
        narrow[f"{table}.bytes"] = arrays["bytes"]
    ordered = sorted(narrow.items(), key=lambda item: -item[1].itemsize)  # keeps every array aligned
    path = folder / "index.safetensors"
    shards.write_tensors(path, {**wide, **dict(ordered), "flags": flags.astype(np.uint8)})
    return ShardRecord(path.name, path.stat().st_size, shards.checksum(path), len(keys), int(starts[-1]))


def write_facts(
    folder: Path,
    *,
    name: str,
    protocol: str,
    index: ShardRecord,
    records: Sequence[ShardRecord],
    partition: dict | None,
    findings: dict | None = None,
) -> None:
    """Write dataset.json, the last file of a dataset. `findings`: what `gaitfast prepare` noticed (see packing.py)."""
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "protocol": protocol,
        "sequences": index.sequences,
        "frames": index.frames,
        "frame": {"dtype": "uint8", "shape": list(codec.FRAME_SHAPE), "codec": "lz4-block"},
        "order": "id, then type, then view, by Unicode code point",
        "partition": partition,
        "findings": findings or {},
        "index": index._asdict(),
        "shards": [record._asdict() for record in records],
    }
    shards.write_text(folder / "dataset.json", json.dumps(facts, indent=1) + "\n")


def write(
    path: str | Path,
    sequences: Iterable[tuple[str, str, str, np.ndarray]],
    *,
    name: str = "dataset",
    protocol: str = "none",
    partition: dict | None = None,
) -> PackedDataset:
    """Pack sequences (id, type, view, frames uint8 (T, 64, 64)) that are in memory, as one shard; `partition` as in an
    OpenGait JSON. For small sets and tests: `gaitfast prepare` streams, resumes and uses all cores."""
    from gaitfast.data.partition import Partition

    folder = Path(path)
    folder.mkdir(parents=True)
    ordered = sorted(sequences, key=lambda s: s[:3])
    keys = [s[:3] for s in ordered]
    assert len(set(keys)) == len(keys)
    file = folder / "shard-00000.safetensors"
    writer = shards.ShardWriter(file)
    for *_, frames in ordered:
        writer.append(codec.compress(frames))
    writer.close()
    flags, facts = np.zeros(len(keys), np.uint8), None
    if partition is not None:
        flags, facts = Partition.parse(partition, "partition").apply(keys)
    index = write_index(folder, keys, [len(s[3]) for s in ordered], flags)
    record = ShardRecord(file.name, file.stat().st_size, shards.checksum(file), index.sequences, index.frames)
    write_facts(folder, name=name, protocol=protocol, index=index, records=[record], partition=facts)
    return PackedDataset.open(folder)
