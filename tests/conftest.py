"""Shared data of the tests: a small packed dataset of synthetic walkers, made once by the real commands."""

import os
from pathlib import Path

import pytest

from gaitfast.cli import main

ROOT = Path(__file__).resolve().parent.parent


def run_command(*arguments) -> int:
    """`gaitfast ARGUMENTS` in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code or 0


@pytest.fixture(scope="session")
def walkers_dataset(tmp_path_factory) -> Path:
    """6 + 5 people, 3 walks each, packed."""
    folder = tmp_path_factory.mktemp("walkers")
    tree, packed = folder / "tree", folder / "packed"
    options = ("--subjects", 6, "--test-subjects", 5, "--walks", 3, "--frames", 12, 20, "--workers", 1)
    assert run_command("walkers", tree, *options) == 0
    assert run_command("prepare", tree, packed, "--layout", "opengait", "--workers", 1) == 0
    return packed


@pytest.fixture(scope="session")
def usf17() -> Path:
    """The folder of the USF HumanID .mat files, where there is one."""
    folder = Path(os.environ.get("GAITFAST_USF17", ROOT.parent / "shared" / "data" / "usf17"))
    if not (folder / "Gal.mat").exists():
        pytest.skip("needs the USF HumanID silhouettes; set GAITFAST_USF17 to a folder that holds Gal.mat")
    return folder
