"""The two passes of retrieval: the k nearest, and the places of given gallery items without sorting.

A gallery is taken in blocks, so that what is prepared of it stays within bounds however large it is, and may be shared
out over processes. What blocks and processes say is merged by float64 distances within a known tolerance, and what that
leaves open by exact ones: neither changes a bit of the result. Shapes are checked by the callers, values here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from gaitfast.retrieval import _reference
from gaitfast.retrieval._backends import Block, CompiledBlock, ReferenceBlock
from gaitfast.retrieval._exact import pair_distances
from gaitfast.retrieval._inputs import Exclusion
from gaitfast.retrieval._shards import Shard
from gaitfast.retrieval._tiles import Interval, tolerance

_STEP_ROWS = 4096  # queries of a step at least: between steps Python is back, for the progress bar and Ctrl-C
Found = tuple[torch.Tensor, torch.Tensor]


class Problem:
    """Queries (Q, C, P), and of the gallery (G, C, P) the items of this process.

    Args:
        exclude: by numbers of the whole gallery.
        tile: queries of a step and items of a block; None: as many as memory and threads suggest.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        gallery: torch.Tensor,
        metric: str,
        exclude: Exclusion,
        *,
        tile: int | None = None,
        shard: Shard | None = None,
        compiled: bool = False,
    ) -> None:
        self.queries, self.gallery, self.metric = queries, gallery, metric
        self.shard = shard or Shard(len(gallery))
        self.exclude = exclude.part(slice(0, len(queries)), slice(self.shard.first, self.shard.first + len(gallery)))
        self.tile = tile or _reference.DEFAULT_TILE
        self._kind = CompiledBlock if compiled else ReferenceBlock
        self._prepared = self._kind.prepare(queries)
        self._block_rows = tile or self._kind.most_items(gallery)
        self._step_rows = tile or max(_STEP_ROWS, 1024 * torch.get_num_threads())
        self._only: Block | None = None

    def blocks(self) -> Iterator[Block]:
        """One block after the other. The only block of a small gallery is prepared once."""
        for first in range(0, len(self.gallery), self._block_rows):
            size = min(self._block_rows, len(self.gallery) - first)
            block = self._only or self._kind(self._prepared, self.gallery, first, size, self.metric)
            if size == len(self.gallery):
                self._only = block
            yield block

    def steps(self) -> list[slice]:
        """The queries in runs."""
        count = len(self.queries)
        return [slice(s, min(s + self._step_rows, count)) for s in range(0, count, self._step_rows)]

    def bar(self, name: str, progress: bool) -> tqdm:
        """Of one pass over the gallery."""
        total = len(self.steps()) * -(-len(self.gallery) // self._block_rows)
        return tqdm(total=total, desc=name, unit="tile", disable=None if progress else True, leave=False)

    def quick(self, rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """float64 (n,), within tolerance, of the pairs (query rows[i], item items[i] of the whole gallery)."""
        result = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        local = items - self.shard.first
        for block in self.blocks():
            own = ((local >= block.first) & (local < block.first + block.size)).nonzero(as_tuple=True)[0]
            result[own] = block.distances(rows[own], local[own] - block.first)
        return self.shard.sum(result)  # elsewhere it is 0

    def exact(self, rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """float64 (n,), exact, of the same pairs; called by every process alike."""
        local = items - self.shard.first
        own = ((local >= 0) & (local < len(self.gallery))).nonzero(as_tuple=True)[0]
        result = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        result[own] = self.exact_here(rows[own], items[own])
        return self.shard.sum(result)

    def exact_here(self, rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """float64 (n,), exact, of pairs whose item this process has."""
        return pair_distances(self.queries, self.gallery, rows, items - self.shard.first, self.metric)


def search(problem: Problem, k: int, progress: bool = False) -> Found:
    """The k nearest gallery items of every query, ordered by (exact distance, gallery number).

    Returns:
        Distances float32 (Q, k) and gallery numbers int64 (Q, k); where exclusions leave fewer than k: infinite, -1.
    """
    best: Found | None = None
    with problem.bar("search", progress) as bar:
        for block in problem.blocks():
            found = []
            for rows in problem.steps():
                distances, items = block.search(rows, min(k, block.size), problem.exclude, problem.tile)
                found.append((distances, torch.where(items < 0, -1, items + block.first + problem.shard.first)))
                bar.update()
            here = torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])
            best = here if best is None else _merge(problem, [best, here], k, problem.exact_here)
    if problem.shard.several:
        missing = k - best[0].shape[1]
        best = (
            torch.nn.functional.pad(best[0], (0, missing), value=torch.inf),
            torch.nn.functional.pad(best[1], (0, missing), value=-1),
        )
        best = _merge(problem, [tuple(problem.shard.beside(x) for x in best)], k, problem.exact)
    return best[0].float(), best[1]


def _merge(problem: Problem, found: list[Found], k: int, exact: Callable[..., torch.Tensor]) -> Found:
    """The k nearest of several results for all queries."""
    distances, items = (torch.cat(x, 1) for x in zip(*found))
    off = tolerance(problem.metric, *problem.queries.shape[1:], distances)
    off = torch.where(torch.isinf(distances), 0.0, off)
    rows = torch.arange(len(items), device=items.device)
    width = min(k, items.shape[1])
    return _reference.settle(exact, rows, items, Interval(distances - off, distances + off), width)


def rank_positives(
    problem: Problem, positives: torch.Tensor, offsets: torch.Tensor, progress: bool = False
) -> torch.Tensor:
    """For given gallery items of each query, their places in its ranking, by counting what is closer.

    Args:
        positives: int64 (n,), gallery numbers, not excluded. offsets: int64 (Q + 1,): query q asks for
            positives[offsets[q]:offsets[q + 1]].

    Returns:
        int64 (n,): 1 + how many items that are not excluded come before, ordered by (exact distance, gallery number).
    """
    owner = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
    distances = problem.quick(owner, positives)
    counts, unknown = _count(problem, positives, offsets, distances, False, progress)
    again = unknown.nonzero(as_tuple=True)[0]
    if len(again):
        # Something lies within rounding of these positives: once more, for them alone, with their exact distances.
        size = torch.bincount(owner[again], minlength=len(offsets) - 1)
        offsets = torch.cat((size.new_zeros(1), size.cumsum(0)))
        distances = problem.exact(owner[again], positives[again])
        counts[again] = _count(problem, positives[again], offsets, distances, True, progress)[0]
    return counts + 1


def _count(
    problem: Problem,
    positives: torch.Tensor,
    offsets: torch.Tensor,
    distances: torch.Tensor,
    exact: bool,
    progress: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many items of all processes come before each positive, and for which that needs its exact distance."""
    counts = torch.zeros_like(positives)
    unknown = torch.zeros_like(positives)
    known = torch.full_like(positives, exact, dtype=torch.bool)
    local = positives - problem.shard.first
    with problem.bar("rank", progress) as bar:
        for block in problem.blocks():
            for rows in problem.steps():
                part = slice(int(offsets[rows.start]), int(offsets[rows.stop]))
                if part.start < part.stop:
                    asked = offsets[rows.start : rows.stop + 1] - part.start
                    given = _reference.Positives(asked, local[part] - block.first, distances[part], known[part])
                    found = block.count_before(rows, given, problem.exclude, problem.tile)
                    counts[part] += found[0]
                    unknown[part] += found[1]
                bar.update()
    return problem.shard.sum(counts), problem.shard.sum(unknown) > 0
