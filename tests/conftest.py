"""Shared data of the tests: a small packed dataset of synthetic walkers, made once by the real commands."""

import os
from pathlib import Path

import pytest
import torch

from gaitfast.cli import main

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config) -> None:
    """Import Triton's kernels here, interpreted unless this run is for a GPU.

    Triton reads TRITON_INTERPRET once, when it is imported. The variable goes away again, so that programs which tests
    start do not inherit it.
    """
    if torch.cuda.is_available() and "not gpu" not in config.option.markexpr:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from gaitfast.kernels import triton_ops

        # The first launch imports more of Triton.
        triton_ops.MODULES["layer_norm"].run(torch.ones(1, 16), torch.ones(16), 1e-5)
    finally:
        del os.environ["TRITON_INTERPRET"]


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
