"""The layout holds: who may import whom, which names are free, how long a file may be, where kernels/ ends up."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = 500

# What a part may import of gaitfast, besides itself. `_C` is the compiled library, which registers torch.ops.gaitfast.
PARTS = {
    "strict_yaml": set(),
    "config": {"strict_yaml", "engine_config"},
    "engine_config": {"strict_yaml", "config"},
    "randomness": {"_C"},
    "files": {"config"},
    "names": set(),
    "kernels": {"_C"},
    "data": {"config", "randomness", "files", "names", "_C"},
    "models": {"kernels", "config", "_C"},
    "diffusion": set(),
    "recognition": {"models"},
    "engine": {"config", "files"},
    "retrieval": {"config", "names", "_C"},
    "interop": {"models", "config"},
    "report": {"config"},
}
# What some parts may import from outside the standard library; the others may use any dependency.
OUTSIDE = {
    "strict_yaml": {"yaml"},
    "config": {"yaml"},
    "randomness": {"numpy", "torch"},
    "kernels": {"torch", "triton"},
    "doctor": {"torch"},
}
# Pieces of the entries: they may import every part and each other, and parts may not import them.
SHARED = {"measure", "model_files", "needs", "pictures"}
# Commands and programs. Nobody imports one; `cli`, which starts them by name, is the exception both ways.
ENTRIES = {"pretrain", "transfer", "rank", "export", "train_autoencoder", "doctor", "status"}


def sources() -> Iterator[tuple[str, Path]]:
    """(part, file) of every module of the package; part "" is gaitfast/__init__.py."""
    for path in sorted((ROOT / "gaitfast").rglob("*.py")):
        part = path.relative_to(ROOT / "gaitfast").parts[0].removesuffix(".py")
        yield "" if part == "__init__" else part, path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path


def module_name(path: Path) -> list[str]:
    """["gaitfast", "data", "packed"]; a package's __init__ keeps that name, so that its parent is the package."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    return ["gaitfast", *inside] if inside[0] == "kernels" else list(inside)


def imports(path: Path, code: str | None = None) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports: at its top, inside functions, or by import_module("...")."""
    tree = ast.parse(path.read_text(encoding="utf-8") if code is None else code, str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module_name(path)[: -node.level]) if node.level else ""
            base = f"{base}.{node.module}" if base and node.module else base or node.module
            if base == "gaitfast":
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def allowed(part: str) -> set[str]:
    """What `part` may import of gaitfast; besides, everybody may import gaitfast itself for its version."""
    if part == "":
        return set()
    if part in PARTS:
        return PARTS[part] | {part}
    everything = {*PARTS, *SHARED, "_C"}
    if part == "cli":
        return everything | ENTRIES
    return everything | {"cli"} if part in ENTRIES else everything


def offences(part: str, path: Path, code: str | None = None) -> list[str]:
    found = []
    for line, name in imports(path, code):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        top, *rest = name.split(".")
        if top == "gaitfast":
            if rest and rest[0] not in allowed(part) and rest[0] != "__version__":
                found.append(f"{where}: {part or 'the package'} may import {sorted(allowed(part))}")
        elif top == "kernels":
            found.append(f"{where}: write gaitfast.kernels")
        elif part in OUTSIDE and top not in OUTSIDE[part] and top not in sys.stdlib_module_names:
            found.append(f"{where}: {part} may use {sorted(OUTSIDE[part])} besides the standard library")
    return found


def test_every_module_has_its_place():
    known = {*PARTS, *SHARED, *ENTRIES, "cli", ""}
    strangers = sorted({part for part, _ in sources()} - known)
    assert not strangers, f"say in {Path(__file__).name} what gaitfast.{strangers[0]} may import"


def test_import_rules():
    found = [offence for part, path in sources() for offence in offences(part, path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("where", "code", "count"),
    [
        ("gaitfast/data/packed.py", "from gaitfast.models import build_denoiser", 1),
        ("gaitfast/data/packed.py", "from gaitfast import models, config", 1),
        (
            "gaitfast/data/packed.py",
            "from ..models import build_denoiser\nfrom . import shards\nfrom .. import engine",
            2,
        ),
        ("gaitfast/data/packed.py", "def f():\n    import gaitfast.pretrain", 1),
        ("gaitfast/data/packed.py", "import importlib\nimportlib.import_module('gaitfast.cli')", 1),
        ("gaitfast/data/__init__.py", "from . import packed\nfrom ..kernels import film", 1),
        ("gaitfast/diffusion/schedule.py", "from gaitfast.config import UserError", 1),
        ("gaitfast/measure.py", "from gaitfast import pretrain", 1),
        ("gaitfast/pretrain.py", "from gaitfast import rank\nfrom gaitfast.cli import user_errors, main", 1),
        ("gaitfast/cli.py", "from gaitfast import pretrain, rank, data", 0),
        ("gaitfast/models/x.py", "import kernels\nfrom kernels import film\nfrom gaitfast import kernels", 2),
        (
            "kernels/film.py",
            "import numpy\nfrom . import reference\nimport triton.language\nfrom gaitfast import _C",
            1,
        ),
        ("gaitfast/config.py", "import yaml, json\nimport torch", 1),
        (
            "gaitfast/report/page.py",
            "from gaitfast import __version__\nfrom gaitfast.report import run\nimport torch",
            0,
        ),
    ],
)
def test_the_rules_see_an_offence(where, code, count):
    path = ROOT / where
    part = (
        "kernels" if where.startswith("kernels") else path.relative_to(ROOT / "gaitfast").parts[0].removesuffix(".py")
    )
    assert len(offences(part, path, code)) == count


def test_no_module_shadows_another():
    """`deepspeed gaitfast/pretrain.py` puts gaitfast/ first on sys.path: `import NAME` must not find ours."""
    ours = {
        path.stem for path in (ROOT / "gaitfast").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    installed = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if {o.lower() for o in owners} - {"gaitfast"}
    }
    assert not (ours - {"__init__"}) & (set(sys.stdlib_module_names) | installed)


def test_files_are_short():
    suffixes = (".py", ".css", ".cpp", ".h", ".cu", ".cuh")
    folders = ("gaitfast", "kernels", "csrc", "benchmarks", "tests")
    files = [ROOT / "setup.py", *(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)]
    assert len(files) > 20
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert not {name: length for name, length in lengths.items() if length > LINES}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What `pip install .` would put into site-packages, of a copy of this checkout, without the extension."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("gaitfast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(copy / "built")]
    environment = {**os.environ, "GAITFAST_BUILD": "0"}
    subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True, timeout=300)
    return copy / "built"


def test_everything_is_installed_and_kernels_inside_the_package_only(built):
    found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert {name.split("/")[0] for name in found} == {"gaitfast"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gaitfast").rglob("*")
        if path.suffix in (".py", ".css", ".safetensors")
    }
    wanted |= {f"gaitfast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert "gaitfast/report/page.css" in wanted and "gaitfast/kernels/__init__.py" in wanted
    assert wanted - found == set()


@pytest.mark.parametrize("place", ["checkout", "installed", "launcher"])
def test_kernels_are_found(built, tmp_path, place):
    """In a checkout, in an installed copy, and where deepspeed has put gaitfast/ itself first on sys.path."""
    paths = {"checkout": [ROOT], "installed": [built], "launcher": [ROOT / "gaitfast", ROOT]}[place]
    code = "import importlib.util, gaitfast; print(importlib.util.find_spec('gaitfast.kernels').origin)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    inside = built / "gaitfast" / "kernels" if place == "installed" else ROOT / "kernels"
    assert Path(done.stdout.strip()) == inside / "__init__.py"
