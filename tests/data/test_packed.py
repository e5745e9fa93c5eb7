"""The packed dataset: what goes in comes out; what is damaged is named; a million sequences open at once."""

import hashlib
import json
import pickle
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from gaitfast.config import UserError
from gaitfast.data import codec, packed, shards
from tests.data.silhouettes import write_in_shards

BACKENDS = [
    "plain",
    pytest.param("compiled", marks=pytest.mark.skipif(not codec.compiled(), reason="gaitfast._C is not built")),
]
PARTITION = {"TRAIN_SET": ["000", "001"], "TEST_SET": ["002", "003"], "PROBE_SET": ["002-nm-01-090", "003-nm-01-090"]}


def make_sequences(seed=0):
    """Five subjects, three views: noise, zeros and sparse frames, shuffled."""
    rng = np.random.default_rng(seed)
    sequences = []
    for subject in range(5):
        for view in range(3):
            shape = (int(rng.integers(1, 20)), 64, 64)
            noise = rng.integers(0, 256, shape, dtype=np.uint8)
            frames = (noise, np.zeros(shape, np.uint8), (noise > 240).astype(np.uint8) * 255)[view]
            sequences.append((f"{subject:03d}", "nm-01", f"{view * 90:03d}", frames))
    return [sequences[i] for i in rng.permutation(len(sequences))]


@pytest.fixture(scope="module")
def sequences():
    return make_sequences()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, sequences):
    return write_in_shards(tmp_path_factory.mktemp("packed") / "set", sequences, 4, name="toy", partition=PARTITION)


@pytest.fixture
def folder(tmp_path, pristine):
    return shutil.copytree(pristine, tmp_path / "set")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_goes_in_comes_out(pristine, sequences, backend):
    dataset = packed.PackedDataset.open(pristine, backend=backend)
    ordered = sorted(sequences, key=lambda s: s[:3])
    frames = np.concatenate([s[3] for s in ordered])
    assert (dataset.name, dataset.protocol) == ("toy", "none")
    assert (dataset.num_sequences, dataset.num_frames) == (len(ordered), len(frames))
    assert dataset.lengths.tolist() == [len(s[3]) for s in ordered]
    assert dataset.starts.dtype == np.int64 and dataset.subject.dtype == dataset.view.dtype == np.int32
    for i, (subject, condition, view, content) in enumerate(ordered):
        codes = dataset.subject[i], dataset.condition[i], dataset.view[i]
        tables = dataset.subjects, dataset.conditions, dataset.views
        assert [table[code] for table, code in zip(tables, codes)] == [subject, condition, view]
        assert dataset.sequence_name(i) == f"{subject}-{condition}-{view}"
        assert np.array_equal(dataset.sequence(i), content)
    order = np.random.default_rng(1).integers(0, len(frames), 300)
    decoded = dataset.frames(order)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, frames[order])
    assert dataset.frames(order[:0]).shape == (0, 64, 64)
    assert np.array_equal(dataset.frames(order[:1]), frames[order[:1]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_bytes_decode_alone(pristine, backend):
    dataset = packed.PackedDataset.open(pristine, backend=backend)
    order = np.random.default_rng(2).integers(0, dataset.num_frames, 200)
    data, offset, size = dataset.chunk_bytes(order)
    assert data.dtype == np.uint8 and offset.dtype == size.dtype == np.int64 and offset[0] == 0
    assert len(data) == size.sum()
    decoded = codec.ChunkReader(data, backend).inflate(offset, size)
    assert np.array_equal(decoded.reshape(-1, 64, 64), dataset.frames(order))


def test_frame_numbers_out_of_range_are_refused(pristine):
    dataset = packed.PackedDataset.open(pristine)
    for number in (-1, dataset.num_frames):
        with pytest.raises(IndexError):
            dataset.frames(np.array([0, number]))


def test_splits(pristine):
    dataset = packed.PackedDataset.open(pristine)

    def names(split):
        return [dataset.sequence_name(i) for i in dataset.split(split)]

    assert names("train") == [f"{s:03d}-nm-01-{v:03d}" for s in (0, 1) for v in (0, 90, 180)]
    assert names("test") == [f"{s:03d}-nm-01-{v:03d}" for s in (2, 3) for v in (0, 90, 180)]
    assert names("probe") == PARTITION["PROBE_SET"]
    assert names("gallery") == [name for name in names("test") if name not in PARTITION["PROBE_SET"]]
    assert dataset.split("all").tolist() == list(range(15)) and dataset.split("all").dtype == np.int64
    with pytest.raises(UserError, match="split dev: unknown"):
        dataset.split("dev")


def test_splits_without_a_partition(tmp_path, sequences):
    dataset = packed.write(tmp_path / "set", sequences)
    assert not dataset.has_partition
    assert len(dataset.split("train")) == len(dataset.split("all")) == 15
    for split in ("test", "probe", "gallery"):
        with pytest.raises(UserError, match="has no partition"):
            dataset.split(split)


def test_a_partition_without_probes_has_an_empty_probe_split(tmp_path, sequences):
    dataset = packed.write(tmp_path / "set", sequences, partition={"TRAIN_SET": ["000"], "TEST_SET": ["001"]})
    assert len(dataset.split("probe")) == 0 and len(dataset.split("gallery")) == 3


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ([], "is an object with TRAIN_SET"),
        ({"TRAIN_SET": []}, "TEST_SET is missing"),
        ({"TRAIN_SET": [1], "TEST_SET": []}, "TRAIN_SET holds 1, which is not a string"),
        ({"TRAIN_SET": ["000"], "TEST_SET": ["000"]}, "in TRAIN_SET and TEST_SET"),
        ({"TRAIN_SET": ["x"], "TEST_SET": ["y"]}, "lists no subject of this dataset"),
        ({"TRAIN_SET": [], "TEST_SET": ["000"], "PROBE_SET": ["z"]}, "no sequence has a name in PROBE_SET"),
        ({"TRAIN_SET": ["000"], "TEST_SET": ["001"], "PROBE_SET": ["000-nm-01-000"]}, "not of a subject in TEST_SET"),
    ],
)
def test_bad_partitions_are_refused(tmp_path, sequences, partition, message):
    with pytest.raises(UserError, match=message):
        packed.write(tmp_path / "set", sequences, partition=partition)


def test_a_probe_name_that_fits_two_sequences_is_refused(tmp_path):
    frames = np.zeros((1, 64, 64), np.uint8)
    partition = {"TRAIN_SET": [], "TEST_SET": ["a", "a-b"], "PROBE_SET": ["a-b-c-d"]}
    with pytest.raises(UserError, match="fits two sequences"):
        packed.write(tmp_path / "set", [("a", "b-c", "d", frames), ("a-b", "c", "d", frames)], partition=partition)


def test_the_files_are_ordinary_safetensors(pristine):
    index = load_file(pristine / "index.safetensors")
    assert index["starts"].dtype == np.int64 and len(index["subject"]) == 15
    shard = load_file(pristine / "shard-00000.safetensors")
    assert set(shard) == {"frames", "offsets", "crc"} and len(shard["offsets"]) == len(shard["crc"]) + 1


def test_the_fingerprint_follows_the_content(tmp_path, sequences, pristine):
    again = packed.PackedDataset.open(write_in_shards(tmp_path / "a", sequences, 4, name="toy", partition=PARTITION))
    assert again.fingerprint == packed.PackedDataset.open(pristine).fingerprint
    changed = [(*s[:3], s[3].copy()) for s in sequences]
    changed[0][3][0, 0, 0] ^= 1
    other = packed.PackedDataset.open(write_in_shards(tmp_path / "b", changed, 4, name="toy", partition=PARTITION))
    assert other.fingerprint != again.fingerprint


def test_pickles_as_its_path(pristine):
    dataset = packed.PackedDataset.open(pristine)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).frames(np.arange(3)), dataset.frames(np.arange(3)))


def test_string_table():
    names = ["", "001", "01", "1", "é", "人", "😀"]
    codes, arrays = packed._table([*names[::-1], *names])
    table = packed.StringTable(arrays["bytes"], arrays["offsets"])
    assert list(table) == names and table[-1] == "😀" and table[1:3] == ["001", "01"]
    assert [table[c] for c in codes] == [*names[::-1], *names]
    assert [table.index(name) for name in names] == list(range(len(names)))
    assert "01" in table and "02" not in table and 1 not in table
    with pytest.raises(ValueError, match="'zzz' is not in the table"):
        table.index("zzz")
    with pytest.raises(IndexError):
        table[7]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_not_a_dataset(tmp_path):
    with pytest.raises(UserError, match="no such dataset folder; write it with"):
        packed.PackedDataset.open(tmp_path / "none")
    (tmp_path / "none.partial").mkdir()
    with pytest.raises(UserError, match="it resumes"):
        packed.PackedDataset.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"no dataset\.json"):
        packed.PackedDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(format="other"), "not the description of a packed dataset"),
        (lambda f: f.update(version=2), "format version 2"),
        (lambda f: f.pop("name"), "damaged"),
        (lambda f: f.update(name=3), "damaged"),
        (lambda f: f.update(frames=f["frames"] + 1), "damaged"),
        (lambda f: f.update(partition=[]), "damaged"),
        (lambda f: f["frame"].update(shape=[64, 44]), "damaged"),
        (lambda f: f["shards"][0].update(file="../../secret"), "damaged"),
        (lambda f: f["shards"][0].update(frames=-1), "damaged"),
        (lambda f: f["shards"][0].update(extra=1), "damaged"),
        (lambda f: f["shards"][0].update(bytes=1), "where dataset.json says 1"),
        (lambda f: f.update(shards=[]), "damaged"),
        (lambda f: f.update(shards=f["shards"][:-1]), "damaged"),
    ],
)
def test_a_wrong_description_is_refused(folder, change, message):
    facts = json.loads((folder / "dataset.json").read_text())
    change(facts)
    (folder / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=message):
        packed.PackedDataset.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"format": "gaitfast-packed", "version": 1}'])
def test_a_damaged_description_is_refused(folder, text):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        packed.PackedDataset.open(folder)


@pytest.mark.parametrize("name", ["index.safetensors", "shard-00001.safetensors"])
def test_missing_and_truncated_files_are_named(folder, name):
    data = (folder / name).read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        (folder / name).write_bytes(data[:size])
        with pytest.raises(UserError, match=name):
            packed.PackedDataset.open(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: No such file"):
        packed.PackedDataset.open(folder)


def test_a_flipped_bit_in_the_index_is_found_on_opening(folder):
    data = bytearray((folder / "index.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "index.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"index\.safetensors: does not match its checksum"):
        packed.PackedDataset.open(folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_in_a_frame_is_named_and_the_rest_still_reads(folder, backend):
    file = folder / "shard-00001.safetensors"
    position = 512 + int(shards.map_tensors(file)["offsets"][3]) + 1
    data = bytearray(file.read_bytes())
    data[position] ^= 16
    file.write_bytes(data)
    dataset = packed.PackedDataset.open(folder, backend=backend)
    first = int(dataset.starts[4])  # four sequences per shard
    i = int(np.searchsorted(dataset.starts, first + 3, side="right")) - 1
    message = (
        f"shard-00001.safetensors: frame {first + 3 - dataset.starts[i]} of sequence {dataset.sequence_name(i)} does"
    )
    for read in (dataset.frames, dataset.chunk_bytes):
        with pytest.raises(UserError, match=message):
            read(np.array([0, first + 3, 1]))
        read(np.array([0, first + 2, first + 4]))
    problems = list(dataset.verify())
    assert len(problems) == 2 and "shard-00001.safetensors: does not match" in problems[0] and message in problems[1]


def test_verify_is_silent_on_a_sound_dataset(pristine):
    assert list(packed.PackedDataset.open(pristine).verify()) == []


def rewrite_index(folder, change):
    """Change index.safetensors and its checksum alike: what a checksum cannot tell."""
    tensors = {name: array.copy() for name, array in shards.map_tensors(folder / "index.safetensors").items()}
    change(tensors)
    shards.write_tensors(folder / "index.safetensors", tensors)
    facts = json.loads((folder / "dataset.json").read_text())
    data = (folder / "index.safetensors").read_bytes()
    facts["index"].update(bytes=len(data), blake2b=hashlib.blake2b(data, digest_size=32).hexdigest())
    (folder / "dataset.json").write_text(json.dumps(facts))


def _swap_starts(tensors):
    tensors["starts"][[3, 4]] = tensors["starts"][[4, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_starts, "contradicts"),
        (lambda t: t["subject"].fill(5), "contradicts"),
        (lambda t: t["view"].fill(-1), "contradicts"),
        (lambda t: t.update(flags=t["flags"][:-1]), "contradicts"),
        (lambda t: t.pop("condition"), "has no array"),
        (lambda t: t["subjects.offsets"].fill(10**12), "contradicts"),
        (lambda t: t.update(starts=t["starts"].astype(np.int32)), "contradicts"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(folder, change, message):
    rewrite_index(folder, change)
    with pytest.raises(UserError, match=message):
        packed.PackedDataset.open(folder)


def header(text, rest=b""):
    text = text.encode() if isinstance(text, str) else text
    return len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 63).to_bytes(8, "little") + b"{}",
        header("{"),
        header("[]"),
        header("nonsense"),
        header(b"\xff\xfe"),
        header("[" * 5000),
        header('{"a":{}}'),
        header('{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}', bytes(8)),
        header('{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,8]}}', bytes(8)),
        header('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', bytes(9)),
        header('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', bytes(7)),
        header('{"a":{"dtype":"U8","shape":[-8],"data_offsets":[0,-8]}}', bytes(8)),
        header('{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', bytes(4)),
        header('{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}', bytes(8)),
        header('{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', bytes(8)),  # 54 bytes of text: not aligned
    ],
)
def test_bad_headers_are_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        shards.map_tensors(path)


def test_a_million_sequences_open_in_under_a_second(tmp_path):
    """Every sequence with a view name of its own, as in GREW. The one shard holds one empty frame a million times."""
    n = 1_000_000
    chunk = codec.compress(np.zeros((1, 64, 64), np.uint8)).data.tobytes()
    folder = tmp_path / "million"
    folder.mkdir()
    names = np.char.encode(np.char.mod("%07d", np.arange(n)))
    views = np.frombuffer(names.tobytes(), np.uint8)
    index = folder / "index.safetensors"
    subjects = b"".join(b"%05d" % i for i in range(n // 50))
    tensors = {
        "starts": np.arange(n + 1),
        "subjects.offsets": np.arange(n // 50 + 1) * 5,
        "conditions.offsets": np.array([0, 2]),
        "views.offsets": np.arange(n + 1) * 7,
        "subject": (np.arange(n) // 50).astype(np.int32),
        "condition": np.zeros(n, np.int32),
        "view": np.arange(n, dtype=np.int32),
        "subjects.bytes": np.frombuffer(subjects, np.uint8),
        "conditions.bytes": np.frombuffer(b"00", np.uint8),
        "views.bytes": views,
        "flags": np.full(n, packed.TRAIN, np.uint8),
    }
    shards.write_tensors(index, tensors)
    shard = folder / "shard-00000.safetensors"
    data = np.tile(np.frombuffer(chunk, np.uint8), n)
    data = np.pad(data, (0, -len(data) % 8))
    crc = np.full(n, codec.zlib.crc32(chunk), np.uint32)
    shards.write_tensors(shard, {"offsets": np.arange(n + 1) * len(chunk), "crc": crc, "frames": data})
    records = [
        packed.ShardRecord(file.name, file.stat().st_size, shards.checksum(file), n, n) for file in (index, shard)
    ]
    facts = {"train": n, "test": 0, "probe": 0}
    packed.write_facts(folder, name="big", protocol="none", index=records[0], records=records[1:], partition=facts)

    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        dataset = packed.PackedDataset.open(folder)
        frames = dataset.frames(np.array([0, n // 2, n - 1]))
        seconds.append(time.perf_counter() - started)
    assert frames.shape == (3, 64, 64) and not frames.any()
    assert dataset.sequence_name(n - 1) == "19999-00-0999999" and len(dataset.split("train")) == n
    assert min(seconds) < 1.0, seconds
