"""The losses of the supervised stage: batch-all triplets per part, and the identity loss over the logits of all parts.

Both work in float32 or better whatever the autocast, keep every statistic on the device, and take any distribution of
labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("cosine", "euclidean")


class TripletLoss(NamedTuple):
    """Scalars: the loss and, without gradient, what OpenGait logs beside it, each averaged over the parts."""

    loss: Tensor
    hardest: Tensor
    """The largest single triplet's loss."""
    active: Tensor
    """Triplets with a loss above zero."""
    distance: Tensor
    """Mean of all pairwise distances."""


class IdentityLoss(NamedTuple):
    """Scalars: the loss and, without gradient, the share of parts and samples whose largest logit is the identity's."""

    loss: Tensor
    accuracy: Tensor


def part_distances(embedding: Tensor, metric: str = "cosine") -> Tensor:
    """All pairwise distances per part: (N, E, P) -> (P, N, N), float32 or better.

    "euclidean": sqrt(relu(|x|^2 + |y|^2 - 2 x.y)), whose gradient at distance 0 is 0. "cosine": 1 - x.y of the unit
    vectors.
    """
    assert metric in METRICS, f"metric is one of {', '.join(METRICS)}, got {metric!r}"
    with torch.autocast(embedding.device.type, enabled=False):
        x = _precise(embedding).permute(2, 0, 1)
        if metric == "cosine":
            x = F.normalize(x, dim=2)
            return 1 - torch.matmul(x, x.transpose(1, 2))
        square = x.square().sum(2)
        return (square[:, :, None] + square[:, None, :] - 2 * torch.matmul(x, x.transpose(1, 2))).relu().sqrt()


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def triplet_loss(embedding: Tensor, labels: Tensor, margin: float = 0.2, metric: str = "cosine") -> TripletLoss:
    """Batch-all triplet loss (Hermans et al., 2017) per part, as OpenGait computes it.

    For every anchor a, every positive i of the same label *including a itself*, and every negative j:
    relu(D[a,i] - D[a,j] + margin); per part the sum over the number of triplets above zero; then the mean over parts.

    embedding: (N, E, P); labels: int64 (N,). Instead of the N x positives x negatives triplets, the distances of each
    anchor are sorted and every distance is weighted by the number of active triplets that it occurs in: memory P x N x
    N, value and gradient the same. A part without an active triplet has loss 0.
    """
    distance = part_distances(embedding, metric)
    positive = labels[:, None] == labels[None, :]
    weight, active = _triplet_weights(distance.detach(), positive, margin)
    # Triplets compare distances of one anchor, so a constant per anchor cancels; without it float32 sums lose digits.
    centred = distance - distance.detach().mean(2, keepdim=True)
    loss = ((weight * centred).sum((1, 2)) + margin * active) / (active + 1e-9)
    with torch.no_grad():
        farthest = distance.masked_fill(~positive, -torch.inf).amax(2)
        nearest = distance.masked_fill(positive, torch.inf).amin(2)
        hardest = (farthest - nearest + margin).relu().amax(1)
    return TripletLoss(loss.mean(), hardest.mean(), active.mean(), distance.detach().mean())


def _triplet_weights(distance: Tensor, positive: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """How often each distance enters an active triplet, as positive (+) or negative (-), and the triplets per part.

    distance (P, N, N) without gradient, positive bool (N, N) -> weight (P, N, N), active (P,).
    """
    threshold = (distance + margin).masked_fill(~positive, -torch.inf)
    negatives = distance.masked_fill(positive, torch.inf)
    # A triplet is active when threshold[i] > distance[j]: count the j below each i, and the i above each j.
    below = torch.searchsorted(negatives.sort(2).values, threshold, right=False)
    above = distance.shape[2] - torch.searchsorted(threshold.sort(2).values, negatives, right=True)
    below = below.masked_fill(~positive, 0)
    return (below - above.masked_fill(positive, 0)).to(distance.dtype), below.sum((1, 2)).to(distance.dtype)


def identity_loss(logits: Tensor, labels: Tensor, *, scale: float = 16.0, smoothing: float = 0.1) -> IdentityLoss:
    """Cross-entropy with label smoothing over the scaled logits (N, K, P), mean over samples and parts.

    labels: int64 (N,) in 0..K-1. Smoothing eps: (1 - eps) * NLL + eps * mean over the classes of -log p.
    """
    targets = labels[:, None].expand(-1, logits.shape[2])
    loss = F.cross_entropy(_precise(logits) * scale, targets, label_smoothing=smoothing)
    accuracy = (logits.detach().argmax(1) == targets).float().mean()
    return IdentityLoss(loss, accuracy)
