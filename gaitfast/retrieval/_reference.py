"""Search and counting in plain PyTorch, on any device and in any floating type: the definition of the compiled ones.

Matrix products in float64 by tiles decide nearly everything (_tiles.py), and what their error bounds leave open is
decided by the exact distance (_exact.py). Inputs are checked by the callers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from gaitfast.retrieval._exact import pair_distances
from gaitfast.retrieval._inputs import Exclusion
from gaitfast.retrieval._tiles import Interval, tiles, tolerance

DEFAULT_TILE = 1024
_SLACK = 8  # candidates kept beyond k, so that ties around the k-th place seldom need a second look
_WINDOW_PAIRS = 1 << 16  # pairs looked at together at least, however small the tile
_PAIR_ELEMENTS = 1 << 22  # feature values of the pairs in flight
_INFINITY = float("inf")


class Positives(NamedTuple):
    """Of some queries: what is asked of each. In the order in which the compiled operators take it."""

    offsets: torch.Tensor
    """int64 (Q + 1,): query q asks for items[offsets[q]:offsets[q + 1]]."""
    items: torch.Tensor
    """int64 (n,), numbers in this gallery, or outside of 0..G-1 for items that lie elsewhere."""
    distances: torch.Tensor
    """float64 (n,), within tolerance."""
    exact: torch.Tensor
    """bool (n,): whether the distance is the exact one."""


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

    def exact(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return pair_distances(self.queries, self.gallery, rows, columns, self.metric)

    def within(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Iterator[_Window]:
        """For each member of `rows`, the items whose interval meets [low[i], high[i]]; some members at a time."""
        # An adversarial gallery may put every item into the window, so the number of rows keeps the pairs to a tile's.
        count = max(self.tile * self.tile, _WINDOW_PAIRS) // len(self.gallery)
        count = max(1, min(count, self.tile))
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


def settle(
    exact: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    columns: torch.Tensor,
    interval: Interval,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of each row's candidates, in exact order.

    Args:
        exact: the exact distances, float64 (n,), of the pairs (rows, columns), int64 (n,) each.
        rows: int64 (n,). columns: int64 (n, m), m >= k. interval: (n, m), infinite where there is no candidate.

    Returns:
        Distances float64 (n, k), whose float32 is the exact one's, and gallery numbers int64 (n, k); infinite and -1
        where candidates ran out.
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
    distance[open_pairs] = exact(rows[open_pairs[0]], columns[open_pairs])
    columns, order = columns.sort(1)
    distance, order = distance.gather(1, order).sort(dim=1, stable=True)
    columns = columns.gather(1, order)
    columns[torch.isinf(distance)] = -1
    return distance[:, :k], columns[:, :k]


def search(
    queries: torch.Tensor, gallery: torch.Tensor, k: int, metric: str, exclude: Exclusion, tile: int = DEFAULT_TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest gallery items of every query, ordered by (exact distance, gallery number).

    Args:
        queries: (Q, C, P). gallery: (G, C, P). k: 1..G.
        tile: rows of each side that are held in float64 at a time.

    Returns:
        Distances float64 (Q, k), whose float32 is the exact one's, and gallery numbers int64 (Q, k); where exclusions
        leave fewer than k: infinite, -1.
    """
    problem = _Problem(queries, gallery, metric, exclude, tile)
    distances = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), tile):
        rows = torch.arange(start, min(start + tile, len(queries)), device=queries.device)
        columns, interval = _candidates(problem, rows, min(k + _SLACK, len(gallery)))
        # The k nearest lie below the k-th smallest upper bound; what was dropped lies above the last lower bound kept.
        limit = interval.upper.kthvalue(k, 1).values
        last = interval.lower.amax(1)
        distances[rows], indices[rows] = settle(problem.exact, rows, columns, interval, k)
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
        distances[part], indices[part] = settle(problem.exact, part, columns, Interval(*padded), k)


def count_before(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    given: Positives,
    metric: str,
    exclude: Exclusion,
    tile: int = DEFAULT_TILE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For given items of each query, how many gallery items come before them.

    Args:
        queries: (Q, C, P). gallery: (G, C, P).

    Returns:
        int64 (n,): the items, not excluded, that come before in the order of (exact distance, number); and bool (n,):
        the distance must be exact for that, and the count means nothing.
    """
    problem = _Problem(queries, gallery, metric, exclude, tile)
    counts, unknown = torch.empty_like(given.items), torch.zeros_like(given.exact)
    for start in range(0, len(queries), tile):
        rows = torch.arange(start, min(start + tile, len(queries)), device=queries.device)
        offsets = given.offsets[start : start + len(rows) + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        if part.start < part.stop:
            own = Positives(offsets - part.start, given.items[part], given.distances[part], given.exact[part])
            counts[part], unknown[part] = _count_tile(problem, rows, own)
    return counts, unknown


def _count_tile(problem: _Problem, rows: torch.Tensor, given: Positives) -> tuple[torch.Tensor, torch.Tensor]:
    offsets, positives, distances, exact = given
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), offsets.diff())
    place = torch.arange(len(owner), device=owner.device) - offsets[:-1][owner]
    off = tolerance(problem.metric, *problem.queries.shape[1:], distances).masked_fill(exact, 0.0)
    own = Interval(distances - off, distances + off)
    counts, open_or_closer = _count(problem, rows, owner, place, own)
    # A positive of this gallery meets its own interval; one that meets no other has its count.
    inside = (positives >= 0) & (positives < len(problem.gallery))
    unsure = open_or_closer != counts + inside
    settled = (unsure & exact).nonzero(as_tuple=True)[0]
    for window in problem.within(rows[owner[settled]], own.lower[settled], own.upper[settled]):
        member = settled[window.members]
        query, positive, distance = rows[owner[member]], positives[member], distances[member]
        found = problem.exact(query[window.owner], window.columns)
        tied_before = (found == distance[window.owner]) & (window.columns < positive[window.owner])
        before = window.owner[(found < distance[window.owner]) | tied_before]
        counts[member] = window.below + torch.bincount(before, minlength=len(member))
    return counts, unsure & ~exact


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


def pair_values(
    queries: torch.Tensor, gallery: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, metric: str
) -> torch.Tensor:
    """float64 (n,): the distances of the pairs (queries[rows[i]], gallery[columns[i]]), within `tolerance`."""
    result = torch.empty(len(rows), dtype=torch.float64, device=queries.device)
    step = max(1, _PAIR_ELEMENTS // queries[0].numel())
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        x, y = queries[rows[part]].double(), gallery[columns[part]].double()
        if metric == "euclidean":
            result[part] = (x - y).square().sum(1).sqrt().mean(1)
        else:
            norms = x.square().sum(1).sqrt() * y.square().sum(1).sqrt()
            result[part] = 1.0 - ((x * y).sum(1) / norms.masked_fill(norms == 0, 1.0)).mean(1)
    return result
