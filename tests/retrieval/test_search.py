"""The order of `search` is that of the true distances, whatever the tile, and bad input is refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaitfast.config import UserError
from gaitfast.retrieval import search
from gaitfast.retrieval._exact import pair_distances
from gaitfast.retrieval._tiles import tiles
from tests.retrieval import oracle
from tests.retrieval.cases import KINDS, features

METRICS = ("cosine", "euclidean")


def split(kind, seed, queries, gallery, channels, parts):
    both = features(kind, seed, queries + gallery, channels, parts)
    return both[:queries], both[queries:]


@given(
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 2**20),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 24), st.integers(1, 5), st.integers(1, 3)),
    tile=st.integers(1, 12),
    own=st.booleans(),
    excluded=st.booleans(),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_search_equals_the_definition(kind, metric, seed, sizes, tile, own, excluded, data):
    queries, gallery = split(kind, seed, *sizes)
    if own:  # the query is in the gallery: distances of exactly 0
        queries = gallery[torch.arange(len(queries)) % len(gallery)]
    k = data.draw(st.integers(1, len(gallery)), label="k")
    mask = np.random.default_rng(seed).random((len(queries), len(gallery))) < 0.3 if excluded else None
    expected = oracle.search(oracle.distances(queries, gallery, metric), k, mask)
    distances, indices = search(queries, gallery, k, metric, exclude=mask, tile=tile)
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64
    np.testing.assert_array_equal(indices.numpy(), expected[1])
    np.testing.assert_array_equal(distances.numpy(), expected[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_of_a_tile_holds(kind, metric):
    queries, gallery = split(kind, 7, 6, 9, 5, 3)
    rule = tiles(metric, 5, 3)
    lower, upper = rule.distances(rule.side(queries), rule.side(gallery))
    true = torch.from_numpy(oracle.distances(queries, gallery, metric))
    assert bool((lower <= true).all()) and bool((true <= upper).all())


@pytest.mark.parametrize("metric", METRICS)
def test_the_bound_of_a_tile_is_tight(metric):
    queries, gallery = split("normal", 3, 20, 30, 256, 16)
    rule = tiles(metric, 256, 16)
    lower, upper = rule.distances(rule.side(queries), rule.side(gallery))
    assert float((upper - lower).max()) < (
        1e-11 if metric == "cosine" else 1e-9
    )  # so float32 values are nearly decided


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_distance_is_correctly_rounded(kind, metric):
    queries, gallery = split(kind, 11, 5, 8, 7, 3)
    rows, columns = (x.reshape(-1) for x in torch.meshgrid(torch.arange(5), torch.arange(8), indexing="ij"))
    exact = pair_distances(queries, gallery, rows, columns, metric)
    np.testing.assert_array_equal(exact.view(5, 8).numpy(), oracle.distances(queries, gallery, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_tiles_and_threads_change_no_bit(metric):
    queries, gallery = split("normal", 5, 40, 400, 32, 4)
    gallery[300:] = gallery[:100]
    threads = torch.get_num_threads()
    results = []
    try:
        for tile, count in ((1024, 1), (64, 1), (37, 2), (7, 1)):
            torch.set_num_threads(count)
            results.append(search(queries, gallery, 20, metric, tile=tile))
    finally:
        torch.set_num_threads(threads)
    for distances, indices in results[1:]:
        assert torch.equal(distances, results[0][0]) and torch.equal(indices, results[0][1])


@pytest.mark.parametrize("metric", METRICS)
def test_more_ties_than_places_are_kept(metric):
    """40 equal items around the k-th place: more than the candidates that are kept beyond k."""
    queries, gallery = split("normal", 2, 3, 60, 4, 2)
    gallery[10:50] = gallery[10]
    queries[0] = gallery[10]
    for k in (1, 5, 39, 45):
        expected = oracle.search(oracle.distances(queries, gallery, metric), k)
        for tile in (8, 1024):
            np.testing.assert_array_equal(search(queries, gallery, k, metric, tile=tile)[1].numpy(), expected[1])


def test_a_pair_of_codes_excludes_as_the_mask_does():
    queries, gallery = split("normal", 1, 7, 20, 4, 2)
    own, other = [f"p{i % 3}" for i in range(7)], [f"p{i % 5}" for i in range(20)]
    mask = torch.tensor([[a == b for b in other] for a in own])
    by_mask, by_codes = (search(queries, gallery, 20, exclude=e, tile=6) for e in (mask, (own, other)))
    assert torch.equal(by_mask[1], by_codes[1]) and torch.equal(by_mask[0], by_codes[0])
    left = (~mask).sum(1)
    assert bool((by_codes[1] == -1).sum(1).eq(20 - left).all())
    assert bool(torch.isinf(by_codes[0]).sum(1).eq(20 - left).all())


def test_a_part_of_zeros_has_the_cosine_0():
    queries = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    gallery = torch.tensor([[[2.0, 5.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    distances, indices = search(queries, gallery, 2)
    assert indices.tolist() == [[0, 1]] and distances.tolist() == [[0.5, 1.0]]


def test_strides_do_not_matter():
    queries, gallery = split("normal", 4, 6, 15, 5, 3)
    expected = search(queries, gallery, 4)
    strided = gallery.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    backwards = gallery.numpy()[::-1].copy()[::-1]
    assert backwards.strides[0] < 0 and not strided.is_contiguous()
    for same in (strided, backwards):
        for got, want in zip(search(queries, same, 4), expected):
            assert torch.equal(got, want)


@pytest.mark.parametrize("side", ["queries", "gallery"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_named(side, value):
    both = {"queries": torch.ones(4, 3, 2), "gallery": torch.ones(5, 3, 2)}
    both[side][2, 1, 0] = value
    with pytest.raises(ValueError, match=rf"{side}\[2\].*NaN"):
        search(both["queries"], both["gallery"], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: lies in 1..5"),
        ({"k": 6}, "k: lies in 1..5"),
        ({"k": -1}, "k: lies in 1..5"),
        ({"k": 2.0}, "k: must be an integer"),
        ({"metric": "manhattan"}, "metric: is cosine or euclidean"),
        ({"queries": torch.ones(0, 3, 2)}, "queries: empty"),
        ({"gallery": torch.ones(0, 3, 2)}, "gallery: empty"),
        ({"gallery": torch.ones(5, 0, 2)}, "gallery: no values"),
        ({"gallery": torch.ones(5, 3)}, r"gallery: must have shape \(N, C, P\)"),
        ({"gallery": torch.ones(5, 2, 3)}, r"\(C, P\) differ"),
        ({"gallery": torch.ones(5, 3, 2, dtype=torch.int64)}, "gallery: must be floating point"),
        ({"queries": [[[1.0]]]}, "queries: must be a tensor"),
        ({"queries": torch.full((4, 3, 2), 1e61, dtype=torch.float64)}, r"queries\[0\].*rescale"),
        ({"exclude": torch.zeros(4, 4, dtype=torch.bool)}, r"shape \(4, 5\)"),
        ({"exclude": torch.zeros(4, 5)}, r"must be a bool mask \(Q, G\).*got torch.float32"),
        ({"exclude": [["a"] * 4, ["a"] * 5]}, "got list"),
        ({"exclude": (["a"] * 4, [1] * 5)}, "none would ever match"),
        ({"exclude": (["a"] * 4, ["a"] * 4)}, "4 values for 5 rows"),
        ({"tile": 0}, "tile: must be positive"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"queries": torch.ones(4, 3, 2), "gallery": torch.ones(5, 3, 2), "k": 1} | change
    with pytest.raises(ValueError, match=message) as caught:
        search(**arguments)
    assert isinstance(caught.value, UserError)


def test_a_distance_beyond_float32_is_refused():
    queries = torch.full((1, 400, 1), 3e38)
    with pytest.raises(ValueError, match="beyond the range of float32"):
        search(queries, -queries, 1, "euclidean")
    assert search(queries, -queries, 1, "cosine")[0].tolist() == [[2.0]]
