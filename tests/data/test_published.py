"""The benchmarks by name, in small: trees as published, real pictures and pickles, and what is said of them."""

import json
import pickle

import cv2
import numpy as np
import pytest

from gaitfast.config import UserError
from gaitfast.data import pretreatment
from gaitfast.data.packed import PackedDataset
from gaitfast.data.partition import Partition
from gaitfast.data.published import PUBLISHED, differences
from gaitfast.data.raw_trees import RawGrew, RawOuMvlp
from gaitfast.data.sources import SourceError
from tests.conftest import run_command
from tests.data.silhouettes import figure


def mask(person, height=120, width=90):
    """A raw silhouette picture: a figure somewhere in a larger frame."""
    picture = np.zeros((height, width), np.uint8)
    picture[20:84, 10:74] = np.where(figure(person, 0.7) > 127, 255, 0)
    return picture


def put_pngs(folder, pictures):
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        assert cv2.imwrite(str(folder / f"{number:05d}.png"), picture)


def put_pickle(folder, frames):
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.pkl").write_bytes(pickle.dumps(frames))


def put_partition(path, train, test, **more):
    path.write_text(json.dumps({"TRAIN_SET": train, "TEST_SET": test} | more))


def prepare(*arguments):
    assert run_command("prepare", *arguments, "--workers", 1) == 0
    return PackedDataset.open(arguments[1])


def names(dataset):
    return [dataset.sequence_name(i) for i in range(dataset.num_sequences)]


def raw_grew(root):
    """Two people to train, three of the gallery, two probes, a distractor, and what else lies in such a download."""
    for person, sequences in {"00001": ["aZ", "Qb", "9c"], "00002": ["x1"]}.items():
        for number, name in enumerate(sequences):
            put_pngs(root / "train" / person / name, [figure(int(person), number + t) for t in range(3)])
    gallery = {"00001": ["zz", "AA"], "00002": ["m2", "m1"], "00003": ["only"]}
    for person, sequences in gallery.items():
        for number, name in enumerate(sequences):
            put_pngs(root / "test" / "gallery" / person / name, [figure(5 + int(person), number + t) for t in range(2)])
    for number, name in enumerate(["vB", "vA"]):
        put_pngs(root / "test" / "probe" / name, [figure(6, 2 + number)])
    put_pngs(root / "distractor" / "00001" / "d", [figure(9, 0)])
    (root / "train" / "00001.tgz").write_bytes(b"packed")
    (root / "train" / "00001" / "aZ" / "00000_2d_pose.txt").write_text("not a picture")
    assert cv2.imwrite(str(root / "train" / "00001" / "aZ" / "aZ-gei.png"), figure(1, 0))


GREW_NAMES = [
    *("00001-01-AA", "00001-02-zz", "00001train-00-9c", "00001train-00-Qb", "00001train-00-aZ"),
    *("00002-01-m1", "00002-02-m2", "00002train-00-x1", "00003-01-only", "probe-03-vA", "probe-03-vB"),
]


@pytest.mark.parametrize("how", [("--layout", "grew"), ("--name", "GREW"), ("--layout", "png")])
def test_grew_as_published(tmp_path, how, capsys):
    raw_grew(tmp_path / "raw")
    dataset = prepare(tmp_path / "raw", tmp_path / "out", *how)
    assert (dataset.name.lower(), dataset.protocol) == ("grew", "grew")
    assert names(dataset) == GREW_NAMES
    aa = dataset.sequence(0)
    assert np.array_equal(aa, np.stack([figure(6, 1 + t) for t in range(2)]))  # as read, and 01 is the first by name
    # without a partition file the folders say who trains
    train = {dataset.subjects[dataset.subject[i]] for i in dataset.split("train")}
    assert train == {"00001train", "00002train"} and len(dataset.split("test")) == 7
    text = capsys.readouterr().out
    assert "warning: this is not GREW as published: 2 train subjects instead of 20,000 (19,998 fewer)" in text
    assert "4 test subjects instead of 6,001 (5,997 fewer)" in text
    assert dataset.facts["findings"]["published"]["train"] == [4, 102887]
    assert "unsorted_pairs" not in dataset.facts["findings"]


def test_grew_with_the_partition_file_of_the_user(tmp_path):
    raw_grew(tmp_path / "raw")
    put_partition(tmp_path / "GREW.json", ["00001train"], ["00001", "00003", "probe"])
    dataset = prepare(tmp_path / "raw", tmp_path / "out", "--layout", "grew")  # found beside the tree
    assert (len(dataset.split("train")), len(dataset.split("test"))) == (3, 5)
    assert dataset.facts["partition"]["unlisted_sequences"] == 3


def test_what_is_wrong_with_a_grew_tree_is_named(tmp_path):
    raw_grew(tmp_path)
    put_pngs(tmp_path / "test" / "gallery" / "00002" / "m9", [figure(0, 0)])
    (tmp_path / "test" / "gallery" / "00009.tgz").write_bytes(b"packed")
    put_pngs(tmp_path / "train" / "00002" / "mixed", [figure(0, 0), mask(1)])
    put_pngs(tmp_path / "train" / "00002" / "large", [mask(1), mask(2)])
    (tmp_path / "train" / "00002" / "void").mkdir()
    source = RawGrew(tmp_path)
    entries, problems = source.scan()
    reasons = {problem.path.removeprefix(f"{tmp_path}/test/gallery/"): problem.reason for problem in problems}
    assert set(reasons) == {"00002/m9", "00009.tgz"}
    assert "third or a later" in reasons["00002/m9"] and "not unpacked" in reasons["00009.tgz"]
    by_name = {entry.view: entry for entry in entries}
    with pytest.raises(SourceError, match="90x120 pixels"):
        source.read(by_name["mixed"])
    with pytest.raises(SourceError, match=r"holds no \.png"):
        source.read(by_name["void"])
    large = np.stack([pretreatment.normalise(mask(i)) for i in (1, 2)])
    assert np.array_equal(source.read(by_name["large"]), large)


def test_grew_pickles_keep_their_types_and_say_when_these_are_not_sorted(tmp_path, capsys):
    """OpenGait's script gives 01 and 02 in the order in which the file system lists the folders."""
    for subject, condition, view in [("00001", "01", "zz"), ("00001", "02", "AA"), ("probe", "03", "v")]:
        put_pickle(tmp_path / "pkl" / subject / condition / view, np.stack([figure(len(view), 1.0)]))
    put_pickle(tmp_path / "pkl" / "probe" / "w", np.stack([figure(1, 1.0)]))  # as its documentation shows it
    arguments = (tmp_path / "pkl", tmp_path / "out", "--layout", "grew", "--workers", 1)
    assert run_command("prepare", *arguments) == 3
    captured = capsys.readouterr()
    assert "probe/w/w.pkl: is a pickle that is not three folders (id/type/view) deep" in captured.err
    assert "of 1 ids the types 01 and 02 are not in the order" in captured.out
    dataset = PackedDataset.open(tmp_path / "out")
    assert names(dataset) == ["00001-01-zz", "00001-02-AA", "probe-03-v"]
    assert dataset.facts["findings"]["unsorted_pairs"] == 1


def test_ou_mvlp_as_published(tmp_path):
    for view in ("000", "015", "270"):
        for walk in ("00", "01"):
            for person in ("00001", "00002"):
                folder = tmp_path / "raw" / f"Silhouette_{view}-{walk}" / person
                put_pngs(folder, [mask(int(person) + len(view) + int(walk) + t) for t in range(2)])
    put_partition(tmp_path / "OUMVLP.json", ["00001"], ["00002"])
    dataset = prepare(tmp_path / "raw", tmp_path / "out", "--layout", "ou-mvlp")
    assert dataset.protocol == "ou-mvlp" and dataset.num_sequences == 12
    assert names(dataset)[:4] == ["00001-00-000", "00001-00-015", "00001-00-270", "00001-01-000"]
    expected = np.stack([pretreatment.normalise(mask(1 + 3 + 1 + t)) for t in range(2)])
    assert np.array_equal(dataset.sequence(3), expected)
    assert dataset.facts["findings"]["published"]["train"] == [6, 144284]
    (tmp_path / "raw" / "Silhouette_15-00").mkdir()
    assert "is not named Silhouette_VIEW-SEQUENCE" in RawOuMvlp(tmp_path / "raw").scan().problems[0].reason


def test_casia_b_as_published(tmp_path, capsys):
    for person in ("001", "075"):
        for walk in ("nm-01", "bg-01"):
            put_pngs(tmp_path / "GaitDatasetB-silh" / person / walk / "090", [mask(int(person) % 7 + len(walk))] * 2)
    put_partition(tmp_path / "mine.json", ["001"], ["075"])
    source = tmp_path / "GaitDatasetB-silh"
    dataset = prepare(source, tmp_path / "out", "--layout", "casia-b", "--partition", tmp_path / "mine.json")
    assert (dataset.name, dataset.protocol) == ("casia-b", "casia-b")
    assert names(dataset) == ["001-bg-01-090", "001-nm-01-090", "075-bg-01-090", "075-nm-01-090"]
    text = capsys.readouterr().out
    assert "1 train subjects instead of 74 (73 fewer)" in text and "2 test sequences instead of 5,500" in text
    assert "the release lacks a few" in text


@pytest.mark.parametrize("kind", ["png", "pkl"])
def test_gait3d_as_published_and_as_opengait_packs_it(tmp_path, kind):
    for person in range(4):
        for number in range(2):
            folder = tmp_path / "2D_Silhouettes" / f"{person:04d}" / "camid1_videoid2" / f"seq{number}"
            picture = mask(person + number)
            if kind == "png":
                put_pngs(folder, [picture, picture])
            else:
                put_pickle(folder, np.stack([pretreatment.normalise(picture)] * 2))
    train, test = ["0000", "0001"], ["0002", "0003"]
    put_partition(tmp_path / "Gait3D.json", train, test, PROBE_SET=[f"{i}-camid1_videoid2-seq1" for i in test])
    dataset = prepare(tmp_path / "2D_Silhouettes", tmp_path / "out", "--name", "gait3d")
    assert dataset.protocol == "gait3d" and len(dataset.split("probe")) == len(dataset.split("gallery")) == 2
    assert np.array_equal(dataset.sequence(0)[1], pretreatment.normalise(mask(0)))
    assert dataset.facts["findings"]["published"]["probe"] == [2, 1000]


def test_the_published_counts():
    for name, published in PUBLISHED.items():
        assert differences(name, dict(published.counts)) == {}
        fewer = differences(name, published.counts | {"test": published.counts["test"] - 3})
        assert fewer == {"test": [published.counts["test"] - 3, published.counts["test"]]}
    assert differences("gait3d", {"subjects": 4000, "sequences": 25309}) == {}
    assert differences("ou-mvlp", {"subjects": 10307, "sequences": 288596}) == {}
    assert differences("casia-b", {"subjects": 124, "sequences": 13633}) == {"sequences": [13633, 13640]}
    assert differences("walkers", {"subjects": 1, "sequences": 1}) == {}


def test_a_benchmark_without_its_partition_says_which_file_it_needs(tmp_path, capsys):
    put_pickle(tmp_path / "tree" / "001" / "nm-01" / "000", np.stack([figure(1, 0)]))
    prepare(tmp_path / "tree", tmp_path / "out", "--layout", "casia-b")
    text = capsys.readouterr().out
    assert "there is nothing to test on" in text and "--partition CASIA-B.json" in text
    assert "1 subjects instead of 124 (123 fewer), 1 sequences instead of 13,640" in text


# --- near misses and copies -------------------------------------------------------------------------------------------


def small_tree(root, names_and_frames):
    for (subject, condition, view), frames in names_and_frames.items():
        put_pickle(root / subject / condition / view, frames)


def test_names_that_differ_by_case_or_padding_are_named(tmp_path, capsys):
    keys = [("001", "nm-01", "000"), ("1", "nm-01", "000"), ("002", "NM-01", "000"), ("003", "nm-1", "000")]
    small_tree(tmp_path / "tree", {key: np.stack([figure(i, i)]) for i, key in enumerate(keys)})
    put_partition(tmp_path / "p.json", ["001", "2"], ["003"])
    dataset = prepare(tmp_path / "tree", tmp_path / "out", "--layout", "casia-b", "--partition", tmp_path / "p.json")
    text = capsys.readouterr().out
    assert "the partition lists '2', the dataset has '002'" in text
    assert "'001' and '1' differ by case or leading zeros alone" in text
    assert "'NM-01' and 'nm-01' and 'nm-1' differ" in text
    assert dataset.facts["findings"]["lookalikes"] == [["001", "1"], ["NM-01", "nm-01", "nm-1"]]
    assert dataset.facts["partition"]["near_misses"] == [["2", "002"]]


def test_a_partition_that_misses_by_padding_says_so():
    partition = Partition.parse({"TRAIN_SET": ["1"], "TEST_SET": ["2"]}, "p.json")
    with pytest.raises(UserError, match=r"p\.json: lists no subject .* it says '1' where the dataset has '001'"):
        partition.apply([("001", "nm-01", "000")])
    probe = ["002-NM-01-000"]
    partition = Partition.parse({"TRAIN_SET": ["001"], "TEST_SET": ["002"], "PROBE_SET": probe}, "p.json")
    with pytest.raises(
        UserError, match=r"no sequence has a name in PROBE_SET .* where the dataset has '002-nm-01-000'"
    ):
        partition.apply([("001", "nm-01", "000"), ("002", "nm-01", "000")])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"TRAIN_SET": [1], "TEST_SET": []}, 'TRAIN_SET holds 1, which is not a string; write "1"'),
        ({"TRAIN_SET": ["1"], "TEST_SET": ["1"]}, "1 ids are in TRAIN_SET and TEST_SET, e.g. 1"),
        ({"TRAIN_SET": ["1"]}, "TEST_SET is missing"),
        (["1"], "a partition is an object"),
    ],
)
def test_partitions_that_cannot_be(sets, message):
    with pytest.raises(UserError) as caught:
        Partition.parse(sets, "p.json")
    assert message in str(caught.value)


def test_copies_are_named(tmp_path, capsys):
    walk = np.stack([figure(1, 0), figure(1, 1)])
    keys = {("a", "x", "v"): walk, ("b", "x", "v"): walk[:1], ("b", "x", "w"): walk, ("c", "x", "v"): walk[::-1]}
    keys |= {("d", "x", "v"): walk}
    small_tree(tmp_path / "tree", keys)
    dataset = prepare(tmp_path / "tree", tmp_path / "out", "--layout", "opengait")
    assert dataset.facts["findings"]["duplicates"] == [[0, 2, 4]]
    text = capsys.readouterr().out
    assert "2 sequences are copies of others, frame by frame, e.g. a-x-v = b-x-w\n" in text
