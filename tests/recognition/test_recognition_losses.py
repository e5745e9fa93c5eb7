"""The supervised losses against loops in float64 that follow the definition."""

import pytest
import torch

from gaitfast.recognition import identity_loss, triplet_loss
from gaitfast.recognition.losses import part_distances


def embedding(n: int, channels: int, parts: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, parts, generator=generator, dtype=dtype)


def every_triplet(x: torch.Tensor, labels: list[int], margin: float, metric: str):
    """(mean over parts of loss, hardest, active, mean distance) by visiting each triplet, anchors as positives too."""
    losses, hardest, active, distances = [], [], [], []
    for part in range(x.shape[2]):
        y = x[:, :, part]
        if metric == "cosine":
            y = y / y.norm(dim=1, keepdim=True)
        n = len(labels)
        d = [[1 - y[i] @ y[j] if metric == "cosine" else _distance(y[i], y[j]) for j in range(n)] for i in range(n)]
        terms = [
            d[a][i] - d[a][j] + margin
            for a in range(n)
            for i in range(n)
            for j in range(n)
            if labels[a] == labels[i] != labels[j]
        ]
        positive = [t for t in terms if t > 0]
        losses.append(sum(positive) / len(positive) if positive else y.sum() * 0)
        hardest.append(max([0.0, *(t.item() for t in terms)]))
        active.append(len(positive))
        distances.append(sum(v.item() for row in d for v in row) / n**2)
    mean = [sum(values) / len(values) for values in (losses, hardest, active, distances)]
    return mean


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).norm() if a is not b and not torch.equal(a, b) else (a - b).sum() * 0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 1, 0, 2, 0, 0, 1], [4, 3, 2, 1]])
@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_triplet_loss_is_the_sum_over_all_triplets(metric, labels, margin):
    x = embedding(len(labels), 5, 3).requires_grad_()
    result = triplet_loss(x, torch.tensor(labels), margin, metric)
    y = x.detach().clone().requires_grad_()
    loss, hardest, active, distance = every_triplet(y, labels, margin, metric)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    assert result.hardest.item() == pytest.approx(hardest, rel=1e-9)
    assert result.active.item() == pytest.approx(active)
    assert result.distance.item() == pytest.approx(distance, rel=1e-6)
    result.loss.backward()
    loss.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-9)
    assert not (result.hardest.requires_grad or result.active.requires_grad or result.distance.requires_grad)


def test_anchors_are_their_own_positives():
    """One sample per identity: without self-positives there would be no triplet at all."""
    x = torch.tensor([[1.0, 0.0], [0.995, 0.0999]])[:, :, None]
    result = triplet_loss(x, torch.tensor([0, 1]), margin=0.2, metric="cosine")
    assert result.active.item() == 2
    assert result.loss.item() == pytest.approx(0.2 - part_distances(x)[0, 0, 1].item(), abs=1e-6)


def test_equal_embeddings_cost_the_margin_and_send_no_gradient():
    x = torch.zeros(4, 8, 3, requires_grad=True)
    result = triplet_loss(x, torch.tensor([0, 0, 1, 1]), margin=0.2, metric="euclidean")
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.2)
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nothing_to_separate_costs_nothing(metric):
    far = torch.eye(4)[:, :, None].repeat(1, 1, 2)
    x = (far[[0, 0, 1, 1]] * 3).requires_grad_()
    result = triplet_loss(x, torch.tensor([0, 0, 1, 1]), metric=metric)
    result.loss.backward()
    assert result.loss.item() == 0 and result.active.item() == 0 and not x.grad.any()
    single = triplet_loss(torch.randn(3, 4, 2), torch.tensor([5, 5, 5]), metric=metric)
    assert single.loss.item() == 0 and single.hardest.item() == 0


def test_a_bad_embedding_is_not_a_quiet_zero():
    x = torch.randn(4, 8, 2)
    x[1, 3, 0] = float("nan")
    assert triplet_loss(x, torch.tensor([0, 0, 1, 1])).loss.isnan()


def test_float32_keeps_its_digits_over_a_large_batch():
    """32 x 4 samples, distances near 100: the shift per anchor is what keeps the sums exact enough."""
    x = embedding(128, 64, 4) + 0.0
    x = x * 10
    labels = torch.arange(128) // 4
    exact = triplet_loss(x, labels, metric="euclidean").loss.item()
    assert triplet_loss(x.float(), labels, metric="euclidean").loss.item() == pytest.approx(exact, rel=1e-4)


def test_losses_leave_autocast():
    x, labels = embedding(6, 16, 4, dtype=torch.float32), torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", torch.bfloat16):
        inside = triplet_loss(x, labels).loss, identity_loss(x, labels).loss
    outside = triplet_loss(x, labels).loss, identity_loss(x, labels).loss
    assert inside == outside and all(loss.dtype == torch.float32 for loss in inside)
    assert triplet_loss(x.bfloat16(), labels).loss.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_identity_loss_by_definition(smoothing):
    logits, labels = embedding(5, 7, 3).requires_grad_(), torch.tensor([0, 6, 2, 2, 5])
    result = identity_loss(logits, labels, scale=16, smoothing=smoothing)
    total, hits = 0.0, 0
    for sample in range(5):
        for part in range(3):
            log_p = torch.log_softmax(16 * logits[sample, :, part].detach(), 0)
            total += float(-(1 - smoothing) * log_p[labels[sample]] - smoothing * log_p.mean())
            hits += int(log_p.argmax() == labels[sample])
    assert result.loss.item() == pytest.approx(total / 15, rel=1e-12)
    assert result.accuracy.item() == pytest.approx(hits / 15)
    assert result.loss.requires_grad and not result.accuracy.requires_grad
