"""The distance itself: its float64 value, computed for single pairs in twice float64's precision.

What the library calls the distance of a pair is the real number rounded to float64. It does not depend on an order of
summation, so neither on a tile, a thread nor a device, and pairs whose real distances are equal (a feature and its
multiple under the cosine, say) tie. Sums of two floats (high, low) give it: every operation below is error free or good
to about 2^-104. Source: Dekker, "A floating-point technique for extending the available precision", 1971.
"""

from __future__ import annotations

import torch

_CHUNK_ELEMENTS = 1 << 20  # feature values of the pairs in flight: about 20 float64 temporaries of this size
_SPLITTER = 2.0**27 + 1.0

Double = tuple[torch.Tensor, torch.Tensor]


def _two_sum(a: torch.Tensor, b: torch.Tensor) -> Double:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: torch.Tensor, b: torch.Tensor) -> Double:
    product = a * b
    a_high = a * _SPLITTER
    a_high = a_high - (a_high - a)
    b_high = b * _SPLITTER
    b_high = b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _add(a: Double, b: Double) -> Double:
    high, low = _two_sum(a[0], b[0])
    return _two_sum(high, low + (a[1] + b[1]))


def _multiply(a: Double, b: Double) -> Double:
    high, low = _two_product(a[0], b[0])
    return _two_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


def _divide(a: Double, b: Double) -> Double:
    quotient = a[0] / b[0]
    back = _multiply((quotient, torch.zeros_like(quotient)), b)
    rest = _add(a, (-back[0], -back[1]))
    return _two_sum(quotient, rest[0] / b[0])


def _square_root(a: Double) -> Double:
    """Of a number >= 0; 0 gives 0."""
    root = a[0].sqrt()
    square = _two_product(root, root)
    rest = _add(a, (-square[0], -square[1]))
    correction = rest[0] / (2.0 * root)
    return _two_sum(root, torch.where(root > 0, correction, torch.zeros_like(root)))


def _sum(a: Double, axis: int) -> Double:
    """Sum over an axis by halves."""
    high, low = a
    while (length := high.shape[axis]) > 1:
        half = length // 2
        first = tuple(x.narrow(axis, 0, half) for x in (high, low))
        second = tuple(x.narrow(axis, half, half) for x in (high, low))
        total = _add(first, second)
        if length % 2:
            rest = tuple(x.narrow(axis, length - 1, 1) for x in (high, low))
            total = tuple(torch.cat((t, r), axis) for t, r in zip(total, rest))
        high, low = total
    return high.squeeze(axis), low.squeeze(axis)


def _mean_over_parts(a: Double) -> torch.Tensor:
    """(n, P) -> float64 (n,): the mean, rounded once."""
    count = torch.full_like(a[0][:, 0], a[0].shape[1])
    return _divide(_sum(a, 1), (count, torch.zeros_like(count)))[0]


def _cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    dot = _sum(_two_product(x, y), 1)
    norms = _multiply(_sum(_two_product(x, x), 1), _sum(_two_product(y, y), 1))
    zero = norms[0] == 0
    one = torch.ones_like(norms[0])
    norms = torch.where(zero, one, norms[0]), torch.where(zero, torch.zeros_like(one), norms[1])
    return 1.0 - _mean_over_parts(_divide(dot, _square_root(norms)))  # the dot product of a zero part is 0


def _euclidean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    high, low = _two_sum(x, -y)
    square = _two_product(high, high)
    return _mean_over_parts(_square_root(_sum((square[0], square[1] + 2.0 * high * low), 1)))


def pair_distances(
    queries: torch.Tensor, gallery: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, metric: str
) -> torch.Tensor:
    """float64 (n,): the distance of queries[rows[i]] and gallery[columns[i]], correctly rounded.

    Args:
        queries: (Q, C, P), any floating point type. gallery: (G, C, P).
        rows, columns: int64 (n,).
        metric: `cosine`, 1 - mean over parts of the cosine (a part of zeros has the cosine 0), rounded as a mean and
            then as a difference; `euclidean`, the mean over parts of the Euclidean distance.
    """
    distance = {"cosine": _cosine, "euclidean": _euclidean}[metric]
    result = torch.empty(len(rows), dtype=torch.float64, device=queries.device)
    step = max(1, _CHUNK_ELEMENTS // queries[0].numel())
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        result[part] = distance(queries[rows[part]].double(), gallery[columns[part]].double())
    return result
