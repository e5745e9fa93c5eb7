"""What happened to a run, one JSON object a line: RUN/events.jsonl. And who may write into its folder.

    {"time": "2026-01-31T12:00:00.000Z", "event": "checkpoint", "rank": 0, "step": 5000, "bytes": 123, "seconds": 0.4}

Events: start, resume, evaluate, checkpoint, stop, finish by the main rank, failure by any. The file only grows; a
resumed run appends. The main rank holds a lock on it while it lives, and the lock goes with the process, however that
ends: so two commands never train into one folder, and `gaitfast status` knows whether a run is alive without a clock.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from gaitfast.config import UserError

NAME = "events.jsonl"
PATIENCE = 30.0
"""Seconds that a start waits for the processes of a killed one to end."""


class Events:
    """The log of one process. `add` may be called by any thread."""

    def __init__(self, run: Path, rank: int):
        self.path, self.rank = run / NAME, rank
        self._file: int | None = None
        self._mutex = threading.Lock()

    def claim(self, patience: float = 0.0) -> None:
        """Lock the folder, which must exist. UserError if another process trains in it for longer than `patience` s, or
        if its file system does not let us."""
        deadline = time.monotonic() + patience
        while True:
            try:
                self._open()
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.utime(self.path)  # a sign of life, long before the first row
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.path.parent}: another process trains in this folder; "
                        "wait for it, or choose another folder with --set run=FOLDER"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written and locked ({error.strerror}); choose a folder where that is "
                    "possible with --set run=FOLDER"
                ) from None

    @property
    def claimed(self) -> bool:
        return self._file is not None

    def _open(self) -> None:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # a line that a kill cut off
                os.write(self._file, b"\n")

    def add(self, event: str, **facts: Any) -> None:
        """Append one event. Nothing happens where the folder does not exist (yet)."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, "event": event, "rank": self.rank, **facts}) + "\n"
        with self._mutex:
            if self.path.parent.is_dir():
                self._open()
                os.write(self._file, line.encode())

    def close(self) -> None:
        with self._mutex:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run, the oldest first; lines that were cut off are left out."""
    try:
        lines = (run / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found


def is_alive(run: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    try:
        file = os.open(run / NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(file)
