"""Readers of foreign trees: each lists its sequences, then reads one at a time as uint8 frames (T, 64, 64).

    OpenGaitTree  root/id/type/view/*.pkl, NumPy uint8 (T, 64, 64)
    PngTree       .../id/type/view/*.png, raw silhouettes
    UsfRelease    in usf17.py

Foreign bytes are hostile: nothing is unpickled, sizes are checked before memory is taken, a link that leaves the tree
is not followed. What is wrong with one sequence is a Problem of that sequence and stops no other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gaitfast.data import safe_pickle

PICTURE_LIMIT = 1 << 26
"""Bytes of the largest picture file and pixels of the largest picture that are read."""


class SourceError(Exception):
    """One sequence cannot be read: `path` is the file at fault."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # both, so that it survives the way from a worker process
        self.path, self.reason = str(path), reason


class Problem(NamedTuple):
    """What was left out and why; `path` is the file or folder at fault."""

    path: str
    reason: str


class Entry(NamedTuple):
    """A sequence to read: its id, type and view, the places it is read from (relative to the source), and a stamp that
    changes when these change."""

    subject: str
    condition: str
    view: str
    paths: tuple[str, ...]
    stamp: int


class Listing(NamedTuple):
    entries: list[Entry]
    """Sorted by id, type, view."""
    problems: list[Problem]


def bad_name(name: str) -> str | None:
    """Why `name` cannot be an id, type or view; None if it can."""
    if name in ("", ".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
        return f"the name {name!r} has characters that a dataset name may not have"
    return None


def children_of(folder: Path, root: Path, problems: list[Problem]) -> list[os.DirEntry]:
    """Entries of `folder` in sorted order, without links that leave `root` or lead nowhere (they become problems)."""
    try:
        with os.scandir(folder) as scan:
            found = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(Problem(str(folder), f"cannot be listed ({error.strerror})"))
        return []
    return [entry for entry in found if not entry.is_symlink() or _link_is_safe(entry, root, problems)]


def _link_is_safe(entry: os.DirEntry, root: Path, problems: list[Problem]) -> bool:
    if not Path(os.path.realpath(entry.path)).is_relative_to(root):
        problems.append(Problem(entry.path, "is a link that leaves the tree; copy its target into the tree"))
        return False
    try:
        entry.stat()
    except OSError as error:
        problems.append(Problem(entry.path, f"is a link that leads nowhere ({error.strerror})"))
        return False
    return True


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes. SourceError otherwise."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must not stop the worker
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise SourceError(path, "is not a regular file")
            if facts.st_size > limit:
                raise SourceError(path, f"has {facts.st_size} bytes, more than the limit of {limit}")
            return file.read(limit)
    except OSError as error:
        raise SourceError(path, f"cannot be read ({error.strerror})") from None


def _check_frames(frames: np.ndarray, path: Path) -> np.ndarray:
    """Frames as a packed dataset stores them. SourceError for another dtype or shape, no frame, or 0/1 masks."""
    if frames.dtype != np.uint8:
        raise SourceError(path, f"has dtype {frames.dtype}, expected uint8 of 0..255")
    if frames.ndim != 3 or frames.shape[1:] != (64, 64):
        raise SourceError(path, f"has shape {frames.shape}, expected (T, 64, 64)")
    if len(frames) == 0:
        raise SourceError(path, "is empty: it has no frame")
    if frames.max() == 1:
        raise SourceError(path, "is a mask of 0 and 1, expected grey values of 0..255; multiply it by 255")
    return frames


def _id_type_view(root: Path) -> Listing:
    """Every folder root/id/type/view as an Entry; what it holds is looked at when it is read."""
    problems: list[Problem] = []
    entries: list[Entry] = []

    def folders(path: Path) -> Iterator[os.DirEntry]:
        for child in children_of(path, root, problems):
            if child.name.endswith(".pkl"):
                problems.append(Problem(child.path, "is a pickle that is not three folders (id/type/view) deep"))
            if child.is_dir() and (reason := bad_name(child.name)):
                problems.append(Problem(child.path, reason))
            elif child.is_dir():
                yield child

    for subject in folders(root):
        for condition in folders(Path(subject.path)):
            for view in folders(Path(condition.path)):
                path = f"{subject.name}/{condition.name}/{view.name}"
                entries.append(Entry(subject.name, condition.name, view.name, (path,), view.stat().st_mtime_ns))
    return Listing(sorted(entries), problems)


@dataclass(frozen=True)
class OpenGaitTree:
    """OpenGait's pickle tree. A view folder with several pickles holds several modalities, in the order of their names;
    `modality` says which one has the silhouettes."""

    root: Path
    modality: int | None = None

    def scan(self) -> Listing:
        return _id_type_view(self.root)

    def read(self, entry: Entry) -> np.ndarray:
        """SourceError for a folder without a pickle, or a pickle that is not a uint8 array (T, 64, 64)."""
        folder = self.root / entry.paths[0]
        problems: list[Problem] = []
        found = [child.path for child in children_of(folder, self.root, problems) if child.name.endswith(".pkl")]
        if problems:
            raise SourceError(*problems[0])
        if not found:
            raise SourceError(folder, "holds no .pkl file")
        if self.modality is None and len(found) > 1:
            raise SourceError(folder, f"holds {len(found)} pickles; say which with --modality 0..{len(found) - 1}")
        if (self.modality or 0) >= len(found):
            raise SourceError(folder, f"holds {len(found)} pickles, so there is no modality {self.modality}")
        path = Path(found[self.modality or 0])
        try:
            frames = safe_pickle.loads(read_bytes(path, safe_pickle.SIZE_LIMIT))
        except safe_pickle.PickleError as error:
            raise SourceError(path, str(error)) from None
        return _check_frames(frames, path)


@dataclass(frozen=True)
class PngTree:
    """Raw silhouettes as pictures; id, type and view are the last three folders above them, at any depth.

    `as_read`: take the pictures, 64x64 already, as they are (OpenGait's `--dataset GREW`), without pretreatment.
    """

    root: Path
    as_read: bool = False

    def scan(self) -> Listing:
        problems: list[Problem] = []
        places: dict[tuple[str, ...], list[tuple[str, int]]] = {}
        pending = [self.root]
        while pending:
            folder = pending.pop()
            children = children_of(folder, self.root, problems)
            # A link is not descended into: inside the tree its target is visited anyway, and links may form a circle.
            pending += [Path(child.path) for child in children if child.is_dir(follow_symlinks=False)]
            if not any(is_silhouette(child) for child in children):
                continue
            relative = folder.relative_to(self.root)
            if len(relative.parts) < 3:
                problems.append(Problem(str(folder), "holds pictures, but is not three folders (id/type/view) deep"))
            elif reason := next(filter(None, map(bad_name, relative.parts)), None):
                problems.append(Problem(str(folder), reason))
            else:
                key = relative.parts[-3:]
                places.setdefault(key, []).append((str(relative), folder.stat().st_mtime_ns))
        entries = [
            Entry(*key, tuple(sorted(path for path, _ in found)), max(stamp for _, stamp in found))
            for key, found in places.items()
        ]
        return Listing(sorted(entries), problems)

    def read(self, entry: Entry) -> np.ndarray:
        """Frames in the order of their paths. SourceError for an unreadable picture, or if none has a silhouette."""
        return read_pictures(self.root, entry.paths, self.as_read)


def read_pictures(root: Path, folders: tuple[str, ...], as_read: bool | None) -> np.ndarray:
    """The pictures of `folders` (relative to `root`) in the order of their paths, uint8 (T, 64, 64).

    `as_read`: True takes them as they are and needs 64x64, False applies OpenGait's pretreatment, None does the first
    where the first picture is 64x64, else the second. SourceError for an unreadable picture, another size, or no frame.
    """
    from gaitfast.data import pretreatment

    problems: list[Problem] = []
    listed = [children_of(root / path, root, problems) for path in folders]
    if problems:
        raise SourceError(*problems[0])
    paths = sorted(child.path for children in listed for child in children if is_silhouette(child))
    frames = []
    size_rule = "--as-read needs 64x64" if as_read else "the first of its sequence has 64x64"
    for path in paths:
        picture = _read_picture(Path(path))
        if as_read is None:
            as_read = picture.shape == (64, 64)
        if not as_read:
            picture = pretreatment.normalise(picture)
        elif picture.shape != (64, 64):
            raise SourceError(path, f"has {picture.shape[1]}x{picture.shape[0]} pixels; {size_rule}")
        if picture is not None:
            frames.append(picture)
    folder = root / folders[0]
    if not paths:
        raise SourceError(folder, "holds no .png picture")
    if not frames:
        raise SourceError(folder, f"none of its {len(paths)} pictures shows a silhouette")
    return _check_frames(np.stack(frames), folder)


def is_silhouette(entry: os.DirEntry) -> bool:
    return entry.name.endswith(".png") and "gei.png" not in entry.name and not entry.is_dir()


def _read_picture(path: Path) -> np.ndarray:
    """A PNG as greyscale uint8 (H, W). Its size is read from the header first: a small file can claim a huge one."""
    import cv2

    data = read_bytes(path, PICTURE_LIMIT)
    if len(data) < 33 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise SourceError(path, "is not a PNG picture")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not 0 < width * height <= PICTURE_LIMIT:
        raise SourceError(path, f"claims {width}x{height} pixels, more than the limit of {PICTURE_LIMIT}")
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error as error:
        raise SourceError(path, f"cannot be decoded ({' '.join(str(error).split())[:200]})") from None
    if picture is None:
        raise SourceError(path, "cannot be decoded: truncated or corrupt")
    return picture
