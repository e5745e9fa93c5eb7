"""The doctor: right about this machine, and of use on one where anything is missing or broken."""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gaitfast import doctor

ROOT = Path(__file__).resolve().parent.parent


def run(
    *arguments: str, flags: tuple[str, ...] = (), path: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """`python FLAGS -c "run gaitfast.doctor" ARGUMENTS`, where `path` comes first on sys.path."""
    first = [p for p in (path, str(ROOT)) if p]
    code = (
        f"import sys, runpy; sys.path[:0] = {first!r}; sys.argv[1:] = {list(arguments)!r}; "
        "runpy.run_module('gaitfast.doctor', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def states(done: subprocess.CompletedProcess) -> dict[str, dict]:
    """Checks of a --json run by name."""
    return {check["name"]: check for checks in json.loads(done.stdout)["sections"].values() for check in checks}


@pytest.fixture(scope="module")
def here() -> subprocess.CompletedProcess:
    return run("--json")


def test_table_of_packages_is_that_of_setup_py():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = {k.arg: k.value for node in ast.walk(tree) if isinstance(node, ast.Call) for k in node.keywords}
    extras = ast.literal_eval(keywords["extras_require"])
    required = [line.split(";")[0].strip() for line in ast.literal_eval(keywords["install_requires"])]
    assert {f"{p.name}>={p.lowest}" for p in doctor.PACKAGES if p.needed} == set(required)
    optional = {re.split(r"[>=]+", line)[0]: line for extra in extras.values() for line in extra}
    for package in doctor.PACKAGES:
        if not package.needed:
            assert optional[package.name] == package.name + (f">={package.lowest}" if package.lowest else "")


def test_exit_code_and_verdict_agree(here):
    report = json.loads(here.stdout)
    missing = [name for name, check in states(here).items() if check["state"] == "missing"]
    assert here.stderr == "" and report["ready"] == (not missing) and here.returncode == (1 if missing else 0)
    assert next(iter(report["sections"])) == "software" and len(report["sections"]) == 6


def test_it_is_right_about_this_machine(here):
    import torch

    from gaitfast import kernels

    found = states(here)
    assert found["torch"]["state"] == "ok" and torch.__version__ in found["torch"]["detail"]
    assert ("gpu 0" in found) == torch.cuda.is_available()
    cores = int(re.search(r"(\d+) usable cores", found["cpu"]["detail"]).group(1))
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    for operation in kernels.OPERATIONS:
        backend, reason = kernels.backend_of(operation)
        assert found[operation]["detail"].startswith(backend) and reason in found[operation]["detail"]
    try:
        import gaitfast._C  # noqa: F401

        built = hasattr(torch.ops.gaitfast, "inflate_frames")
    except ImportError:
        built = False
    assert found["frame decoding"]["detail"].startswith("compiled" if built else "lz4")
    if built:
        assert found["denoiser on a CPU"]["detail"].startswith(torch.ops.gaitfast.denoiser_instructions())


def test_forced_backend_that_does_not_exist_is_a_line_not_a_crash(here):
    done = run("--json", GAITFAST_BACKEND="abacus")
    assert done.returncode == here.returncode and "abacus" in states(done)["denoiser"]["detail"]
    assert states(done)["denoiser"]["state"] == "check"


def test_bare_python(tmp_path):
    """No site-packages at all: everything needed is named with the command that brings it."""
    done = run("--json", flags=("-S", "-E", "-s"))
    assert done.returncode == 1 and done.stderr == ""
    found = states(done)
    for package in doctor.PACKAGES:
        assert found[package.name]["state"] == ("missing" if package.needed else "optional")
        assert found[package.name]["remedy"].startswith(f"pip install '{package.name}")
    missing = {name for name, check in found.items() if check["state"] == "missing"}
    assert missing - {"autoencoder"} == {p.name for p in doctor.PACKAGES if p.needed}
    text = run(flags=("-S", "-E", "-s")).stdout
    assert "pretraining cannot run; missing: torch, deepspeed" in text and "\033" not in text


@pytest.mark.parametrize(
    "error", ["ImportError('libcudart.so.13: not found')", "OSError('bad ELF')", "SystemError('x')"]
)
def test_broken_torch_is_reported(tmp_path, error):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {error}\n")
    done = run("--json", path=str(tmp_path))
    assert done.returncode == 1 and done.stderr == ""
    software = json.loads(done.stdout)["sections"]["software"]
    assert [
        c for c in software if c["name"] == "torch" and c["state"] == "missing" and error.split("(")[0] in c["detail"]
    ]


def test_thorough_imports_for_real(tmp_path):
    """A package that is installed but does not import is found with --thorough."""
    (tmp_path / "einops").mkdir()
    (tmp_path / "einops" / "__init__.py").write_text("raise ImportError('half an upgrade')\n")
    assert doctor._import_error("json") == ""
    broken = subprocess.run(
        [sys.executable, "-c", "from gaitfast import doctor; print(doctor._import_error('einops'))"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert broken.stdout.strip() == "ImportError: half an upgrade"


def old_package(folder: Path, name: str, version: str) -> None:
    """The metadata of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_versions_too_old_and_other_dali(tmp_path):
    for name, version in (
        ("lz4", "4.2.9"),
        ("torch", "2.10.0+cu130"),
        ("nvidia-dali-cuda120", "1.51.2"),
        ("tqdm", "4"),
    ):
        old_package(tmp_path, name, version)
    done = run("--json", flags=("-S", "-E", "-s"), path=str(tmp_path))
    found = states(done)
    assert found["lz4"]["state"] == "missing" and "4.2.9 is too old (needs >=4.3)" in found["lz4"]["detail"]
    assert found["tqdm"]["state"] == "missing"
    assert found["nvidia-dali-cuda120"]["state"] == "ok" and "nvidia-dali-cuda130" not in found
    by_state = [c["state"] for c in json.loads(done.stdout)["sections"]["software"] if c["name"] == "torch"]
    assert by_state == ["ok", "missing"]  # 2.10 is not older than 2.6; but there is only metadata, no module


@pytest.mark.parametrize(
    ("version", "release"), [("2.13.0+cpu", (2, 13, 0)), ("5.0.0.93", (5, 0, 0, 93)), ("3", (3,)), ("unknown", ())]
)
def test_release(version, release):
    assert doctor._release(version) == release


def test_text_marks_and_remedies(capsys):
    checks = {"part": [doctor.Check("alpha", "ok", "fine"), doctor.Check("be", "missing", "gone", "get it")]}
    doctor._print(checks, colour=False)
    lines = capsys.readouterr().out.splitlines()
    assert "  ok        alpha  fine" in lines and "  missing   be     gone" in lines
    assert any(line.strip() == "-> get it" for line in lines)
    assert lines[-1] == "pretraining cannot run; missing: be"
    doctor._print({"part": [doctor.Check("a", "ok", "x"), doctor.Check("b", "optional", "y")]}, colour=True)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "pretraining can run" and "\033[32mok" in printed
    assert doctor.ready({"part": [doctor.Check("b", "optional", "y"), doctor.Check("c", "check", "z")]})


def test_command_line():
    parser = argparse.ArgumentParser()
    doctor.configure(parser)
    args = parser.parse_args(["--json"])
    assert args.json and not args.thorough
    args = parser.parse_args(["--config", "F", "--set", "a=1", "--set", "b=2", "--ranks", "3"])
    assert args.set == ["a=1", "b=2"] and args.ranks == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.batch=8"], "--set: say which run with --config FILE"),
        (["--ranks", "2"], "--ranks: say which run with --config FILE"),
        (["--ranks", "0", "--config", "F"], "--ranks: must be positive, got 0"),
        (["--ranks", "-1"], "--ranks: must be positive, got -1"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("-S", "-E", "-s")], ids=["", "bare"])
def test_mistakes_on_the_command_line_are_one_line(arguments, message, flags):
    done = run(*arguments, flags=flags)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gaitfast: error: {message}\n")


def test_overrides_and_ranks_reach_the_estimate(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("backbone: {width: 0.125}\ndenoiser: {dim: 32}\ndata: {frames: 30}\ntrain: {batch: 64}\n")

    def section(overrides: list[str], ranks: int) -> tuple[str, str]:
        title, (check,) = list(doctor.examine(False, str(file), overrides, ranks).items())[-1]
        return title, check.detail

    def activations(detail: str) -> float:
        return float(re.search(r"activations ([\d.]+)", detail).group(1))

    title, whole = section([], 1)
    assert title == f"a run of {file}" and "at batch 64" in whole and activations(whole) > 0.5
    title, less = section(["train.accumulation=2", "data.prefetch=1"], 2)
    assert title == f"a run of {file} train.accumulation=2 data.prefetch=1, each of 2 processes"
    assert activations(whole) / activations(less) == pytest.approx(4, rel=0.25)  # of figures with one decimal
    assert "train.batch: 64 does not divide by 3 ranks" in section([], 3)[1]
    assert "data.framez: unknown key" in section(["data.framez=3"], 1)[1]


def extension_is_built() -> bool:
    from gaitfast.data import codec

    return codec.compiled()


def test_retrieval_is_what_a_search_would_take(here):
    import torch

    from gaitfast.retrieval import _backends

    backend, _ = _backends.backend_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    assert states(here)["retrieval"]["detail"].startswith(backend)
    forced = states(run("--json", GAITFAST_BACKEND="reference"))
    assert forced["retrieval"]["detail"] == "reference  forced by GAITFAST_BACKEND"
    assert "retrieval filter" not in forced


@pytest.mark.parametrize(
    ("cuda", "built", "engine"),
    [(False, True, "compiled"), (False, False, "dali"), (True, True, "dali"), (True, False, "dali")],
)
def test_dali_is_missing_only_where_auto_takes_it(cuda, built, engine, monkeypatch):
    import torch

    from gaitfast.data import codec

    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda p: None if p.module == "nvidia.dali" else installed(p))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(codec, "compiled", lambda: built)
    sections = doctor.examine()
    found = {check.name: check for checks in sections.values() for check in checks}
    assert found["nvidia-dali-cuda130"].state == ("optional" if engine == "compiled" else "missing")
    assert found["nvidia-dali-cuda130"].remedy.startswith("pip install 'nvidia-dali-cuda130")
    if not cuda:  # this machine has no CUDA for the other sections to ask about
        assert found["data.engine=auto"].detail.startswith(engine)
        assert doctor.ready(sections) == (engine == "compiled")


@pytest.mark.skipif(not extension_is_built(), reason="the extension is not built")
def test_the_engine_that_auto_takes_on_a_cpu_with_the_extension(here):
    import torch

    detail = states(here)["data.engine=auto"]["detail"]
    assert "DALI pipeline" not in states(here)
    assert detail.startswith("dali" if torch.cuda.is_available() else "compiled")
