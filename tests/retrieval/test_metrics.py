"""Rank-k, mAP and mINP against the definition probe by probe, and against OpenGait's figures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaitfast.retrieval import rank_report, search
from gaitfast.retrieval.metrics import distance_gap, probe_ranks
from tests.retrieval import golden, oracle
from tests.retrieval.cases import KINDS, features


@given(
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(("cosine", "euclidean")),
    seed=st.integers(0, 2**20),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 24), st.integers(1, 4), st.integers(1, 3)),
    tile=st.integers(1, 12),
    identities=st.integers(1, 9),
    unmatched=st.sampled_from(("drop", "miss")),
    excluded=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_the_report_equals_the_definition(kind, metric, seed, sizes, tile, identities, unmatched, excluded):
    both = features(kind, seed, sizes[0] + sizes[1], *sizes[2:])
    queries, gallery = both[: sizes[0]], both[sizes[0] :]
    rng = np.random.default_rng(seed)
    query_ids, gallery_ids = rng.integers(0, identities, sizes[0]), rng.integers(0, identities, sizes[1])
    mask = rng.random(sizes[:2]) < 0.3 if excluded else None
    distance = oracle.distances(queries, gallery, metric)
    expected = oracle.report(distance, query_ids, gallery_ids, (1, 3, 50), mask, unmatched)
    arguments = (queries, gallery, query_ids, gallery_ids, metric, (1, 3, 50), mask)
    if expected is None:
        with pytest.raises(ValueError, match="no probe has a match"):
            rank_report(*arguments, unmatched=unmatched, tile=tile)
        return
    report = rank_report(*arguments, unmatched=unmatched, tile=tile)
    assert set(report) == set(expected)
    for key, value in expected.items():
        assert report[key] == pytest.approx(value, abs=1e-9), key


@given(
    seed=st.integers(0, 2**20),
    metric=st.sampled_from(("cosine", "euclidean")),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    identities=st.integers(1, 5),
    views=st.integers(1, 3),
    tile=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_identical_views_are_excluded_by_codes(seed, metric, sizes, identities, views, tile):
    """The exclusion of the protocols: same person and same view, as a pair of codes, among ties and string ids."""
    both = features("integers", seed, sum(sizes), 3, 2)
    queries, gallery = both[: sizes[0]], both[sizes[0] :]
    rng = np.random.default_rng(seed)
    ids = [[f"{i:03d}" for i in rng.integers(0, identities, n)] for n in sizes]
    codes = [[f"{i}-{v:03d}" for i, v in zip(side, rng.integers(0, views, len(side)))] for side in ids]
    mask = np.array([[a == b for b in codes[1]] for a in codes[0]])
    expected = oracle.report(oracle.distances(queries, gallery, metric), *ids, (1, 5), mask)
    arguments = (queries, gallery, *ids, metric, (1, 5), tuple(codes))
    if expected is None:
        with pytest.raises(ValueError, match="no probe has a match"):
            rank_report(*arguments, tile=tile)
        return
    assert rank_report(*arguments, tile=tile) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("metric", "name"), [("euclidean", "euc"), ("cosine", "cos")])
def test_opengait_figures(metric, name):
    figures = golden.FIGURES["eval_rank"][name]
    x, ids = golden.clustered(12, 4, 16, 4, 0.4, noise_stream=1, base_stream=2)
    probe = np.arange(48) % 4 == 0
    report = rank_report(x[probe], x[~probe], ids[probe], ids[~probe], metric)
    for key in ("rank1", "rank5", "rank10", "mAP", "mINP"):
        assert report[key] == pytest.approx(figures[key], abs=1e-4), key
    distances, indices = search(x[probe], x[~probe], 36, metric)
    matrix = torch.empty(12, 36).scatter_(1, indices, distances)
    assert float(matrix.double().sum()) == pytest.approx(figures["dist_sum"], rel=1e-5)
    assert matrix[0, :3].tolist() == pytest.approx(figures["dist[0,:3]"], abs=1e-5)


def test_ids_may_be_strings_arrays_or_tensors():
    x = features("normal", 0, 30, 4, 2)
    numbers = np.arange(30) % 6
    strings = [f"{i:04d}" for i in numbers]
    expected = rank_report(x[:10], x[10:], numbers[:10], numbers[10:])
    assert list(expected) == ["rank1", "rank5", "rank10", "mAP", "mINP"]
    for ids in (strings, np.array(strings), np.array(strings, object), torch.from_numpy(numbers), numbers.tolist()):
        assert rank_report(x[:10], x[10:], ids[:10], ids[10:]) == expected


def test_probes_without_a_match_are_counted():
    x = torch.eye(6)[:, :, None]
    ids = ["a", "b", "c"], ["a", "a", "z"]
    dropped = rank_report(x[[0, 1, 2]], x[[0, 3, 4]], *ids)
    assert (dropped["rank1"], dropped.probes, dropped.unmatched) == (100.0, 3, 2)
    missed = rank_report(x[[0, 1, 2]], x[[0, 3, 4]], *ids, unmatched="miss")
    assert missed["rank1"] == missed["rank10"] == pytest.approx(100 / 3)
    assert missed["mAP"] == missed["mINP"] == pytest.approx(100 / 3)


def test_an_excluded_item_is_neither_rival_nor_match():
    """The identical view of the same person is nearest and must not count."""
    queries = torch.tensor([[[1.0], [0.0]]])
    gallery = torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]], [[0.0], [1.0]]])
    ids = ["a"], ["a", "b", "a"]
    assert rank_report(queries, gallery, *ids)["rank1"] == 100.0
    excluded = rank_report(queries, gallery, *ids, exclude=(["a-000"], ["a-000", "b-000", "a-090"]))
    assert excluded == {"rank1": 0.0, "rank5": 100.0, "rank10": 100.0, "mAP": 50.0, "mINP": 50.0}


def test_tiles_change_nothing():
    x = features("integers", 3, 300, 6, 2)
    ids = np.arange(300) % 17
    results = [probe_ranks(x[:100], x[100:], ids[:100], ids[100:], tile=tile) for tile in (1024, 64, 23)]
    for other in results[1:]:
        assert torch.equal(other.first, results[0].first)
        assert torch.equal(other.average_precision, results[0].average_precision)
        assert torch.equal(other.inverse_negative_penalty, results[0].inverse_negative_penalty)


@pytest.mark.parametrize(
    ("query_ids", "gallery_ids", "message"),
    [
        (["a", "b"], [1, 2, 3], "one side holds strings, the other integers"),
        (["a"], ["a", "b", "c"], "query_ids: 1 values for 2 rows"),
        ([0.5, 1.5], [1, 2, 3], "query_ids: values are all strings or all integers"),
        (["a", 1], ["a", "b", "c"], "query_ids: values are all strings or all integers"),
        ([True, False], [1, 2, 3], "query_ids: values are all strings or all integers"),
        ("ab", ["a", "b", "c"], "query_ids: needs one value per row"),
        (np.zeros((2, 1), int), [1, 2, 3], "query_ids: needs one value per row"),
        (np.zeros(2), [1, 2, 3], "query_ids: values are strings or integers, got float64"),
        (["a", "b"], ["x", "y", "z"], "no probe has a match"),
    ],
)
def test_ids_that_cannot_be_compared(query_ids, gallery_ids, message):
    x = torch.ones(5, 2, 1)
    with pytest.raises(ValueError, match=message):
        rank_report(x[:2], x[2:], query_ids, gallery_ids)


@pytest.mark.parametrize("ranks", [(0,), (-1,), (1.5,)])
def test_ranks_are_positive_integers(ranks):
    x = torch.ones(5, 2, 1)
    with pytest.raises(ValueError, match="ranks: are positive integers"):
        rank_report(x[:2], x[2:], [0, 0], [0, 0, 0], ranks=ranks)


def test_distance_gap_is_the_mean_over_all_pairs():
    x = features("sparse", 9, 25, 4, 3)
    ids = np.arange(25) % 4
    distance = oracle.distances(x, x, "cosine")
    same = ids[:, None] == ids
    positive, negative = distance[same & ~np.eye(25, dtype=bool)].mean(), distance[~same].mean()
    assert distance_gap(x, ids) == pytest.approx((positive, negative), abs=1e-12)
    with pytest.raises(ValueError, match="no positive pair"):
        distance_gap(x, np.arange(25))
    with pytest.raises(ValueError, match="no negative pair"):
        distance_gap(x, np.zeros(25, int))
