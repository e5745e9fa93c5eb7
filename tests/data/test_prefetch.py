import gc
import threading
import time

import pytest

from gaitfast.data.prefetch import Prefetcher

PATIENCE = 10.0
"""Seconds after which something that should happen at once has failed to happen."""


class Counting:
    """0, 1, 2, ... up to `stop`, where `error` is raised. Counts what was asked for, and notes who closed it."""

    def __init__(self, stop=None, error=None):
        self.asked, self.stop, self.error, self.closed = 0, stop, error, threading.Event()
        self.threads = set()

    def __iter__(self):
        return self

    def __next__(self):
        self.threads.add(threading.current_thread())
        if self.asked == self.stop:
            raise self.error or StopIteration
        self.asked += 1
        return self.asked - 1

    def close(self):
        self.threads.add(threading.current_thread())
        self.closed.set()


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_arrive_in_order_and_at_most_depth_wait(depth):
    source = Counting()
    ahead = Prefetcher(source, depth)
    for number in range(20):
        wait_until(lambda number=number: source.asked == number + depth)
        time.sleep(0.002)
        assert source.asked == number + depth
        assert next(ahead) == number
    ahead.close()
    assert source.closed.is_set() and len(source.threads) == 1 and threading.current_thread() not in source.threads


def test_the_end_of_the_source_ends_the_iteration_for_good():
    ahead = Prefetcher(Counting(stop=3), 2)
    assert list(ahead) == [0, 1, 2]
    assert list(ahead) == []
    ahead.close()


def test_an_exception_arrives_at_its_place_and_stays():
    source = Counting(stop=3, error=ValueError("bad item"))
    ahead = Prefetcher(source, 5)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="bad item"):
            next(ahead)
    ahead.close()
    assert source.closed.is_set()


def test_close_ends_a_thread_that_waits_for_room():
    source = Counting()
    ahead = Prefetcher(source, 2)
    wait_until(lambda: source.asked == 2)
    ahead.close()
    ahead.close()
    assert not any(thread.is_alive() for thread in source.threads)
    with pytest.raises(StopIteration):
        next(ahead)


def test_close_wakes_a_consumer_that_waits_for_an_item():
    release = threading.Event()

    def slow():
        release.wait(PATIENCE)
        yield 0

    ahead = Prefetcher(slow(), 2)
    result = []
    consumer = threading.Thread(target=lambda: result.extend(ahead))
    consumer.start()
    closer = threading.Thread(target=ahead.close)
    closer.start()
    release.set()
    for thread in (consumer, closer):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert result in ([], [0])


def test_a_forgotten_prefetcher_closes_itself():
    source = Counting()
    ahead = Prefetcher(source, 2)
    wait_until(lambda: source.asked == 2)
    del ahead
    gc.collect()
    assert source.closed.wait(PATIENCE)
