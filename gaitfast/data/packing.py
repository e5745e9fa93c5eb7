"""Packs a source: lists it, cuts the list into shards, writes these in parallel, and assembles the dataset at the end.

All work happens in OUT.partial/. A shard is finished when its record lies in OUT.partial/progress/; after a kill at any
moment the same command keeps the finished shards and goes on. The last act renames OUT.partial to OUT, so a dataset is
complete or absent. What a shard holds follows from the list alone, so the output does not depend on the workers.

What is odd about the whole goes into dataset.json as `findings`: `published` (counts that are not the published ones,
what -> [found, published]), `duplicates` (groups of sequence numbers that are equal frame by frame), `lookalikes`
(groups of ids, types or views that differ by case or padding alone), and of GREW `unsorted_pairs` (ids whose 01 and 02
are not in the order of their names).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gaitfast import files, names
from gaitfast.config import UserError
from gaitfast.data import codec, packed, published, shards
from gaitfast.data.partition import Partition
from gaitfast.data.sources import Entry, Listing, Problem, SourceError

MIN_SEQUENCES, MAX_SHARDS = 128, 128
"""A shard has at least this many sequences, and a dataset at most this many shards."""


class Source(Protocol):
    """What a reader offers (gaitfast/data/sources.py). It travels to the workers, so it pickles."""

    def scan(self) -> Listing: ...

    def read(self, entry: Entry) -> np.ndarray: ...


Progress = Callable[[int, int], None]
"""Told (sequences, frames) done so far by this process and its workers."""


@dataclass(frozen=True)
class Job:
    """One dataset to write."""

    source: Source
    out: Path
    name: str
    protocol: str
    partition: Partition | None
    workers: int


class ShardWork(NamedTuple):
    """What a worker is sent."""

    source: Source
    entries: list[Entry]
    folder: Path
    number: int

    @property
    def file(self) -> Path:
        return self.folder / f"shard-{self.number:05d}.safetensors"

    @property
    def record(self) -> Path:
        return self.folder / "progress" / f"shard-{self.number:05d}.json"


class ShardResult(NamedTuple):
    """What became of a shard; kept in its record. `lengths`: frames of each entry, 0 where it was left out; `digests`:
    BLAKE2b-128 of its chunks, equal for equal frames, "" where it was left out."""

    shard: packed.ShardRecord
    lengths: list[int]
    digests: list[str]
    problems: list[Problem]


class _Stopped(Exception):
    """The parent asked the worker to stop."""


def pack_shard(work: ShardWork, done: Progress) -> ShardResult:
    """Write one shard and its record, durably. Sequences that cannot be read become problems."""
    lengths, digests, problems = [], [], []
    temporary = work.file.with_suffix(f".{os.getpid()}.tmp")
    writer = shards.ShardWriter(temporary)
    try:
        for entry in work.entries:
            before, digest = writer.num_frames, ""
            try:
                chunks = codec.compress(work.source.read(entry))
                writer.append(chunks)
                digest = hashlib.blake2b(chunks.size.tobytes() + chunks.data.tobytes(), digest_size=16).hexdigest()
            except SourceError as error:
                problems.append(Problem(error.path, error.reason))
            except MemoryError:
                problems.append(Problem(entry.paths[0], "does not fit into memory"))
            lengths.append(writer.num_frames - before)
            digests.append(digest)
            done(1, lengths[-1])
        writer.close()
    except BaseException:
        writer.abort()
        temporary.unlink(missing_ok=True)
        raise
    kept = sum(length > 0 for length in lengths)
    record = packed.ShardRecord(
        work.file.name, temporary.stat().st_size, shards.checksum(temporary), kept, writer.num_frames
    )
    temporary.rename(work.file)
    files.sync(work.folder)
    result = ShardResult(record, lengths, digests, problems)
    temporary = work.record.with_suffix(f".{os.getpid()}.tmp")
    shards.write_text(temporary, json.dumps([record._asdict(), lengths, digests, problems]))
    temporary.rename(work.record)
    return result


def _finished(work: ShardWork) -> ShardResult | None:
    """The result of a shard that an earlier run finished."""
    try:
        record, lengths, digests, problems = json.loads(work.record.read_text(encoding="utf-8"))
        result = ShardResult(packed.ShardRecord(**record), lengths, digests, [Problem(*p) for p in problems])
        whole = work.file.stat().st_size == result.shard.bytes and len(lengths) == len(digests) == len(work.entries)
        return result if whole else None
    except (OSError, ValueError, TypeError):
        return None


# --- worker processes -------------------------------------------------------------------------------------------------

_shared = None  # in a worker: int64 (sequences, frames, stop)


def _start_worker(shared) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and asks through `shared`
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Die with the parent, however it died: a worker left behind would write into the folder of the next run."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work_in_pool(work: ShardWork) -> ShardResult:
    def done(sequences: int, frames: int) -> None:
        with _shared.get_lock():
            _shared[0] += sequences
            _shared[1] += frames
            if _shared[2]:
                raise _Stopped

    return pack_shard(work, done)


def _run(pending: list[ShardWork], workers: int, progress: Progress) -> Iterator[tuple[int, ShardResult]]:
    """Pack shards, in this process or in a pool; yields (number, result) as they are finished."""
    if workers == 1 or len(pending) == 1:
        for work in pending:
            yield work.number, pack_shard(work, progress)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may deadlock
    shared = context.Array("q", 3)
    pool = ProcessPoolExecutor(min(workers, len(pending)), context, _start_worker, (shared,))
    told = [0, 0]

    def report() -> None:
        now = shared[:2]
        progress(now[0] - told[0], now[1] - told[1])
        told[:] = now

    try:
        futures = {pool.submit(_work_in_pool, work): work.number for work in pending}
        waiting = set(futures)
        while waiting:
            ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            report()
            for future in ready:
                yield futures[future], future.result()
    finally:
        shared[2] = 1
        pool.shutdown(wait=True, cancel_futures=True)


# --- the whole --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """A finished dataset and what was left out of it."""

    dataset: packed.PackedDataset
    problems: list[Problem]


def pack(job: Job, listing: Listing, progress: Progress, note: Callable[[str], None]) -> Outcome:
    """Write the dataset of `listing`, or go on with it. UserError if no sequence can be read, or on a full disk."""
    partial = job.out.with_name(job.out.name + ".partial")
    entries = listing.entries
    size = max(MIN_SEQUENCES, -(-len(entries) // MAX_SHARDS))
    starts = range(0, len(entries), size)
    works = [ShardWork(job.source, entries[i : i + size], partial, n) for n, i in enumerate(starts)]
    try:
        with _locked(partial):
            if job.partition is not None:  # a wrong file is better found before the work than after it
                job.partition.apply([tuple(entry[:3]) for entry in entries])
            _resume_or_restart(partial, _plan(job.source, entries, size), note)
            results = {work.number: result for work in works if (result := _finished(work))}
            for work in works:
                if work.number in results:
                    progress(len(work.entries), 0)
            pending = [work for work in works if work.number not in results]
            results.update(_run(pending, job.workers, progress))
            problems = _assemble(job, listing, [results[work.number] for work in works], partial)
            partial.rename(job.out)
            files.sync(job.out.parent)
            finish(job.out)
    except BrokenProcessPool:
        raise UserError(
            f"{job.out}: a worker was killed (out of memory?); run the same command again, it resumes"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{partial}: no space left on the device; free some and run the same command again, it resumes"
            ) from None
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{partial}: a file grew beyond what this session may write; raise `ulimit -f` and run the same command"
                " again, it resumes"
            ) from None
        raise UserError(f"{error.filename or partial}: cannot be written ({error.strerror})") from None
    return Outcome(packed.PackedDataset.open(job.out, backend="plain"), problems)


def finish(out: Path) -> bool:
    """Whether `out` is a whole dataset; removes what a run that was killed at the very end left in it."""
    if not (out / "dataset.json").is_file():
        return False
    shutil.rmtree(out / "progress", ignore_errors=True)
    return True


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """The folder, made if need be and held by this process alone."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{partial}: another `gaitfast prepare` is writing it; wait for it, or stop it") from None
    finally:
        os.close(descriptor)


def _plan(source: Source, entries: list[Entry], size: int) -> str:
    """Changes when finished shards would no longer be what this run writes."""
    digest = hashlib.blake2b(
        repr((packed.FORMAT, packed.VERSION, codec.encoder(), size, source)).encode(), digest_size=16
    )
    for entry in entries:
        digest.update(repr(tuple(entry)).encode())
    return digest.hexdigest()


def _resume_or_restart(partial: Path, plan: str, note: Callable[[str], None]) -> None:
    progress = partial / "progress"
    file = progress / "plan"
    if progress.is_dir():
        if file.is_file() and file.read_text() == plan:
            note(f"resuming in {partial}")
            return
        note(f"{partial}: the source or the options have changed since; starting afresh")
        for path in partial.glob("shard-*"):
            path.unlink()
        shutil.rmtree(progress)
    elif any(partial.iterdir()):
        raise UserError(f"{partial}: exists and is not an unfinished dataset; move it away")
    progress.mkdir()
    shards.write_text(file, plan)


def _assemble(job: Job, listing: Listing, results: list[ShardResult], folder: Path) -> list[Problem]:
    """Index, problems.json and dataset.json from the finished shards."""
    problems = sorted({*listing.problems, *(problem for result in results for problem in result.problems)})
    lengths = [length for result in results for length in result.lengths]
    keys = [tuple(entry[:3]) for entry, length in zip(listing.entries, lengths) if length]
    if not keys:
        first = f"; first: {problems[0].path} {problems[0].reason}" if problems else ""
        raise UserError(f"{job.out}: not written, because no sequence could be read{first}")
    flags, facts = np.zeros(len(keys), np.uint8), None
    if job.partition is not None:
        flags, facts = job.partition.apply(keys)
    for path in folder.rglob("*.tmp"):
        path.unlink()
    records = [result.shard for result in results if result.shard.sequences]
    for result in results:
        if not result.shard.sequences:
            (folder / result.shard.file).unlink(missing_ok=True)
    index = packed.write_index(folder, keys, [length for length in lengths if length], flags)
    if problems:
        text = json.dumps([problem._asdict() for problem in problems], indent=1)
        shards.write_text(folder / "problems.json", text + "\n")
    digests = [digest for result in results for digest in result.digests if digest]
    found = _findings(job.protocol, keys, digests, facts)
    packed.write_facts(
        folder, name=job.name, protocol=job.protocol, index=index, records=records, partition=facts, findings=found
    )
    return problems


def _findings(protocol: str, keys: list[tuple[str, str, str]], digests: list[str], facts: dict | None) -> dict:
    """What is odd about the sequences `keys` (id, type, view) in their order; only what there is."""
    ids, types, views = (set(column) for column in zip(*keys))
    copies: dict[str, list[int]] = {}
    for number, digest in enumerate(digests):
        copies.setdefault(digest, []).append(number)
    found = {
        "published": published.differences(protocol, {"subjects": len(ids), "sequences": len(keys)} | (facts or {})),
        "duplicates": [group for group in copies.values() if len(group) > 1],
        # GREW's and Gait3D's views are free names, random ones at that, so likeness means nothing there
        "lookalikes": [group for side in (ids, types) for group in names.lookalikes(side)]
        + (names.lookalikes(views) if protocol in ("casia-b", "ou-mvlp") else []),
    }
    if protocol == "grew":
        pairs: dict[str, dict[str, str]] = {}
        for subject, condition, view in keys:
            pairs.setdefault(subject, {})[condition] = view
        found["unsorted_pairs"] = sum("01" in p and "02" in p and p["01"] > p["02"] for p in pairs.values())
    return {key: value for key, value in found.items() if value}
