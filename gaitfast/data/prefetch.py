"""An iterator that runs ahead of its consumer in a background thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_END = object()


class Prefetcher(Generic[Item]):
    """Items of `source` in order, at most `depth` of them waiting. `source` is advanced and closed in one thread only.

    An exception of `source` arrives behind the items before it, and again on every later request. `close` may be called
    from any thread and at any time; it returns when the thread has ended, after the item that it may be working on.
    An unreferenced prefetcher closes itself, and so does a living one at interpreter exit.
    """

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._failure: BaseException | None = None
        stop = threading.Event()
        # The thread must not hold `self`, or a forgotten prefetcher would live for ever.
        thread = threading.Thread(
            target=_fill, args=(source, self._ready, self._slots, stop), name="gaitfast-prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, thread, self._slots, stop)
        thread.start()

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def __next__(self) -> Item:
        if self._failure is not None:
            raise self._failure
        item = self._ready.get() if self._finalizer.alive else _END
        if item is _END:
            self._ready.put(_END)  # for the next request
            raise StopIteration
        self._slots.release()
        if isinstance(item, _Failure):
            self._failure = item.error
            raise item.error
        return item

    def close(self) -> None:
        self._finalizer()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _fill(source: Iterator, ready: queue.SimpleQueue, slots: threading.Semaphore, stop: threading.Event) -> None:
    try:
        while True:
            slots.acquire()
            if stop.is_set():
                break
            try:
                ready.put(next(source))
            except StopIteration:
                break
            except BaseException as error:
                ready.put(_Failure(error))
                break
    finally:
        if hasattr(source, "close"):
            source.close()
        ready.put(_END)


def _stop(thread: threading.Thread, slots: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    slots.release()
    thread.join()
