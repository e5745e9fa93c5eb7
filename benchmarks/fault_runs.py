"""Small training runs that faults are done to: made, started by forking, watched, compared with undisturbed ones."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from safetensors.torch import load_file

from gaitfast import pretrain
from gaitfast.cli import user_errors
from gaitfast.engine import checkpoint, events

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
data: {{path: {dataset}, frames: 2, threads: 1}}
backbone: {{name: smplgait, variant: gait3d, width: 0.125}}
denoiser: {{dim: 32}}
optimizer: {{warmup: 4}}
train: {{iterations: {iterations}, batch: 2, precision: fp32, timeout: 3600}}
eval: {{every: 0, condition_clips: 2, condition_timesteps: 1}}
checkpoint: {{every: 2, keep: 2}}
log_every: 1
"""
PATIENCE = 120.0
"""Seconds within which whatever is waited for has to happen."""


class Survival(AssertionError):
    """A run did not do what it has to do after a fault."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise Survival(text)


def pack_walkers(folder: Path) -> Path:
    """A small dataset of walkers in `folder`."""
    tree, packed = folder / "tree", folder / "packed"
    people = ("--subjects", 4, "--test-subjects", 2, "--walks", 3, "--frames", 6, 8, "--workers", 1)
    for command in (
        ("walkers", tree, *people),
        ("prepare", tree, packed, "--layout", "opengait", "--workers", 1),
    ):
        subprocess.run(
            [sys.executable, "-m", "gaitfast.cli", *map(str, command)], check=True, capture_output=True, cwd=ROOT
        )
    return packed


def prepare(folder: Path, steps: int) -> Path:
    """A dataset and the config of runs of `steps` steps in `folder`; returns the config."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(dataset=pack_walkers(folder), iterations=steps))
    return config


def warm_up() -> None:
    """Import what every run imports, so that a forked one need not."""
    import deepspeed  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401


class Run:
    """One run folder and the processes that train in it at the moment."""

    def __init__(self, config: Path, folder: Path, ranks: int):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.log = folder.with_suffix(".log")
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        self.launcher: subprocess.Popen | None = None

    @property
    def arguments(self) -> list[str]:
        return ["--config", str(self.config), "--set", f"run={self.folder}"]

    def start(self) -> None:
        """`python gaitfast/pretrain.py` for each rank, but forked from this process, which has imported everything."""
        port = str(random.SystemRandom().randint(20_000, 60_000))
        place = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.codes = {}
        self.pids = [self._fork({**place, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(self.ranks)]

    def _fork(self, environment: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(file, stream)
            os.environ.update(environment)
            parser = argparse.ArgumentParser()
            pretrain.configure(parser)
            with user_errors():
                code = pretrain.main(parser.parse_args(self.arguments))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def command(self, ranks: int = 0) -> list[str]:
        """The command that a user types; with `ranks` under the `deepspeed` launcher."""
        first = [sys.executable]
        if ranks:
            port = random.SystemRandom().randint(20_000, 60_000)
            first = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
            first += ["--master_port", str(port)]
        return [*first, str(ROOT / "gaitfast/pretrain.py"), *self.arguments]

    def start_command(self, ranks: int = 0) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with self.log.open("a") as log:
            self.launcher = subprocess.Popen(
                self.command(ranks), stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PATH": path}
            )

    # --- watching ---

    def poll(self) -> bool:
        """Whether a process still runs."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def wait(self) -> list[int]:
        """Until all ended; their exit codes."""
        self.until(lambda: not self.poll(), "the processes to end", while_running=False)
        return [self.codes[pid] for pid in self.pids]

    def until(self, happened, what: str, while_running: bool = True) -> bool:
        """Wait until `happened()`; False if the processes ended before. Survival after PATIENCE seconds."""
        waited, before = 0.0, time.monotonic()
        while not happened():
            if while_running and not self.poll():
                return bool(happened())
            now = time.monotonic()
            waited, before = waited + min(now - before, 1.0), now  # who measures may suspend us meanwhile
            if waited > PATIENCE:
                self.kill()
                raise Survival(f"{self.folder.name}: waited {PATIENCE:.0f} s for {what}; see {self.log}")
            time.sleep(0.002)
        return True

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        self.poll()
        for rank, pid in enumerate(self.pids):
            if pid not in self.codes and (ranks is None or rank in ranks):
                os.kill(pid, number)

    def rows(self, name: str = "metrics.jsonl") -> list[dict]:
        """The rows that are whole."""
        try:
            lines = (self.folder / name).read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    @property
    def partial(self) -> list[Path]:
        """Checkpoints that are being written."""
        return list(checkpoint.folder_of(self.folder).glob(".*.partial"))

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def last_event(self) -> dict:
        return (events.read(self.folder) or [{}])[-1]

    # --- judging ---

    def outcome(self) -> dict:
        """What has to be the same, bit for bit."""
        timing = {"seconds", "clips_per_s", "data_wait"}
        return {
            name: [{k: v for k, v in row.items() if k not in timing} for row in self.rows(name)]
            for name in ("metrics.jsonl", "evaluations.jsonl")
        } | {"weights": self.weights()}

    def weights(self) -> dict[str, bytes]:
        """The last checkpoint, weights and optimizer, and the backbone."""
        found = {}
        for path in (checkpoint.listing(self.folder)[0], self.folder / "backbone.safetensors"):
            found |= {f"{path.stem}/{name}": t.numpy().tobytes() for name, t in load_file(path).items()}
        return found

    def require_equal(self, reference: dict) -> None:
        ours = self.outcome()
        for name, wanted in reference.items():
            require(ours[name] == wanted, f"{self.folder}: {name} is not that of the undisturbed run; see {self.log}")
        require(not self.partial, f"{self.folder}: half a file was left")
        require(len(checkpoint.listing(self.folder)) <= 2, f"{self.folder}: checkpoints were not pruned")
