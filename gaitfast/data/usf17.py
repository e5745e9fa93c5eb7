"""Reader of the USF HumanID gait silhouettes, release 1.7, as published with MPCA.

Source: Lu, Plataniotis, Venetsanopoulos, "MPCA: Multilinear principal component analysis of tensor objects", IEEE
Trans. Neural Networks 19(1), 2008. Files Gal.mat, PrbA.mat .. PrbG.mat with fea3D uint8 (32, 22, 10, N), where 0 is the
person, and gnd (N, 1), the subject of each half-cycle; 0 is somebody who is not in the gallery.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io

from gaitfast.config import UserError
from gaitfast.data.sources import Entry, Listing, Problem, SourceError, children_of, read_bytes

MAT_LIMIT = 1 << 26
"""Bytes of the largest .mat file that is read (the release's are below 300 kB)."""
USF_SETS = {  # file stem: camera
    "Gal": "right",
    "PrbA": "left",
    "PrbB": "right",
    "PrbC": "left",
    "PrbD": "right",
    "PrbE": "right",
    "PrbF": "left",
    "PrbG": "left",
}
_HALF_CYCLE = (32, 22, 10)  # rows, columns, frames


@dataclass(frozen=True)
class UsfRelease:
    """Any subset of the eight files. A walk is all half-cycles of a subject in one file, in stored order."""

    root: Path

    def scan(self) -> Listing:
        """UserError if there is none of the eight files."""
        problems: list[Problem] = []
        entries: list[Entry] = []
        files = [child for child in children_of(self.root, self.root, problems) if Path(child.name).stem in USF_SETS]
        files = [child for child in files if child.name.endswith(".mat")]
        if not files and not problems:
            raise UserError(f"{self.root}: holds none of {', '.join(f'{name}.mat' for name in USF_SETS)}")
        for child in files:
            try:
                _, subjects = _load_usf(child.path, child.stat().st_mtime_ns)
            except SourceError as error:
                problems.append(Problem(error.path, error.reason))
                continue
            name, stamp = Path(child.name).stem, child.stat().st_mtime_ns
            entries += [Entry(f"{i:03d}", name, USF_SETS[name], (child.name,), stamp) for i in set(subjects.tolist())]
        return Listing(sorted(entry for entry in entries if entry.subject != "000"), problems)

    def read(self, entry: Entry) -> np.ndarray:
        """Person 255, background 0: inverted, doubled in size (nearest), 10 empty columns on each side."""
        silhouettes, subjects = _load_usf(str(self.root / entry.paths[0]), entry.stamp)
        walk = silhouettes[:, :, :, subjects == int(entry.subject)]
        walk = walk.transpose(3, 2, 0, 1).reshape(-1, *_HALF_CYCLE[:2])  # half-cycles one after the other
        frames = np.zeros((len(walk), 64, 64), np.uint8)
        frames[:, :, 10:54] = np.where(walk == 0, np.uint8(255), np.uint8(0)).repeat(2, axis=1).repeat(2, axis=2)
        return frames


def partition(entries: list[Entry]) -> dict:
    """The partition that this project uses for training on USF (the protocol `usf17` does not): a subject whose number
    minus 1 leaves 0 or 3 when divided by 7 is a test subject (21 of 71); test sequences outside Gal are probes."""
    subjects = sorted({entry.subject for entry in entries})
    test = [s for s in subjects if (int(s) - 1) % 7 in (0, 3)]
    return {
        "TRAIN_SET": [s for s in subjects if s not in test],
        "TEST_SET": test,
        "PROBE_SET": ["-".join(e[:3]) for e in entries if e.subject in test and e.condition != "Gal"],
    }


@functools.lru_cache(maxsize=8)  # 5 MB each; walks are read subject by subject, so all files are in use at once
def _load_usf(path: str, stamp: int) -> tuple[np.ndarray, np.ndarray]:
    """fea3D uint8 (32, 22, 10, N) of 0 and 1, and gnd (N,), of one file of time `stamp`. SourceError otherwise."""
    data = read_bytes(Path(path), MAT_LIMIT)
    names = ["fea3D", "gnd"]
    try:
        claimed = {name: shape for name, shape, _ in scipy.io.whosmat(io.BytesIO(data))}
        shapes = [claimed.get(name, ()) for name in names]
        count = shapes[0][3] if len(shapes[0]) == 4 else -1
        if shapes[0][:3] != _HALF_CYCLE or shapes[1] not in ((count, 1), (1, count)):
            raise SourceError(path, f"fea3D is {shapes[0]} and gnd {shapes[1]}; expected (32, 22, 10, N) and (N, 1)")
        if count > 100_000:
            raise SourceError(path, f"claims {count} half-cycles, more than the limit of 100000")
        content = scipy.io.loadmat(io.BytesIO(data), variable_names=names)
        silhouettes, subjects = content["fea3D"], content["gnd"].ravel()
    except SourceError:
        raise
    except Exception as error:  # scipy raises whatever the malformed bytes lead it to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SourceError(path, f"is not a MATLAB 5 file that can be read ({reason})") from None
    if silhouettes.dtype != np.uint8 or silhouettes.shape != shapes[0] or silhouettes.max(initial=0) > 1:
        raise SourceError(path, f"fea3D is not a uint8 mask of 0 and 1, but {silhouettes.dtype} {silhouettes.shape}")
    if subjects.dtype.kind not in "ui" or len(subjects) != count or subjects.max(initial=0) > 999:
        raise SourceError(path, "gnd does not hold one subject number of 0..999 for each half-cycle")
    return silhouettes, subjects
