"""Each protocol on random small sets, with ties, holes and people without a match, against a plain computation.

Features are small integers of one part, so that every comparison of two distances below is one of exact fractions.
"""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaitfast.config import UserError
from gaitfast.retrieval import protocols
from tests.retrieval.test_protocols import dataset, keys_of

CASIA_TYPES = [*(f"nm-{i:02d}" for i in range(1, 7)), "bg-01", "bg-02", "cl-01", "cl-02"]
UNIVERSES = {
    "casia-b": (CASIA_TYPES, ["000", "018", "180"]),
    "casia-b-all-views": (CASIA_TYPES, ["000", "018", "180"]),
    "ou-mvlp": (["00", "01"], ["000", "015", "180", "270"]),
    "ou-mvlp-all-views": (["00", "01"], ["000", "015", "180", "270"]),
    "grew": (["01", "02", "03"], ["xA", "Bq"]),
    "usf17": (["Gal", "PrbA", "PrbD"], ["left"]),
    "gait3d": (["camid0_videoid2", "camid3_videoid2"], ["seq0", "seq1"]),
}
CASIA_GALLERY, CASIA_CROSS = ("nm-01", "nm-02", "nm-03", "nm-04"), ("nm-02", "bg-02", "cl-02")
CASIA_GROUPS = {"NM": ("nm-05", "nm-06"), "BG": ("bg-01", "bg-02"), "CL": ("cl-01", "cl-02")}


def far(x, y, metric):
    """A number that orders as the distance does, without rounding."""
    if metric == "euclidean":
        return sum((a - b) ** 2 for a, b in zip(x, y))
    dot, norms = sum(a * b for a, b in zip(x, y)), sum(a * a for a in x) * sum(b * b for b in y)
    return -Fraction(dot * abs(dot), norms) if norms else Fraction(0)


def one_probe(rows, probe, gallery, metric, without=lambda j: False):
    """(place of the first positive, average precision, inverse negative penalty), or None without a positive."""
    left = [j for j in gallery if not without(j)]
    order = sorted(left, key=lambda j: (far(rows[probe][1], rows[j][1], metric), j))
    places = [n for n, j in enumerate(order, 1) if rows[j][0][0] == rows[probe][0][0]]
    if not places:
        return None
    return places[0], sum(i / p for i, p in enumerate(places, 1)) / len(places), len(places) / places[-1]


def pooled(found, ranks, unmatched):
    """Means in percent over what `one_probe` returned for every probe; None without one match."""
    counted = [x for x in found if x] if unmatched == "drop" else found
    if not any(found):
        return None
    result = {f"rank{k}": [bool(x) and x[0] <= k for x in counted] for k in ranks}
    result["mAP"], result["mINP"] = ([x[i] if x else 0.0 for x in counted] for i in (1, 2))
    return {key: 100.0 * sum(map(float, values)) / len(values) for key, values in result.items()}


def of(rows, types, view=None):
    return [i for i, ((_, kind, at), _) in enumerate(rows) if kind in types and view in (None, at)]


def by_view(rows, probe_types, gallery_types, metric):
    """Mean over probe views of the mean over other gallery views of rank-1; None where it is not defined."""
    views = sorted({rows[i][0][2] for i in of(rows, gallery_types)})
    people = {rows[i][0][0] for i in of(rows, gallery_types)}
    if not any(rows[i][0][0] in people for i in of(rows, probe_types)):
        return None
    means = []
    for own in sorted({rows[i][0][2] for i in of(rows, probe_types)}):
        cells = []
        for view in views:
            probes, gallery = of(rows, probe_types, own), of(rows, gallery_types, view)
            nearest = [min(gallery, key=lambda j: (far(rows[i][1], rows[j][1], metric), j)) for i in probes]
            if view != own:
                cells.append(100.0 * sum(rows[i][0][0] == rows[j][0][0] for i, j in zip(probes, nearest)) / len(probes))
        if not cells:
            return None
        means.append(sum(cells) / len(cells))
    return sum(means) / len(means) if means else None


def across_views(rows, probe_types, gallery_types, metric):
    """(rank-1, mAP): means over probe views, without the same person in the identical view."""
    gallery, means = of(rows, gallery_types), []
    for own in sorted({rows[i][0][2] for i in of(rows, probe_types)}):
        found = []
        for i in of(rows, probe_types, own):
            person = rows[i][0][0]
            found.append(
                one_probe(
                    rows, i, gallery, metric, lambda j, p=person, v=own: rows[j][0][0] == p and rows[j][0][2] == v
                )
            )
        report = pooled(found, (1,), "drop")
        if report is None:
            return None
        means.append((report["rank1"], report["mAP"]))
    return tuple(np.mean(means, axis=0)) if means else None


def expected(protocol, rows, probe_set, metric):
    """Metrics by definition, or None where the protocol has no answer."""
    casia = protocol.startswith("casia")
    groups = CASIA_GROUPS if casia else {"": ("00",)}
    if protocol in ("casia-b", "ou-mvlp"):
        gallery = CASIA_GALLERY if casia else ("01",)
        result = {name: by_view(rows, types, gallery, metric) for name, types in groups.items()}
        if None in result.values():
            return None
        named = {f"rank1_{name}": value for name, value in result.items() if name}
        return named | {"rank1": sum(result.values()) / len(result)}
    if protocol.endswith("all-views"):
        gallery = CASIA_CROSS if casia else ("01",)
        groups = {name: types[:1] if name != "NM" else ("nm-01",) for name, types in groups.items()}
        result = {name: across_views(rows, types, gallery, metric) for name, types in groups.items()}
        if None in result.values():
            return None
        named = {f"{key}_{n}": v[i] for n, v in result.items() if n for i, key in enumerate(("rank1", "mAP"))}
        return named | dict(zip(("rank1", "mAP"), np.mean(list(result.values()), axis=0)))
    if protocol == "usf17":
        sets = sorted({key[1] for key, _ in rows} - {"Gal"})
        parts = {name[3:]: [one_probe(rows, i, of(rows, ("Gal",)), metric) for i in of(rows, (name,))] for name in sets}
        if not parts or not all(any(found) for found in parts.values()):
            return None
        result = pooled([x for found in parts.values() for x in found], (1, 5, 10), "drop")
        if len(parts) > 1:
            result |= {f"rank1_{name}": pooled(found, (1,), "drop")["rank1"] for name, found in parts.items()}
        return result
    if protocol == "grew":
        probes, gallery, rest = of(rows, ("02",)), of(rows, ("01",)), ((1, 5, 10, 20), "miss")
    else:
        probes = [i for i, (key, _) in enumerate(rows) if "-".join(key) in probe_set]
        gallery, rest = [i for i in range(len(rows)) if i not in probes], ((1, 5, 10), "drop")
    return pooled([one_probe(rows, i, gallery, metric) for i in probes], *rest)


@pytest.mark.parametrize("protocol", UNIVERSES)
@given(
    seed=st.integers(0, 2**20),
    metric=st.sampled_from(("cosine", "euclidean")),
    people=st.integers(1, 4),
    kept=st.sampled_from((0.3, 0.6, 0.9, 1.0)),
)
@settings(max_examples=25, deadline=None)
def test_a_protocol_equals_its_definition(protocol, seed, metric, people, kept):
    rng = np.random.default_rng(seed)
    types, views = UNIVERSES[protocol]
    every = [(f"{i:03d}", t, v) for i in range(people) for t in types for v in views]
    keys = [key for key in every if rng.random() < kept] or every[:1]
    probe_set = ["-".join(key) for key in keys if rng.random() < 0.4]
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(Path(folder), keys, protocol, probe=probe_set)
        order = keys_of(data, numbers=data.split("test"))
        features = rng.integers(-2, 3, (len(order), 3))
        rows = [(key, [int(v) for v in row]) for key, row in zip(order, features)]
        wanted = expected(protocol, rows, set(probe_set), metric)
        if wanted is None:
            with pytest.raises(UserError):
                protocols.check(protocol, data)
            return
        embedded = np.isin(data.split("test"), protocols.sequences(protocol, data))
        x = torch.from_numpy(features[embedded][:, :, None].astype(np.float32))
        found = dict(protocols.evaluate(protocol, data, x, metric=metric))
        assert found == pytest.approx(wanted, abs=1e-9)
