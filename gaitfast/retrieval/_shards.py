"""A gallery shared out over processes, each with a run of its items, in the order of their ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gaitfast.retrieval._inputs import require


class Shard:
    """This process's run of gallery items: numbers [first, first + own) of `total`. Without a group: all of them."""

    def __init__(self, own: int, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.first, self.total = group, 0, own
        self.several = group is not None and dist.get_world_size(group) > 1
        if self.several:
            sizes: list = [None] * dist.get_world_size(group)
            dist.all_gather_object(sizes, own, group=group)
            self.first, self.total = sum(sizes[: dist.get_rank(group)]), sum(sizes)

    def agree(self, **facts: object) -> None:
        """ValueError, on every process, unless all were called with the same values."""
        if not self.several:
            return
        gathered: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, facts, group=self.group)
        for name, value in gathered[0].items():
            for rank, other in enumerate(gathered):
                require(other[name] == value, f"{name}: rank 0 has {value}, rank {rank} has {other[name]}")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; where all but one hold zeros, the value of that one, to the bit."""
        if self.several and values.numel():
            dist.all_reduce(values, group=self.group)
        return values

    def beside(self, values: torch.Tensor) -> torch.Tensor:
        """(n, m) of every process side by side: (n, processes * m)."""
        if not self.several:
            return values
        everywhere = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everywhere, values.contiguous(), group=self.group)
        return torch.cat(everywhere, 1)
