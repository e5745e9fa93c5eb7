"""What a protocol averages over what, given its probes and gallery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from gaitfast.config import UserError
from gaitfast.retrieval.metrics import ProbeRanks, probe_ranks
from gaitfast.retrieval.search import search

RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Table:
    """Percentages by probe (rows) and gallery (columns); None where a cell is not part of the protocol's mean."""

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    row_means: list[float] = field(default_factory=list)
    """Of each row, over the cells that count: what publications print per probe view."""


class Evaluation(dict):
    """Metrics in percent, `rank1` always among them; `.tables` by view, where the protocol has them; counts; `.notes`,
    lines on what keeps the figures from being comparable."""

    def __init__(self, metrics: dict[str, float], *, probes: int, gallery: int, unmatched: int) -> None:
        super().__init__(metrics)
        self.probes, self.gallery, self.unmatched = probes, gallery, unmatched
        self.tables: list[Table] = []
        self.notes: list[str] = []


@dataclass(frozen=True)
class Labels:
    """Of each embedded sequence: id, type, view (strings), and whether its id is in TRAIN_SET and it in PROBE_SET."""

    source: str
    subject: np.ndarray
    condition: np.ndarray
    view: np.ndarray
    trained: np.ndarray
    probe: np.ndarray

    def of(self, conditions: tuple[str, ...]) -> np.ndarray:
        """Rows of the sequences of one of the conditions, int64."""
        return np.flatnonzero(np.isin(self.condition, conditions))


class Split(NamedTuple):
    """Rows of the embedded sequences, int64."""

    probes: np.ndarray
    gallery: np.ndarray


def need_matches(labels: Labels, split: dict[str, Split]) -> None:
    """UserError for a group in which not one probe has a match: 0 % would say something about the features, and this
    does not."""
    for name, part in split.items():
        matched = np.isin(labels.subject[part.probes], labels.subject[part.gallery])
        _need(labels, bool(matched.any()), name, "", "gallery")


def need_other_view(labels: Labels, split: dict[str, Split]) -> None:
    """Besides, UserError where a probe view has no gallery view but its own to be compared with."""
    need_matches(labels, split)
    for part in split.values():
        views = set(labels.view[part.gallery].tolist())
        if len(views) == 1 and views & set(labels.view[part.probes].tolist()):
            raise UserError(f"{labels.source}: only one gallery view, so no view but the identical one to compare with")


def need_matches_across_views(labels: Labels, split: dict[str, Split]) -> None:
    """UserError for a probe view in which nobody is in another view of the gallery."""
    for name, part in split.items():
        seen: dict[str, set[str]] = {}
        for subject, view in zip(labels.subject[part.gallery].tolist(), labels.view[part.gallery].tolist()):
            seen.setdefault(subject, set()).add(view)
        matched: dict[str, bool] = {}
        for subject, view in zip(labels.subject[part.probes].tolist(), labels.view[part.probes].tolist()):
            matched[view] = matched.get(view, False) or bool(seen.get(subject, set()) - {view})
        for view, any_match in matched.items():
            _need(labels, any_match, name, f" in view {view}", "other views of the gallery")


def _need(labels: Labels, matched: bool, group: str, which: str, where: str) -> None:
    if not matched:
        probes = f"no probe{f' of {group}' if group else ''}{which}"
        raise UserError(
            f"{labels.source}: {probes} has a match in the {where}, so there is nothing to rank; check the ids"
        )


def pooled(
    features: torch.Tensor,
    labels: Labels,
    split: dict[str, Split],
    search_options: dict[str, Any],
    *,
    ranks: tuple[int, ...] = RANKS,
    unmatched: str = "drop",
) -> Evaluation:
    """One mean over all probes; with several groups also the rank-1 of each, and of the ids outside TRAIN_SET."""
    results = [_ranks(features, labels, part, search_options) for part in split.values()]
    pooled = ProbeRanks(*(torch.cat([getattr(r, f) for r in results]) for f in ProbeRanks.__dataclass_fields__))
    report = pooled.report(ranks, unmatched)
    metrics = dict(report)
    if len(split) > 1:
        for name, result in zip(split, results):
            metrics[f"rank1_{name}"] = result.report((1,), unmatched)["rank1"]
        unseen = torch.from_numpy(~labels.trained[np.concatenate([part.probes for part in split.values()])])
        if unseen.any() and not unseen.all():
            metrics["rank1_unseen"] = pooled[unseen].report((1,), unmatched)["rank1"]
    return Evaluation(metrics, probes=report.probes, gallery=_gallery_size(split), unmatched=report.unmatched)


def _ranks(
    features: torch.Tensor, labels: Labels, part: Split, search_options: dict[str, Any], exclude: Any = None
) -> ProbeRanks:
    probes, gallery = part
    ids = labels.subject[probes], labels.subject[gallery]
    return probe_ranks(features[probes], features[gallery], *ids, exclude=exclude, **search_options)


def _gallery_size(split: dict[str, Split]) -> int:
    return len(np.unique(np.concatenate([part.gallery for part in split.values()])))


def view_by_view(
    features: torch.Tensor, labels: Labels, split: dict[str, Split], search_options: dict[str, Any]
) -> Evaluation:
    """Rank-1 of every probe view against every gallery view; the mean leaves out identical views.

    The denominator of a cell is all probes of the view, so one without a match in the gallery view is a miss. OpenGait
    rounds each cell to two decimals before it averages; nothing is rounded here.
    """
    metrics: dict[str, float] = {}
    tables = []
    unmatched = 0
    for name, (probes, gallery) in split.items():
        probe_views, gallery_views = (sorted(set(labels.view[rows].tolist())) for rows in (probes, gallery))
        values = np.full((len(probe_views), len(gallery_views)), np.nan)
        for column, view in enumerate(gallery_views):
            seen = gallery[labels.view[gallery] == view]
            nearest = search(features[probes], features[seen], 1, **search_options)[1][:, 0].cpu().numpy()
            hits = labels.subject[seen[nearest]] == labels.subject[probes]
            for row, probe_view in enumerate(probe_views):
                if probe_view != view:
                    values[row, column] = 100.0 * hits[labels.view[probes] == probe_view].mean()
        unmatched += int((~np.isin(labels.subject[probes], labels.subject[gallery])).sum())
        row_means = np.nanmean(values, axis=1)
        metrics[f"rank1_{name}" if name else "rank1"] = float(row_means.mean())
        cells = [[None if np.isnan(value) else float(value) for value in row] for row in values]
        tables.append(Table(f"rank-1 {name}".strip(), probe_views, gallery_views, cells, row_means.tolist()))
    metrics.setdefault("rank1", float(np.mean(list(metrics.values()))))
    probes = sum(len(part.probes) for part in split.values())
    result = Evaluation(metrics, probes=probes, gallery=_gallery_size(split), unmatched=unmatched)
    result.tables = tables
    return result


def all_views(
    features: torch.Tensor, labels: Labels, split: dict[str, Split], search_options: dict[str, Any]
) -> Evaluation:
    """All gallery views at once without the same person in the identical view; means over probe views of means.

    A probe whose person is in no other view of the gallery is left out of the means of its view.
    """
    subject, view = (np.unique(x, return_inverse=True)[1] for x in (labels.subject, labels.view))
    person_and_view = subject * (view.max() + 1) + view
    metrics: dict[str, list[float]] = {}
    unmatched = 0
    for name, part in split.items():
        exclude = person_and_view[part.probes], person_and_view[part.gallery]
        result = _ranks(features, labels, part, search_options, exclude)
        per_view = []
        for one in np.unique(view[part.probes]):
            per_view.append(result[torch.from_numpy(view[part.probes] == one)].report((1,)))
            unmatched += per_view[-1].unmatched
        for key in ("rank1", "mAP"):
            mean = float(np.mean([report[key] for report in per_view]))
            metrics.setdefault(key, []).append(mean)
            if name:
                metrics[f"{key}_{name}"] = [mean]
    probes = sum(len(part.probes) for part in split.values())
    order = sorted(metrics, key=lambda key: "_" in key)  # the figures over all groups first
    means = {key: float(np.mean(metrics[key])) for key in order}
    return Evaluation(means, probes=probes, gallery=_gallery_size(split), unmatched=unmatched)
