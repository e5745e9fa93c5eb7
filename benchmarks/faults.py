"""Training that is killed again and again: `python -m benchmarks.faults --kills 200 --json FILE`.

Small pretraining runs are hit by faults and started again by the same command until they are done; then losses,
evaluations, weights and moments must equal those of a run that nothing happened to, bit for bit. The faults:

    kill       SIGKILL at a random moment between the start and the end
    write      SIGKILL while a checkpoint is being written
    rank       SIGKILL to one of two ranks: the other ends by itself and says why
    corrupt    SIGKILL, and the newest checkpoint is damaged
    term       SIGTERM: saves and exits with 0
    launcher   SIGTERM to the `deepspeed` command alone: its processes save and end
    disk       the disk fills up: ends with exit code 2 and says why (needs the right to mount a tmpfs)
    clock      the wall clock jumps by up to a year, forth or back

`--kills` counts the first four. Headline: kills, and how many of them the runs survived with nothing lost.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.environment import envelope
from benchmarks.fault_runs import ROOT, Run, prepare, require, warm_up
from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.engine import checkpoint, events
from gaitfast.engine.portable import source_commit

KILLS = ("kill", "write", "rank", "corrupt")
SHIFT = "GAITFAST_CLOCK_SHIFT"
SMALL = "small"
"""Folder on which a small disk is mounted where that is permitted; the other runs use the machine's own."""
DISK = 300 << 20
"""Bytes of that disk: enough for a run, two checkpoints and one that is being written."""
SECONDS = 6.0
"""Within which a random kill comes after the start of the command."""


def plan(kills: int, rng: random.Random, disk: bool) -> list[str]:
    """Which fault comes when: every kind at least once, `kills` of them kills."""
    rank, write, corrupt = (max(1, round(kills * share)) for share in (0.15, 0.25, 0.05))
    some = max(1, kills // 25)
    counts = {"rank": rank, "write": write, "corrupt": corrupt, "kill": max(0, kills - rank - write - corrupt)}
    counts |= {"term": some, "clock": some, "disk": some * disk, "launcher": max(1, kills // 50)}
    faults = [fault for fault, count in counts.items() for _ in range(count)]
    rng.shuffle(faults)
    return faults


class Campaign:
    """A run of one rank, one of two and one on a small disk at a time, each replaced by a new one when it is done."""

    def __init__(self, folder: Path, seed: int, steps: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.config = prepare(folder, steps)
        self.current: dict[str, Run] = {}
        self.hit: dict[str, list[dict]] = collections.defaultdict(list)
        self.rows: list[dict] = []
        self.reference: dict[int, dict] = {}
        self.count = 0

    # --- runs ---

    def undisturbed(self) -> None:
        """The runs to compare with; that of one rank by the plain command too: forking changes nothing."""
        for ranks in (1, 2):
            run = Run(self.config, self.folder / f"undisturbed-{ranks}", ranks)
            run.start()
            require(run.wait() == [0] * ranks, f"the undisturbed run failed; see {run.log}")
            self.reference[ranks] = run.outcome()
            shutil.rmtree(run.folder)
        run = Run(self.config, self.folder / "command", 1)
        run.start_command()
        require(run.launcher.wait() == 0, f"the command failed; see {run.log}")
        run.require_equal(self.reference[1])
        shutil.rmtree(run.folder)

    def run_of(self, kind: str) -> Run:
        """The open run of a kind: `one` rank, `two` ranks, or `small`, one rank on the small disk."""
        if kind not in self.current:
            self.count += 1
            folder = self.folder / SMALL if kind == "small" else self.folder
            self.current[kind] = Run(self.config, folder / f"run{self.count}", 2 if kind == "two" else 1)
        return self.current[kind]

    def settle(self, kind: str) -> None:
        """Compare a finished run, and count what it survived."""
        run = self.current.pop(kind)
        run.require_equal(self.reference[run.ranks])
        for row in self.hit[kind]:
            row["survived"] = True
        self.hit[kind] = []
        shutil.rmtree(run.folder)
        run.log.unlink()

    # --- faults: each starts the run's command, disturbs it, and says what it saw; None if the run ended before ---

    def at_random(self, run: Run) -> bool:
        """Wait for a random moment of the first seconds, which a start and some steps take; whether it still goes."""
        deadline = time.monotonic() + self.rng.uniform(0, SECONDS)
        while time.monotonic() < deadline and run.poll():
            time.sleep(0.002)
        return run.poll()

    def after_a_step(self, run: Run) -> bool:
        """Wait until the run has done a step more, then a little."""
        known = len(run.rows())
        going = run.until(lambda: len(run.rows()) not in (0, known), "a step")
        time.sleep(self.rng.uniform(0, 0.5))
        return going and run.poll()

    def kill(self, run: Run) -> dict | None:
        run.start()
        if not self.at_random(run):
            return None
        run.kill()
        run.wait()
        return {"half_files": len(run.partial)}

    def write(self, run: Run) -> dict | None:
        run.start()
        skipped = self.rng.randrange(3)  # not always the first
        for _ in range(skipped + 1):
            if not run.until(lambda: run.partial, "a checkpoint being written"):
                return None
            if _ < skipped:
                run.until(lambda: not run.partial, "it to be whole")
        time.sleep(self.rng.uniform(0, 0.1))
        run.kill()
        run.wait()
        return {"half_files": len(run.partial)}

    def rank(self, run: Run) -> dict | None:
        run.start()
        victim = self.rng.randrange(2)
        if not self.after_a_step(run):
            return None
        run.kill(ranks=[victim])
        started = time.monotonic()
        run.wait()
        if run.finished:
            return None
        code = run.codes[run.pids[1 - victim]]
        require(code == 2, f"{run.folder}: the other rank ended with {code}; see {run.log}")
        require("lost the other processes" in run.log.read_text(), f"{run.log} does not say what happened")
        return {"rank": victim, "seconds_to_end": round(time.monotonic() - started, 2)}

    def corrupt(self, run: Run) -> dict | None:
        run.start()
        two = run.until(lambda: len(checkpoint.listing(run.folder)) >= 2, "two checkpoints")
        if not two or not self.at_random(run):
            return None
        run.kill()
        run.wait()
        newest = checkpoint.listing(run.folder)[0]
        content, how = bytearray(newest.read_bytes()), self.rng.choice(("flip", "cut", "empty"))
        if how == "flip":
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        newest.write_bytes(
            content if how == "flip" else content[: self.rng.randrange(len(content))] if how == "cut" else b""
        )
        return {"damage": how}

    def term(self, run: Run) -> dict | None:
        run.start()
        if not self.after_a_step(run):
            return None
        run.kill(15)
        codes = run.wait()
        if run.finished:
            return None
        require(codes == [0], f"{run.folder}: SIGTERM ended it with {codes}; see {run.log}")
        require(run.last_event["event"] == "stop", f"{run.folder}: no stop in its events; see {run.log}")
        return {}

    def launcher(self, run: Run) -> dict | None:
        known = len(run.rows())
        run.start_command(ranks=run.ranks)
        run.until(lambda: len(run.rows()) not in (0, known), "a step", while_running=False)
        run.launcher.terminate()
        run.launcher.wait()
        started = time.monotonic()
        run.until(lambda: not events.is_alive(run.folder), "the processes to save and end", while_running=False)
        if run.finished:
            return None
        require(run.last_event["event"] == "stop", f"{run.folder}: no stop in its events; see {run.log}")
        return {"seconds_to_end": round(time.monotonic() - started, 2)}

    def fill_disk(self, run: Run) -> dict | None:
        run.start()
        during, left = self.rng.choice((True, False)), self.rng.choice((0, 10 << 20))
        going = run.until(lambda: run.partial, "a checkpoint") if during else self.after_a_step(run)
        filler = self.folder / SMALL / "filler"
        try:
            fill(filler, left)
            run.wait()
        finally:
            filler.unlink()
        if not going or run.finished:
            return None
        code = run.codes[run.pids[0]]
        require(code == 2, f"{run.folder}: a full disk ended it with {code}; see {run.log}")
        return {"bytes_left": left, "during_a_checkpoint": during}

    def clock(self, run: Run) -> dict | None:
        run.start()
        jump = self.rng.choice((-1, 1)) * self.rng.randint(3600, 365 * 86400)
        try:
            going = self.after_a_step(run)
            set_clock(jump)
            codes = run.wait()
        finally:
            set_clock(0)
        require(codes == [0], f"{run.folder}: the jump of the clock ended it with {codes}; see {run.log}")
        return {"seconds": jump} if going else None

    def go(self, faults: list[str], deadline: float, tell: Callable[[str], None]) -> None:
        """Strike until all faults were done or the deadline is over, then finish what is open."""
        do = {name: getattr(self, name) for name in (*KILLS, "term", "launcher", "clock")} | {"disk": self.fill_disk}
        for number, fault in enumerate(faults, 1):
            if time.monotonic() > deadline:
                break
            kind = {"rank": "two", "launcher": "two", "disk": "small"}.get(fault, "one")
            facts = None
            while facts is None:  # a run that ended before the fault came is no test of it
                run = self.run_of(kind)
                facts = do[fault](run)
                if facts is not None:
                    rows = run.rows()
                    step = rows[-1]["step"] if rows else 0
                    self.rows.append({"fault": fault, "ranks": run.ranks, "step": step, **facts, "survived": False})
                    self.hit[kind].append(self.rows[-1])
                if run.finished:
                    self.settle(kind)
            tell(f"{number}/{len(faults)} {self.rows[-1]}")
        for kind, run in list(self.current.items()):
            run.start()
            codes = run.wait()
            require(codes == [0] * run.ranks, f"{run.folder}: could not be finished, {codes}; see {run.log}")
            self.settle(kind)


def fill(path: Path, left: int) -> None:
    """Fill the disk with a file, up to `left` bytes."""
    with path.open("wb") as file:
        for _ in range(100):
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(path.parent).free - left))
                return
            except OSError:  # somebody took some of it meanwhile
                continue
    raise OSError(f"{path.parent} could not be filled")


def set_clock(seconds: int) -> None:
    """Let the wall clock of this process and its children jump to `seconds` from the true time."""
    with open(os.environ[SHIFT], "r+b") as file:
        file.write(struct.pack("q", seconds))


def preload_clock(folder: Path) -> None:
    """Run this program again, in the same process, with a clock that can be moved."""
    library, shift = folder / "clock_shift.so", folder / "clock_shift"
    source = ROOT / "benchmarks/clock_shift.cpp"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    shift.write_bytes(struct.pack("q", 0))
    os.environ |= {SHIFT: str(shift), "LD_PRELOAD": str(library)}
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]])


def own_disk(folder: Path) -> bool:
    """Mount a small disk on `folder`, visible to this process and its children alone; False where not permitted."""
    new_mounts = 0x20000  # CLONE_NEWNS
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts) != 0:
        return False
    commands = [
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)],
    ]
    return all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)


def summary(campaign: Campaign, seconds: float) -> tuple[dict, list[dict]]:
    """Headline, and one row per kind of fault."""
    kinds = collections.defaultdict(list)
    for row in campaign.rows:
        kinds[row["fault"]].append(row)
    rows = []
    for fault, hits in sorted(kinds.items()):
        row = {"fault": fault, "count": len(hits), "survived": sum(hit["survived"] for hit in hits)}
        if fault in KILLS:
            row["half_files_left"] = sum(hit.get("half_files", 0) for hit in hits)
        if times := [hit["seconds_to_end"] for hit in hits if "seconds_to_end" in hit]:
            row["seconds_to_end_at_most"] = max(times)
        rows.append({**row, "steps": sorted(hit["step"] for hit in hits)})
    kills = [row for row in campaign.rows if row["fault"] in KILLS]
    headline = {
        "kills": len(kills),
        "kills_survived": sum(row["survived"] for row in kills),
        "faults": len(campaign.rows),
        "faults_survived": sum(row["survived"] for row in campaign.rows),
        "runs": campaign.count,
        "steps_of_a_run": campaign.reference[1]["metrics.jsonl"][-1]["step"],
        "seconds": round(seconds),
    }
    return headline, rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kills, besides the other faults (default: 200)")
    parser.add_argument("--steps", type=int, default=40, help="of a run (default: 40)")
    parser.add_argument("--minutes", type=float, default=120, help="strike no longer than this (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they come")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if SHIFT not in os.environ:
        preload_clock(Path(tempfile.mkdtemp(prefix="gaitfast-faults-")))
    folder = Path(os.environ[SHIFT]).parent / "runs"
    started = time.monotonic()
    source_commit()  # remembers it: what runs is what was imported
    warm_up()
    try:
        (folder / SMALL).mkdir(parents=True)
        disk = own_disk(folder / SMALL)
        campaign = Campaign(folder, arguments.seed, arguments.steps)
        campaign.undisturbed()
        faults = plan(arguments.kills, campaign.rng, disk)
        campaign.go(faults, started + 60 * arguments.minutes, lambda text: print(text, flush=True))
    finally:
        logs = sorted(folder.glob("*.log"))
        if sys.exc_info()[0] and logs:
            print("\n".join(path.read_text()[-2000:] for path in logs[-2:]), file=sys.stderr)
        shutil.rmtree(folder.parent, ignore_errors=True)
    headline, rows = summary(campaign, time.monotonic() - started)
    if not disk:
        print("no tmpfs could be mounted here, so no disk was filled")
    print(headline)
    if arguments.json:
        files.write_json(arguments.json, envelope(headline, rows))
    return 0 if headline["faults_survived"] == headline["faults"] else 1


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with user_errors():
        sys.exit(main())
