"""Readers of GREW and OU-MVLP as they are published, before any rearranging: no copy, no tree of links.

    RawGrew     train/ID/SEQUENCE/*.png, test/gallery/ID/SEQUENCE/*.png, test/probe/VIDEO/*.png
    RawOuMvlp   Silhouette_VIEW-SEQUENCE/ID/*.png

The names that come out are OpenGait's, so its partition files fit. Gait3D and CASIA-B are published as id/type/view,
which PngTree reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gaitfast.data.sources import Entry, Listing, Problem, bad_name, children_of, read_pictures

_OU_MVLP_FOLDER = re.compile(r"Silhouette_(\d{3})-(\d{2})")
_GREW_GALLERY = ("01", "02")


def looks_like_grew(root: Path) -> bool:
    """Whether `root` holds test/gallery or test/probe, which no id/type/view tree does."""
    return (root / "test" / "gallery").is_dir() or (root / "test" / "probe").is_dir()


def looks_like_ou_mvlp(root: Path) -> bool:
    """Whether `root` holds a folder Silhouette_VIEW-SEQUENCE."""
    return any(_OU_MVLP_FOLDER.fullmatch(child.name) and child.is_dir() for child in root.iterdir())


@dataclass(frozen=True)
class RawGrew:
    """GREW: train ids become `NNNNNtrain` of type 00, the two sequences of a gallery id types 01 and 02 in the order of
    their names (by code point), probes id `probe` of type 03; the view is the sequence's name. The distractor set
    belongs to no protocol here and is not read."""

    root: Path

    def scan(self) -> Listing:
        problems: list[Problem] = []
        entries = [
            Entry(f"{subject.name}train", "00", sequence.name, *self._place(sequence))
            for subject in self._folders("train", problems)
            for sequence in self._folders(f"train/{subject.name}", problems)
        ]
        for subject in self._folders("test/gallery", problems):
            sequences = list(self._folders(f"test/gallery/{subject.name}", problems))
            for condition, sequence in zip(_GREW_GALLERY, sequences):
                entries.append(Entry(subject.name, condition, sequence.name, *self._place(sequence)))
            for sequence in sequences[len(_GREW_GALLERY) :]:
                problems.append(
                    Problem(sequence.path, "is the third or a later sequence of an id that has two in GREW")
                )
        for sequence in self._folders("test/probe", problems):
            entries.append(Entry("probe", "03", sequence.name, *self._place(sequence)))
        return Listing(sorted(entries), problems)

    def read(self, entry: Entry) -> np.ndarray:
        """Frames as published, where they are 64x64, as GREW's are (OpenGait's `--dataset GREW`); pictures of another
        size get OpenGait's pretreatment. SourceError as for PngTree, and for a sequence of mixed sizes."""
        return read_pictures(self.root, entry.paths, None)

    def _folders(self, path: str, problems: list[Problem]) -> Iterator[os.DirEntry]:
        """Folders in `path` by name; none where it does not exist, as when only the training set was downloaded."""
        folder = self.root / path
        if not folder.is_dir():
            return
        children = children_of(folder, self.root, problems)
        names = {child.name for child in children}
        for child in children:
            if child.name.endswith(".tgz") and child.name.removesuffix(".tgz") not in names:
                problems.append(Problem(child.path, "is not unpacked; unpack it where it lies"))
            elif child.is_dir() and (reason := bad_name(child.name)):
                problems.append(Problem(child.path, reason))
            elif child.is_dir():
                yield child

    def _place(self, folder: os.DirEntry) -> tuple[tuple[str, ...], int]:
        return (os.path.relpath(folder.path, self.root),), folder.stat().st_mtime_ns


@dataclass(frozen=True)
class RawOuMvlp:
    """OU-MVLP: folder Silhouette_VIEW-SEQUENCE, in it one folder per id; the sequence (00, 01) becomes the type."""

    root: Path

    def scan(self) -> Listing:
        problems: list[Problem] = []
        entries: list[Entry] = []
        for folder in children_of(self.root, self.root, problems):
            if not folder.is_dir():
                continue
            match = _OU_MVLP_FOLDER.fullmatch(folder.name)
            if not match:
                problems.append(Problem(folder.path, "is not named Silhouette_VIEW-SEQUENCE, as in Silhouette_000-01"))
                continue
            view, condition = match.groups()
            for subject in children_of(Path(folder.path), self.root, problems):
                if subject.is_dir() and (reason := bad_name(subject.name)):
                    problems.append(Problem(subject.path, reason))
                elif subject.is_dir():
                    place = f"{folder.name}/{subject.name}"
                    entries.append(Entry(subject.name, condition, view, (place,), subject.stat().st_mtime_ns))
        return Listing(sorted(entries), problems)

    def read(self, entry: Entry) -> np.ndarray:
        """Frames after OpenGait's pretreatment. SourceError as for PngTree."""
        return read_pictures(self.root, entry.paths, False)
