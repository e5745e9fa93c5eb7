"""Readers of foreign trees: what they list and read, and what they say about what they cannot."""

import os
import pickle

import cv2
import numpy as np
import pytest
import scipy.io

from gaitfast.config import UserError
from gaitfast.data import pretreatment, usf17
from gaitfast.data.sources import OpenGaitTree, PngTree, SourceError, bad_name

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)


def put(path, content):
    """A pickle of an array or of whatever is given; bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))


def reason(source, entry):
    with pytest.raises(SourceError) as caught:
        source.read(entry)
    return f"{caught.value.path}: {caught.value.reason}"


# --- OpenGait's pickles -----------------------------------------------------------------------------------------------


def test_opengait_tree(tmp_path):
    for i, key in enumerate(["b/nm-02/000", "b/nm-01/090", "a/nm-10/018", "a/nm-09/018", "人/x/y"]):
        put(tmp_path / key / "x.pkl", FRAMES + np.uint8(i))
    put(tmp_path / "readme.txt", b"not a folder")
    put(tmp_path / "a" / "notes.json", b"{}")
    tree = OpenGaitTree(tmp_path)
    entries, problems = tree.scan()
    assert not problems
    keys = ["/".join(entry[:3]) for entry in entries]
    assert keys == ["a/nm-09/018", "a/nm-10/018", "b/nm-01/090", "b/nm-02/000", "人/x/y"]
    assert [tree.read(entry)[0, 0, 0] - FRAMES[0, 0, 0] for entry in entries] == [3, 2, 1, 0, 4]
    assert np.array_equal(tree.read(entries[3]), FRAMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated|is not a whole pickle"),
        (pickle.dumps(FRAMES)[:-100], "is not a whole pickle"),
        (FRAMES.astype(np.float32), "has dtype float32, expected uint8"),
        (FRAMES > 100, "has dtype bool"),
        (FRAMES[0], r"has shape \(64, 64\), expected \(T, 64, 64\)"),
        (FRAMES[:, :, 10:54], r"has shape \(3, 64, 44\)"),
        (FRAMES[:0], "is empty"),
        (FRAMES & 1, "mask of 0 and 1"),
        ([FRAMES], "only NumPy arrays are read"),
        ({"silhouettes": FRAMES}, "only NumPy arrays are read"),
    ],
)
def test_wrong_pickles_are_named(tmp_path, content, message):
    put(tmp_path / "a" / "b" / "c" / "x.pkl", content)
    source = OpenGaitTree(tmp_path)
    with pytest.raises(SourceError, match=message) as caught:
        source.read(source.scan().entries[0])
    assert caught.value.path == str(tmp_path / "a" / "b" / "c" / "x.pkl")


def test_a_black_sequence_is_kept(tmp_path):
    put(tmp_path / "a" / "b" / "c" / "x.pkl", FRAMES * 0)
    source = OpenGaitTree(tmp_path)
    assert not source.read(source.scan().entries[0]).any()


def test_modalities(tmp_path):
    put(tmp_path / "a" / "b" / "c" / "0-sil.pkl", FRAMES)
    put(tmp_path / "a" / "b" / "c" / "1-smpl.pkl", FRAMES.astype(np.float32))
    entry = OpenGaitTree(tmp_path).scan().entries[0]
    assert "holds 2 pickles; say which with --modality 0..1" in reason(OpenGaitTree(tmp_path), entry)
    assert np.array_equal(OpenGaitTree(tmp_path, 0).read(entry), FRAMES)
    assert "1-smpl.pkl: has dtype float32" in reason(OpenGaitTree(tmp_path, 1), entry)
    assert "no modality 2" in reason(OpenGaitTree(tmp_path, 2), entry)


def test_a_folder_without_a_pickle_is_named(tmp_path):
    put(tmp_path / "a" / "b" / "c" / "x.txt", b"")
    source = OpenGaitTree(tmp_path)
    assert "a/b/c: holds no .pkl file" in reason(source, source.scan().entries[0])


def test_links_that_leave_the_tree_are_not_followed(tmp_path):
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    put(outside / "b" / "c" / "x.pkl", FRAMES)
    put(tree / "a" / "b" / "c" / "x.pkl", FRAMES)
    (tree / "leaves").symlink_to(outside)
    (tree / "stays").symlink_to(tree / "a")
    (tree / "a" / "b" / "dangling").symlink_to(tmp_path / "nowhere")
    (tree / "a" / "b" / "circle").symlink_to(tree / "a" / "b" / "circle")
    (tree / "a" / "b" / "file").mkdir()
    (tree / "a" / "b" / "file" / "x.pkl").symlink_to(outside / "b" / "c" / "x.pkl")
    source = OpenGaitTree(tree)
    entries, problems = source.scan()
    assert [entry.paths[0] for entry in entries] == ["a/b/c", "a/b/file", "stays/b/c", "stays/b/file"]
    reasons = {
        problem.path.removeprefix(f"{tree}/"): problem.reason.split(";")[0].split(" (")[0] for problem in problems
    }
    leaves, nowhere = "is a link that leaves the tree", "is a link that leads nowhere"
    assert reasons == {"leaves": leaves, "a/b/dangling": leaves, "stays/b/dangling": leaves} | {
        "a/b/circle": nowhere,
        "stays/b/circle": nowhere,
    }
    assert np.array_equal(source.read(entries[2]), FRAMES)
    assert "file/x.pkl: is a link that leaves the tree" in reason(source, entries[1])


def test_what_is_not_a_regular_file_does_not_stop_the_reader(tmp_path):
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "x.pkl")
    source = OpenGaitTree(tmp_path)
    assert "is not a regular file" in reason(source, source.scan().entries[0])


def test_a_huge_file_is_not_read(tmp_path):
    put(tmp_path / "a" / "b" / "c" / "x.pkl", b"")
    os.truncate(tmp_path / "a" / "b" / "c" / "x.pkl", 1 << 40)  # sparse
    source = OpenGaitTree(tmp_path)
    assert "more than the limit" in reason(source, source.scan().entries[0])


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "\x1b[31m", "a\u202eb", os.fsdecode(b"\xff\xfe")])
def test_names_with_tricks_are_refused(tmp_path, name):
    put(tmp_path / name / "b" / "c" / "x.pkl", FRAMES)
    put(tmp_path / "good" / name / "c" / "x.pkl", FRAMES)
    put(tmp_path / "good" / "b" / "c" / "x.pkl", FRAMES)
    entries, problems = OpenGaitTree(tmp_path).scan()
    assert [entry.subject for entry in entries] == ["good"]
    assert len(problems) == 2 and all("characters" in problem.reason for problem in problems)


def test_bad_names():
    assert all(bad_name(name) for name in ("", ".", "..", "a/b", "a\0b", "a\tb"))
    assert not any(bad_name(name) for name in ("001", "nm-01", "camid0_videoid2", "...", "Ünal", "a b"))


# --- raw pictures -----------------------------------------------------------------------------------------------------


def picture(seed):
    rng = np.random.default_rng(seed)
    image = np.zeros((120, 90), np.uint8)
    top, left = rng.integers(5, 40, 2)
    image[top : top + 70, left : left + 20] = rng.integers(100, 256, (70, 20))
    return image


def put_png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def test_png_tree_is_opengait_pretreatment_in_path_order(tmp_path):
    for i, name in enumerate(["010.png", "002.png", "1.png", "gei.png", "x-gei.png"]):
        put_png(tmp_path / "deep" / "001" / "nm-01" / "090" / name, picture(i))
    put_png(tmp_path / "deep" / "001" / "nm-01" / "090" / "003.png", np.zeros((120, 90), np.uint8))  # dropped
    put_png(tmp_path / "002" / "nm-01" / "090" / "0.png", cv2.cvtColor(picture(7), cv2.COLOR_GRAY2BGR))
    source = PngTree(tmp_path)
    entries, problems = source.scan()
    assert not problems and [entry[:3] for entry in entries] == [("001", "nm-01", "090"), ("002", "nm-01", "090")]
    expected = np.stack([pretreatment.normalise(picture(i)) for i in (1, 0, 2)])
    assert np.array_equal(source.read(entries[0]), expected)
    assert np.array_equal(source.read(entries[1])[0], pretreatment.normalise(picture(7)))


def test_png_folders_of_one_key_are_one_sequence(tmp_path):
    """OpenGait's key is the last three folders, wherever they lie."""
    put_png(tmp_path / "part2" / "001" / "nm" / "000" / "1.png", picture(1))
    put_png(tmp_path / "part1" / "001" / "nm" / "000" / "2.png", picture(2))
    source = PngTree(tmp_path)
    (entry,) = source.scan().entries
    expected = np.stack([pretreatment.normalise(picture(i)) for i in (2, 1)])
    assert np.array_equal(source.read(entry), expected)


def test_png_as_read(tmp_path):
    small = picture(1)[:64, :64]
    put_png(tmp_path / "a" / "b" / "c" / "1.png", small)
    put_png(tmp_path / "a" / "b" / "d" / "1.png", picture(1))
    source = PngTree(tmp_path, as_read=True)
    entries = source.scan().entries
    assert np.array_equal(source.read(entries[0])[0], small)
    assert "has 90x120 pixels; --as-read needs 64x64" in reason(source, entries[1])


def png_claiming(width, height):
    data = bytearray(cv2.imencode(".png", picture(0))[1].tobytes())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PNG picture"),
        (b"GIF89a" + bytes(100), "is not a PNG picture"),
        (cv2.imencode(".png", picture(0))[1].tobytes()[:-30], "truncated or corrupt"),
        (cv2.imencode(".png", picture(0))[1].tobytes()[:40], "truncated or corrupt"),
        (png_claiming(2**31 - 1, 2**31 - 1), "more than the limit"),
        (png_claiming(0, 5), "more than the limit"),
        (png_claiming(9000, 7000), "truncated or corrupt"),
        (cv2.imencode(".png", np.zeros((9, 9), np.uint8))[1].tobytes(), "none of its 1 pictures shows a silhouette"),
    ],
)
def test_wrong_pictures_are_named(tmp_path, content, message):
    put(tmp_path / "a" / "b" / "c" / "1.png", content)
    source = PngTree(tmp_path)
    assert message in reason(source, source.scan().entries[0])


def test_shallow_pictures_and_circular_links(tmp_path):
    put_png(tmp_path / "a" / "b" / "1.png", picture(0))
    put_png(tmp_path / "a" / "b" / "c" / "1.png", picture(0))
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path)
    entries, problems = PngTree(tmp_path).scan()
    assert [entry[:3] for entry in entries] == [("a", "b", "c")]
    assert len(problems) == 1 and "not three folders" in problems[0].reason


# --- USF --------------------------------------------------------------------------------------------------------------


def usf_file(path, subjects, seed=0, **changes):
    rng = np.random.default_rng(seed)
    content = {
        "fea3D": rng.integers(0, 2, (32, 22, 10, len(subjects)), dtype=np.uint8),
        "gnd": np.array(subjects, np.uint8)[:, None],
    }
    content.update(changes)
    scipy.io.savemat(path, {key: value for key, value in content.items() if value is not None})
    return content["fea3D"]


def test_usf_walks(tmp_path):
    gallery = usf_file(tmp_path / "Gal.mat", [3, 0, 1, 3])
    usf_file(tmp_path / "PrbC.mat", [1])
    (tmp_path / "README.md").write_text("other files do not matter")
    source = usf17.UsfRelease(tmp_path)
    entries, problems = source.scan()
    assert not problems
    assert [entry[:3] for entry in entries] == [
        ("001", "Gal", "right"),
        ("001", "PrbC", "left"),
        ("003", "Gal", "right"),
    ]
    walk = source.read(entries[2])
    assert walk.shape == (20, 64, 64) and walk.dtype == np.uint8
    for number, sample in ((0, 0), (7, 0), (10, 3), (19, 3)):  # frame of the walk: the half-cycle it comes from
        person = gallery[:, :, number % 10, sample] == 0
        assert np.array_equal(walk[number, ::2, 10:54:2] == 255, person)
        assert np.array_equal(walk[number, 1::2, 11:54:2], walk[number, ::2, 10:54:2])
        assert set(np.unique(walk[number])) <= {0, 255}
        assert not walk[number, :, :10].any() and not walk[number, :, 54:].any()


def test_usf_partition_is_fixed_by_the_number():
    entries = [usf17.Entry(f"{i:03d}", name, "right", ("x",), 0) for i in range(1, 72) for name in ("Gal", "PrbA")]
    partition = usf17.partition(entries)
    assert (len(partition["TRAIN_SET"]), len(partition["TEST_SET"])) == (50, 21)
    assert partition["TEST_SET"][:4] == ["001", "004", "008", "011"]
    assert partition["PROBE_SET"][:2] == ["001-PrbA-right", "004-PrbA-right"]
    some = usf17.partition(entries[6:])  # without the first three subjects the others stay where they were
    assert set(some["TEST_SET"]) == set(partition["TEST_SET"]) - {"001"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gnd": None}, "expected (32, 22, 10, N) and (N, 1)"),
        ({"gnd": np.ones((2, 1), np.uint8)}, "expected (32, 22, 10, N) and (N, 1)"),
        ({"gnd": np.ones((3, 1)) * 0.5}, "gnd does not hold one subject number"),
        ({"fea3D": np.zeros((32, 22, 10), np.uint8)}, "expected (32, 22, 10, N) and (N, 1)"),
        ({"fea3D": np.zeros((32, 22, 10, 3))}, "is not a uint8 mask"),
        ({"fea3D": np.full((32, 22, 10, 3), 2, np.uint8)}, "is not a uint8 mask"),
    ],
)
def test_wrong_usf_files_are_named(tmp_path, changes, message):
    usf_file(tmp_path / "Gal.mat", [1, 2, 3], **changes)
    usf_file(tmp_path / "PrbA.mat", [1])
    entries, problems = usf17.UsfRelease(tmp_path).scan()
    assert [entry.condition for entry in entries] == ["PrbA"]
    assert problems[0].path.endswith("Gal.mat") and message in problems[0].reason


def test_damaged_usf_files_are_named(tmp_path):
    usf_file(tmp_path / "Gal.mat", [1, 2, 3])
    data = (tmp_path / "Gal.mat").read_bytes()
    for damaged in (b"", b"text", data[:200], data[:-50], bytes(200) + data[200:]):
        (tmp_path / "Gal.mat").write_bytes(damaged)
        entries, problems = usf17.UsfRelease(tmp_path).scan()
        assert not entries and problems[0].path.endswith("Gal.mat")
        assert "is not a MATLAB 5 file" in problems[0].reason or "expected (32, 22, 10, N)" in problems[0].reason


def test_usf_needs_one_of_its_files(tmp_path):
    with pytest.raises(UserError, match=r"holds none of Gal\.mat"):
        usf17.UsfRelease(tmp_path).scan()


def test_the_published_release(usf17):
    """Counts of the release (where it is at hand): 71 people in the gallery, each with whole half-cycles."""
    from gaitfast.data.usf17 import UsfRelease

    source = UsfRelease(usf17)
    entries, problems = source.scan()
    assert not problems
    gallery = [entry for entry in entries if entry.condition == "Gal"]
    assert [entry.subject for entry in gallery] == [f"{i:03d}" for i in range(1, 72)]
    walks = [source.read(entry) for entry in gallery]
    assert sum(map(len, walks)) == 7310 and all(len(walk) % 10 == 0 for walk in walks)
    assert 0.1 < np.mean(walks[0] > 0) < 0.4  # people, not their background
