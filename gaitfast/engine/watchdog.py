"""Ends a process whose run has come to a standstill because other processes of it cannot be reached.

Exchanges have a timeout of their own, and mostly it is what ends them. But a network that is cut in the middle of a
large message can leave the transport waiting for a send that never completes, where no exception gets through.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE = 5.0
"""Seconds beyond the timeout of exchanges, so that those can speak first."""
TICK = 0.5
PATIENT = 12
"""How many times longer an evaluation may take than a step."""


class Watchdog:
    """A thread that ends the process when nobody called `beat` for `timeout` + `grace` seconds.

    Args:
        timeout: seconds, of time in which this process could run: a suspended one is not at a standstill.
        last_words: called before the end; returns the message for stderr.
    """

    def __init__(self, timeout: float, last_words: Callable[[], str], grace: float = GRACE):
        self._limit, self._last_words = timeout + grace, last_words
        self._waited, self._factor = 0.0, 1
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Something was done."""
        self._waited = 0.0

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, a standstill may last longer: ranks work on their own without exchanging anything."""
        self._factor = PATIENT
        self.beat()
        try:
            yield
        finally:
            self._factor = 1
            self.beat()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(TICK):
            now = time.monotonic()
            self._waited += min(now - before, 2 * TICK)
            before = now
            if self._waited > self._limit * self._factor:
                try:
                    print(f"\ngaitfast: error: {self._last_words()}", file=sys.stderr, flush=True)
                finally:
                    os._exit(2)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
