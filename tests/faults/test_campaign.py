"""A short campaign of faults (the recorded one is benchmarks/results/*-faults.json): every kind once, 6 kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_fault_is_survived_with_nothing_lost(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "6", "--steps", "10", "--json"]
    done = subprocess.run([*command, str(tmp_path / "row.json")], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["headline"]["kills"] == row["headline"]["kills_survived"] == 6
    counts = {kind["fault"]: (kind["count"], kind["survived"]) for kind in row["rows"]}
    assert counts["term"] == counts["clock"] == counts["launcher"] == counts["rank"] == (1, 1)
    assert counts.get("disk", (1, 1)) == (1, 1), "where a small disk may be mounted"
