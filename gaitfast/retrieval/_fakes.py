"""What the compiled operators return, without computing it: for torch.compile, export and opcheck."""

from __future__ import annotations

import torch


def _plane_shape(kind: str, rows: int, segments: int, values: int) -> tuple[int, ...]:
    """See csrc/cpu/retrieval/plane.h."""
    if kind == "float32":
        return segments, rows, values
    depth = 64 if kind == "int8" else 32
    plane = segments * (-(-rows // 32) * 32) * (-(-values // depth) | 1) * depth
    return (2, plane) if kind == "int8" else (plane,)


def register() -> None:
    """Tell PyTorch. Called once, after the extension is loaded."""

    @torch.library.register_fake("gaitfast::part_squares")
    def _(features):
        return features.new_empty((features.shape[0], features.shape[2]), dtype=torch.float64)

    @torch.library.register_fake("gaitfast::gallery_plane")
    def _(features, squares, metric, scale):
        rows, channels, parts = features.shape
        segments, values = (1, channels * parts) if metric == "cosine" else (parts, channels)
        kind = torch.ops.gaitfast.plane_type()
        plane = features.new_empty(_plane_shape(kind, rows, segments, values), dtype=getattr(torch, kind))
        return plane, features.new_empty((rows, segments, 3), dtype=torch.float32)

    @torch.library.register_fake("gaitfast::search_gallery")
    def _(queries, _a, _b, _c, _d, _e, _f, _g, k, _h, _i):
        shape = queries.shape[0], k
        return queries.new_empty(shape, dtype=torch.float64), queries.new_empty(shape, dtype=torch.int64)

    @torch.library.register_fake("gaitfast::count_before")
    def _(_a, _b, _c, _d, _e, _f, _g, _h, _i, positives, _j, exact, _k, _l):
        return torch.empty_like(positives), torch.empty_like(exact)

    @torch.library.register_fake("gaitfast::pair_distances")
    def _(queries, _a, _b, _c, rows, _d, _e, _f):
        return queries.new_empty(rows.shape, dtype=torch.float64)
