"""The k nearest gallery items of every probe, exactly."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.distributed as dist

from gaitfast.retrieval import _backends, _ops
from gaitfast.retrieval._inputs import Exclusion, check_metric, check_pair, require
from gaitfast.retrieval._shards import Shard


def search(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    metric: str = "cosine",
    *,
    exclude: Any = None,
    tile: int | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest gallery items of every query.

    The order is that of the float64 distances (the real distance, rounded once), ties by the lower gallery number. It
    does not depend on the tile, the number of threads or the device.

    Args:
        queries: (Q, C, P) in float16, bfloat16, float32 or float64; tensor or NumPy array.
        gallery: (G, C, P), on the same device.
        k: 1..G.
        metric: `cosine`, 1 - mean over parts of the cosine, where a part of zeros has the cosine 0; or `euclidean`, the
            mean over parts of the Euclidean distance.
        exclude: gallery items that do not exist for a query: None, a bool mask (Q, G), or a pair `(query_codes,
            gallery_codes)` of strings or integers that excludes where they are equal, without a Q x G matrix.
        tile: queries of a step and gallery items of a block; by default what keeps the memory beyond inputs and result
            below some 200 MiB. A gallery in a memory-mapped file (`open_features`) may be larger than memory.
        progress: draw a progress bar.
        group: processes that call this together, each with the same queries and a run of the gallery, in the order of
            their ranks. Each gets the whole result; gallery numbers, k and `exclude` are those of the whole gallery.

    Returns:
        distances float32 (Q, k), ascending, and indices int64 (Q, k). Where exclusions leave fewer than k items the
        rest is infinite and -1.

    Raises:
        ValueError: (also a UserError) NaN or infinity, naming side and row; an empty side; shapes, types or devices
            that do not match; k outside 1..G; an unknown metric; a distance beyond float32.
    """
    check_metric(metric)
    queries, gallery = check_pair(queries, gallery)
    require(hasattr(k, "__index__") and not isinstance(k, bool), f"k: must be an integer, got {k!r}")
    k = operator.index(k)
    require(tile is None or tile >= 1, f"tile: must be positive, got {tile}")
    shard = Shard(len(gallery), group)
    shard.agree(queries=tuple(queries.shape), dtype=queries.dtype, metric=metric, k=k)
    require(1 <= k <= shard.total, f"k: lies in 1..{shard.total} (the gallery's size), got {k}")
    exclusion = Exclusion(exclude, (len(queries), shard.total), queries.device)
    compiled = _backends.backend_of(queries.device, queries.dtype)[0] == "compiled"
    compiled = compiled and _backends.few_neighbours(k, len(gallery))
    problem = _ops.Problem(queries, gallery, metric, exclusion, tile=tile, shard=shard, compiled=compiled)
    distances, indices = _ops.search(problem, k, progress)
    overflow = torch.isinf(distances) & (indices >= 0)
    require(
        not bool(overflow.any()), "queries and gallery: distances beyond the range of float32; rescale the features"
    )
    return distances, indices
