"""Rank-k, mAP and mINP from the places of each probe's positives; no distance matrix, no sort of the gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gaitfast.retrieval import _backends, _ops
from gaitfast.retrieval._inputs import (
    Exclusion,
    check_features,
    check_metric,
    check_pair,
    check_values,
    joint_codes,
    matching,
    require,
)
from gaitfast.retrieval._shards import Shard

_MANY_POSITIVES = 256  # per probe: beyond, searching a sorted list of them costs less than comparing with each


@dataclass(frozen=True)
class ProbeRanks:
    """What a ranking says about each probe; all (Q,). An unmatched probe has positives 0 and the other values 0."""

    positives: torch.Tensor
    """int64: gallery items of the probe's identity that are not excluded."""
    first: torch.Tensor
    """int64: place of the nearest of them, from 1."""
    average_precision: torch.Tensor
    """float64: mean over them of the precision at their places."""
    inverse_negative_penalty: torch.Tensor
    """float64: their number over the place of the last of them."""

    def __getitem__(self, selection: Any) -> ProbeRanks:
        """The probes of a bool mask or an index."""
        return ProbeRanks(
            self.positives[selection],
            self.first[selection],
            self.average_precision[selection],
            self.inverse_negative_penalty[selection],
        )

    def hits(self, k: int) -> torch.Tensor:
        """bool (Q,): whether one of the first k gallery items is a positive."""
        return (self.positives > 0) & (self.first <= k)

    def report(self, ranks: Sequence[int] = (1, 5, 10), unmatched: str = "drop") -> RankReport:
        """Means over the probes, in percent. See `rank_report`."""
        require(unmatched in ("drop", "miss"), f"unmatched: is drop or miss, got {unmatched!r}")
        for k in ranks:
            require(hasattr(k, "__index__") and k >= 1, f"ranks: are positive integers, got {k!r}")
        matched = self.positives > 0
        missing = len(matched) - int(matched.sum())
        require(missing < len(matched), "query_ids and gallery_ids: no probe has a match in the gallery")
        selected = self[matched] if unmatched == "drop" else self
        report = RankReport({f"rank{k}": 100.0 * float(selected.hits(k).double().mean()) for k in ranks})
        report["mAP"] = 100.0 * float(selected.average_precision.mean())
        report["mINP"] = 100.0 * float(selected.inverse_negative_penalty.mean())
        report.probes, report.unmatched = len(matched), missing
        return report


class RankReport(dict):
    """{"rank1", "rank5", "rank10", "mAP", "mINP"} in percent; of `.probes` probes `.unmatched` had no positive."""

    probes: int
    unmatched: int


def probe_ranks(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_ids: Sequence,
    gallery_ids: Sequence,
    metric: str = "cosine",
    *,
    exclude: Any = None,
    tile: int | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> ProbeRanks:
    """Each probe's result; arguments as in `rank_report`. On the CPU."""
    check_metric(metric)
    queries, gallery = check_pair(queries, gallery)
    require(tile is None or tile >= 1, f"tile: must be positive, got {tile}")
    shard = Shard(len(gallery), group)
    shard.agree(queries=tuple(queries.shape), dtype=queries.dtype, metric=metric)
    sizes = len(queries), shard.total
    exclusion = Exclusion(exclude, sizes, queries.device)
    codes = joint_codes(query_ids, gallery_ids, "ids", sizes, queries.device)
    positives, offsets = _positives(*codes, exclusion)
    compiled = _backends.backend_of(queries.device, queries.dtype)[0] == "compiled"
    compiled = compiled and len(positives) <= _MANY_POSITIVES * len(queries)
    problem = _ops.Problem(queries, gallery, metric, exclusion, tile=tile, shard=shard, compiled=compiled)
    ranks = _ops.rank_positives(problem, positives, offsets, progress)
    return ProbeRanks(*_summarise(ranks.cpu(), offsets.cpu()))


def _positives(
    codes: torch.Tensor, gallery_codes: torch.Tensor, exclusion: Exclusion
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gallery items of each query's identity that are not excluded: numbers (n,) and offsets (Q + 1,)."""
    owner, positives, _ = matching(codes, gallery_codes)
    there = ~exclusion.pairs(owner, positives)
    size = torch.bincount(owner[there], minlength=len(codes))
    return positives[there], torch.cat((size.new_zeros(1), size.cumsum(0)))


def _summarise(ranks: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Fields of ProbeRanks from the places of the positives of each probe."""
    size = offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(size)), size)
    # Ascending places within each probe: the i-th of them has i positives up to it.
    order = torch.argsort(ranks)
    ranks = ranks[order[torch.argsort(owner[order], stable=True)]]
    number = torch.arange(len(ranks)) - offsets[:-1][owner] + 1
    precision = number.double() / ranks.double()
    matched = size > 0
    first, last = torch.zeros_like(size), torch.ones_like(size)
    first[matched] = ranks[offsets[:-1][matched]]
    last[matched] = ranks[offsets[1:][matched] - 1]
    total = torch.zeros(len(size), dtype=torch.float64).index_add_(0, owner, precision)
    return size, first, total / size.clamp(min=1), size.double() / last.double()


def rank_report(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_ids: Sequence,
    gallery_ids: Sequence,
    metric: str = "cosine",
    ranks: Sequence[int] = (1, 5, 10),
    exclude: Any = None,
    *,
    unmatched: str = "drop",
    tile: int | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> RankReport:
    """Rank-k, mean average precision and mean inverse negative penalty.

    Rank-k is the share of probes with a positive among the first k gallery items; the average precision is the
    non-interpolated mean of the precision at the place of each positive; the inverse negative penalty is the number of
    positives over the place of the last one. The order of the gallery is that of `search`.

    Args:
        queries: probes (Q, C, P). gallery: (G, C, P). metric, tile, progress, group: as in `search`; with a group,
            gallery_ids and exclude are those of the whole gallery.
        query_ids, gallery_ids: one identity per row, all strings or all integers.
        ranks: the k of rank-k; beyond the gallery's size every probe with a match is a hit.
        exclude: as in `search`, for example `(["07-090", ...], ["07-000", ...])` with the id and view of both sides, to
            leave out the identical view of the same person.
        unmatched: `drop` leaves probes without a positive out of every mean (OpenGait's evaluate_Gait3D); `miss` counts
            them with 0 (GREW's protocol).

    Returns:
        {"rank1", "rank5", "rank10", "mAP", "mINP"} in percent (one rank key for each of `ranks`), with the attributes
        `.probes` and `.unmatched`, the numbers of all probes and of those without a positive.

    Raises:
        ValueError: (also a UserError) as `search`; ids of another type or number; no probe with a positive at all.
    """
    result = probe_ranks(
        queries, gallery, query_ids, gallery_ids, metric, exclude=exclude, tile=tile, progress=progress, group=group
    )
    return result.report(ranks, unmatched)


def distance_gap(features: torch.Tensor, ids: Sequence) -> tuple[float, float]:
    """Mean cosine distance of anchor-positive and of anchor-negative pairs, over all pairs of two different rows.

    The mean over pairs of a dot product is the dot product of sums: one pass and no matrix. Paper, Fig. 3.

    Args:
        features: (N, C, P). ids: N strings or integers.

    Returns:
        (positive, negative), each in 0..2.

    Raises:
        ValueError: no two rows of one identity, or a single identity.
    """
    features = check_values(check_features(features, "features"), "features")
    codes = joint_codes(ids, ids, "ids", (len(features),) * 2, features.device)[0]
    unit = torch.nn.functional.normalize(features.double(), dim=1, eps=1e-100).flatten(1) / features.shape[2] ** 0.5
    sums = torch.zeros(int(codes.max()) + 1, unit.shape[1], dtype=torch.float64, device=unit.device)
    sums.index_add_(0, codes, unit)
    sizes = torch.bincount(codes).double()
    own = float(unit.square().sum())
    same, all_pairs = float(sums.square().sum()), float(sums.sum(0).square().sum())
    same_count = float((sizes * (sizes - 1)).sum())
    other_count = float(sizes.sum() ** 2 - sizes.square().sum())
    require(same_count > 0, "ids: no identity has two features, so there is no positive pair")
    require(other_count > 0, "ids: a single identity, so there is no negative pair")
    return 1.0 - (same - own) / same_count, 1.0 - (all_pairs - same) / other_count
