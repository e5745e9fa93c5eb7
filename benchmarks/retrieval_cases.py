"""What retrieval is measured on: sizes, and features that are random or lie as those of a gait model do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS, PARTS = 256, 16  # GaitBase's embedding
SEQUENCES = 4  # of a person, on either side


class Features(NamedTuple):
    queries: Tensor
    gallery: Tensor
    query_ids: Tensor
    gallery_ids: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table of the benchmark: the same question to all contenders."""

    kind: str
    """search or report."""
    queries: int
    gallery: int
    k: int = 50
    metric: str = "cosine"
    data: str = "gait"
    """normal or gait."""
    levels: tuple[str, ...] = ("",)
    """Values of GAITFAST_CPU that ours is measured with; "" is the best that the CPU has."""
    rounds: int = 3
    third: int | None = None
    """Of a report: the reference takes this third of the probes (0, 1, 2), because all take minutes."""

    @property
    def name(self) -> str:
        size = f"{self.queries}x{self.gallery}"
        what = f"k{self.k}" if self.kind == "search" else "probes"
        third = "" if self.third is None else f"-third{self.third + 1}"
        capped = "" if "" in self.levels else "-capped"
        return f"{self.kind}{capped}-{size}-{what}-{self.metric}-{self.data}{third}"

    @property
    def operations(self) -> int:
        """Of one product of all queries with the gallery."""
        return 2 * self.queries * self.gallery * CHANNELS * PARTS

    def features(self) -> Features:
        return make_features(self.data, self.queries, self.gallery)


def make_features(data: str, queries: int, gallery: int, channels: int = CHANNELS, parts: int = PARTS) -> Features:
    """Features (N, C, P) in float32 and their identities; the same on every call.

    normal: independent values, where all distances are about 1.
    gait: people of SEQUENCES sequences per side. A feature is a common one, plus the person, plus the camera and the
        clothing of the walk, plus noise; person and walk lie in few dimensions, so that they get in each other's way.
        Nearly all distances are far below 1, and rank-1 is between 0 and 100 %.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    people = max(1, gallery // SEQUENCES)
    ids = (torch.arange(queries) % people, torch.arange(gallery) % people)
    width = channels * parts
    if data == "normal":
        sides = [normal(len(own), width) for own in ids]
    else:
        traits, conditions = 16, 8
        person, trait_axes = normal(people, traits), normal(traits, width)
        condition_axes, common = normal(conditions, width), normal(width)
        sides = []
        for own in ids:
            side = torch.addmm(3.0 * common, person[own], trait_axes, alpha=0.25)
            side.addmm_(normal(len(own), conditions), condition_axes, alpha=0.3)
            sides.append(side.add_(normal(len(own), width), alpha=0.5))
    queries_, gallery_ = (side.view(len(side), channels, parts) for side in sides)
    return Features(queries_, gallery_, *ids)


NO_AMX = ("", "avx512", "generic")

QUICK = [
    Case(kind="search", queries=3000, gallery=3000),
    Case(kind="search", queries=3000, gallery=3000, data="normal"),
    Case(kind="search", queries=1000, gallery=5000, k=1, levels=NO_AMX),
    Case(kind="search", queries=1000, gallery=5000, metric="euclidean"),
    Case(kind="report", queries=1500, gallery=3000),
]

FULL = [
    Case(kind="search", queries=12000, gallery=12000),
    Case(kind="search", queries=12000, gallery=12000, data="normal"),
    *(Case(kind="report", queries=12000, gallery=12000, third=third, rounds=2) for third in range(3)),
    *(
        Case(kind="search", queries=1000, gallery=5000, k=k, data=data, levels=NO_AMX, rounds=9)
        for k in (1, 50)
        for data in ("gait", "normal")
    ),
    Case(kind="search", queries=6000, gallery=6000, k=1, levels=NO_AMX),
    Case(kind="search", queries=12000, gallery=12000, levels=NO_AMX[1:]),
    Case(kind="search", queries=1000, gallery=5000, k=1, metric="euclidean", levels=NO_AMX, rounds=5),
    Case(kind="search", queries=1000, gallery=5000, metric="euclidean", levels=NO_AMX, rounds=5),
    Case(kind="search", queries=6000, gallery=6000, metric="euclidean", levels=("", "avx512")),
    Case(kind="report", queries=1000, gallery=5000, levels=NO_AMX),
    Case(kind="report", queries=1000, gallery=5000, metric="euclidean"),
]
