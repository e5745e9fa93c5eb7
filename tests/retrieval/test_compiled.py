"""The compiled operators give the bits of the plain path, with every set of instructions, tile, block and shard."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import save_file

from gaitfast.config import UserError
from gaitfast.retrieval import _backends, _ops, open_features, rank_report, search
from gaitfast.retrieval._inputs import Exclusion
from gaitfast.retrieval.metrics import probe_ranks
from tests.retrieval.cases import KINDS, features

METRICS = ("cosine", "euclidean")
LEVELS = ("generic", "avx2", "avx512", "amx")  # each is capped by what this CPU has

pytestmark = pytest.mark.skipif(
    not _backends.compiled_for(torch.device("cpu")), reason="the extension is not built (GAITFAST_BUILD=0)"
)


def plain(monkeypatch, call, *arguments):
    """`call(*arguments)` on the plain path."""
    with monkeypatch.context() as context:
        context.setenv("GAITFAST_BACKEND", "reference")
        return call(*arguments)


def assert_same(found, expected):
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def sides(kind, seed, queries=70, gallery=600, channels=37, parts=3):
    both = features(kind, seed, queries + gallery, channels, parts)
    return both[:queries], both[queries:]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "double"])
def test_search_gives_the_bits_of_the_plain_path(monkeypatch, kind, metric, level):
    monkeypatch.setenv("GAITFAST_CPU", level)
    queries, gallery = sides(kind, 3)
    if metric == "euclidean" and kind == "huge":
        queries, gallery = queries * 1e-3, gallery * 1e-3  # distances within float32
    for k in (1, 20):
        expected = plain(monkeypatch, search, queries, gallery, k, metric)
        assert_same(search(queries, gallery, k, metric), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "copies", "multiples", "neighbours", "integers", "half"])
def test_ranks_are_those_of_the_plain_path(monkeypatch, kind, metric, level):
    monkeypatch.setenv("GAITFAST_CPU", level)
    queries, gallery = sides(kind, 5, 40, 150)
    rng = np.random.default_rng(0)
    ids, gallery_ids = rng.integers(0, 20, len(queries)), rng.integers(0, 20, len(gallery))
    views, gallery_views = rng.integers(0, 3, len(queries)), rng.integers(0, 3, len(gallery))
    exclude = ids * 3 + views, gallery_ids * 3 + gallery_views

    def ranks():
        result = probe_ranks(queries, gallery, ids, gallery_ids, metric, exclude=exclude)
        return result.positives, result.first, result.average_precision, result.inverse_negative_penalty

    assert_same(ranks(), plain(monkeypatch, ranks))


@pytest.mark.parametrize("parts", [1, 2, 7, 16, 31, 64, 65])
@pytest.mark.parametrize("channels", [1, 63, 64, 129])
def test_every_shape_of_a_feature(monkeypatch, channels, parts):
    queries, gallery = sides("normal", parts, 5, 140, channels, parts)
    for metric in METRICS:
        expected = plain(monkeypatch, search, queries, gallery, 9, metric)
        assert_same(search(queries, gallery, 9, metric), expected)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 31), (33, 257), (300, 513)])
def test_every_size_of_a_side(monkeypatch, sizes):
    queries, gallery = sides("normal", 9, *sizes, channels=8, parts=2)
    ids, gallery_ids = np.arange(sizes[0]) % 4, np.arange(sizes[1]) % 4
    for metric in METRICS:
        k = min(sizes[1], 40)
        expected = plain(monkeypatch, search, queries, gallery, k, metric)
        assert_same(search(queries, gallery, k, metric), expected)
        report = rank_report(queries, gallery, ids, gallery_ids, metric)
        assert report == plain(monkeypatch, rank_report, queries, gallery, ids, gallery_ids, metric)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(300, 8), (2100, 2)])
def test_features_and_sides_beyond_one_tile(monkeypatch, shape, level):
    """Products in steps of depth, cosine and Euclidean; several blocks of queries and tiles of the gallery."""
    monkeypatch.setenv("GAITFAST_CPU", level)
    queries, gallery = sides("normal", 4, 270, 1100, *shape)
    for metric in METRICS:
        expected = plain(monkeypatch, search, queries, gallery, 7, metric)
        assert_same(search(queries, gallery, 7, metric), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_the_bounds_of_a_score_hold(monkeypatch, metric):
    """With features made so that every rounding goes the same way: the k nearest are right only if the bounds are."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 4096, 1, generator=generator) + 0.5
    steps = torch.linspace(-2e-5, 2e-5, 400).view(-1, 1, 1)
    gallery = (base * (1 + steps * torch.linspace(0, 1, 4096).view(1, -1, 1)))[torch.randperm(400, generator=generator)]
    expected = plain(monkeypatch, search, base, gallery, 50, metric)
    for level in LEVELS:
        monkeypatch.setenv("GAITFAST_CPU", level)
        assert_same(search(base, gallery, 50, metric), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("at", ["everywhere", "one place", "one step"])
def test_sums_that_only_just_fit_their_integers(monkeypatch, at, metric, level):
    """Rows along each other and against each other, their length spread out evenly or in few places."""
    base = torch.zeros(1, 1100, 2)
    base[:, {"everywhere": slice(None), "one place": slice(700, 701), "one step": slice(512, 768)}[at]] = 1.0
    generator = torch.Generator().manual_seed(1)
    off = 1e-5 * torch.randn(80, 1100, 2, generator=generator)
    signs = torch.where(torch.arange(80) % 3 == 0, -1.0, 1.0).view(-1, 1, 1)
    both = signs * (base + off)
    expected = plain(monkeypatch, search, both[:20], both[20:], 60, metric)
    monkeypatch.setenv("GAITFAST_CPU", level)
    assert_same(search(both[:20], both[20:], 60, metric), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_thousands_of_equal_items_around_the_last_place(monkeypatch, metric):
    queries, gallery = sides("normal", 2, 3, 9000, 4, 2)
    gallery[1000:] = gallery[1000]
    queries[0] = gallery[1000]
    expected = plain(monkeypatch, search, queries, gallery, 5, metric)
    assert_same(search(queries, gallery, 5, metric), expected)
    assert expected[1][0].tolist() == [1000, 1001, 1002, 1003, 1004]


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_steps_and_threads_change_no_bit(metric):
    queries, gallery = sides("copies", 8, 90, 700, 33, 4)
    ids, gallery_ids = np.arange(90) % 9, np.arange(700) % 9
    expected = search(queries, gallery, 25, metric), rank_report(queries, gallery, ids, gallery_ids, metric)
    threads = torch.get_num_threads()
    try:
        for tile, count in ((None, 1), (None, 3), (64, 2), (37, 1), (650, 2)):
            torch.set_num_threads(count)
            assert_same(search(queries, gallery, 25, metric, tile=tile), expected[0])
            assert rank_report(queries, gallery, ids, gallery_ids, metric, tile=tile) == expected[1]
    finally:
        torch.set_num_threads(threads)


def _shard(rank, world, store, metric, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    queries, gallery = sides("copies", 8, 20, 200, 9, 2)
    gallery[150:] = gallery[:50]  # ties between shards
    ids, gallery_ids = np.arange(20) % 5, np.arange(200) % 5
    exclude = np.arange(20) % 7, np.arange(200) % 7
    bounds = [0, 30, 200] if world == 2 else [0, 30, 31, 200]
    own = gallery[bounds[rank] : bounds[rank + 1]]
    group = torch.distributed.group.WORLD
    found = search(queries, own, 60, metric, exclude=exclude, group=group)
    report = rank_report(queries, own, ids, gallery_ids, metric, exclude=exclude, group=group)
    expected = search(queries, gallery, 60, metric, exclude=exclude)
    same = torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    results[rank] = same and report == rank_report(queries, gallery, ids, gallery_ids, metric, exclude=exclude)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_shards_of_several_processes_change_no_bit(tmp_path, metric, world):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_shard, (world, tmp_path / "store", metric, results), nprocs=world)
        assert dict(results) == dict.fromkeys(range(world), True)


def test_a_gallery_in_a_file_is_searched_where_it_lies(tmp_path):
    queries, gallery = sides("half", 4, 30, 900, 16, 4)
    save_file({"features": gallery.contiguous()}, tmp_path / "gallery.safetensors")
    mapped = open_features(tmp_path / "gallery.safetensors")
    assert_same(search(queries, mapped, 10, tile=256), search(queries, gallery, 10))


def test_a_file_that_is_no_gallery_is_named(tmp_path):
    path = tmp_path / "gallery.safetensors"
    with pytest.raises(UserError, match="no such file"):
        open_features(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_features(path)
    save_file({"other": torch.ones(2, 3)}, path)
    with pytest.raises(UserError, match="no tensor 'features'; it has other"):
        open_features(path)
    with pytest.raises(UserError, match=r"other must have shape \(N, C, P\)"):
        open_features(path, "other")


def test_a_row_of_a_later_block_is_named():
    queries, gallery = sides("normal", 1, 3, 100, 4, 2)
    gallery[77, 1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"gallery\[77\].*NaN"):
        search(queries, gallery, 2, tile=20)


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("GAITFAST_CPU", "sse")
    with pytest.raises(RuntimeError, match="GAITFAST_CPU=sse: unknown"):
        search(*sides("normal", 1, 3, 50, 4, 2), 2)


def test_the_plane_is_of_what_the_instructions_multiply(monkeypatch):
    found = []
    for level in LEVELS:
        monkeypatch.setenv("GAITFAST_CPU", level)
        found.append(torch.ops.gaitfast.plane_type())
    widths = ["float32", "int16", "int8"]
    assert found[:2] == ["float32", "float32"]
    assert [widths.index(kind) for kind in found] == sorted(widths.index(kind) for kind in found)


def test_a_forced_backend_is_the_one_that_runs(monkeypatch):
    cpu = torch.device("cpu")
    assert _backends.backend_of(cpu, torch.float32)[0] == "compiled"
    assert _backends.backend_of(cpu, torch.float64)[0] == "reference"
    monkeypatch.setenv("GAITFAST_BACKEND", "reference")
    assert _backends.backend_of(cpu, torch.float32)[0] == "reference"
    monkeypatch.setenv("GAITFAST_BACKEND", "compiled")
    with pytest.raises(UserError, match="GAITFAST_BACKEND=compiled"):
        _backends.backend_of(torch.device("meta"), torch.float32)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_operators_are_what_they_say(monkeypatch, level):
    monkeypatch.setenv("GAITFAST_CPU", level)
    ops = torch.ops.gaitfast
    queries, gallery = (x.contiguous() for x in sides("normal", 6, 5, 40, 4, 2))
    query_squares, squares = ops.part_squares(queries), ops.part_squares(gallery)
    plane = ops.gallery_plane(gallery, squares, "cosine", 1.0)
    head = queries, query_squares, gallery, squares, *plane, "cosine", 1.0
    offsets, none = torch.zeros(6, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    asked = torch.arange(6), torch.arange(5)
    distances, exact = torch.full((5,), 0.9, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    calls = {
        "part_squares": (gallery,),
        "gallery_plane": (gallery, squares, "cosine", 1.0),
        "search_gallery": (*head, 3, offsets, none),
        "count_before": (*head, *asked, distances, exact, offsets, none),
        "pair_distances": (*head[:4], *(torch.arange(5),) * 2, "cosine", True),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(3, 4)}, "must be contiguous"),
        ({0: torch.ones(3, 4, 2).double()}, "must be float32"),
        ({2: torch.ones(9, 5, 2)}, r"same \(C, P\)"),
        ({3: torch.ones(9, 3).double()}, "sums of squares"),
        ({4: torch.zeros(2, 7, dtype=torch.int8)}, "does not belong to this gallery"),
        ({8: 10}, "k: lies in 1..9"),
        ({9: torch.tensor([0, 2, 1, 0])}, "offsets must ascend"),
        ({6: "dot"}, "metric: is cosine or euclidean"),
    ],
)
def test_operators_refuse_what_does_not_fit(change, message):
    ops = torch.ops.gaitfast
    queries, gallery = torch.ones(3, 4, 2), torch.ones(9, 4, 2)
    squares = ops.part_squares(queries), ops.part_squares(gallery)
    plane = ops.gallery_plane(gallery, squares[1], "cosine", 1.0)
    none = torch.zeros(0, dtype=torch.int64)
    arguments = [queries, squares[0], gallery, squares[1], *plane, "cosine", 1.0, 2, torch.zeros(4).long(), none]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        ops.search_gallery(*arguments)


def test_a_count_needs_an_exact_distance_only_where_something_is_near():
    queries, gallery = sides("normal", 6, 1, 50, 4, 2)
    gallery[10] = gallery[20]
    problem = _ops.Problem(queries, gallery, "cosine", Exclusion(None, (1, 50), queries.device), compiled=True)
    order = search(queries, gallery, 50)[1][0].tolist()
    positives = torch.tensor([10, 20, order[0]])
    ranks = _ops.rank_positives(problem, positives, torch.tensor([0, 3]))
    assert ranks.tolist() == [order.index(10) + 1, order.index(20) + 1, 1]
