"""Peak memory of a call, as Linux counts it: the high-water mark of the resident set, in a fresh process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Extra(NamedTuple):
    """MiB beyond what lay in memory when the call began, results included."""

    resident: float
    """The kernel's high-water mark: everything, with pages of mapped files, which it may drop at any time."""
    anonymous: float
    """Sampled every 2 ms: without those pages."""


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def extra_memory(call: Callable[[], Any]) -> Extra:
    """Of one call in this process, which should have made a small one before: libraries allocate at their first."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    resident, anonymous = status_kib("VmRSS"), status_kib("RssAnon")
    highest, done = [anonymous], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], status_kib("RssAnon"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = call()
        highest[0] = max(highest[0], status_kib("RssAnon"))
    finally:
        done.set()
        watcher.join()
    result = Extra(
        *((peak - start) / 1024 for peak, start in ((status_kib("VmHWM"), resident), (highest[0], anonymous)))
    )
    del kept
    return result


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a fresh process, where no other measurement has left memory behind."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}: the process ended without an answer, see above") from None
    finally:
        child.join()


def _send(sender: Any, function: Callable[..., Any], arguments: tuple) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # of a parent that is in a job
        os.environ.pop(name, None)
    sender.send(function(*arguments))
