"""The published evaluation protocols: which sequences are probes and gallery, and what is averaged over what.

A protocol belongs to the dataset that is evaluated, never to the one trained on: any checkpoint ranks on any set.
Sources: OpenGait's evaluators for Gait3D, GREW, CASIA-B and OU-MVLP; Sarkar et al., TPAMI 27(2), 2005 for USF.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gaitfast.config import UserError
from gaitfast.retrieval import cautions
from gaitfast.retrieval.scoring import (
    RANKS,
    Evaluation,
    Labels,
    Split,
    all_views,
    need_matches,
    need_matches_across_views,
    need_other_view,
    pooled,
    view_by_view,
)
from gaitfast.retrieval.search import search

_CASIA_GALLERY = ("nm-01", "nm-02", "nm-03", "nm-04")
_CASIA_PROBES = {"NM": ("nm-05", "nm-06"), "BG": ("bg-01", "bg-02"), "CL": ("cl-01", "cl-02")}
_CASIA_CROSS_GALLERY = ("nm-02", "bg-02", "cl-02")
_CASIA_CROSS_PROBES = {"NM": ("nm-01",), "BG": ("bg-01",), "CL": ("cl-01",)}
_CASIA_TYPES = (*_CASIA_GALLERY, *(condition for group in _CASIA_PROBES.values() for condition in group))
_CASIA_VIEWS = tuple(f"{angle:03d}" for angle in range(0, 181, 18))
_OU_MVLP_TYPES = ("00", "01")
_OU_MVLP_VIEWS = tuple(f"{angle:03d}" for angle in (*range(0, 91, 15), *range(180, 271, 15)))
_GREW_KNOWN, _GREW_UNKNOWN = ("01", "02"), ("03",)
"""Types of GREW's test sequences: two of each known id, and the probes, which are all filed under the id `probe`."""
ALL_VIEWS = "all-views"


@dataclass(frozen=True)
class Protocol:
    """How a dataset is evaluated."""

    sequences: str
    """The split that probes and gallery are taken from."""
    split: Callable[[Labels], dict[str, Split]]
    """Probes and gallery by name of the group; UserError where the dataset has not what the protocol needs."""
    score: Callable[[torch.Tensor, Labels, dict[str, Split], dict[str, Any]], Evaluation]
    need: Callable[[Labels, dict[str, Split]], None] = need_matches
    """UserError where there would be no figure, by the labels alone."""
    options: dict[str, Any] = field(default_factory=dict)
    types: tuple[str, ...] = ()
    """Types that it looks for by name."""
    views: tuple[str, ...] = ()
    """Views as published, where views are compared."""


def _need(labels: Labels, split: dict[str, Split], *, probes: str, gallery: str) -> dict[str, Split]:
    """The split, unless one side is empty; `probes` (with {} for the group) and `gallery` say what was looked for."""
    for name, part in split.items():
        if not len(part.probes):
            raise UserError(f"{labels.source}: no probe {probes.format(name)}; choose another --protocol")
        if not len(part.gallery):
            raise UserError(f"{labels.source}: no gallery {gallery}; choose another --protocol")
    return split


def _by_probe_set(labels: Labels) -> dict[str, Split]:
    split = {"": Split(np.flatnonzero(labels.probe), np.flatnonzero(~labels.probe))}
    return _need(labels, split, probes="(the partition has no PROBE_SET)", gallery="(all are probes)")


def _grew(labels: Labels) -> dict[str, Split]:
    split = {"": Split(labels.of(("02",)), labels.of(("01",)))}
    return _need(labels, split, probes="of type 02 among the test ids", gallery="of type 01 among the test ids")


def _usf17(labels: Labels) -> dict[str, Split]:
    gallery = labels.of(("Gal",))
    sets = sorted(set(labels.condition.tolist()) - {"Gal"})
    split = {name.removeprefix("Prb"): Split(labels.of((name,)), gallery) for name in sets}
    if not split:
        raise UserError(f"{labels.source}: no probe set beside Gal; prepare a folder that holds PrbA.mat .. PrbG.mat")
    return _need(labels, split, probes="of {}", gallery="of type Gal")


def _casia_b(gallery: tuple[str, ...], probes: dict[str, tuple[str, ...]]) -> Callable[[Labels], dict[str, Split]]:
    def split(labels: Labels) -> dict[str, Split]:
        groups = {name: Split(labels.of(conditions), labels.of(gallery)) for name, conditions in probes.items()}
        return _need(labels, groups, probes="of {}", gallery=f"of type {', '.join(gallery)}")

    return split


def _ou_mvlp(labels: Labels) -> dict[str, Split]:
    split = {"": Split(labels.of(("00",)), labels.of(("01",)))}
    return _need(labels, split, probes="of type 00 among the test ids", gallery="of type 01 among the test ids")


PROTOCOLS = {
    "gait3d": Protocol("test", _by_probe_set, pooled),
    "walkers": Protocol("test", _by_probe_set, pooled),
    "grew": Protocol(
        "test", _grew, pooled, options={"ranks": (*RANKS, 20), "unmatched": "miss"}, types=_GREW_KNOWN + _GREW_UNKNOWN
    ),
    "casia-b": Protocol(
        "test",
        _casia_b(_CASIA_GALLERY, _CASIA_PROBES),
        view_by_view,
        need_other_view,
        types=_CASIA_TYPES,
        views=_CASIA_VIEWS,
    ),
    "casia-b-all-views": Protocol(
        "test",
        _casia_b(_CASIA_CROSS_GALLERY, _CASIA_CROSS_PROBES),
        all_views,
        need_matches_across_views,
        types=_CASIA_TYPES,
        views=_CASIA_VIEWS,
    ),
    "ou-mvlp": Protocol("test", _ou_mvlp, view_by_view, need_other_view, types=_OU_MVLP_TYPES, views=_OU_MVLP_VIEWS),
    "ou-mvlp-all-views": Protocol(
        "test", _ou_mvlp, all_views, need_matches_across_views, types=_OU_MVLP_TYPES, views=_OU_MVLP_VIEWS
    ),
    "usf17": Protocol("all", _usf17, pooled, types=("Gal", *(f"Prb{letter}" for letter in "ABCDEFG"))),
}
"""gait3d, walkers: the partition's PROBE_SET against all other test sequences.
grew: the local split of the test ids, type 02 against 01; a probe without a match is a miss. The official figures come
from GREW's site (`grew_submission`).
casia-b: nm-05, 06 (NM), bg-01, 02 (BG) and cl-01, 02 (CL) against nm-01..04; ou-mvlp: 00 against 01; both view by view,
without the identical view. -all-views: OpenGait's `cross_view_gallery`, the mAP columns of its model zoo; `all-views`
alone is that of the dataset's own protocol.
usf17: every other set against Gal, all subjects, trained on or not."""


def resolve(protocol: str, dataset: Any) -> str:
    """The protocol's name; `auto` is the one that the dataset names, `all-views` the form of it that compares all views
    at once. UserError if it is unknown."""
    name = dataset.protocol if protocol == "auto" else protocol
    if name == ALL_VIEWS:
        name = f"{dataset.protocol}-{ALL_VIEWS}"
        if name not in PROTOCOLS:
            raise UserError(
                f"{dataset.path}: has the protocol {dataset.protocol!r}, and {ALL_VIEWS} is a form of casia-b and"
                f" ou-mvlp; name it in full, as in --protocol casia-b-{ALL_VIEWS}"
            )
    if name in PROTOCOLS:
        return name
    choices = ", ".join(PROTOCOLS)
    if protocol == "auto":
        raise UserError(f"{dataset.path}: names no known protocol ({name!r}); say --protocol with one of {choices}")
    near = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)[0]
    raise UserError(f"protocol {name!r}: unknown; did you mean {near}? Choose one of {choices}")


def sequences(protocol: str, dataset: Any) -> np.ndarray:
    """Numbers of the sequences to embed, int64 ascending: the probes and the gallery, and no other.

    `evaluate` takes the embeddings in this order. UserError as `check`.
    """
    return _split(protocol, dataset)[1]


def known(protocol: str, dataset: Any) -> np.ndarray:
    """Numbers of the test sequences whose id says who walks, int64 ascending: all but GREW's probes.

    `protocol`: any name, `auto` for the dataset's.
    """
    test = dataset.split("test")
    if (dataset.protocol if protocol == "auto" else protocol) != "grew" or not len(test):
        return test
    return test[~np.isin(_labels(dataset, test).condition, _GREW_UNKNOWN)]


def check(protocol: str, dataset: Any) -> None:
    """UserError if the dataset has not what the protocol needs: a partition, probes, gallery, a match, names without
    doubt. What passes can be ranked whatever the features, as long as these are finite."""
    _split(protocol, dataset)


def evaluate(
    protocol: str, dataset: Any, embeddings: torch.Tensor, *, metric: str = "cosine", progress: bool = False
) -> Evaluation:
    """Rank the embeddings of `sequences(protocol, dataset)` under a protocol.

    Args:
        protocol: a key of PROTOCOLS, or `auto`.
        dataset: a PackedDataset, for the labels and the partition.
        embeddings: (S, C, P), in the order of `sequences`.
        metric: `cosine` or `euclidean`.

    Returns:
        Metrics in percent: `rank1` always; rank5, rank10, mAP, mINP where the protocol has them; `rank1_NM` and the
        like per group. `.tables` holds the tables by view, `.probes`, `.gallery` and `.unmatched` the counts, `.notes`
        what keeps the figures from being comparable with published ones.

    Raises:
        UserError: an unknown protocol, a dataset without what it needs, another number of embeddings, NaN or infinity,
            not one probe with a match, names that differ by case or padding alone.
    """
    rule, numbers, labels, split = _split(protocol, dataset)
    if len(embeddings) != len(labels.subject):
        raise UserError(f"embeddings: {len(embeddings)} rows for {len(labels.subject)} sequences of {labels.source}")
    result = rule.score(embeddings, labels, split, {"metric": metric, "progress": progress}, **rule.options)
    result.notes += cautions.view_notes(labels, split, rule.views)
    result.notes += cautions.copy_notes(dataset, numbers, split)
    return result


def _split(protocol: str, dataset: Any) -> tuple[Protocol, np.ndarray, Labels, dict[str, Split]]:
    """The protocol, the numbers of the sequences that it ranks, their labels, and who is probe and gallery in these."""
    rule = PROTOCOLS[resolve(protocol, dataset)]
    numbers = dataset.split(rule.sequences)
    labels = _labels(dataset, numbers)
    # Of all sequences: a name in doubt may be the very reason why one is neither probe nor gallery.
    cautions.check_names(labels, rule.types, rule.views)
    split = rule.split(labels)
    rule.need(labels, split)
    used = np.unique(np.concatenate([rows for part in split.values() for rows in part]))
    if len(used) < len(numbers):
        numbers = numbers[used]
        labels = _labels(dataset, numbers)
        split = rule.split(labels)
    return rule, numbers, labels, split


def submission_sequences(dataset: Any) -> np.ndarray:
    """Numbers of the sequences to embed for a submission, int64 ascending: those of `sequences("grew", dataset)`, and
    the probes."""
    test = dataset.split("test")
    return test[_labels(dataset, test).of(_GREW_KNOWN + _GREW_UNKNOWN)]


def grew_submission(dataset: Any, embeddings: torch.Tensor, *, metric: str = "cosine", progress: bool = False) -> str:
    """The CSV that GREW's site scores: per probe (type 03) the ids of its 20 nearest sequences of types 01 and 02.

    Ids lose their leading zeros and may repeat, rows are in the order of the dataset: OpenGait's GREW_submission.

    Args:
        embeddings: (S, C, P), in the order of `submission_sequences(dataset)`.

    Raises:
        UserError: no probes of type 03, fewer than 20 gallery sequences, an id that is not a number, a doubled video.
    """
    labels, probes, gallery = check_submission(dataset)
    videos = labels.view[probes].tolist()
    nearest = search(embeddings[probes], embeddings[gallery], 20, metric, progress=progress)[1].cpu().numpy()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["videoId", *(f"rank{k}" for k in range(1, 21))])
    for video, row in zip(videos, labels.subject[gallery[nearest]]):
        writer.writerow([video, *(int(name) for name in row)])
    return text.getvalue()


def check_submission(dataset: Any) -> tuple[Labels, np.ndarray, np.ndarray]:
    """Labels of `submission_sequences`, and their rows of probes and gallery; UserError where the dataset cannot give a
    submission (see there)."""
    labels = _labels(dataset, submission_sequences(dataset))
    probes, gallery = labels.of(_GREW_UNKNOWN), labels.of(_GREW_KNOWN)
    if not len(probes) or len(gallery) < 20:
        raise UserError(
            f"{labels.source}: {len(probes)} probes of type 03, {len(gallery)} gallery sequences of types 01 and 02; "
            "a GREW submission needs at least 1 and 20"
        )
    videos = labels.view[probes].tolist()
    if len(set(videos)) < len(videos):
        raise UserError(f"{labels.source}: two probes of type 03 share a video name; prepare GREW's test set again")
    wrong = next((name for name in labels.subject[gallery].tolist() if not name.isdecimal()), None)
    if wrong is not None:
        raise UserError(f"{labels.source}: the id {wrong!r} is not a number as GREW's are, so it cannot be submitted")
    return labels, probes, gallery


def _labels(dataset: Any, numbers: np.ndarray) -> Labels:
    if not len(numbers):
        raise UserError(f"{dataset.path}: no test sequence to evaluate on; prepare it with another --partition")

    def strings(codes: np.ndarray, table: Any) -> np.ndarray:
        used, places = np.unique(codes[numbers], return_inverse=True)
        return np.array([table[code] for code in used])[places.reshape(-1)]

    def member(name: str) -> np.ndarray:
        return np.isin(numbers, dataset.split(name)) if dataset.has_partition else np.zeros(len(numbers), bool)

    return Labels(
        str(dataset.path),
        strings(dataset.subject, dataset.subjects),
        strings(dataset.condition, dataset.conditions),
        strings(dataset.view, dataset.views),
        member("train"),
        member("probe"),
    )
