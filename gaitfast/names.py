"""Names of people, types and views: compared character by character, everywhere; so near misses must be found."""

from __future__ import annotations

import re
from collections.abc import Iterable


def plain(name: str) -> str:
    """The name without what people get wrong: case, leading zeros of every number, spaces around it."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", name.strip().casefold())


def lookalikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of different names that are the same when case and leading zeros are left aside, sorted."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(plain(name), set()).add(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def near(wanted: Iterable[str], found: Iterable[str]) -> list[tuple[str, str]]:
    """(wanted, found) where a wanted name is not among the found ones, but one that looks like it is; sorted."""
    found = set(found)
    by_plain = {plain(name): name for name in sorted(found, reverse=True)}
    missing = sorted(set(wanted) - found)
    return [(name, by_plain[plain(name)]) for name in missing if plain(name) in by_plain]
