"""Batch norms whose statistics span the ranks, so that the number of ranks does not change what is learned."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks; the gradient of each rank's share is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class RankBatchNorm(_BatchNorm):
    """Batch norm over the samples of all ranks, which may hold different numbers of them. In eval mode a plain one.

    torch.nn.SyncBatchNorm does this on GPUs only. As there, gradients are those of the sum of the ranks' losses.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2, f"batch norm takes (N, C, ...), got {tuple(input.shape)}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        precise = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        others = [dim for dim in range(x.dim()) if dim != 1]
        column = (1, -1, *[1] * (x.dim() - 2))
        own = precise.new_full((1,), x.numel() / x.shape[1])
        total, count = _SumOverRanks.apply(torch.cat((precise.sum(others), own))).split((x.shape[1], 1))
        mean = total / count
        centred = precise - mean.view(column)
        variance = _SumOverRanks.apply(centred.square().sum(others)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(column) + self.bias.view(column)).to(x.dtype)


def synchronize_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch norm replaced by one over all ranks; parameters, buffers and names stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, RankBatchNorm):
            assert child.affine and child.track_running_stats and child.momentum is not None
            norm = RankBatchNorm(child.num_features, child.eps, child.momentum, device="meta")
            norm._parameters, norm._buffers, norm.training = child._parameters, child._buffers, child.training
            setattr(module, name, norm)
        else:
            synchronize_norms(child, device)
    return module
