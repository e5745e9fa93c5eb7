"""Each protocol against a few lines that say what it means, on packed datasets with known features."""

import csv
import io
import json
import pickle

import numpy as np
import pytest
import torch

from gaitfast.config import UserError
from gaitfast.data import packed
from gaitfast.retrieval import protocols
from tests.conftest import run_command
from tests.retrieval import golden, oracle


def dataset(folder, keys, protocol, *, train=(), test=None, probe=()):
    """A packed dataset of one-frame sequences (id, type, view)."""
    frame = np.full((1, 64, 64), 255, np.uint8)
    partition = {"TRAIN_SET": list(train), "TEST_SET": test or sorted({k[0] for k in keys}), "PROBE_SET": list(probe)}
    return packed.write(folder / "set", [(*key, frame) for key in keys], protocol=protocol, partition=partition)


def keys_of(data, protocol="auto", numbers=None):
    """(id, type, view) of the sequences that a protocol embeds, or of `numbers`, in this order."""
    numbers = protocols.sequences(protocol, data) if numbers is None else numbers
    return [
        (data.subjects[data.subject[i]], data.conditions[data.condition[i]], data.views[data.view[i]]) for i in numbers
    ]


def noisy(keys, seed=0, channels=6, parts=2):
    """Features (len(keys), C, P) that depend on the person, with noise."""
    rng = np.random.default_rng(seed)
    people = sorted({k[0] for k in keys})
    base = rng.standard_normal((len(people), channels, parts))
    rows = [0.5 * base[people.index(k[0])] + rng.standard_normal((channels, parts)) for k in keys]
    return torch.from_numpy(np.array(rows, np.float32))


def test_gait3d_ranks_the_probe_set_against_the_rest(tmp_path):
    keys = [(f"{i:04d}", f"camid{c}_videoid2", f"seq{s}") for i in range(8) for c in range(2) for s in range(3)]
    probe = [f"{i:04d}-camid1_videoid2-seq{i % 3}" for i in range(2, 8)]
    data = dataset(
        tmp_path, keys, "gait3d", train=["0000", "0001"], test=[f"{i:04d}" for i in range(2, 8)], probe=probe
    )
    order = keys_of(data)
    assert len(order) == 36 and {k[0] for k in order} == {f"{i:04d}" for i in range(2, 8)}
    x = noisy(order)
    mask = np.array(["-".join(k) in probe for k in order])
    ids = np.array([k[0] for k in order])
    for metric in ("cosine", "euclidean"):
        result = protocols.evaluate("auto", data, x, metric=metric)
        expected = oracle.report(oracle.distances(x[mask], x[~mask], metric), ids[mask], ids[~mask])
        assert dict(result) == pytest.approx(expected)
        assert (result.probes, result.gallery, result.unmatched) == (6, 30, 0)
    assert dict(protocols.evaluate("walkers", data, x)) == dict(protocols.evaluate("gait3d", data, x))


def test_grew_ranks_02_against_01_and_counts_misses(tmp_path):
    keys = [(f"{i:05d}", t, f"v{i}{t}") for i in range(30) for t in ("01", "02")]
    keys.remove(("00004", "01", "v401"))  # a probe without a match
    keys += [("probe", "03", "v900"), ("00001", "03", "distractor")]
    data = dataset(tmp_path, keys, "grew")
    order = keys_of(data)
    assert order == sorted(key for key in keys if key[1] != "03"), "type 03 has no part in it, so it is not embedded"
    x = noisy(order, 1)
    kind, ids = (np.array([k[i] for k in order]) for i in (1, 0))
    probe, gallery = kind == "02", kind == "01"
    result = protocols.evaluate("auto", data, x)
    distance = oracle.distances(x[probe], x[gallery], "cosine")
    expected = oracle.report(distance, ids[probe], ids[gallery], (1, 5, 10, 20), unmatched="miss")
    assert dict(result) == pytest.approx(expected)
    assert (result.probes, result.gallery, result.unmatched) == (30, 29, 1)


def test_the_grew_submission_has_the_official_form(tmp_path):
    keys = [(f"{i:05d}", t, f"v{i}{t}") for i in range(15) for t in ("01", "02")]
    keys += [("probe", "03", f"w{i}") for i in range(4)]
    data = dataset(tmp_path, [*keys, ("00003", "04", "none of the three")], "grew")
    order = keys_of(data, numbers=protocols.submission_sequences(data))
    assert order == sorted(keys)
    x = noisy(order, 2)
    text = protocols.grew_submission(data, x, metric="euclidean")
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["videoId", *(f"rank{i}" for i in range(1, 21))]
    assert [row[0] for row in rows[1:]] == ["w0", "w1", "w2", "w3"]
    gallery = np.array([k[1] in ("01", "02") for k in order])
    ids = [int(k[0]) for k, inside in zip(order, gallery) if inside]
    _, nearest = oracle.search(oracle.distances(x[~gallery], x[gallery], "euclidean"), 20)
    assert [[int(v) for v in row[1:]] for row in rows[1:]] == [[ids[j] for j in row] for row in nearest]
    assert "\r" not in text and text.endswith("\n")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([(f"{i:05d}", "01", "v") for i in range(25)], "0 probes of type 03"),
        ([("00001", "01", "v"), ("probe", "03", "w")], "1 gallery sequences"),
        ([(f"id{i}", "01", "v") for i in range(20)] + [("probe", "03", "w")], "'id0' is not a number"),
        (
            [(f"{i:05d}", "01", "v") for i in range(20)] + [("probe", "03", "w"), ("probe2", "03", "w")],
            "two probes of type 03 share",
        ),
    ],
)
def test_a_grew_submission_that_cannot_be(tmp_path, keys, message):
    data = dataset(tmp_path, keys, "grew")
    with pytest.raises(UserError, match=message):
        protocols.grew_submission(data, torch.ones(len(keys), 2, 1))


def test_who_is_known(tmp_path):
    """GREW's probes share one id that names nobody; everywhere else an id is a person."""
    keys = [("00001", "01", "a"), ("00001", "02", "b"), ("probe", "03", "c"), ("probe", "03", "d")]
    data = dataset(tmp_path, keys, "grew")
    assert keys_of(data, numbers=protocols.known("auto", data)) == keys[:2]
    data = dataset(tmp_path / "other", keys, "none")
    assert keys_of(data, numbers=protocols.known("auto", data)) == keys
    assert keys_of(data, numbers=protocols.known("grew", data)) == keys[:2]


def casia_b(tmp_path):
    """The golden case: features in its order (id > type > view, nm before bg and cl), as a dataset has them."""
    types = [f"nm-{i:02d}" for i in range(1, 7)] + ["bg-01", "bg-02", "cl-01", "cl-02"]
    keys = [(f"{i:03d}", t, v) for i in range(75, 79) for t in types for v in ("000", "018", "036")]
    x, _ = golden.clustered(4, 30, 8, 2, 0.6, noise_stream=3, base_stream=4)
    data = dataset(tmp_path, keys, "casia-b")
    return data, x[[keys.index(key) for key in keys_of(data)]]


@pytest.mark.parametrize(("metric", "name"), [("euclidean", "euc"), ("cosine", "cos")])
def test_opengait_figures_of_casia_b(tmp_path, metric, name):
    data, x = casia_b(tmp_path)
    result = protocols.evaluate("auto", data, x, metric=metric)
    for group in ("NM", "BG", "CL"):
        figure = golden.FIGURES["casia_b"][name][f"scalar/test_accuracy/{group}@R1"]
        assert result[f"rank1_{group}"] == pytest.approx(figure, abs=1e-4)
    assert result["rank1"] == pytest.approx(np.mean([result[f"rank1_{g}"] for g in ("NM", "BG", "CL")]))
    assert [(t.title, t.rows, t.columns) for t in result.tables] == [
        (f"rank-1 {g}", ["000", "018", "036"], ["000", "018", "036"]) for g in ("NM", "BG", "CL")
    ]
    assert all(
        (value is None) == (i == j) for i, row in enumerate(result.tables[0].values) for j, value in enumerate(row)
    )


def by_view(order, x, metric, probe_types, gallery_types):
    """Rank-1 by (probe view, gallery view), cell by cell."""
    distance = oracle.distances(x, x, metric)
    views = sorted({k[2] for k in order})
    table = {}
    for a in views:
        for b in views:
            probes = [i for i, k in enumerate(order) if k[1] in probe_types and k[2] == a]
            gallery = [i for i, k in enumerate(order) if k[1] in gallery_types and k[2] == b]
            hits = [order[gallery[int(np.argmin(distance[i, gallery]))]][0] == order[i][0] for i in probes]
            table[a, b] = 100.0 * np.mean(hits)
    return table


def test_casia_b_cell_by_cell(tmp_path):
    data, x = casia_b(tmp_path)
    result = protocols.evaluate("auto", data, x)
    table = by_view(keys_of(data), x, "cosine", ("bg-01", "bg-02"), ("nm-01", "nm-02", "nm-03", "nm-04"))
    for row, values in zip(result.tables[1].rows, result.tables[1].values):
        for column, value in zip(result.tables[1].columns, values):
            assert value is None if row == column else value == pytest.approx(table[row, column])


def test_ou_mvlp_counts_probes_without_a_match(tmp_path):
    keys = [(f"{i:05d}", t, v) for i in range(6) for t in ("00", "01") for v in ("000", "015", "090")]
    keys.remove(("00002", "01", "015"))
    data = dataset(tmp_path, keys, "ou-mvlp")
    order = keys_of(data)
    x = noisy(order, 3)
    table = by_view(order, x, "cosine", ("00",), ("01",))
    views = ("000", "015", "090")
    means = [np.mean([table[a, b] for b in views if b != a]) for a in views]
    assert protocols.evaluate("auto", data, x)["rank1"] == pytest.approx(np.mean(means))


@pytest.mark.parametrize("protocol", ["casia-b-all-views", "ou-mvlp-all-views"])
def test_all_views_leaves_out_the_identical_view_of_the_person(tmp_path, protocol):
    if protocol.startswith("casia"):
        data, x = casia_b(tmp_path)
        every, used = keys_of(data), keys_of(data, protocol)
        assert (len(every), len(used)) == (120, 72), "the other walks have no part in it"
        x = x[[every.index(key) for key in used]]
        probes, gallery_types = {"NM": "nm-01", "BG": "bg-01", "CL": "cl-01"}, ("nm-02", "bg-02", "cl-02")
    else:
        keys = [(f"{i:05d}", t, v) for i in range(6) for t in ("00", "01") for v in ("000", "015", "090")]
        data = dataset(tmp_path, keys, "ou-mvlp")
        x = noisy(keys_of(data), 4)
        probes, gallery_types = {"": "00"}, ("01",)
    order = keys_of(data, protocol)
    distance = oracle.distances(x, x, "cosine")
    gallery = [i for i, k in enumerate(order) if k[1] in gallery_types]
    result = protocols.evaluate(protocol, data, x)
    means = []
    for name, kind in probes.items():
        per_view = []
        for view in sorted({k[2] for k in order}):
            rows = [i for i, k in enumerate(order) if k[1] == kind and k[2] == view]
            excluded = np.array([[order[i][0] == order[j][0] and order[j][2] == view for j in gallery] for i in rows])
            ids = [[order[i][0] for i in side] for side in (rows, gallery)]
            per_view.append(oracle.report(distance[np.ix_(rows, gallery)], *ids, excluded=excluded))
        means.append([np.mean([report[key] for report in per_view]) for key in ("rank1", "mAP")])
        if name:
            assert [result[f"rank1_{name}"], result[f"mAP_{name}"]] == pytest.approx(means[-1])
    assert [result["rank1"], result["mAP"]] == pytest.approx(np.mean(means, axis=0))


def test_usf17_ranks_every_set_against_gal_with_all_subjects(tmp_path):
    sets = {"Gal": range(1, 13), "PrbA": range(1, 13), "PrbB": range(3, 10)}
    keys = [(f"{i:03d}", name, "right") for name, people in sets.items() for i in people]
    data = dataset(tmp_path, keys, "usf17", train=[f"{i:03d}" for i in range(1, 9)], test=["009", "010", "011", "012"])
    order = keys_of(data)
    assert len(order) == 31
    x = noisy(order, 5)
    kind, ids = (np.array([k[i] for k in order]) for i in (1, 0))
    result = protocols.evaluate("auto", data, x)

    def rank1(chosen):
        distance = oracle.distances(x[chosen], x[kind == "Gal"], "cosine")
        return oracle.report(distance, ids[chosen], ids[kind == "Gal"])

    assert result["rank1_A"] == pytest.approx(rank1(kind == "PrbA")["rank1"])
    assert result["rank1_B"] == pytest.approx(rank1(kind == "PrbB")["rank1"])
    assert result["rank1_unseen"] == pytest.approx(rank1((kind != "Gal") & (ids > "008"))["rank1"])
    pooled = rank1(kind != "Gal")
    assert {key: result[key] for key in pooled} == pytest.approx(pooled)
    assert (result.probes, result.gallery) == (19, 12)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("gait3d", "no PROBE_SET"),
        ("grew", "no probe of type 02"),
        ("casia-b", "no probe of NM"),
        ("ou-mvlp", "no probe of type 00"),
        ("casia", "did you mean casia-b"),
        ("auto", "names no known protocol"),
    ],
)
def test_a_dataset_without_what_the_protocol_needs(tmp_path, protocol, message):
    data = dataset(tmp_path, [("a", "x", "v"), ("b", "x", "v")], "none")
    with pytest.raises(UserError, match=message):
        protocols.check(protocol, data)


def test_a_dataset_without_a_partition_or_a_gallery(tmp_path):
    frame = np.full((1, 64, 64), 255, np.uint8)
    data = packed.write(tmp_path / "a", [("a", "x", "v", frame)], protocol="gait3d")
    with pytest.raises(UserError, match="has no partition"):
        protocols.check("auto", data)
    data = dataset(tmp_path, [("001", "PrbA", "left")], "usf17")
    with pytest.raises(UserError, match="no gallery of type Gal"):
        protocols.check("auto", data)


def test_a_gallery_that_is_empty_is_named(tmp_path):
    keys = [("a", "c", "seq0"), ("a", "c", "seq1")]
    data = dataset(tmp_path, keys, "gait3d", probe=["-".join(key) for key in keys])
    with pytest.raises(UserError, match=r"no gallery \(all are probes\)"):
        protocols.check("auto", data)
    data = dataset(tmp_path / "b", [("075", "nm-05", "000"), ("075", "bg-01", "000")], "casia-b")
    with pytest.raises(UserError, match="no gallery of type nm-01, nm-02"):
        protocols.check("auto", data)


def test_embeddings_that_are_no_numbers_are_refused(tmp_path):
    data, x = casia_b(tmp_path)
    x[7, 0, 0] = float("nan")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        protocols.evaluate("auto", data, x)


def test_embeddings_must_fit_the_sequences(tmp_path):
    data, x = casia_b(tmp_path)
    with pytest.raises(UserError, match="119 rows for 120 sequences"):
        protocols.evaluate("auto", data, x[1:])


def test_all_views_stands_for_the_form_of_the_datasets_own_protocol(tmp_path):
    data, x = casia_b(tmp_path)
    assert protocols.resolve("all-views", data) == "casia-b-all-views"
    x = x[: len(protocols.sequences("all-views", data))]
    assert protocols.evaluate("all-views", data, x) == protocols.evaluate("casia-b-all-views", data, x)
    other = dataset(tmp_path / "other", [("a", "x", "v")], "gait3d")
    with pytest.raises(UserError, match="all-views is a form of casia-b and ou-mvlp"):
        protocols.resolve("all-views", other)


def test_tables_have_the_mean_of_each_probe_view(tmp_path):
    data, x = casia_b(tmp_path)
    result = protocols.evaluate("auto", data, x)
    for name, table in zip(("NM", "BG", "CL"), result.tables):
        means = [np.mean([value for value in row if value is not None]) for row in table.values]
        assert table.row_means == pytest.approx(means) and np.mean(means) == pytest.approx(result[f"rank1_{name}"])


@pytest.mark.parametrize("protocol", ["gait3d", "grew", "casia-b", "ou-mvlp", "casia-b-all-views", "usf17"])
def test_probes_without_one_match_are_no_zero_percent(tmp_path, protocol):
    types = {
        "gait3d": ("p", "g"),
        "grew": ("02", "01"),
        "ou-mvlp": ("00", "01"),
        "usf17": ("PrbA", "Gal"),
        "casia-b": ("nm-05", "nm-01"),
        "casia-b-all-views": ("nm-01", "nm-02"),
    }[protocol]
    keys = [("001", types[0], v) for v in ("000", "018")] + [("002", types[1], v) for v in ("000", "018")]
    keys += [("001", t, v) for t in ("bg-01", "cl-01") for v in ("000", "018")] * protocol.startswith("casia")
    data = dataset(tmp_path, keys, protocol, probe=["001-p-000", "001-p-018"] * (protocol == "gait3d"))
    if protocol == "gait3d":
        data = dataset(tmp_path / "b", keys[:1] + keys[2:], protocol, probe=["001-p-000"])
    for attempt in (
        protocols.check,
        lambda *a: protocols.evaluate(*a, torch.ones(len(keys), 2, 1)),
    ):  # before the embedding too
        with pytest.raises(UserError, match=r"no probe.* has a match"):
            attempt(protocol, data)


def test_a_view_without_another_to_compare_with_is_refused(tmp_path):
    keys = [("075", t, "000") for t in ("nm-01", "nm-05", "bg-01", "cl-01")]
    with pytest.raises(UserError, match="only one gallery view"):
        protocols.check("casia-b", dataset(tmp_path, keys, "casia-b"))


@pytest.mark.parametrize(
    ("protocol", "keys", "message"),
    [
        ("casia-b", [("075", "NM-05", "000"), ("075", "nm-01", "000")], "types 'nm-05' and 'NM-05'"),
        ("casia-b", [("075", "nm-5", "000"), ("075", "nm-1", "000")], "types 'nm-01' and 'nm-1'"),
        ("casia-b", [("075", "nm-05", "18"), ("075", "nm-01", "036")], "views '018' and '18'"),
        ("ou-mvlp", [("00002", "0", "000"), ("00002", "01", "015")], "types '00' and '0'"),
        ("ou-mvlp", [("00002", "00", "000"), ("00002", "01", "015"), ("2", "01", "000")], "ids '00002' and '2'"),
        ("grew", [("00001", "1", "xA"), ("00001", "02", "XA")], "types '01' and '1'"),
        ("gait3d", [("a", "c", "seq0"), ("A", "c", "seq1")], "ids 'A' and 'a'"),
        ("usf17", [("001", "gal", "right"), ("001", "PrbA", "left")], "types 'Gal' and 'gal'"),
        # As the third, it would be no part of the protocol, and nothing else would tell.
        ("grew", [("00001", "01", "a"), ("00001", "02", "b"), ("00001", "2", "c")], "types '02' and '2'"),
    ],
)
def test_names_that_differ_by_case_or_padding_are_refused(tmp_path, protocol, keys, message):
    data = dataset(tmp_path, keys, protocol, probe=["-".join(keys[0])] * (protocol == "gait3d"))
    with pytest.raises(UserError, match=message):
        protocols.check("auto", data)
    with pytest.raises(UserError, match=message):
        protocols.evaluate("auto", data, torch.ones(len(keys), 2, 1))


def test_random_names_of_grew_may_look_alike(tmp_path):
    keys = [("00001", "01", "xA"), ("00001", "02", "XA"), ("00002", "01", "7"), ("00002", "02", "07")]
    data = dataset(tmp_path, keys, "grew")
    assert protocols.evaluate("auto", data, torch.eye(4)[:, :, None]).unmatched == 0


def test_views_that_are_not_the_published_ones_are_noted(tmp_path):
    data, x = casia_b(tmp_path)
    probes, gallery = protocols.evaluate("auto", data, x).notes
    assert probes == "of the 11 published views the probes lack 054, 072, 090, 108, 126, 144, 162, 180"
    assert gallery.startswith("of the 11 published views the gallery lack")
    views = ["000", "017", *(f"{angle:03d}" for angle in range(18, 181, 18))]
    keys = [("075", t, v) for t in ("nm-01", "nm-05", "bg-01", "cl-01") for v in views]
    data = dataset(tmp_path / "b", keys, "casia-b")
    assert (
        protocols.evaluate("auto", data, noisy(keys)).notes[0]
        == "of the 11 published views the probes have 017 besides"
    )


def test_copies_of_gallery_sequences_among_the_probes_are_noted(tmp_path):
    folder = tmp_path / "set"
    frames = [np.full((1, 64, 64), grey, np.uint8) for grey in (200, 210, 220)]
    keys = [("a", "01", "v"), ("a", "02", "w"), ("b", "01", "x"), ("b", "02", "y")]
    partition = {"TRAIN_SET": [], "TEST_SET": ["a", "b"]}
    for (subject, condition, view), frame in zip(keys, (frames[0], frames[1], frames[2], frames[0])):
        path = tmp_path / "tree" / subject / condition / view
        path.mkdir(parents=True)
        (path / "x.pkl").write_bytes(pickle.dumps(frame))
    (tmp_path / "p.json").write_text(json.dumps(partition))
    arguments = ("--layout", "grew", "--partition", tmp_path / "p.json", "--workers", 1)
    assert run_command("prepare", tmp_path / "tree", folder, *arguments) == 0
    result = protocols.evaluate("auto", packed.PackedDataset.open(folder), torch.eye(4)[:, :, None])
    assert result.notes == ["1 probes are copies, frame by frame, of gallery sequences; they are ranked as any other"]
