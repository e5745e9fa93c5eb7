"""`gaitfast prepare` as a whole: right output, the same for any workers and after any kill, and its messages."""

import argparse
import errno
import filecmp
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gaitfast.config import UserError
from gaitfast.data import codec, packing, prepare, shards
from gaitfast.data.packed import PackedDataset
from gaitfast.data.sources import OpenGaitTree


def run(*arguments):
    """`gaitfast prepare ARGUMENTS` in this process; its exit code."""
    parser = argparse.ArgumentParser()
    prepare.configure(parser)
    return prepare.main(parser.parse_args([str(a) for a in arguments]))


def make_tree(root, subjects, views=3, frames=5):
    """A pickle tree with frames of its own for every sequence; returns {(id, type, view): frames}."""
    rng = np.random.default_rng(0)
    content = {}
    for subject in range(subjects):
        for view in range(views):
            key = (f"{subject:04d}", "nm-01", f"{view:03d}")
            content[key] = (rng.random((frames, 64, 64)) > 0.9).astype(np.uint8) * 255
            folder = root.joinpath(*key)
            folder.mkdir(parents=True)
            (folder / f"{key[2]}.pkl").write_bytes(pickle.dumps(content[key]))
    return content


def same_folders(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    different = filecmp.cmpfiles(a, b, names, shallow=False)[1:]
    assert different == ([], [])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "Gait-3D"
    return root, make_tree(root, 100)


def test_packs_everything_in_order(tree, tmp_path, capsys):
    root, content = tree
    ids = sorted({key[0] for key in content})
    partition = {"TRAIN_SET": [*ids[:60], "9999"], "TEST_SET": ids[60:99], "PROBE_SET": [f"{ids[60]}-nm-01-001"]}
    (tmp_path / "p.json").write_text(json.dumps(partition))
    assert run(root, tmp_path / "out", "--layout", "opengait", "--partition", tmp_path / "p.json", "--workers", 1) == 0
    dataset = PackedDataset.open(tmp_path / "out")
    assert (dataset.name, dataset.protocol) == ("Gait-3D", "gait3d")
    assert dataset.num_sequences == 300 and len(dataset.facts["shards"]) == 3
    for i, key in enumerate(sorted(content)):
        assert dataset.sequence_name(i) == "-".join(key)
        assert np.array_equal(dataset.sequence(i), content[key])
    assert [len(dataset.split(name)) for name in ("train", "test", "probe", "gallery")] == [180, 117, 1, 116]
    text = capsys.readouterr().out
    assert "300 sequences" in text and "train 180, test 117, of these probe 1" in text
    assert "note: 1 subjects of the partition have no sequence" in text
    assert "note: 3 sequences are of subjects that the partition does not list" in text
    assert "warning: this is not Gait3D as published: 60 train subjects instead of 3,000 (2,940 fewer)" in text
    assert dataset.facts["findings"]["published"]["test"] == [117, 6369]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.json"]
    assert run("--verify", tmp_path / "out") == 0


def test_the_output_does_not_depend_on_the_workers(tree, tmp_path):
    for workers in (1, 2, 3):
        assert run(tree[0], tmp_path / str(workers), "--layout", "opengait", "--workers", workers) == 0
    same_folders(tmp_path / "1", tmp_path / "2")
    same_folders(tmp_path / "1", tmp_path / "3")


def test_the_bar_counts_what_is_new(monkeypatch):
    """Sequences of an earlier run are done, but say nothing about how long the others take."""
    bars = []

    class Bar(prepare.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(prepare, "tqdm", Bar)
    with prepare._progress_bar(100) as progress:
        progress(40, 0)
        progress(30, 0)
        for _ in range(10):
            progress(1, 50)
    assert (bars[0].initial, bars[0].n) == (70, 80) and bars[0].postfix.endswith(" frames/s")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_sequences_are_listed_and_stop_no_good_one(tmp_path, capsys, workers):
    content = make_tree(tmp_path / "tree", 100)
    bad = {
        ("0003", "nm-01", "001"): (np.zeros((0, 64, 64), np.uint8), "is empty"),
        ("0050", "nm-01", "002"): (np.zeros((2, 64, 44), np.uint8), "has shape (2, 64, 44)"),
        ("0099", "nm-01", "000"): (["no array"], "only NumPy arrays are read"),
    }
    for key, (thing, _) in bad.items():
        path = tmp_path / "tree" / "/".join(key) / f"{key[2]}.pkl"
        path.write_bytes(pickle.dumps(thing))
    out = tmp_path / "out"
    assert run(tmp_path / "tree", out, "--layout", "opengait", "--workers", workers) == prepare.WITH_PROBLEMS == 3
    dataset = PackedDataset.open(out)
    good = sorted(set(content) - set(bad))
    assert [dataset.sequence_name(i) for i in range(dataset.num_sequences)] == ["-".join(key) for key in good]
    assert all(np.array_equal(dataset.sequence(i), content[key]) for i, key in enumerate(good))
    problems = json.loads((out / "problems.json").read_text())
    errors = capsys.readouterr().err
    assert "3 problems; all of them in" in errors
    for problem, (key, (_, message)) in zip(problems, sorted(bad.items())):
        assert "/".join(key) in problem["path"] and message in problem["reason"]
        assert problem["path"] in errors


def test_names_that_are_no_text_are_reported(tmp_path, capsys):
    make_tree(tmp_path / "tree", 2)
    (tmp_path / "tree" / os.fsdecode(b"\xff\n")).mkdir()
    assert run(tmp_path / "tree", tmp_path / "out", "--layout", "opengait", "--workers", 1) == 3
    assert "characters that a dataset name may not have" in capsys.readouterr().err
    (problem,) = json.loads((tmp_path / "out" / "problems.json").read_text())
    assert os.fsencode(problem["path"]).endswith(b"\xff\n")


def test_a_shard_without_a_good_sequence_is_left_out(tmp_path):
    make_tree(tmp_path / "tree", 100, views=2)
    for path in sorted((tmp_path / "tree").rglob("*.pkl"))[:128]:
        path.write_bytes(b"")
    assert run(tmp_path / "tree", tmp_path / "out", "--layout", "opengait", "--workers", 1) == 3
    dataset = PackedDataset.open(tmp_path / "out")
    assert dataset.num_sequences == 72 and [s["file"] for s in dataset.facts["shards"]] == ["shard-00001.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").glob("shard-*")) == ["shard-00001.safetensors"]


def test_nothing_readable_writes_nothing(tmp_path):
    make_tree(tmp_path / "tree", 2)
    for path in (tmp_path / "tree").rglob("*.pkl"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no sequence could be read; first: .*0000/nm-01/000/000\.pkl is"):
        run(tmp_path / "tree", tmp_path / "out", "--layout", "opengait", "--workers", 1)
    assert not (tmp_path / "out").exists()


def test_what_walkers_writes_is_recognised(tmp_path):
    make_tree(tmp_path / "tree" / "sequences", 4)
    partition = {"TRAIN_SET": ["0000"], "TEST_SET": ["0001"], "PROBE_SET": ["0001-nm-01-000"]}
    (tmp_path / "tree" / "partition.json").write_text(json.dumps(partition))
    assert run(tmp_path / "tree", tmp_path / "out", "--layout", "opengait") == 0
    dataset = PackedDataset.open(tmp_path / "out")
    assert (dataset.name, dataset.protocol) == ("walkers", "walkers")
    assert len(dataset.split("probe")) == 1 and len(dataset.split("gallery")) == 2


def test_the_usf_release(usf17, tmp_path):
    assert run(usf17, tmp_path / "out", "--layout", "usf17", "--workers", 1) == 0
    dataset = PackedDataset.open(tmp_path / "out")
    assert (dataset.name, dataset.protocol, len(dataset.subjects)) == ("usf17", "usf17", 71)
    train, test = (set(dataset.subject[dataset.split(name)]) for name in ("train", "test"))
    assert (len(train), len(test)) == (50, 21) and not train & test
    assert {dataset.conditions[c] for c in dataset.condition[dataset.split("gallery")]} == {"Gal"}


def test_names_and_protocols(tmp_path):
    make_tree(tmp_path / "OUMVLP", 2)
    partition = {"dataset": "GREW", "TRAIN_SET": ["0000"], "TEST_SET": ["0001"]}
    (tmp_path / "p.json").write_text(json.dumps(partition))
    for i, (options, expected) in enumerate(
        (
            ((), ("OUMVLP", "ou-mvlp")),
            (("--partition", tmp_path / "p.json"), ("GREW", "grew")),
            (("--name", "CASIA-B", "--partition", tmp_path / "p.json"), ("CASIA-B", "casia-b")),
            (("--name", "half of it"), ("half of it", "ou-mvlp")),
            (("--protocol", "none"), ("OUMVLP", "none")),
        )
    ):
        out = tmp_path / str(i)
        assert run(tmp_path / "OUMVLP", out, "--layout", "opengait", "--workers", 1, *options) == 0
        dataset = PackedDataset.open(out)
        assert (dataset.name, dataset.protocol) == expected


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("Gait3D", "gait3d"), ("CASIA_B", "casia-b"), ("OUMVLP", "ou-mvlp"), ("grew", "grew"), ("mine", "none")],
)
def test_protocols_by_name(name, protocol):
    assert prepare.protocol_of(name) == protocol


def test_user_mistakes(tree, tmp_path):
    root = tree[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    layout = ("--layout", "opengait")
    for arguments, message in (
        ((), "write `gaitfast prepare SRC OUT"),
        ((root, tmp_path / "o"), "write `gaitfast prepare SRC OUT"),
        ((tmp_path / "none", tmp_path / "o", *layout), "none: no such folder"),
        ((tmp_path / "empty", tmp_path / "o", *layout), "holds no sequence in the layout opengait"),
        ((tmp_path / "empty", tmp_path / "o", "--layout", "usf17"), "holds none of Gal.mat"),
        ((root, tmp_path / "full", *layout), "full: already exists"),
        ((root, tmp_path / "o", *layout, "--partition", tmp_path / "none.json"), "no such partition file"),
        ((root, tmp_path / "o", *layout, "--partition", tmp_path / "bad.json"), "not readable as JSON"),
        ((root, tmp_path / "o", *layout, "--workers", "-1"), "--workers: must be positive"),
        ((root, tmp_path / "o", "--layout", "png", "--modality", "0"), "these are pictures"),
        ((root, tmp_path / "o", *layout, "--modality", "-1"), "is a number from 0"),
        ((tmp_path / "empty", tmp_path / "o", "--layout", "grew"), "holds neither pickles nor .png pictures"),
        ((root, tmp_path / "o", *layout, "--as-read"), "--as-read"),
        ((root, "--verify", tmp_path / "o"), "takes a packed dataset alone"),
        (("--verify", tmp_path / "none"), "no such dataset folder"),
    ):
        with pytest.raises(UserError) as caught:
            run(*arguments)
        assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "empty", "full"]


def test_a_wrong_partition_is_found_before_the_work(tree, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"TRAIN_SET": ["x"], "TEST_SET": ["y"]}))
    with pytest.raises(UserError, match="lists no subject of this dataset"):
        run(tree[0], tmp_path / "out", "--layout", "opengait", "--partition", tmp_path / "p.json", "--workers", 1)
    assert not list((tmp_path / "out.partial").rglob("shard*"))


def test_verify_names_what_is_damaged(tree, tmp_path, capsys):
    run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1)
    shard = tmp_path / "out" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert run("--verify", tmp_path / "out") == 3
    captured = capsys.readouterr()
    assert "shard-00001.safetensors: does not match its checksum" in captured.err
    assert "of sequence 0042-nm-01-002 does not match its checksum" in captured.err
    assert "2 problems" in captured.out


# --- resuming ---------------------------------------------------------------------------------------------------------

COMMAND = """
import argparse, signal
from gaitfast.data import prepare
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background without it
    parser = argparse.ArgumentParser()
    prepare.configure(parser)
    raise SystemExit(prepare.main(parser.parse_args()))
"""


@pytest.mark.parametrize(("signal_number", "workers"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 2)])
def test_resumes_after_a_kill_with_the_same_output(tmp_path, signal_number, workers):
    rng = np.random.default_rng(0)
    (tmp_path / "one.pkl").write_bytes(pickle.dumps(rng.integers(0, 256, (12, 64, 64), dtype=np.uint8)))
    for i in range(2100):
        folder = tmp_path / "tree" / f"{i:04d}" / "nm" / "000"
        folder.mkdir(parents=True)
        os.link(tmp_path / "one.pkl", folder / "x.pkl")
    (tmp_path / "command.py").write_text(COMMAND)
    arguments = [tmp_path / "tree", tmp_path / "out", "--layout", "opengait", "--workers", str(workers)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(prepare.__file__))))
    process = subprocess.Popen(
        [sys.executable, tmp_path / "command.py", *arguments],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    progress = tmp_path / "out.partial" / "progress"
    while not list(progress.glob("*.json")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)
    process.send_signal(signal_number)
    errors = process.communicate()[1].decode()
    assert process.returncode == (-signal.SIGKILL if signal_number == signal.SIGKILL else prepare.INTERRUPTED), errors
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in progress.glob("*.json")}
    assert 0 < len(finished) < 16
    if workers > 1:
        time.sleep(0.5)  # orphans, if there were any, would go on
        assert set(finished) == {path.name for path in progress.glob("*.json")}

    shard = tmp_path / "out.partial" / next(iter(finished)).replace(".json", ".safetensors")
    inode = shard.stat().st_ino
    assert run(*arguments) == 0
    assert (tmp_path / "out" / shard.name).stat().st_ino == inode  # kept, not written again
    assert run(tmp_path / "tree", tmp_path / "clean", "--layout", "opengait", "--workers", 1) == 0
    same_folders(tmp_path / "out", tmp_path / "clean")


# Starts the command again and again in a child, which ends at a random moment unless it is done; then lets it end. The
# children are forked: importing PyTorch would take longer than the work.
KILLED = """
import argparse, os, random, resource, signal, sys, time
from gaitfast.data import codec, prepare
from gaitfast.strict_yaml import UserError

def command(limit=None):
    child = os.fork()
    if child:
        return child
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    parser = argparse.ArgumentParser()
    prepare.configure(parser)
    try:
        code = prepare.main(parser.parse_args(sys.argv[3:]))
    except UserError as error:
        print(error, flush=True)
        code = 2
    sys.stdout.flush()
    os._exit(code)

codec.compiled()
rng, kills, limit = random.Random(int(sys.argv[1])), 0, int(sys.argv[2])
if limit:
    os.waitpid(command(limit), 0)
    sys.exit()
while True:
    child = command()
    moment = time.monotonic() + rng.expovariate(1 / 0.02 if kills < 60 else 1 / 5.0)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:  # a run that was killed after its last rename had nothing left to do
            assert status == 0 or os.path.isfile(os.path.join(sys.argv[4], "dataset.json")), status
            print(kills)
            sys.exit()
        if time.monotonic() > moment:
            break
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
"""


def start_killed(tmp_path, *arguments):
    (tmp_path / "killed.py").write_text(KILLED)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(prepare.__file__))))
    command = [sys.executable, tmp_path / "killed.py", *map(str, arguments), "--layout", "opengait", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_and_again_it_ends_with_the_same_bytes(tree, tmp_path, seed):
    """SIGKILL at some sixty random moments of the work, also while files are renamed, assembled and cleaned up."""
    assert run(tree[0], tmp_path / "clean", "--layout", "opengait", "--workers", 1) == 0
    done = start_killed(tmp_path, seed, 0, tree[0], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 5
    same_folders(tmp_path / "clean", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_killed_at_the_very_end_the_next_run_tidies_up(tree, tmp_path):
    arguments = (tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1)
    assert run(*arguments) == 0
    (tmp_path / "out" / "progress").mkdir()
    (tmp_path / "out" / "progress" / "plan").write_text("")
    with pytest.raises(UserError, match="out: already a whole dataset; remove it to pack anew"):
        run(*arguments)
    assert not (tmp_path / "out" / "progress").exists()
    assert run("--verify", tmp_path / "out") == 0


def test_a_file_that_may_not_grow_leaves_nothing_half_written(tree, tmp_path):
    """A real refusal in the midst of a shard (RLIMIT_FSIZE, as a full disk): one line, no rest, and it resumes."""
    done = start_killed(tmp_path, 0, 100_000, tree[0], tmp_path / "out")
    assert "out.partial: a file grew beyond what this session may write" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out.partial").rglob("*") if path.is_file()] == ["plan"]
    assert run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1) == 0
    assert run(tree[0], tmp_path / "clean", "--layout", "opengait", "--workers", 1) == 0
    same_folders(tmp_path / "clean", tmp_path / "out")


def interrupt_after(monkeypatch, count, error):
    """Let the packing of shards fail after `count` of them."""
    original, calls = packing.pack_shard, []

    def pack_shard(work, done):
        if len(calls) == count:
            raise error
        calls.append(work.number)
        return original(work, done)

    monkeypatch.setattr(packing, "pack_shard", pack_shard)
    return calls


def test_a_full_disk_is_one_line_and_the_work_is_kept(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(UserError, match=r"out\.partial: no space left on the device; free some and run"):
            run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1)
    calls = interrupt_after(monkeypatch, 99, None)
    assert run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1) == 0
    assert calls == [1, 2]
    assert run("--verify", tmp_path / "out") == 0


def test_a_full_disk_for_real(tree, tmp_path):
    """The writer against /dev/full, which refuses every byte as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "shard").symlink_to("/dev/full")
    writer = shards.ShardWriter(tmp_path / "shard")
    with pytest.raises(OSError) as caught:
        writer.append(codec.compress(np.random.default_rng(0).integers(0, 256, (9, 64, 64), dtype=np.uint8)))
        writer.close()
    assert caught.value.errno == errno.ENOSPC


def test_a_changed_source_starts_afresh(tmp_path, monkeypatch, capsys):
    make_tree(tmp_path / "tree", 100)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        assert run(tmp_path / "tree", tmp_path / "out", "--layout", "opengait", "--workers", 1) == prepare.INTERRUPTED
    assert "the same command resumes" in capsys.readouterr().err
    new = tmp_path / "tree" / "0000" / "nm-01" / "999"
    new.mkdir()
    (new / "x.pkl").write_bytes(pickle.dumps(np.full((1, 64, 64), 9, np.uint8)))
    calls = interrupt_after(monkeypatch, 99, None)
    assert run(tmp_path / "tree", tmp_path / "out", "--layout", "opengait", "--workers", 1) == 0
    assert calls == [0, 1, 2]
    assert "the source or the options have changed" in capsys.readouterr().out
    assert PackedDataset.open(tmp_path / "out").sequence(3)[0, 0, 0] == 9


def test_a_record_whose_shard_is_short_is_not_trusted(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt())
        run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1)
    shard = tmp_path / "out.partial" / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    (tmp_path / "out.partial" / "progress" / "shard-00000.json").write_text("{")
    calls = interrupt_after(monkeypatch, 99, None)
    assert run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1) == 0
    assert calls == [0, 1, 2]


def test_two_writers_do_not_meet(tree, tmp_path):
    with packing._locked(tmp_path / "out.partial"), pytest.raises(UserError, match="another `gaitfast prepare`"):
        run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1)


def test_a_foreign_folder_in_the_way_is_not_touched(tree, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("x")
    with pytest.raises(UserError, match="is not an unfinished dataset"):
        run(tree[0], tmp_path / "out", "--layout", "opengait", "--workers", 1)
    assert (tmp_path / "out.partial" / "precious").exists()


def test_shards_grow_with_the_dataset():
    """At most 128 shards, whatever the size: a million sequences are not ten thousand files."""
    source = OpenGaitTree("x")
    for count, expected in ((1, 128), (128 * 128, 128), (1_280_000, 10_000)):
        assert max(packing.MIN_SEQUENCES, -(-count // packing.MAX_SHARDS)) == expected
    assert packing._plan(source, [], 128) != packing._plan(OpenGaitTree("x", 1), [], 128)
