"""The watchdog ends a process that does nothing any more, and no other."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(body: str) -> tuple[subprocess.CompletedProcess, float]:
    code = f"""
import time
from gaitfast.engine.watchdog import Watchdog
dog = Watchdog(0.5, lambda: "rank 1 of 2 lost the other processes", grace=0.5)
{body}
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done, time.monotonic() - started


def test_a_standstill_ends_with_a_message():
    done, seconds = run("time.sleep(50)")
    assert done.returncode == 2 and seconds < 30
    assert "gaitfast: error: rank 1 of 2 lost the other processes" in done.stderr


def test_who_beats_or_asked_for_patience_or_closed_it_lives_on():
    body = """
for _ in range(15):
    time.sleep(0.1)
    dog.beat()
with dog.patient():
    time.sleep(2)
dog.close()
time.sleep(1.5)
print("alive")
"""
    done, _ = run(body)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
