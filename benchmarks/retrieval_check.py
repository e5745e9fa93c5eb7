"""That the contenders answer the same question: ours against float64, the others against ours within their float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.reference_retrieval import opengait_report
from benchmarks.retrieval_cases import Features
from gaitfast.retrieval import rank_report

SAMPLE = 24  # queries whose distances are computed in float64


def float64_distances(queries: Tensor, gallery: Tensor, metric: str, at_once: int = 500) -> Tensor:
    """(Q, G); of few queries and any gallery."""
    blocks = []
    for start in range(0, len(gallery), at_once):
        x, y = queries.double().permute(2, 0, 1), gallery[start : start + at_once].double().permute(2, 0, 1)
        if metric == "cosine":
            x, y = (torch.nn.functional.normalize(side, dim=2) for side in (x, y))
            blocks.append(1.0 - (x @ y.transpose(1, 2)).mean(0))
        else:
            blocks.append(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean(0))
    return torch.cat(blocks, 1)


def check_search(metric: str, data: Features, answers: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict]:
    """Fails where ours is not float64's order, or another disagrees where its own error allows no doubt."""
    names = [name for name in answers if name.startswith("ours")]
    distances, indices = answers[names[0]]
    for name in names[1:]:
        assert torch.equal(answers[name][0], distances) and torch.equal(answers[name][1], indices), name
    k = indices.shape[1]
    rows = torch.linspace(0, len(indices) - 1, SAMPLE).long()
    true = float64_distances(data.queries[rows], data.gallery, metric)
    nearest = true.sort(dim=1, stable=True)
    own = true.gather(1, indices[rows])
    assert torch.allclose(own, nearest.values[:, :k], rtol=1e-12, atol=1e-13), "ours is not float64's order"
    assert torch.allclose(distances[rows].double(), own, rtol=2**-23, atol=1e-13), "ours: distances"
    found: dict[str, dict] = {}
    for name, (values, items) in answers.items():
        if name in names:
            continue
        # What float32 costs it, seen at the sampled queries, with room for those that are not sampled.
        error = 4.0 * float((values[rows].double() - true.gather(1, items[rows])).abs().max())
        assert error < 1e-3 * float(own.mean()), f"{name}: no answer in float32 is that far off"
        assert float((values - distances).abs().max()) <= 2.0 * error, f"{name}: distances differ"
        gaps = torch.full((len(distances), k + 1), torch.inf)
        gaps[:, 1:k] = distances.diff(dim=1)
        gaps[:, k] = 0.0  # the first item that is not in the list is unknown
        decided = gaps[:, :k].minimum(gaps[:, 1:]) > 2.0 * error
        assert bool((items == indices)[decided].all()), f"{name}: other neighbours"
        found[name] = {
            "float32_error": error,
            "places_decided": round(float(decided.float().mean()), 4),
            "places_equal": round(float((items == indices).float().mean()), 6),
        }
    return found


def check_report(metric: str, probes: Features, own: dict[str, float], answers: dict[str, Any]) -> dict[str, dict]:
    """Of some probes all figures in float64; then the others within what float32 may move a few probes."""
    rows = torch.linspace(0, len(probes.queries) - 1, SAMPLE).long()
    queries, ids = probes.queries[rows], probes.query_ids[rows]
    true = float64_distances(queries, probes.gallery, metric)
    expected = opengait_report(
        queries, probes.gallery, ids, probes.gallery_ids, metric, vectorised=True, distances=true.numpy()
    )
    got = rank_report(queries, probes.gallery, ids, probes.gallery_ids, metric)
    assert all(abs(got[key] - expected[key]) < 1e-9 for key in expected), (got, expected)
    found = {"ours": {key: round(value, 4) for key, value in own.items()}}
    for name, answer in answers.items():
        if name.startswith("opengait"):
            apart = {key: abs(answer[key] - own[key]) for key in answer}
            assert max(apart.values()) < 100.0 * 5 / len(probes.queries), (name, apart)
            found[name] = {"points_apart": float(f"{max(apart.values()):.3g}")}
    for name, answer in answers.items():
        if name.startswith("ours ") and isinstance(answer, dict):
            assert answer == answers["ours"], name
    return found
