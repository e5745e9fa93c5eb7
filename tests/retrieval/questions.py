"""Questions to the retrieval operators whose answers must be the same bits on every device."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from tests.retrieval.cases import features


@dataclass
class Question:
    """Features of one kind, items excluded, and some positives of each query."""

    queries: torch.Tensor
    gallery: torch.Tensor
    metric: str
    scale: float
    k: int
    excluded: tuple[torch.Tensor, torch.Tensor]
    positives: tuple[torch.Tensor, torch.Tensor]


def _lists(mask):
    """A bool matrix as offsets (Q + 1,) and items (n,)."""
    counts = torch.from_numpy(mask.sum(1))
    return torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))), torch.from_numpy(
        np.ascontiguousarray(mask.nonzero()[1])
    )


def question(kind, metric, seed, sizes, k=None, excluded=0.3, positives=0.1):
    """A question about `sizes` (queries, gallery, channels, parts); each query's first item is one of its positives."""
    rng = np.random.default_rng(seed)
    number, gallery = sizes[:2]
    both = features(kind, seed, number + gallery, *sizes[2:])
    squares = both.double().square().sum(1)
    longest = float(squares.max())
    scale = 2.0 ** -math.ceil(math.log2(longest) / 2 + 1e-9) if metric == "euclidean" and longest > 0 else 1.0
    mask, chosen = rng.random((2, number, gallery)) < np.array([excluded, positives])[:, None, None]
    chosen[:, 0] = True
    k = k or int(rng.integers(1, gallery + 1))
    split = both[:number].contiguous(), both[number:].contiguous()
    return Question(*split, metric, scale, k, _lists(mask), _lists(chosen))


def answers(operators, asked, device="cpu"):
    """Everything the operators say that must not depend on the device, by name; tensors on the CPU."""
    queries, gallery = asked.queries.to(device), asked.gallery.to(device)
    excluded, (offsets, items) = [x.to(device) for x in asked.excluded], (x.to(device) for x in asked.positives)
    squares, gallery_squares = operators.part_squares(queries), operators.part_squares(gallery)
    plane = operators.gallery_plane(gallery, gallery_squares, asked.metric, asked.scale)
    sides = queries, squares, gallery, gallery_squares
    rest = *plane, asked.metric, asked.scale
    distances, nearest = operators.search_gallery(*sides, *rest, asked.k, *excluded)
    rows = torch.repeat_interleave(offsets.diff())
    quick, exact = (operators.pair_distances(*sides, rows, items, asked.metric, known) for known in (False, True))
    yes = torch.ones_like(items, dtype=torch.bool)
    counts, open_counts = operators.count_before(*sides, *rest, offsets, items, exact, yes, *excluded)
    assert not open_counts.any()
    quick_counts, open_counts = operators.count_before(*sides, *rest, offsets, items, quick, ~yes, *excluded)
    result = {
        "distances": distances.float(),
        "items": nearest,
        "exact": exact,
        "counts": counts,
        "counts by quick distances": torch.where(open_counts, counts, quick_counts),
    }
    return {name: value.cpu() for name, value in result.items()}
