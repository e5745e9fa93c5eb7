"""Retrieval by definition: every distance in 80 decimal digits, every order by a plain sort. Slow and independent."""

from decimal import Decimal, localcontext

import numpy as np


def distances(queries, gallery, metric):
    """float64 (Q, G): the real distance, rounded to float64 (the cosine as a mean first, then as a difference)."""
    result = np.empty((len(queries), len(gallery)))
    with localcontext() as context:
        context.prec = 80
        queries, gallery = (_decimals(side) for side in (queries, gallery))
        for i, x in enumerate(queries):
            for j, y in enumerate(gallery):
                result[i, j] = {"cosine": _cosine, "euclidean": _euclidean}[metric](x, y)
    return result


def _decimals(features):
    """(N, C, P) -> N lists of P lists of C exact decimals."""
    features = features.double().numpy()
    return [[[Decimal(float(value)) for value in part] for part in feature.T] for feature in features]


def _cosine(x, y):
    total = Decimal(0)
    for a, b in zip(x, y):
        norms = sum(v * v for v in a) * sum(v * v for v in b)
        if norms:
            total += sum(v * w for v, w in zip(a, b)) / norms.sqrt()
    return 1.0 - float(total / len(x))


def _euclidean(x, y):
    total = sum((sum((v - w) ** 2 for v, w in zip(a, b)).sqrt() for a, b in zip(x, y)), Decimal(0))
    return float(total / len(x))


def search(distance, k, excluded=None):
    """(distances float32 (Q, k), indices (Q, k)); infinite and -1 where candidates run out."""
    distance = distance.copy() if excluded is None else np.where(excluded, np.inf, distance)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    nearest = np.take_along_axis(distance, order, 1)
    return nearest.astype(np.float32), np.where(np.isinf(nearest), -1, order)


def report(distance, query_ids, gallery_ids, ranks=(1, 5, 10), excluded=None, unmatched="drop"):
    """Rank-k, mAP, mINP in percent, probe by probe; None if no probe has a match."""
    rows = []
    for i, own in enumerate(query_ids):
        order = np.argsort(distance[i], kind="stable")
        if excluded is not None:
            order = order[~excluded[i][order]]
        places = [n + 1 for n, j in enumerate(order) if gallery_ids[j] == own]
        if places:
            precision = [(n + 1) / place for n, place in enumerate(places)]
            hits = [float(places[0] <= k) for k in ranks]
            rows.append((*hits, sum(precision) / len(places), len(places) / places[-1]))
        elif unmatched == "miss":
            rows.append((0.0,) * (len(ranks) + 2))
    if not any(any(row) for row in rows):
        return None
    names = [*(f"rank{k}" for k in ranks), "mAP", "mINP"]
    return dict(zip(names, 100.0 * np.mean(rows, axis=0)))
