"""Two nodes, as two network namespaces of this machine: a real `deepspeed --no_ssh` job, cut in two in the middle.

Nothing but the pair of interfaces between them carries traffic; they share no run folder.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gaitfast.engine import events

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT, ITERATIONS = 5, 24
CONFIG = """
data: {{path: {dataset}, frames: 2, threads: 1}}
backbone: {{name: smplgait, variant: gait3d, width: 0.125}}
denoiser: {{dim: 32}}
optimizer: {{warmup: 4}}
train: {{iterations: {iterations}, batch: 2, precision: fp32, timeout: {timeout}}}
eval: {{every: 0, condition_clips: 2, condition_timesteps: 1}}
checkpoint: {{every: 3}}
log_every: 1
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """Names of two namespaces that reach each other at 10.83.0.1 and 10.83.0.2, and the first one's interface."""
    names = [f"gaitfast{os.getpid()}{letter}" for letter in "ab"]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "gf0", "netns", names[0], "type", "veth", "peer", "name", "gf0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.83.0.{number}/24", "dev", "gf0")
            for interface in ("gf0", "lo"):
                ip("-n", name, "link", "set", interface, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"network namespaces are not permitted here ({error})")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.fixture
def folder(tmp_path, walkers_dataset):
    (tmp_path / "hostfile").write_text("10.83.0.1 slots=1\n10.83.0.2 slots=1\n")
    config = CONFIG.format(dataset=walkers_dataset, iterations=ITERATIONS, timeout=TIMEOUT)
    (tmp_path / "config.yaml").write_text(config)
    return tmp_path


def start(folder: Path, nodes: list[str]) -> list[subprocess.Popen]:
    """The command on both nodes; each has a run folder of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment |= {"GLOO_SOCKET_IFNAME": "gf0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = []
    for rank, node in enumerate(nodes):
        command = ["ip", "netns", "exec", node, str(Path(sys.executable).parent / "deepspeed")]
        command += ["--hostfile", str(folder / "hostfile"), "--no_ssh", "--node_rank", str(rank)]
        command += ["--master_addr", "10.83.0.1", "--master_port", "29611", str(ROOT / "gaitfast/pretrain.py")]
        command += ["--config", str(folder / "config.yaml"), "--set", f"run={folder / f'node{rank}'}"]
        with (folder / f"node{rank}.log").open("a") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT))
    return started


def rows(folder: Path) -> list[dict]:
    path = folder / "node0/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_node_is_cut_off_and_the_job_ends_clearly_and_goes_on(nodes, folder):
    job = start(folder, nodes)
    deadline = time.monotonic() + 120
    while len(rows(folder)) < 7:
        assert time.monotonic() < deadline and job[0].poll() is None, (folder / "node0.log").read_text()
        time.sleep(0.02)
    ip("-n", nodes[0], "link", "set", "gf0", "down")
    codes = wait(job, TIMEOUT + 40)  # the launcher looks once a second, and this machine may be busy
    ip("-n", nodes[0], "link", "set", "gf0", "up")
    failures = [event for event in events.read(folder / "node0") if event["event"] == "failure"]
    assert len(failures) == 1 and "lost the other processes" in failures[0]["error"]
    for rank, code in enumerate(codes):
        text = (folder / f"node{rank}.log").read_text()
        assert code != 0
        assert f"gaitfast: error: rank {rank} of 2 lost the other processes after step" in text, text[-3000:]
        assert "Traceback" not in text
    saved = max(event["step"] for event in events.read(folder / "node0") if event["event"] == "checkpoint")
    assert 0 < saved <= rows(folder)[-1]["step"] < ITERATIONS

    assert wait(start(folder, nodes), 200) == [0, 0], (folder / "node0.log").read_text()[-3000:]
    assert [row["step"] for row in rows(folder)] == list(range(1, ITERATIONS + 1))
    assert f"resumed from {folder / 'node0/checkpoints'}" in (folder / "node0.log").read_text()
    assert not (folder / "node1").exists(), "only the first node needs the run's folder"
