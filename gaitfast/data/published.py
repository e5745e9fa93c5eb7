"""What the benchmarks hold by their publications: counts to compare a packed dataset with, and their partition files.

Subjects are those of the partitions that OpenGait ships. Sequences: Gait3D (Zheng et al., CVPR 2022), GREW (Zhu et al.,
ICCV 2021; its 24,000 test sequences are 12,000 of the gallery and 12,000 probes, which OpenGait files under one id
`probe`), CASIA-B (Yu et al., ICPR 2006) and OU-MVLP (Takemura et al., 2018) as people x walks x cameras: the releases
lack a few of these.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Counts of one benchmark; keys as in the partition facts of dataset.json."""

    title: str
    partition: str
    """Name of the partition file that OpenGait ships."""
    counts: dict[str, int]
    nominal: bool = False
    """Whether the sequence counts are people x walks x cameras, of which the release lacks a few."""


PUBLISHED = {
    "gait3d": Published(
        "Gait3D",
        "Gait3D.json",
        {"train_subjects": 3000, "test_subjects": 1000, "train": 18940, "test": 6369, "probe": 1000},
    ),
    "grew": Published(
        "GREW", "GREW.json", {"train_subjects": 20000, "test_subjects": 6001, "train": 102887, "test": 24000}
    ),
    "casia-b": Published(
        "CASIA-B",
        "CASIA-B.json",
        {"train_subjects": 74, "test_subjects": 50, "train": 74 * 10 * 11, "test": 50 * 10 * 11},
        nominal=True,
    ),
    "ou-mvlp": Published(
        "OU-MVLP",
        "OUMVLP.json",
        {"train_subjects": 5153, "test_subjects": 5154, "train": 5153 * 2 * 14, "test": 5154 * 2 * 14},
        nominal=True,
    ),
}
_WORDS = {
    "train_subjects": "train subjects",
    "test_subjects": "test subjects",
    "train": "train sequences",
    "test": "test sequences",
    "probe": "probe sequences",
    "subjects": "subjects",
    "sequences": "sequences",
}


def differences(protocol: str, found: dict[str, int]) -> dict[str, list[int]]:
    """Counts that are not the published ones: what -> [found, published]; empty for a set that is whole or unknown.

    `found`: `subjects` and `sequences` in all, and those of the partition where there is one.
    """
    if protocol not in PUBLISHED:
        return {}
    wanted = PUBLISHED[protocol].counts
    if "train" not in found:  # no partition: only the sums can be compared
        wanted = {
            "subjects": wanted["train_subjects"] + wanted["test_subjects"],
            "sequences": wanted["train"] + wanted["test"],
        }
    return {key: [found[key], number] for key, number in wanted.items() if found[key] != number}


def describe(protocol: str, off: dict[str, list[int]]) -> str:
    """One line on what `differences` found."""
    facts = PUBLISHED[protocol]
    parts = []
    for key, (found, number) in off.items():
        off_by = f"{abs(found - number):,} {'fewer' if found < number else 'more'}"
        parts.append(f"{found:,} {_WORDS[key]} instead of {number:,} ({off_by})")
    nominal = "; people x walks x cameras are counted, and the release lacks a few" if facts.nominal else ""
    return f"this is not {facts.title} as published: {', '.join(parts)}{nominal}"
