"""What retrieval accepts: features, identities and exclusions, checked once at the door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gaitfast.config import UserError

METRICS = ("cosine", "euclidean")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHECK_ELEMENTS = 1 << 22  # values looked at together, so that the check of a large gallery needs no second gallery
_FLOAT64_RANGE = (1e-60, 1e60)  # every float32 lies inside; beyond it the products of norms leave float64's own range


class RetrievalError(UserError, ValueError):
    """Input that has no defined answer: a ValueError to a caller, one clear line to a user of the command."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RetrievalError(message)


def check_metric(metric: str) -> None:
    require(metric in METRICS, f"metric: is cosine or euclidean, got {metric!r}")


def check_features(features: Any, side: str) -> torch.Tensor:
    """`features` as a contiguous tensor (N, C, P) without gradient.

    Accepts tensors and NumPy arrays of any strides in float16, bfloat16, float32 or float64. RetrievalError, naming
    the side, for another type, shape or size. The values are looked at by `check_values`.
    """
    if isinstance(features, np.ndarray):
        require(features.dtype.kind == "f", f"{side}: must be floating point, got {features.dtype}")
        features = torch.from_numpy(np.ascontiguousarray(features))
    require(isinstance(features, torch.Tensor), f"{side}: must be a tensor (N, C, P), got {type(features).__name__}")
    require(features.dtype in _DTYPES, f"{side}: must be floating point, got {features.dtype}")
    require(features.ndim == 3, f"{side}: must have shape (N, C, P), got {tuple(features.shape)}")
    require(features.shape[0] > 0, f"{side}: empty, holds no feature")
    require(features.shape[1] > 0 and features.shape[2] > 0, f"{side}: no values in shape {tuple(features.shape)}")
    return features.detach().contiguous()


def check_values(features: torch.Tensor, side: str, first: int = 0) -> torch.Tensor:
    """`features` (N, C, P), whose row 0 is row `first` of the side.

    RetrievalError, naming the side and the row, for NaN and infinity, and for float64 beyond 1e±60.
    """
    rows = max(1, _CHECK_ELEMENTS // features[0].numel())
    for start in range(0, len(features), rows):
        block = features[start : start + rows].flatten(1)
        require_finite(torch.isfinite(block).all(1), side, first + start)
        if features.dtype == torch.float64:
            magnitude = block.abs()
            low, high = _FLOAT64_RANGE
            bad = ((magnitude > high) | ((magnitude > 0) & (magnitude < low))).any(1)
            if bad.any():
                row = first + start + int(bad.nonzero()[0])
                raise RetrievalError(f"{side}[{row}]: holds values beyond {low:g}..{high:g}; rescale the features")
    return features


def require_finite(finite: torch.Tensor, side: str, first: int) -> None:
    """`finite`: bool (n,), of the rows from `first` on."""
    if not finite.all():
        raise RetrievalError(f"{side}[{first + int((~finite).nonzero()[0])}]: holds NaN or infinity")


def check_pair(queries: Any, gallery: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides, checked, with equal C and P, on one device."""
    queries, gallery = check_features(queries, "queries"), check_features(gallery, "gallery")
    require(
        queries.shape[1:] == gallery.shape[1:],
        f"queries and gallery: (C, P) differ, {tuple(queries.shape[1:])} and {tuple(gallery.shape[1:])}",
    )
    require(
        queries.device == gallery.device,
        f"queries and gallery: on different devices, {queries.device} and {gallery.device}",
    )
    return queries, gallery


def _code_array(codes: Any, side: str, length: int) -> np.ndarray:
    if isinstance(codes, torch.Tensor):
        codes = codes.detach().cpu().numpy()
    require(not isinstance(codes, (str, bytes)), f"{side}: needs one value per row, got a single string")
    require(len(codes) == length, f"{side}: {len(codes)} values for {length} rows")
    if not isinstance(codes, np.ndarray):
        codes = [code.item() if isinstance(code, torch.Tensor) and code.ndim == 0 else code for code in codes]
        kinds = {"string" if isinstance(c, str) else type(c).__name__ for c in codes}
        integers = all(isinstance(c, (int, np.integer)) and not isinstance(c, bool) for c in codes)
        require(integers or kinds == {"string"}, f"{side}: values are all strings or all integers, got {sorted(kinds)}")
        codes = np.array(codes)
    elif codes.dtype == object:
        return _code_array(codes.tolist(), side, length)
    require(codes.ndim == 1, f"{side}: needs one value per row, got shape {codes.shape}")
    require(codes.dtype.kind in "iuU", f"{side}: values are strings or integers, got {codes.dtype}")
    return codes


def joint_codes(
    query_values: Sequence | np.ndarray | torch.Tensor,
    gallery_values: Sequence | np.ndarray | torch.Tensor,
    name: str,
    sizes: tuple[int, int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Strings or integers of both sides as int64 codes that are equal where the values are equal."""
    query = _code_array(query_values, f"query_{name}", sizes[0])
    gallery = _code_array(gallery_values, f"gallery_{name}", sizes[1])
    require(
        (query.dtype.kind == "U") == (gallery.dtype.kind == "U"),
        f"query_{name} and gallery_{name}: one side holds strings, the other integers; none would ever match",
    )
    _, codes = np.unique(np.concatenate((query, gallery)), return_inverse=True)
    codes = torch.from_numpy(codes.astype(np.int64).reshape(-1)).to(device)
    return codes[: sizes[0]], codes[sizes[0] :]


def matching(codes: torch.Tensor, gallery_codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gallery items with the code of each query, ascending: owners (n,), items (n,), and numbers per query (Q,)."""
    sorted_codes, by_code = gallery_codes.sort(stable=True)
    first = torch.searchsorted(sorted_codes, codes)
    size = torch.searchsorted(sorted_codes, codes, right=True) - first
    owner = torch.repeat_interleave(torch.arange(len(codes), device=codes.device), size)
    place = torch.arange(len(owner), device=codes.device) - (size.cumsum(0) - size)[owner]
    return owner, by_code[first[owner] + place], size


class Exclusion:
    """Which gallery items do not exist for which query: none, a bool mask (Q, G), or a pair of codes.

    A pair `(query_codes, gallery_codes)` excludes where the codes are equal, and needs Q + G numbers instead of Q x G.
    """

    def __init__(self, exclude: Any, sizes: tuple[int, int], device: torch.device) -> None:
        self.device = device
        self.mask: torch.Tensor | None = None
        self.codes: tuple[torch.Tensor, torch.Tensor] | None = None
        if exclude is None:
            return
        if isinstance(exclude, tuple):
            require(len(exclude) == 2, f"exclude: a pair of code arrays has 2 members, got {len(exclude)}")
            self.codes = joint_codes(*exclude, "codes", sizes, device)
            return
        what = "exclude: must be a bool mask (Q, G) or a pair (query_codes, gallery_codes)"
        require(isinstance(exclude, (torch.Tensor, np.ndarray)), f"{what}, got {type(exclude).__name__}")
        mask = exclude if isinstance(exclude, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(exclude))
        require(mask.dtype == torch.bool, f"{what}, got {mask.dtype}")
        require(tuple(mask.shape) == sizes, f"exclude: a mask has shape {sizes}, got {tuple(mask.shape)}")
        self.mask = mask.to(device)

    def block(self, rows: torch.Tensor, columns: slice) -> torch.Tensor | None:
        """Bool (len(rows), columns): True where the pair is excluded. None: no pair is."""
        if self.mask is not None:
            return self.mask[rows, columns]
        if self.codes is not None:
            return self.codes[0][rows, None] == self.codes[1][columns]
        return None

    def part(self, rows: slice, columns: slice) -> Exclusion:
        """The same for some queries and some items, numbered from 0."""
        part = Exclusion(None, (0, 0), self.device)
        part.mask = None if self.mask is None else self.mask[rows, columns]
        part.codes = None if self.codes is None else (self.codes[0][rows], self.codes[1][columns])
        return part

    def lists(self, rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The excluded items of each query in `rows`, ascending, as numbers within `columns`: offsets and items."""
        count = rows.stop - rows.start
        if self.mask is not None:
            owner, items = self.mask[rows, columns].nonzero(as_tuple=True)
            size = torch.bincount(owner, minlength=count)
        elif self.codes is not None:
            owner, items, size = matching(self.codes[0][rows], self.codes[1][columns])
        else:
            items = size = torch.zeros(count, dtype=torch.int64, device=self.device)
            items = items[:0]
        return torch.cat((size.new_zeros(1), size.cumsum(0))), items

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Bool (n,): True where the pair (rows[i], columns[i]) is excluded."""
        if self.mask is not None:
            return self.mask[rows, columns]
        if self.codes is not None:
            return self.codes[0][rows] == self.codes[1][columns]
        return torch.zeros_like(rows, dtype=torch.bool)
