"""Which code answers: the compiled operators of torch.ops.gaitfast, or plain PyTorch. Both give the same bits.

A block is a run of gallery items together with what is prepared of it, and answers questions about it alone.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os

import torch

from gaitfast.config import UserError
from gaitfast.retrieval import _fakes, _reference
from gaitfast.retrieval._inputs import Exclusion, check_values, require_finite

_COMPILED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLANE_BYTES = 200 << 20  # of what is prepared of a gallery at a time
Prepared = tuple[torch.Tensor, ...]
_MANY_NEIGHBOURS = 8  # beyond an eighth of the gallery, products in float64 cost less than pairs looked at one by one


@functools.cache
def _load() -> None:
    import gaitfast._C  # noqa: F401  registers the operators

    _fakes.register()


def compiled_for(device: torch.device) -> bool:
    """Whether the compiled operators are there for tensors on `device`."""
    if importlib.util.find_spec("gaitfast._C") is None:
        return False
    _load()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("gaitfast::search_gallery", key)


def backend_of(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(`compiled` or `reference`, the reason in a few words). UserError if GAITFAST_BACKEND forces what is not there.

    GAITFAST_BACKEND=reference and compiled hold here as for the operations of gaitfast.kernels; triton does not concern
    retrieval.
    """
    forced = os.environ.get("GAITFAST_BACKEND", "")
    there = compiled_for(device)
    if forced == "compiled" and not there:
        raise UserError("GAITFAST_BACKEND=compiled: the extension is not built for this device; run `make setup`")
    if forced == "reference":
        return "reference", "forced by GAITFAST_BACKEND"
    if not there:
        return "reference", f"the extension has nothing for {device.type}"
    if dtype not in _COMPILED_TYPES:
        return "reference", f"{str(dtype).removeprefix('torch.')} is left to PyTorch"
    return "compiled", "the extension"


class ReferenceBlock:
    """Gallery items [first, first + size) in plain PyTorch."""

    @staticmethod
    def prepare(queries: torch.Tensor) -> Prepared:
        """What every block takes of the queries. RetrievalError for values that are no numbers."""
        return (check_values(queries, "queries"),)

    @staticmethod
    def most_items(gallery: torch.Tensor) -> int:
        """Items of a block, so that what is prepared of them stays within bounds."""
        return len(gallery)

    def __init__(self, queries: Prepared, gallery: torch.Tensor, first: int, size: int, metric: str) -> None:
        (self.queries,), self.metric, self.first, self.size = queries, metric, first, size
        self.items = check_values(gallery[first : first + size], "gallery", first)

    def search(self, rows: slice, k: int, exclusion: Exclusion, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest of these items for queries[rows], as _reference.search; numbers within the block."""
        part = exclusion.part(rows, slice(self.first, self.first + self.size))
        return _reference.search(self.queries[rows], self.items, k, self.metric, part, tile)

    def count_before(
        self, rows: slice, given: _reference.Positives, exclusion: Exclusion, tile: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As _reference.count_before for queries[rows]."""
        part = exclusion.part(rows, slice(self.first, self.first + self.size))
        return _reference.count_before(self.queries[rows], self.items, given, self.metric, part, tile)

    def distances(self, rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """float64 (n,), within tolerance, of the pairs (queries[rows[i]], items[i]), numbers within the block."""
        return _reference.pair_values(self.queries, self.items, rows, items, self.metric)


class CompiledBlock:
    """The same with the operators of torch.ops.gaitfast (csrc/)."""

    @staticmethod
    def prepare(queries: torch.Tensor) -> Prepared:
        return queries, _squares(queries, "queries")

    @staticmethod
    def most_items(gallery: torch.Tensor) -> int:
        bytes_of_value = 4 if torch.ops.gaitfast.plane_type() == "float32" else 2
        return max(1024, _PLANE_BYTES // (bytes_of_value * gallery[0].numel()))

    def __init__(self, queries: Prepared, gallery: torch.Tensor, first: int, size: int, metric: str) -> None:
        self.metric, self.first, self.size = metric, first, size
        items = gallery[first : first + size]
        squares = _squares(items, "gallery", first)
        self._scale = _scale(metric, squares, queries[1])
        self._queries, self._items = queries, (items, squares)
        self._plane: tuple[torch.Tensor, torch.Tensor] | None = None

    def _prepared(self, rows: slice) -> tuple:
        """What the two passes take first."""
        if self._plane is None:
            self._plane = torch.ops.gaitfast.gallery_plane(*self._items, self.metric, self._scale)
        return *(x[rows] for x in self._queries), *self._items, *self._plane, self.metric, self._scale

    def search(self, rows: slice, k: int, exclusion: Exclusion, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        excluded = exclusion.lists(rows, slice(self.first, self.first + self.size))
        return torch.ops.gaitfast.search_gallery(*self._prepared(rows), k, *excluded)

    def count_before(
        self, rows: slice, given: _reference.Positives, exclusion: Exclusion, tile: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        excluded = exclusion.lists(rows, slice(self.first, self.first + self.size))
        return torch.ops.gaitfast.count_before(*self._prepared(rows), *given, *excluded)

    def distances(self, rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return torch.ops.gaitfast.pair_distances(*self._queries, *self._items, rows, items, self.metric, False)


Block = ReferenceBlock | CompiledBlock


def _squares(features: torch.Tensor, side: str, first: int = 0) -> torch.Tensor:
    """Sums of squares per part, float64 (N, P). RetrievalError for NaN or infinity."""
    squares = torch.ops.gaitfast.part_squares(features)
    require_finite(torch.isfinite(squares).all(1), side, first)
    return squares


def _scale(metric: str, *squares: torch.Tensor) -> float:
    """The power of two that brings the longest part of all to at most 1; 1 for the cosine, which has no scale."""
    longest = max(float(side.max()) for side in squares) ** 0.5
    return 2.0 ** -math.ceil(math.log2(longest)) if metric == "euclidean" and longest > 0 else 1.0


def few_neighbours(k: int, gallery: int) -> bool:
    """Whether a search of k neighbours is one for the compiled operators."""
    return k * _MANY_NEIGHBOURS <= max(gallery, 1024)
