"""`gaitfast status` tells what a run does from what it leaves behind, and whether its process still lives."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gaitfast.config import UserError
from gaitfast.engine import events
from gaitfast.engine.events import Events
from gaitfast.status import describe, status
from tests.conftest import run_command

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """A run that logged 4 rows at half a second per step, 10 steps each, and was closed."""
    rows = [
        {"step": n * 10, "loss": 1 / n, "clips_per_s": 8.0, "data_wait": 0.02, "seconds": n * 5.0} for n in range(1, 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_00000030.safetensors").write_bytes(b"")
    log = Events(tmp_path, 0)
    log.add("start", step=0, iterations=100, processes=2)
    log.add("checkpoint", step=30)
    log.close()
    return tmp_path


def append(run, event, **facts):
    log = Events(run, facts.pop("rank", 0))
    log.add(event, **facts)
    log.close()


def age(run, seconds):
    for path in run.glob("*.jsonl"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_running_run_tells_its_figures(run, capsys):
    held = Events(run, 0)
    held.claim()
    found = status(run)
    held.close()
    assert (found["health"], found["step"], found["iterations"]) == ("running", 40, 100)
    assert found["steps_per_s"] == pytest.approx(2.0) and found["seconds_to_go"] == pytest.approx(30.0)
    assert (found["loss"], found["checkpoint_step"], found["starts"]) == (0.25, 30, 1)
    text = describe(run, found)
    for part in ("running", "40 of 100 (40%)", "2.00 steps/s", "to go       30 s", "checkpoint  step 30"):
        assert part in text


def test_health_follows_the_lock_and_the_last_event(run):
    assert status(run)["health"] == "killed"
    for event, facts, health, word in (
        ("failure", {"rank": 1, "error": "UserError: no space left"}, "failed", "rank 1: UserError: no space left"),
        ("resume", {"step": 30, "iterations": 100}, "killed", "without a word"),
        ("stop", {"step": 50}, "stopped", "the same command goes on"),
        ("finish", {"step": 100}, "finished", "all steps"),
    ):
        append(run, event, **facts)
        found = status(run)
        assert found["health"] == health and word in found["why"], event
        assert found["seconds_to_go"] is None
    assert status(run)["starts"] == 2


def test_a_silent_run_is_stalled_unless_it_evaluates(run):
    held = Events(run, 0)
    held.claim()
    age(run, 200)
    assert status(run)["health"] == "running"
    age(run, 400)
    assert status(run)["health"] == "stalled"
    append(run, "evaluate", step=40)
    age(run, 400)
    assert status(run)["health"] == "running"
    age(run, 4000)
    assert status(run)["health"] == "stalled"
    held.close()


def test_the_command_prints_and_its_exit_code_says_whether_to_look(run, capsys):
    assert run_command("status", run) == 1
    assert "killed" in capsys.readouterr().out
    append(run, "stop", step=40)
    assert run_command("status", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["health"] == "stopped"
    assert run_command("status", run / "nowhere") == 2
    assert "no run of this version" in capsys.readouterr().err


def test_only_one_process_trains_in_a_folder_and_a_dead_one_lets_go(run):
    code = f"""
import sys, time
from pathlib import Path
from gaitfast.engine.events import Events
log = Events(Path({str(run)!r}), 0)
log.claim()
print("held", flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "held\n"
    assert events.is_alive(run)
    with pytest.raises(UserError, match="another process trains in this folder"):
        Events(run, 0).claim()
    other.kill()
    other.wait()
    other.stdout.close()
    assert not events.is_alive(run)
    Events(run, 0).claim()


def test_a_line_that_a_kill_cut_off_spoils_no_event(run):
    with (run / events.NAME).open("a") as file:
        file.write('{"time": "20')
    append(run, "resume", step=30)
    assert [event["event"] for event in events.read(run)] == ["start", "checkpoint", "resume"]
    assert all(event["time"].endswith("Z") and event["rank"] == 0 for event in events.read(run))


def test_a_run_that_logged_nothing_has_no_pace(tmp_path):
    append(tmp_path, "start", step=0, iterations=10, processes=1)
    found = status(tmp_path)
    assert found["steps_per_s"] is None and found["checkpoint_step"] is None and found["step"] == 0
    assert "none yet" in describe(tmp_path, found)
