"""Distances of a whole tile by matrix products in float64, each with a bound on how far it is from the true value.

The bound is what makes a fast product usable for an exact answer: two pairs whose intervals
[distance - error, distance + error] do not meet are ordered; the few others are computed again (_exact.py). It holds
for every order of summation, hence for any BLAS, tile, thread count and device:
|fl(x.y) - x.y| <= n u |x||y| / (1 - n u) (Higham, "Accuracy and Stability of Numerical Algorithms", sec. 3.1).
All bounds carry a factor of two to spare.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_UNIT = 2.0**-53
_FLOOR = 1e-290  # keeps the Euclidean bound away from 0 / 0; its root is far below any float32 difference


class Interval(NamedTuple):
    """The true distance of pair (i, j) lies in [lower, upper]; both float64 (n, m)."""

    lower: torch.Tensor
    upper: torch.Tensor


class CosineTiles:
    """1 - mean over parts of the cosine; a part of zeros has the cosine 0."""

    def __init__(self, channels: int, parts: int) -> None:
        # Parts are normalised first: each component is off by (C/2 + 4) u relatively, on both sides; then one sum over
        # C P products, whose absolute values add up to 1 at most (Cauchy-Schwarz per part, mean over parts).
        self._error = 2.0 * _UNIT * (channels * parts + channels + 16)

    def side(self, features: torch.Tensor) -> torch.Tensor:
        """(n, C, P) -> float64 (n, C P), unit parts over the square root of P."""
        features = features.double()
        norm = features.square().sum(1, keepdim=True).mul_(features.shape[2]).sqrt_()
        return (features / torch.where(norm > 0, norm, torch.ones_like(norm))).flatten(1)

    def distances(self, queries: torch.Tensor, gallery: torch.Tensor) -> Interval:
        """Between two results of `side`."""
        distance = (queries @ gallery.T).neg_().add_(1.0)
        return Interval(distance - self._error, distance.add_(self._error))


class EuclideanTiles:
    """Mean over parts of the Euclidean distance."""

    def __init__(self, channels: int, parts: int) -> None:
        self._square_error = 4.0 * _UNIT * (channels + 8)
        self._mean_error = 2.0 * _UNIT * (parts + 8)
        self._parts = parts

    def side(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, C, P) -> float64 (P, n, C) and squared norms (P, n)."""
        features = features.permute(2, 0, 1).double().contiguous()
        return features, features.square().sum(2)

    def distances(
        self, queries: tuple[torch.Tensor, torch.Tensor], gallery: tuple[torch.Tensor, torch.Tensor]
    ) -> Interval:
        """Between two results of `side`."""
        shape = queries[0].shape[1], gallery[0].shape[1]
        total = torch.zeros(shape, dtype=torch.float64, device=queries[0].device)
        error = torch.zeros_like(total)
        for x, x_square, y, y_square in zip(*queries, *gallery):
            # |x|^2 + |y|^2 - 2 x.y is off by `bound` at most. With root = sqrt(max(it, bound)), the root of the true
            # square is within bound / root: tight where the distance is large, sqrt(bound) where it vanishes.
            bound = (x_square.max() + y_square.max()) * self._square_error + _FLOOR
            root = torch.addmm(y_square.expand(shape), x, y.T, alpha=-2.0)
            root = torch.maximum(root.add_(x_square[:, None]), bound).sqrt_()
            total += root
            error += bound / root
        total /= self._parts
        error = error.div_(self._parts).mul_(1.0 + self._mean_error).add_(total * self._mean_error)
        return Interval(total - error, total.add_(error))


def tolerance(metric: str, channels: int, parts: int, distances: torch.Tensor) -> torch.Tensor:
    """How far a distance computed in float64, pair by pair and in any order of summation, may be from the true one."""
    if metric == "cosine":
        return torch.full_like(distances, 2.0 * _UNIT * (channels * parts + channels + 16))
    return distances * (2.0 * _UNIT * (channels + parts + 8))


def tiles(metric: str, channels: int, parts: int) -> CosineTiles | EuclideanTiles:
    return {"cosine": CosineTiles, "euclidean": EuclideanTiles}[metric](channels, parts)
