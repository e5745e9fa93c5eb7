"""`gaitfast prepare`: a foreign layout in, a packed dataset out; or a packed dataset checked."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gaitfast.config import UserError
from gaitfast.data import packing, raw_trees, usf17
from gaitfast.data.packed import PackedDataset
from gaitfast.data.partition import Partition
from gaitfast.data.published import PUBLISHED, describe
from gaitfast.data.sources import OpenGaitTree, PngTree, Problem, is_silhouette

PROTOCOLS = ("gait3d", "grew", "casia-b", "ou-mvlp", "usf17", "walkers", "none")
LAYOUTS = ("opengait", "png", "usf17", *PUBLISHED)
SHORT = 5
"""OpenGait warns of sequences with fewer frames."""
SHOWN = 20
"""Problems that are printed; problems.json has them all."""
CLEAN, WITH_PROBLEMS, INTERRUPTED = 0, 3, 130


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Pack silhouettes into a dataset that trains fast, or check one."
    parser.epilog = "Exit code: 0 clean, 2 a mistake, 3 written (or checked) with problems."
    parser.add_argument("source", nargs="?", metavar="SRC", help="folder of the foreign dataset")
    parser.add_argument("out", nargs="?", metavar="OUT", help="folder of the packed dataset, which must not exist")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="how SRC is laid out; the name of a benchmark means: as published, or OpenGait's pickles of it",
    )
    parser.add_argument(
        "--partition",
        metavar="FILE",
        help="OpenGait's partition JSON (TRAIN_SET, TEST_SET, PROBE_SET); of a benchmark, default: its file in"
        " or beside SRC",
    )
    parser.add_argument(
        "--name",
        help=f"name of the dataset; default: the partition's, else the folder's. One of {', '.join(PUBLISHED)} stands"
        " for its layout and protocol too",
    )
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, help="how it is evaluated; default: the one its name stands for"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="processes; default: one per core")
    parser.add_argument(
        "--modality", type=int, metavar="I", help="opengait: which of a folder's pickles, sorted by name"
    )
    parser.add_argument("--as-read", action="store_true", help="png: pictures are normalised to 64x64 already")
    parser.add_argument("--verify", metavar="DATASET", help="instead: check every byte of a packed dataset")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. UserError for a mistake."""
    if args.verify:
        if args.source or args.layout:
            raise UserError("--verify: takes a packed dataset alone; drop SRC, OUT and --layout")
        return _verify(Path(args.verify))
    args.layout = args.layout or _published_name(args.name)
    if not (args.source and args.out and args.layout):
        raise UserError(f"prepare: write `gaitfast prepare SRC OUT --layout {'|'.join(LAYOUTS)}`, or --verify DATASET")
    job, listing = _job(args)
    print(f"{len(listing.entries):,} sequences found in {args.source}")
    started = time.perf_counter()
    try:
        with _progress_bar(len(listing.entries)) as progress:
            dataset, problems = packing.pack(job, listing, progress, tqdm.write)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command resumes in {job.out}.partial", file=sys.stderr)
        return INTERRUPTED
    _summary(dataset, time.perf_counter() - started)
    return _report(problems, f"; all of them in {job.out / 'problems.json'}")


def _job(args: argparse.Namespace) -> tuple[packing.Job, packing.Listing]:
    """What to do, and the list of the source."""
    source, out = Path(os.path.realpath(args.source)), Path(os.path.abspath(args.out))
    if not source.is_dir():
        raise UserError(f"{args.source}: no such folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if packing.finish(out):
            raise UserError(f"{args.out}: already a whole dataset; remove it to pack anew, or choose another folder")
        raise UserError(f"{args.out}: already exists; remove it or choose another folder")
    if args.workers < 0:
        raise UserError(f"--workers: must be positive, got {args.workers}")
    if args.modality is not None and args.modality < 0:
        raise UserError(f"--modality: is a number from 0, got {args.modality}")
    if args.as_read and args.layout != "png":
        raise UserError("--as-read: is for --layout png")

    known = args.layout if args.layout in PUBLISHED else _published_name(args.name)
    reader, ours = _reader(source, args, known)
    if args.modality is not None and not isinstance(reader, OpenGaitTree):
        raise UserError("--modality: is for OpenGait's pickles, and these are pictures; drop it")
    partition = _partition(args, source, known, ours)
    listing = reader.scan()
    if not listing.entries and not listing.problems:
        raise UserError(f"{args.source}: holds no sequence in the layout {args.layout}")
    if partition is None and listing.entries and isinstance(reader, usf17.UsfRelease):
        partition = Partition.parse(usf17.partition(listing.entries), "the built-in partition")
    if partition is None and listing.entries and isinstance(reader, raw_trees.RawGrew):
        ids = {entry.subject for entry in listing.entries}
        train = sorted(name for name in ids if name.endswith("train"))
        sets = {"TRAIN_SET": train, "TEST_SET": sorted(ids.difference(train))}
        partition = Partition.parse(sets, "the folders train and test")

    names = [ours, args.name, partition and partition.dataset, source.name]
    protocol = args.protocol or next((p for p in map(protocol_of, filter(None, names)) if p != "none"), "none")
    name = args.name or next(filter(None, names))
    workers = args.workers or len(os.sched_getaffinity(0))
    return packing.Job(reader, out, name, protocol, partition, workers), listing


def _reader(source: Path, args: argparse.Namespace, known: str) -> tuple[packing.Source, str]:
    """The reader of `source`, and the dataset's name where the layout tells it. `known`: the benchmark it is said to
    be, or ""."""
    ours = args.layout if args.layout in PUBLISHED else ""
    if args.layout == "usf17":
        return usf17.UsfRelease(source), "usf17"
    layout = args.layout if args.layout in ("opengait", "png") else _kind(source)
    if layout == "png":
        if raw_trees.looks_like_grew(source) or (known == "grew" and (source / "train").is_dir()):
            return raw_trees.RawGrew(source), "grew"
        if raw_trees.looks_like_ou_mvlp(source):
            return raw_trees.RawOuMvlp(source), "ou-mvlp"
        return PngTree(source, args.as_read), ours
    if (source / "sequences").is_dir() and (source / "partition.json").is_file():
        return OpenGaitTree(source / "sequences", args.modality), "walkers"
    return OpenGaitTree(source, args.modality), ours


def _kind(source: Path) -> str:
    """`opengait` or `png`, by the first pickle or picture below `source`. UserError if there is neither."""
    for folder, folders, files in os.walk(source):
        folders.sort()
        if any(name.endswith(".pkl") for name in files):
            return "opengait"
        with os.scandir(folder) as entries:
            if any(is_silhouette(entry) for entry in entries):
                return "png"
    raise UserError(f"{source}: holds neither pickles nor .png pictures; is everything unpacked?")


def _partition(args: argparse.Namespace, source: Path, known: str, ours: str) -> Partition | None:
    """The partition of --partition, of synthetic walkers, or of a benchmark whose file lies in or beside its tree."""
    if args.partition:
        return Partition.load(args.partition)
    if ours == "walkers":
        return Partition.load(source / "partition.json")
    if published := PUBLISHED.get(known or ours):
        for folder in (source, source.parent):
            if (folder / published.partition).is_file():
                print(f"partition: {folder / published.partition}")
                return Partition.load(folder / published.partition)
    return None


def _published_name(name: str | None) -> str:
    """The benchmark that `name` stands for, or ""."""
    protocol = protocol_of(name or "")
    return protocol if protocol in PUBLISHED else ""


def protocol_of(name: str) -> str:
    """The protocol that a dataset's name stands for, whatever its case, hyphens and underscores; else `none`."""

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    return next((protocol for protocol in PROTOCOLS if plain(protocol) == plain(name)), "none")


@contextmanager
def _progress_bar(sequences: int) -> Iterator[packing.Progress]:
    with tqdm(total=sequences, unit=" sequences", dynamic_ncols=True, disable=None) as bar:
        started, frames = time.perf_counter(), 0

        def progress(done: int, new_frames: int) -> None:
            nonlocal frames, started
            if not frames and not new_frames:  # what an earlier run did: no measure of how long the rest takes
                bar.initial, bar.n, started = bar.n + done, bar.n + done, time.perf_counter()
                bar.refresh()
                return
            frames += new_frames
            bar.set_postfix_str(f"{frames / (time.perf_counter() - started):,.0f} frames/s", refresh=False)
            bar.update(done)

        yield progress


def _summary(dataset: PackedDataset, seconds: float) -> None:
    size = sum(path.stat().st_size for path in dataset.path.iterdir())
    ratio = dataset.num_frames * 4096 / size
    print(
        f"{dataset.path}: {dataset.name} (protocol {dataset.protocol}), {len(dataset.subjects):,} subjects, "
        f"{dataset.num_sequences:,} sequences, {dataset.num_frames:,} frames in {size / 2**20:,.1f} MiB "
        f"({ratio:.1f}x smaller), {seconds:.1f} s"
    )
    if short := int(np.count_nonzero(dataset.lengths < SHORT)):
        print(f"note: {short:,} sequences have fewer than {SHORT} frames")
    facts, found = dataset.facts["partition"], dataset.facts["findings"]
    if facts is None:
        file = PUBLISHED[dataset.protocol].partition if dataset.protocol in PUBLISHED else "FILE"
        print(
            "note: no partition: every sequence is for training, and there is nothing to test on; to have both, prepare"
            f" it with --partition {file}"
        )
    else:
        print(f"train {facts['train']:,}, test {facts['test']:,}, of these probe {facts['probe']:,} sequences")
        for key, what in (
            ("missing_subjects", "subjects of the partition have no sequence"),
            ("missing_probes", "probes of the partition have no sequence"),
            ("unlisted_sequences", "sequences are of subjects that the partition does not list"),
        ):
            if facts[key]:
                print(f"note: {facts[key]:,} {what}")
        for listed, there in facts["near_misses"]:
            print(
                f"warning: the partition lists {listed!r}, the dataset has {there!r}: these are two names, and not one"
            )
    if "published" in found:
        print(f"warning: {describe(dataset.protocol, found['published'])}")
    for group in found.get("lookalikes", ())[:SHOWN]:
        print(f"warning: {' and '.join(map(repr, group[:3]))} differ by case or leading zeros alone, and count apart")
    if copies := found.get("duplicates"):
        first = " = ".join(dataset.sequence_name(number) for number in copies[0][:2])
        surplus = sum(len(group) - 1 for group in copies)
        print(f"warning: {surplus:,} sequences are copies of others, frame by frame, e.g. {first}")
    if "unsorted_pairs" in found:
        print(
            f"note: of {found['unsorted_pairs']:,} ids the types 01 and 02 are not in the order of their sequences'"
            " names, so a local figure depends on how this tree was made; the raw GREW gets the same types everywhere"
        )


def _report(problems: list[Problem], where: str) -> int:
    if not problems:
        return CLEAN
    print(f"{len(problems):,} problems{where}", file=sys.stderr)
    for problem in problems[:SHOWN]:
        print(f"  {_printable(problem.path)}: {problem.reason}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"  ... and {len(problems) - SHOWN:,} more", file=sys.stderr)
    return WITH_PROBLEMS


def _printable(path: str) -> str:
    """A file's name may hold anything: escape sequences for the terminal, half a surrogate pair."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path)


def _verify(path: Path) -> int:
    dataset = PackedDataset.open(path)
    started, problems = time.perf_counter(), 0
    for line in dataset.verify():
        problems += 1
        print(line, file=sys.stderr)
    state = f"{problems:,} problems" if problems else "sound"
    seconds = time.perf_counter() - started
    print(f"{path}: {state}; {dataset.num_sequences:,} sequences, {dataset.num_frames:,} frames, {seconds:.1f} s")
    return WITH_PROBLEMS if problems else CLEAN
