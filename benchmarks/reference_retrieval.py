"""The ways that retrieval is measured against, each written plainly: what a user would write, or OpenGait does.

All take features (N, C, P) in float32 on the CPU and work in float32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gaitfast.config import UserError


def unit_rows(features: Tensor) -> Tensor:
    """(N, C, P) -> (N, C P), every part normalised: a dot product is P times the mean cosine."""
    return torch.nn.functional.normalize(features, dim=1).flatten(1)


def torch_search(queries: Tensor, gallery: Tensor, k: int, metric: str = "cosine") -> tuple[Tensor, Tensor]:
    """A product (of each part, for the Euclidean distance), then topk over the whole matrix."""
    parts = gallery.shape[2]
    if metric == "cosine":
        nearest = (unit_rows(queries) @ unit_rows(gallery).T).topk(k)
        return 1.0 - nearest.values / parts, nearest.indices
    total = torch.zeros(len(queries), len(gallery))
    for p in range(parts):
        x, y = queries[:, :, p].contiguous(), gallery[:, :, p].contiguous()
        squares = torch.addmm(y.square().sum(1)[None] + x.square().sum(1)[:, None], x, y.T, alpha=-2.0)
        total += squares.clamp_(min=0.0).sqrt_()
    nearest = total.topk(k, largest=False)
    return nearest.values / parts, nearest.indices


def faiss_module():
    """faiss, with as many threads as PyTorch. UserError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "faiss: not installed; pip install -e '.[bench]', or leave it out with --without faiss"
        ) from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class FaissSearch:
    """IndexFlatIP over the normalised rows, cosine only. `ready_seconds`: the last call without filling the index."""

    def __init__(self) -> None:
        self.module = faiss_module()
        self.ready_seconds = 0.0

    def __call__(self, queries: Tensor, gallery: Tensor, k: int, metric: str = "cosine") -> tuple[Tensor, Tensor]:
        assert metric == "cosine"
        index = self.module.IndexFlatIP(gallery[0].numel())
        index.add(unit_rows(gallery).numpy())
        started = time.perf_counter()
        values, indices = index.search(unit_rows(queries).numpy(), k)
        self.ready_seconds = time.perf_counter() - started
        return 1.0 - torch.from_numpy(values) / gallery.shape[2], torch.from_numpy(indices)


def opengait_distances(queries: Tensor, gallery: Tensor, metric: str = "cosine") -> np.ndarray:
    """A product per part, summed into the whole matrix, on the host."""
    total = torch.zeros(len(queries), len(gallery))
    for p in range(gallery.shape[2]):
        x, y = queries[:, :, p], gallery[:, :, p]
        if metric == "cosine":
            total += torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T
        else:
            squares = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2.0 * (x @ y.T)
            total += squares.relu().sqrt()
    total = total / gallery.shape[2]
    return (1.0 - total if metric == "cosine" else total).numpy()


def opengait_report(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Sequence[int],
    gallery_ids: Sequence[int],
    metric: str = "cosine",
    *,
    vectorised: bool = False,
    distances: np.ndarray | None = None,
) -> dict[str, float]:
    """The matrix, an argsort of every row, then a loop over probes: rank-1, 5, 10, mAP and mINP in percent.

    In that loop OpenGait takes the precision at every place of the gallery in Python. `vectorised`: that in NumPy,
    which OpenGait does not do, as a stricter comparison. `distances`: the matrix, where it is known.
    """
    if distances is None:
        distances = opengait_distances(queries, gallery, metric)
    owners, wanted = np.asarray(gallery_ids), np.asarray(query_ids)
    matches = owners[np.argsort(distances, axis=1)] == wanted[:, None]
    places = np.arange(1, len(owners) + 1)
    results = []
    for hits in matches:
        found = np.flatnonzero(hits)
        if len(found) == 0:
            continue
        counts = hits.cumsum()
        if vectorised:
            precision = counts / places
        else:
            precision = np.asarray([count / (place + 1.0) for place, count in enumerate(counts)])
        average = (precision * hits).sum() / len(found)
        results.append((*(counts[k - 1] > 0 for k in (1, 5, 10)), average, len(found) / (found[-1] + 1.0)))
    means = 100.0 * np.asarray(results, dtype=np.float64).mean(0)
    return dict(zip(("rank1", "rank5", "rank10", "mAP", "mINP"), means.tolist()))
