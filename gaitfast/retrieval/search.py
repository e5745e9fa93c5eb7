"""The k nearest gallery items of every probe, exactly."""

from __future__ import annotations

import operator
from typing import Any

import torch

from gaitfast.retrieval import _ops
from gaitfast.retrieval._inputs import Exclusion, check_metric, check_pair, require


def search(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    metric: str = "cosine",
    *,
    exclude: Any = None,
    tile: int = _ops.DEFAULT_TILE,
    progress: bool = False,
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
        tile: rows of each side that are held in float64 at a time. Memory beyond the inputs and the result is about
            tile x (40 C P + 60 tile) bytes.
        progress: draw a progress bar.

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
    require(1 <= k <= len(gallery), f"k: lies in 1..{len(gallery)} (the gallery's size), got {k}")
    require(tile >= 1, f"tile: must be positive, got {tile}")
    exclusion = Exclusion(exclude, (len(queries), len(gallery)), queries.device)
    distances, indices = _ops.search(queries, gallery, k, metric, exclusion, tile, progress)
    overflow = torch.isinf(distances) & (indices >= 0)
    require(
        not bool(overflow.any()), "queries and gallery: distances beyond the range of float32; rescale the features"
    )
    return distances, indices
