"""The two operations of retrieval: the k nearest, and the ranks of given gallery items without sorting.

This is the plain PyTorch path on any device: matrix products in float64 by tiles decide nearly everything (_tiles.py),
and what their error bounds leave open is decided by the exact distance (_exact.py). Inputs are checked by the callers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tqdm import tqdm

from gaitfast.retrieval._exact import pair_distances
from gaitfast.retrieval._inputs import Exclusion
from gaitfast.retrieval._tiles import Interval, tiles

DEFAULT_TILE = 1024
_SLACK = 8  # candidates kept beyond k, so that ties around the k-th place seldom need a second look
_BLOCK = 64  # probes whose positives are compared together: small, so that few pairs are not wanted
_WINDOW_PAIRS = 1 << 16  # pairs looked at together at least, however small the tile
_INFINITY = float("inf")


class _Problem:
    """Queries, gallery, metric and exclusions, seen tile by tile."""

    def __init__(
        self, queries: torch.Tensor, gallery: torch.Tensor, metric: str, exclude: Exclusion, tile: int
    ) -> None:
        self.queries, self.gallery, self.metric, self.exclude, self.tile = queries, gallery, metric, exclude, tile
        self._tiles = tiles(metric, queries.shape[1], queries.shape[2])

    def intervals(self, rows: torch.Tensor) -> Iterator[tuple[int, Interval]]:
        """For the query numbers `rows`: (first column, distances to it and its successors), infinite where excluded."""
        left = self._tiles.side(self.queries[rows])
        for start in range(0, len(self.gallery), self.tile):
            columns = slice(start, start + self.tile)
            interval = self._tiles.distances(left, self._tiles.side(self.gallery[columns]))
            excluded = self.exclude.block(rows, columns)
            if excluded is not None:
                for bound in interval:
                    bound.masked_fill_(excluded, _INFINITY)
            yield start, interval

    def between(self, rows: torch.Tensor, columns: torch.Tensor) -> Interval:
        """Distances of every query in `rows` to every gallery item in `columns`, exclusions ignored."""
        left, right = self._tiles.side(self.queries[rows]), self._tiles.side(self.gallery[columns])
        return self._tiles.distances(left, right)

    def exact(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return pair_distances(self.queries, self.gallery, rows, columns, self.metric)

    def within(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Iterator[_Window]:
        """For each member of `rows`, the items whose interval meets [low[i], high[i]]; some members at a time."""
        # An adversarial gallery may put every item into the window, so the number of rows keeps the pairs to a tile's.
        count = max(self.tile * self.tile, _WINDOW_PAIRS) // len(self.gallery)
        count = max(1, min(count, max(self.tile, _BLOCK)))
        for first in range(0, len(rows), count):
            members = slice(first, min(first + count, len(rows)))
            below = torch.zeros_like(rows[members])
            found = []
            for start, (lower, upper) in self.intervals(rows[members]):
                nearer = upper < low[members, None]
                below += nearer.sum(1)
                owner, column = ((lower <= high[members, None]) & ~nearer).nonzero(as_tuple=True)
                found.append((owner, column + start, lower[owner, column], upper[owner, column]))
            owner, column, lower, upper = (torch.cat(x) for x in zip(*found))
            yield _Window(members, below, owner, column, Interval(lower, upper))


class _Window(NamedTuple):
    """Items in the windows of rows[members]. Pair n: rows[members][owner[n]] and gallery item columns[n]."""

    members: slice
    below: torch.Tensor  # int64 (members,): items that lie below the window
    owner: torch.Tensor
    columns: torch.Tensor
    interval: Interval  # (n,)


def _settle(
    problem: _Problem, rows: torch.Tensor, columns: torch.Tensor, interval: Interval, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of each row's candidates, in exact order.

    Args:
        rows: int64 (n,). columns: int64 (n, m), m >= k. interval: (n, m), infinite where there is no candidate.

    Returns:
        Distances float32 (n, k) and gallery numbers int64 (n, k); infinite and -1 where candidates ran out.
    """
    lower, order = interval.lower.sort(1)
    upper, columns = interval.upper.gather(1, order), columns.gather(1, order)
    before = torch.full_like(upper[:, :1], -_INFINITY)
    apart = lower > torch.cat((before, upper.cummax(1).values[:, :-1]), 1)  # from all that come before
    apart &= torch.cat((upper[:, :-1] < lower[:, 1:], torch.ones_like(apart[:, :1])), 1)
    apart &= lower.float() == upper.float()
    open_pairs = (~apart & torch.isfinite(lower)).nonzero(as_tuple=True)
    # A decided interval touches no other, so any value in it is in the right order beside the exact ones.
    distance = lower
    distance[open_pairs] = problem.exact(rows[open_pairs[0]], columns[open_pairs])
    columns, order = columns.sort(1)
    distance, order = distance.gather(1, order).sort(dim=1, stable=True)
    columns = columns.gather(1, order)
    columns[torch.isinf(distance)] = -1
    return distance[:, :k].float(), columns[:, :k]


def search(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    metric: str,
    exclude: Exclusion,
    tile: int = DEFAULT_TILE,
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest gallery items of every query, ordered by (exact distance, gallery number).

    Args:
        queries: (Q, C, P). gallery: (G, C, P). k: 1..G.
        tile: rows of each side that are held in float64 at a time.

    Returns:
        Distances float32 (Q, k) and gallery numbers int64 (Q, k); where exclusions leave fewer than k: infinite, -1.
    """
    problem = _Problem(queries, gallery, metric, exclude, tile)
    distances = torch.empty(len(queries), k, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in tqdm(
        range(0, len(queries), tile), desc="search", unit="tile", disable=None if progress else True, leave=False
    ):
        rows = torch.arange(start, min(start + tile, len(queries)), device=queries.device)
        columns, interval = _candidates(problem, rows, min(k + _SLACK, len(gallery)))
        # The k nearest lie below the k-th smallest upper bound; what was dropped lies above the last lower bound kept.
        limit = interval.upper.kthvalue(k, 1).values
        last = interval.lower.amax(1)
        distances[rows], indices[rows] = _settle(problem, rows, columns, interval, k)
        if interval.lower.shape[1] < len(gallery):
            crowded = (last <= limit) & torch.isfinite(last)
            _settle_crowded(problem, rows[crowded], limit[crowded], k, distances, indices)
    return distances, indices


def _candidates(problem: _Problem, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, Interval]:
    """The `count` gallery items of each row with the smallest lower bounds, in any order: numbers and intervals."""
    kept: tuple[torch.Tensor, ...] | None = None
    for start, (lower, upper) in problem.intervals(rows):
        column = torch.arange(start, start + lower.shape[1], device=lower.device).expand_as(lower)
        block = (
            (column, lower, upper)
            if kept is None
            else tuple(torch.cat(x, 1) for x in zip(kept, (column, lower, upper)))
        )
        if block[1].shape[1] > count:
            best = block[1].topk(count, dim=1, largest=False, sorted=False).indices
            block = tuple(x.gather(1, best) for x in block)
        kept = block
    column, lower, upper = kept
    return column, Interval(lower, upper)


def _settle_crowded(
    problem: _Problem,
    rows: torch.Tensor,
    limit: torch.Tensor,
    k: int,
    distances: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Answer rows where more items tie around the k-th place than were kept: look at all that may belong."""
    for window in problem.within(rows, torch.full_like(limit, -_INFINITY), limit):
        part = rows[window.members]
        order = torch.argsort(window.owner, stable=True)
        owner = window.owner[order]
        size = torch.bincount(owner, minlength=len(part))
        place = torch.arange(len(owner), device=owner.device) - (size.cumsum(0) - size)[owner]
        shape = len(part), int(size.max())
        columns = torch.zeros(shape, dtype=torch.int64, device=owner.device)
        columns[owner, place] = window.columns[order]
        padded = []
        for bound in window.interval:
            padded.append(torch.full(shape, _INFINITY, dtype=torch.float64, device=owner.device))
            padded[-1][owner, place] = bound[order]
        distances[part], indices[part] = _settle(problem, part, columns, Interval(*padded), k)


def rank_positives(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    positives: torch.Tensor,
    offsets: torch.Tensor,
    metric: str,
    exclude: Exclusion,
    tile: int = DEFAULT_TILE,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """For given gallery items of each query, their places in its ranking, by counting what is closer.

    Args:
        queries: (Q, C, P). gallery: (G, C, P).
        positives: int64 (n,), gallery numbers, not excluded. offsets: int64 (R + 1,): query rows[i] asks for
            positives[offsets[i]:offsets[i + 1]].
        rows: int64 (R,), the query numbers; all by default.

    Returns:
        int64 (n,): 1 + how many items that are not excluded come before, ordered by (exact distance, gallery number).
    """
    problem = _Problem(queries, gallery, metric, exclude, tile)
    if rows is None:
        rows = torch.arange(len(queries), device=queries.device)
    ranks = torch.empty_like(positives)
    for start in range(0, len(rows), tile):
        part = slice(start, min(start + tile, len(rows)))
        first, last = int(offsets[part.start]), int(offsets[part.stop])
        local = offsets[part.start : part.stop + 1] - first
        ranks[first:last] = _rank_tile(problem, rows[part], positives[first:last], local)
    return ranks


def _rank_tile(problem: _Problem, rows: torch.Tensor, positives: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    sizes = offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), sizes)
    if not len(owner):
        return positives
    own = _positive_intervals(problem, rows, positives, owner)
    place = torch.arange(len(owner), device=owner.device) - offsets[:-1][owner]
    closer, open_or_closer = _count(problem, rows, owner, place, own)
    ranks = closer + 1
    # A positive meets its own interval; one that meets no other has its rank.
    unsure = (open_or_closer != ranks).nonzero(as_tuple=True)[0]
    for window in problem.within(rows[owner[unsure]], own.lower[unsure], own.upper[unsure]):
        member = unsure[window.members]
        query, positive = rows[owner[member]], positives[member]
        own_distance = problem.exact(query, positive)[window.owner]
        distance = problem.exact(query[window.owner], window.columns)
        tied_before = (distance == own_distance) & (window.columns < positive[window.owner])
        before = window.owner[(distance < own_distance) | tied_before]
        ranks[member] = 1 + window.below + torch.bincount(before, minlength=len(member))
    return ranks


def _positive_intervals(
    problem: _Problem, rows: torch.Tensor, positives: torch.Tensor, owner: torch.Tensor
) -> Interval:
    """Distances of the pairs (rows[owner[n]], positives[n])."""
    result = torch.empty(2, len(positives), dtype=torch.float64, device=rows.device)
    # Queries with the same positives side by side: then a block's product holds little else than what is asked for.
    first_positive = torch.full_like(rows, torch.iinfo(torch.int64).max)
    first_positive.scatter_reduce_(0, owner, positives, "amin")
    place_of = torch.argsort(torch.argsort(first_positive, stable=True))
    block_of = place_of[owner] // _BLOCK
    for block in torch.unique(block_of).tolist():
        wanted = (block_of == block).nonzero(as_tuple=True)[0]
        row, row_at = torch.unique(owner[wanted], return_inverse=True)
        column, column_at = torch.unique(positives[wanted], return_inverse=True)
        for start in range(0, len(column), problem.tile):
            inside = (column_at >= start) & (column_at < start + problem.tile)
            interval = problem.between(rows[row], column[start : start + problem.tile])
            for line, bound in zip(result, interval):
                line[wanted[inside]] = bound[row_at[inside], column_at[inside] - start]
    return Interval(*result)


def _count(
    problem: _Problem, rows: torch.Tensor, owner: torch.Tensor, place: torch.Tensor, own: Interval
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many items are surely closer than a positive, and how many are closer or undecided (itself among them).

    Args:
        owner, place, own: positive n is number place[n] of row owner[n] and lies in own[n].
    """
    shape = len(rows), int(place.max()) + 1
    results = []
    for bound in own:
        padded = torch.full(shape, _INFINITY, dtype=torch.float64, device=rows.device)
        padded[owner, place] = bound
        results.append((*padded.sort(1), torch.zeros(shape[0], shape[1] + 1, dtype=torch.int64, device=rows.device)))
    (own_lower, lower_order, closer), (own_upper, upper_order, open_or_closer) = results
    base = (torch.arange(len(rows), device=rows.device) * (shape[1] + 1))[:, None]
    for _, (lower, upper) in problem.intervals(rows):
        # Bin b of a row: an item before its b-th smallest positive and all that follow.
        for bins, histogram in (
            (torch.searchsorted(own_lower, upper, right=True), closer),  # upper < own lower
            (torch.searchsorted(own_upper, lower, right=False), open_or_closer),  # lower <= own upper
        ):
            histogram += torch.bincount((bins + base).flatten(), minlength=histogram.numel()).view_as(histogram)
    counts = []
    for histogram, order in ((closer, lower_order), (open_or_closer, upper_order)):
        counted = histogram.cumsum(1)[:, :-1]
        counts.append(torch.empty_like(counted).scatter_(1, order, counted)[owner, place])
    return counts[0], counts[1]
