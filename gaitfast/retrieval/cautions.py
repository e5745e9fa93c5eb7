"""What makes a figure wrong or not comparable without showing in it: doubtful names, odd views, copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from gaitfast import names
from gaitfast.config import UserError
from gaitfast.retrieval.scoring import Labels, Split


def check_names(labels: Labels, types: tuple[str, ...], views: tuple[str, ...]) -> None:
    """UserError where a name is written in two ways: a silent split of a person, a type or a view makes wrong numbers.

    `types`, `views`: names that the protocol looks for; empty where these are free names, as GREW's random views are.
    """
    sides = [("ids", labels.subject, ())]
    if types:
        sides.append(("types", labels.condition, types))
    if views:
        sides.append(("views", labels.view, views))
    for what, column, wanted in sides:
        found = set(column.tolist())
        doubtful = [*names.lookalikes(found), *names.near(wanted, found)]
        if doubtful:
            a, b = doubtful[0][:2]
            whose = "the dataset has both" if {a, b} <= found else f"the protocol's is {a!r}, the dataset's {b!r}"
            raise UserError(
                f"{labels.source}: the {what} {a!r} and {b!r} differ by case or leading zeros alone ({whose}); names"
                " are compared character by character, so rename the folders and prepare it again"
            )


def view_notes(labels: Labels, split: dict[str, Split], views: tuple[str, ...]) -> list[str]:
    """Views that are not the published ones: the means go over fewer, or other, cells."""
    if not views:
        return []
    notes = []
    for side in Split._fields:
        rows = np.concatenate([getattr(part, side) for part in split.values()])
        seen = set(labels.view[rows].tolist())
        if seen != set(views):
            missing, other = sorted(set(views) - seen), sorted(seen - set(views))
            parts = [f"lack {', '.join(missing)}"] * bool(missing) + [f"have {', '.join(other)} besides"] * bool(other)
            notes.append(f"of the {len(views)} published views the {side} {' and '.join(parts)}")
    return notes


def copy_notes(dataset: Any, numbers: np.ndarray, split: dict[str, Split]) -> list[str]:
    """Probes that lie in the gallery once more, frame by frame: sure hits, or sure misses under another id."""
    groups = (dataset.facts.get("findings") or {}).get("duplicates", ())
    group_of = {number: place for place, group in enumerate(groups) for number in group}
    if not group_of:
        return []
    count = 0
    for part in split.values():
        probes, gallery = ([group_of.get(int(number)) for number in numbers[rows]] for rows in part)
        copied = set(gallery) - {None}
        count += sum(group in copied for group in probes)
    if not count:
        return []
    return [f"{count:,} probes are copies, frame by frame, of gallery sequences; they are ranked as any other"]
