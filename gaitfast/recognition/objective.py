"""The loss of the transfer stage over the global batch of all ranks (paper, Sec. 3.2 and eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaitfast.models.recognizer import Recognizer
from gaitfast.recognition.losses import identity_loss, triplet_loss


class _GatherRows(torch.autograd.Function):
    """Rows (n, ...) of every rank in the order of the ranks -> (n * ranks, ...), the same on each.

    Every rank computes the same loss of all rows, and DeepSpeed averages the ranks' gradients. So the rank's own rows
    get the gradient of that one loss, times the number of ranks.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather_labels(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows] * dist.get_world_size()


def gather_labels(rows: Tensor) -> Tensor:
    """Equally many rows of every rank, in the order of the ranks, without gradient."""
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class RecognitionObjective(nn.Module):
    """L = w_t * L_triplet + w_i * L_identity of a global batch.

    The triplets are those of all ranks' embeddings together; the identity loss is the mean over all ranks' samples, of
    which each rank has as many. With batch norms over all ranks (engine/norms.py), averaged gradients equal those of
    one rank.

    freeze: the backbone is neither trained nor switched to train mode.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        triplet_weight: float = 1.0,
        margin: float = 0.2,
        metric: str = "cosine",
        identity_weight: float = 0.0,
        scale: float = 16.0,
        smoothing: float = 0.1,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.recognizer = recognizer
        self.triplet_weight, self.margin, self.metric = triplet_weight, margin, metric
        self.identity_weight, self.scale, self.smoothing = identity_weight, scale, smoothing
        self.freeze = freeze
        if freeze:
            recognizer.backbone.requires_grad_(False)
        self.train(self.training)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of what `forward` returns: the losses, the share of triplets above zero, the share of right parts."""
        identity = ("identity", "accuracy") if self.identity_weight else ()
        return ("loss", "triplet", "active", *identity)

    def train(self, mode: bool = True) -> RecognitionObjective:
        super().train(mode)
        if self.freeze:
            self.recognizer.backbone.eval()
        return self

    def forward(
        self, silhouettes: Tensor, label: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss (scalar), and the quantities without gradient, (len(quantities),).

        silhouettes: float in [0, 1], (N, S, 64, 44), or packed (1, sum(lengths), 64, 44); label: int64 (N,). Every rank
        brings as many samples.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            features = self.recognizer.backbone(silhouettes, lengths)
        embedding, logits = self.recognizer.head(features)
        everyone, labels = embedding, label
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone, labels = _GatherRows.apply(embedding), gather_labels(label)
        triplet = triplet_loss(everyone, labels, self.margin, self.metric)
        positives = (labels[:, None] == labels).sum(1)
        triplets = (positives * (len(labels) - positives)).sum()
        loss = self.triplet_weight * triplet.loss
        values = [triplet.loss, triplet.active / triplets]
        if self.identity_weight:
            identity = identity_loss(logits, label, scale=self.scale, smoothing=self.smoothing)
            loss = loss + self.identity_weight * identity.loss
            values += [identity.loss, identity.accuracy]
        return loss, torch.stack([value.detach().to(loss.dtype) for value in (loss, *values)])
