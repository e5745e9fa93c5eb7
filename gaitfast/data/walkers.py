"""Synthetic walking people: 64x64 silhouettes with a known identity in shape and motion, as an OpenGait tree.

Idea by idea: who walks (walker_identity), the moving body (walker_body, walker_flesh, walker_outfit), the camera
(walker_camera), what goes wrong (walker_nuisances), one walk (walker_scene); here the data set and its command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
from tqdm import tqdm

from gaitfast.config import UserError
from gaitfast.data.walker_identity import Draws, sample_subject
from gaitfast.data.walker_preview import draw_preview
from gaitfast.data.walker_scene import CONDITIONS, NUISANCES, Walk, clips, render_walk, sample_walk

__all__ = ["clips", "configure", "draw_preview", "generate", "main", "render_walk", "sample_subject", "sample_walk"]

MARKER = ".gaitfast-walkers"
"""A file in OUT that says who wrote the folder and with what, so that it may be written again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `generate` makes. Subjects 0 .. subjects - 1 train, the next test_subjects test."""

    seed: int
    subjects: int
    test_subjects: int
    walks: int
    frames: tuple[int, int]
    """Shortest and longest walk, both included."""
    nuisances: str
    cameras: int
    """Fixed cameras that everyone walks past in turn; 0: another random one for each walk."""


def _camera(plan: Plan, walk: int, draws: Draws) -> tuple[int, float]:
    """(azimuth in whole degrees, height in metres) of the camera of a walk."""
    azimuth, height = int(draws.between(0, 360)), draws.between(0.8, 4.4)
    if plan.cameras:
        camera = walk % plan.cameras
        azimuth, height = 360 * camera // plan.cameras, 1.0 + camera % 3
    return azimuth, height


def _layout(plan: Plan, subject: int) -> list[tuple[str, str, Walk]]:
    """(type, view, walk) of every walk of a subject; nm, bg, cl in turn from a random one on."""
    draws = Draws(plan.seed, "walker-layout", 0, subject, 3 * plan.walks + 1)
    turn, seen, walks = draws.choice((0, 1, 2)), dict.fromkeys(CONDITIONS, 0), []
    low, high = plan.frames
    for number in range(plan.walks):
        condition = CONDITIONS[(turn + number) % 3]
        seen[condition] += 1
        azimuth, height = _camera(plan, number, draws)
        frames = int(draws.between(low, high + 1))
        walk = sample_walk(
            plan.seed,
            subject,
            number,
            condition=condition,
            azimuth=azimuth,
            height=height,
            frames=frames,
            nuisances=plan.nuisances,
        )
        walks.append((f"{condition}-{seen[condition]:02d}", f"a{azimuth:03d}-h{round(height)}", walk))
    return walks


def _write_subject(job: tuple[Plan, int, str, Path]) -> int:
    """Write the pickles of one subject. Returns the number of frames."""
    plan, subject, name, sequences = job
    frames = 0
    for kind, view, walk in _layout(plan, subject):
        folder = sequences / name / kind / view
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{view}.pkl", pickle.dumps(render_walk(walk), protocol=4))
        frames += walk.frames
    return frames


def _write(path: Path, content: bytes) -> None:
    """The whole file or none."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _claim(out: Path, plan: Plan) -> None:
    """Make `out` ours: new, empty, or written by `generate` before, in which case the old walkers go."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"{out}: not empty and not written by `gaitfast walkers`; give a new folder")
    facts = json.dumps(dataclasses.asdict(plan)).encode()
    if (out / MARKER).exists() and (out / MARKER).read_bytes() != facts:
        raise UserError(f"{out}: holds walkers of other settings; delete the folder or give a new one")
    (out / "partition.json").unlink(missing_ok=True)
    _write(out / MARKER, facts)
    if (out / "sequences").exists():
        shutil.rmtree(out / "sequences")


def _start_worker() -> None:
    cv2.setNumThreads(1)  # the workers share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _each(jobs: list, workers: int) -> Iterator[int]:
    """`_write_subject` of every job, in processes of their own unless one worker is enough."""
    if workers == 1:
        yield from map(_write_subject, jobs)
        return
    # A clean server process forks the workers: forking this one could copy locks that its threads hold.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        yield from pool.map(_write_subject, jobs)


def generate(
    out: str | Path,
    subjects: int,
    test_subjects: int,
    walks_per_subject: int,
    frames: tuple[int, int],
    seed: int = 0,
    nuisances: str = "none",
    workers: int = 0,
    progress: bool = False,
    cameras: int = 0,
) -> int:
    """Write OUT/sequences/<id>/<type>/<view>/<view>.pkl and OUT/partition.json. Returns the number of frames.

    `frames`: the shortest and the longest walk. `cameras`: so many fixed ones, evenly around, that everyone passes
    in turn; 0: another random one for each walk, as in the wild. One walk of each test subject is a probe, the others
    are gallery (Gait3D's protocol). `workers` 0 takes all cores; the files do not depend on it. partition.json comes
    last: a tree without it is not complete. Raises UserError if OUT holds anything else, and if it cannot be written
    (disk full).
    """
    for option, value, least in (
        ("--subjects", subjects, 1),
        ("--test-subjects", test_subjects, 0),
        ("--walks", walks_per_subject, 2),
        ("--workers", workers, 0),
        ("--cameras", cameras, 0),
    ):
        if value < least:
            raise UserError(f"{option}: must be at least {least}, got {value}")
    low, high = frames
    if not 1 <= low <= high:
        raise UserError(f"--frames: needs 1 <= LOW <= HIGH, got {low} {high}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: lies in 0..2^63-1, got {seed}")
    if nuisances not in NUISANCES:
        raise UserError(f"--nuisances: is one of {', '.join(NUISANCES)}, got {nuisances!r}")
    plan = Plan(
        seed=seed,
        subjects=subjects,
        test_subjects=test_subjects,
        walks=walks_per_subject,
        frames=(low, high),
        nuisances=nuisances,
        cameras=cameras,
    )
    out, total = Path(out), subjects + test_subjects
    digits = max(4, len(str(total - 1)))
    names = [f"{subject:0{digits}d}" for subject in range(total)]
    jobs = [(plan, subject, name, out / "sequences") for subject, name in enumerate(names)]
    workers = min(workers or len(os.sched_getaffinity(0)), total)
    written = 0
    try:
        _claim(out, plan)
        with tqdm(total=total, unit=" people", desc="walkers", disable=not progress) as bar:
            for frames_of_one in _each(jobs, workers):
                written += frames_of_one
                bar.update()
        _write(out / "partition.json", json.dumps(_partition(plan, names), indent=1).encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); free some space or choose another") from None
    except BrokenExecutor:
        raise UserError(f"{out}: a worker was killed, probably for lack of memory; use fewer --workers") from None
    return written


def _partition(plan: Plan, names: list[str]) -> dict[str, list[str]]:
    probes = []
    for subject in range(plan.subjects, len(names)):
        chosen = Draws(plan.seed, "walker-probe", 0, subject, 1).choice(range(plan.walks))
        kind, view, _ = _layout(plan, subject)[chosen]
        probes.append(f"{names[subject]}-{kind}-{view}")
    return {"TRAIN_SET": names[: plan.subjects], "TEST_SET": names[plan.subjects :], "PROBE_SET": probes}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write synthetic walking people as an OpenGait tree: OUT/sequences and OUT/partition.json."
    parser.add_argument("out", nargs="?", metavar="OUT", help="folder to write; new, or written by this command before")
    parser.add_argument("--subjects", type=int, default=64, help="people to train on (%(default)s)")
    parser.add_argument("--test-subjects", type=int, default=32, help="other people to test on (%(default)s)")
    parser.add_argument("--walks", type=int, default=8, help="walks per person, each past another camera (%(default)s)")
    parser.add_argument(
        "--frames", type=int, nargs=2, default=(40, 80), metavar=("LOW", "HIGH"), help="length of a walk"
    )
    parser.add_argument(
        "--cameras", type=int, default=0, help="fixed cameras that everyone passes in turn; 0: a random one a walk"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nuisances", choices=NUISANCES, default="mild", help="what goes wrong (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--preview", metavar="PNG", help="draw a sheet of walkers; OUT may then be left out")


def main(args: argparse.Namespace) -> int:
    if args.out is None and args.preview is None:
        raise UserError("OUT: missing; give a folder to write, or --preview PNG")
    if args.preview:
        draw_preview(args.preview, args.seed, args.nuisances)
        print(f"{args.preview}: preview")
    if args.out:
        started = time.perf_counter()
        frames = generate(
            args.out,
            args.subjects,
            args.test_subjects,
            args.walks,
            args.frames,
            args.seed,
            args.nuisances,
            args.workers,
            progress=True,
            cameras=args.cameras,
        )
        rate = frames / (time.perf_counter() - started)
        people = f"{args.subjects} + {args.test_subjects} people"
        print(f"{args.out}: {people}, {args.walks} walks each, {frames} frames, {rate:.0f} frames/s")
    return 0
