"""OpenGait's partition JSON: who trains, who is tested, which test sequences are probes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gaitfast import names
from gaitfast.config import UserError
from gaitfast.data.packed import PROBE, TEST, TRAIN

NEAR_MISSES = 20
"""Names of the partition that differ from one of the dataset by case or padding alone: how many are recorded."""


@dataclass(frozen=True)
class Partition:
    """TRAIN_SET and TEST_SET (ids), PROBE_SET (names "id-type-view" of test sequences). `source`: for messages."""

    train: frozenset[str]
    test: frozenset[str]
    probe: frozenset[str]
    source: str
    dataset: str = ""

    @classmethod
    def parse(cls, tree: object, source: str) -> Partition:
        """From the JSON's content. UserError for a missing list, an id that is not a string, an id in both sets."""
        if not isinstance(tree, dict):
            raise UserError(f"{source}: a partition is an object with TRAIN_SET and TEST_SET")
        sets = []
        for key in ("TRAIN_SET", "TEST_SET", "PROBE_SET"):
            names = tree.get(key, [] if key == "PROBE_SET" else None)
            if not isinstance(names, list):
                raise UserError(f"{source}: {key} is missing or not a list of ids; write it as OpenGait's JSON does")
            wrong = next((n for n in names if not isinstance(n, str)), None)
            if wrong is not None:
                raise UserError(f'{source}: {key} holds {wrong!r}, which is not a string; write "{wrong}"')
            sets.append(frozenset(names))
        if both := sets[0] & sets[1]:
            raise UserError(f"{source}: {len(both)} ids are in TRAIN_SET and TEST_SET, e.g. {min(both)}; remove one")
        dataset = tree.get("dataset", "")
        return cls(*sets, source=source, dataset=dataset if isinstance(dataset, str) else "")

    @classmethod
    def load(cls, path: str | Path) -> Partition:
        """From a JSON file. UserError if it cannot be read."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such partition file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as JSON ({error})") from None
        return cls.parse(tree, str(path))

    def apply(self, keys: Sequence[tuple[str, str, str]]) -> tuple[np.ndarray, dict]:
        """Flags uint8 (N) of sequences (id, type, view), and the facts for dataset.json: how many sequences each set
        has, how many names of the partition no sequence answers to, and which of these differ from one that is there
        by case or padding alone. UserError if it fits no subject or no probe, or if a probe's name fits two sequences
        or one outside TEST_SET."""
        flags = np.zeros(len(keys), np.uint8)
        subjects: set[str] = set()
        probes: dict[str, int] = {}
        for i, key in enumerate(keys):
            subject = key[0]
            subjects.add(subject)
            flags[i] = TRAIN * (subject in self.train) + TEST * (subject in self.test)
            if self.probe and (name := "-".join(key)) in self.probe:
                if name in probes:
                    raise UserError(
                        f"{self.source}: PROBE_SET's {name} fits two sequences, {keys[probes[name]]} and {key}"
                    )
                if not flags[i] & TEST:
                    raise UserError(f"{self.source}: PROBE_SET's {name} is not of a subject in TEST_SET")
                probes[name] = i
                flags[i] += PROBE
        listed = self.train | self.test
        near = names.near(listed, subjects)
        if not listed & subjects:
            raise UserError(
                f"{self.source}: lists no subject of this dataset (e.g. {min(subjects)}); "
                + _advice(near, "wrong file?")
            )
        if self.probe and not probes and self.test & subjects:
            near = names.near(self.probe, map("-".join, keys))
            raise UserError(
                f"{self.source}: no sequence has a name in PROBE_SET (e.g. {min(self.probe)}); "
                + _advice(near, "wrong file?")
            )
        if len(probes) < len(self.probe):
            near += names.near(self.probe - set(probes), map("-".join, keys))
        facts = {
            "train": int(((flags & TRAIN) > 0).sum()),
            "test": int(((flags & TEST) > 0).sum()),
            "probe": int(((flags & PROBE) > 0).sum()),
            "train_subjects": len(self.train & subjects),
            "test_subjects": len(self.test & subjects),
            "missing_subjects": len(listed - subjects),
            "missing_probes": len(self.probe) - len(probes),
            "unlisted_sequences": int((flags == 0).sum()),
            "near_misses": [list(pair) for pair in near[:NEAR_MISSES]],
        }
        return flags, facts


def _advice(near: list[tuple[str, str]], otherwise: str) -> str:
    if not near:
        return otherwise
    return f"it says {near[0][0]!r} where the dataset has {near[0][1]!r}: names are equal to the character or different"
