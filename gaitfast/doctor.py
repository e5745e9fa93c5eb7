"""`gaitfast doctor`: what is installed, which backend each op will use and why, what is missing and how to get it.

Imports nothing but the standard library at its top and survives the absence, or the breakage, of everything else:
`python -m gaitfast.doctor` runs on a bare Python. Exit code 0 when pretraining can run, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gaitfast

OK, MISSING, OPTIONAL, CHECK = "ok", "missing", "optional", "check"
"""There; absent and needed; absent and not needed; look at it. Only `missing` keeps pretraining from running."""
COLOURS = {OK: "32", MISSING: "31;1", OPTIONAL: "90", CHECK: "33"}

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "setup.py").exists() else None
GIB = float(1 << 30)
DISK_GIB, MEMORY_GIB, SHARED_GIB = 5, 6, 1
"""What the demo needs to run in comfort."""


@dataclass(frozen=True)
class Package:
    """A requirement of setup.py: distribution, lowest version, the module it brings, what it is for."""

    name: str
    lowest: str
    module: str
    purpose: str
    needed: bool = True


PACKAGES = (
    Package("torch", "2.6", "torch", "models, training"),
    Package("deepspeed", "0.18.1", "deepspeed", "ZeRO, launcher"),
    Package("nvidia-dali-cuda130", "1.50", "nvidia.dali", "loading, on a GPU or without the extension"),
    Package("einops", "0.7", "einops", "training"),
    Package("numpy", "1.26", "numpy", "data"),
    Package("safetensors", "0.4", "safetensors", "datasets, weights"),
    Package("opencv-python-headless", "4.8", "cv2", "pretreatment, reference augmentation"),
    Package("lz4", "4.3", "lz4", "frame compression"),
    Package("scipy", "1.11", "scipy", "reading .mat releases"),
    Package("pyyaml", "6.0", "yaml", "configs"),
    Package("tqdm", "4.66", "tqdm", "progress"),
    Package("matplotlib", "3.8", "matplotlib", "reports"),
    Package("tensorboard", "2.14", "tensorboard", "training curves"),
    Package("triton", "3.6", "triton", "fused kernels on a GPU, their tests on any machine", needed=False),
    Package("onnx", "1.17", "onnx", "gaitfast export --format onnx", needed=False),
    Package("onnxscript", "0.5", "onnxscript", "gaitfast export --format onnx", needed=False),
    Package("onnxruntime", "1.20", "onnxruntime", "checking an exported graph", needed=False),
    Package("faiss-cpu", "1.8", "faiss", "python -m benchmarks.retrieval", needed=False),
    Package("pytest", "8.0", "pytest", "tests", needed=False),
    Package("ruff", "0.6", "ruff", "lint", needed=False),
    Package("ninja", "", "ninja", "building the extension", needed=False),
)


@dataclass(frozen=True)
class Check:
    """One line of the examination; `remedy` is what to type, or to do, about it."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def _release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _installed(package: Package) -> tuple[str, str] | None:
    """(distribution, version), or None. DALI comes in one distribution per CUDA release, and any of them serves."""
    try:
        return package.name, metadata.version(package.name)
    except metadata.PackageNotFoundError:
        pass
    if package.name.startswith("nvidia-dali-cuda"):
        for found in metadata.distributions():
            name = found.metadata["Name"] or ""
            if name.lower().startswith("nvidia-dali-cuda"):
                return name.lower(), found.version
    return None


def _import_error(module: str) -> str:
    """Why `import module` fails in a fresh interpreter, or nothing."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "no answer within 3 minutes"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def _packages(thorough: bool, engine: str = "") -> list[Check]:
    """`engine`: what data.engine=auto takes here, where that is known."""
    version = platform.python_version()
    old, new = sys.version_info < (3, 10), sys.version_info >= (3, 13)
    state = MISSING if old else CHECK if new else OK
    checks = [
        Check("python", state, f"{version} (3.10 to 3.12)", "use Python 3.10, 3.11 or 3.12" if state != OK else "")
    ]
    for package in PACKAGES:
        if package.module == "nvidia.dali" and engine == "compiled":
            package = replace(package, needed=False, purpose="data.engine=dali; auto does without it here")
        wanted = f">={package.lowest}" if package.lowest else ""
        install = f"pip install '{package.name}{wanted}'"
        absent = MISSING if package.needed else OPTIONAL
        found = _installed(package)
        if found is None:
            checks.append(Check(package.name, absent, f"not installed; {package.purpose}", install))
        elif package.lowest and _release(found[1]) < _release(package.lowest):
            checks.append(Check(found[0], absent, f"{found[1]} is too old (needs {wanted})", install))
        else:
            broken = _import_error(package.module) if thorough else ""
            state, detail = (absent, f"{found[1]} does not import: {broken}") if broken else (OK, found[1])
            remedy = f"pip install --force-reinstall '{found[0]}{wanted}'" if broken else ""
            checks.append(Check(found[0], state, f"{detail:<14} {wanted:<8} {package.purpose}", remedy))
    return checks


def _torch() -> tuple[Any, str]:
    """(torch, "") or (None, why it does not import)."""
    try:
        return importlib.import_module("torch"), ""
    except Exception as error:  # a broken installation raises whatever it likes
        return None, f"{error.__class__.__name__}: {error}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cores() -> int:
    """Cores that this process may use: affinity and the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _memory() -> tuple[float, float] | None:
    """(GiB in all, GiB available), of the machine or of the control group where that is less."""
    fields = dict(re.findall(r"^(MemTotal|MemAvailable): +(\d+) kB", _read("/proc/meminfo"), re.M))
    if len(fields) < 2:
        return None
    total, available = int(fields["MemTotal"]) / (1 << 20), int(fields["MemAvailable"]) / (1 << 20)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit) / GIB)
        available = min(available, (int(limit) - int(used)) / GIB)
    return total, available


def _machine() -> list[Check]:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info, re.M)
    found = re.search(r"^flags\s*: (.+)$", info, re.M)
    flags = set(found.group(1).split()) if found else set()
    kinds = (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("AVX-512 BF16", "avx512_bf16"), ("AMX BF16", "amx_bf16"))
    has = ", ".join(name for name, flag in kinds if flag in flags) or "no AVX2"
    checks = [
        Check("cpu", OK, f"{model.group(1) if model else platform.machine()}, {_cores()} usable cores"),
        Check("vector units", OK if "avx2" in flags or not flags else CHECK, has if flags else "unknown"),
    ]
    memory = _memory()
    if memory:
        state = OK if memory[1] >= MEMORY_GIB else CHECK
        remedy = "" if state == OK else f"the demo wants {MEMORY_GIB} GiB; lower train.batch or data.frames"
        checks.append(Check("memory", state, f"{memory[1]:.1f} of {memory[0]:.1f} GiB available", remedy))
    for name, folder, enough in (
        ("disk here", os.getcwd(), DISK_GIB),
        ("temporary files", tempfile.gettempdir(), 1),
        ("shared memory", "/dev/shm", SHARED_GIB),
    ):
        try:
            usage = shutil.disk_usage(folder)
        except OSError as error:
            checks.append(Check(name, CHECK, f"{folder}: {error.strerror}"))
            continue
        low = usage.free < enough * GIB
        remedy = f"less than {enough} GiB: free some, or set another folder" if low else ""
        if low and folder == "/dev/shm":
            remedy = f"less than {enough} GiB: several processes exchange data there (docker run --shm-size=8g)"
        checks.append(Check(name, CHECK if low else OK, f"{usage.free / GIB:.1f} GiB free in {folder}", remedy))
    return checks


def _accelerators(torch: Any) -> list[Check]:
    if torch is None:
        return [Check("gpu", OPTIONAL, "unknown without torch")]
    if torch.cuda.is_available():
        return [
            Check(f"gpu {i}", OK, f"{p.name}, {p.total_memory / GIB:.0f} GiB, compute capability {p.major}.{p.minor}")
            for i, p in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
        ]
    if os.path.isdir("/proc/driver/nvidia/gpus") or shutil.which("nvidia-smi"):
        why = "this torch was built for CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda} finds none"
        remedy = (
            "install a CUDA build of torch" if torch.version.cuda is None else "compare nvidia-smi's CUDA with torch's"
        )
        return [Check("gpu", CHECK, f"an NVIDIA driver is here, but {why}", remedy)]
    return [Check("gpu", OPTIONAL, "none: everything runs on the CPU, small runs only")]


def _stale(library: Path) -> bool:
    """Whether a C++ or CUDA source of this checkout is newer than the library."""
    sources = (
        [p for p in (CHECKOUT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")] if CHECKOUT else []
    )
    return any(source.stat().st_mtime > library.stat().st_mtime for source in sources)


def _extension(torch: Any) -> list[Check]:
    build = (
        "python setup.py build_ext --inplace" if CHECKOUT else "pip install --no-build-isolation --force-reinstall ."
    )
    checks = []
    spec = importlib.util.find_spec("gaitfast._C")
    if spec is None or spec.origin is None:
        checks.append(Check("gaitfast._C", OPTIONAL, "not built: the plain, slower paths run instead", build))
    elif torch is None:
        checks.append(Check("gaitfast._C", CHECK, "built, but does not load without torch"))
    else:
        try:
            importlib.import_module("gaitfast._C")
        except Exception as error:  # above all: built against another torch
            checks.append(Check("gaitfast._C", CHECK, f"does not load: {str(error)[:90]}", build))
        else:
            state = CHECK if _stale(Path(spec.origin)) else OK
            detail = "older than its sources" if state == CHECK else Path(spec.origin).name
            checks.append(Check("gaitfast._C", state, detail, build if state == CHECK else ""))
    for tool, purpose in (("g++", "building the extension"), ("nvcc", "building its CUDA sources")):
        where = shutil.which(tool)
        install = "apt-get install g++" if tool == "g++" else "the CUDA toolkit (only with a GPU)"
        checks.append(Check(tool, OK, where) if where else Check(tool, OPTIONAL, f"absent; {purpose}", install))
    return checks


def _ops(torch: Any) -> list[Check]:
    if torch is None:
        return [Check("operators", CHECK, "unknown without torch")]
    checks = []
    try:
        kernels = importlib.import_module("gaitfast.kernels")
        for name in kernels.OPERATIONS:
            backend, reason = kernels.backend_of(name)
            checks.append(Check(name, OK, f"{backend:<10} {reason}"))
    except Exception as error:  # no kernels in this build, or a backend was forced that does not exist
        checks.append(Check("denoiser", CHECK, f"{error.__class__.__name__}: {error}"))
    compiled = _compiled_ops(torch)
    if "denoiser_instructions" in compiled:
        level = torch.ops.gaitfast.denoiser_instructions()
        checks.append(Check("denoiser on a CPU", OK, f"{level:<10} instructions; GAITFAST_CPU caps them"))
    decoders = [compiled.get(name, set()) for name in ("inflate_frames", "chunk_crc32")]
    if devices := " and ".join(sorted(set.intersection(*decoders))):
        checks.append(Check("frame decoding", OK, f"{'compiled':<10} gaitfast._C has it for {devices}"))
    else:
        checks.append(Check("frame decoding", OK, f"{'lz4':<10} gaitfast._C does not have it"))
    engine, reason = _engine(torch)
    checks.append(Check("data.engine=auto", OK if engine else CHECK, f"{engine:<10} {reason}".strip()))
    return [*checks, *_retrieval(torch, "plane_type" in compiled)]


def _best_device(torch: Any) -> Any:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _engine(torch: Any) -> tuple[str, str]:
    """(what data.engine=auto takes on this machine's best device, the reason); ("", why nobody knows)."""
    if torch is None:
        return "", "unknown without torch"
    device = _best_device(torch)
    try:
        built = importlib.import_module("gaitfast.data.codec").compiled()
        resolve = importlib.import_module("gaitfast.data.pipeline").resolve_engine
        engine = resolve("auto", SimpleNamespace(compiled=built), device)
    except Exception as error:  # a dependency is missing, or the extension does not load
        return "", f"{error.__class__.__name__}: {error}"
    if device.type == "cuda":
        return engine, "a CUDA device is visible"
    return engine, "no CUDA device, and gaitfast._C " + ("is faster than DALI on a CPU" if built else "is not there")


def _retrieval(torch: Any, filtered: bool) -> list[Check]:
    """`filtered`: whether the compiled operators can say what they filter by."""
    try:
        backends = importlib.import_module("gaitfast.retrieval._backends")
        backend, reason = backends.backend_of(_best_device(torch), torch.float32)
    except Exception as error:  # a forced backend that is not there, or an extension that does not load
        return [Check("retrieval", CHECK, f"{error.__class__.__name__}: {error}")]
    checks = [Check("retrieval", OK, f"{backend:<10} {reason}")]
    if filtered and backend == "compiled":
        kind = torch.ops.gaitfast.plane_type()
        with_ = {"int8": "AMX", "int16": "AVX-512 VNNI"}
        why = f"{with_[kind]} is here" if kind in with_ else "no AMX or AVX-512 VNNI here, or GAITFAST_CPU forbids them"
        checks.append(Check("retrieval filter", OK, f"{kind:<10} {why}"))
    return checks


def _compiled_ops(torch: Any) -> dict[str, set[str]]:
    """Operators of torch.ops.gaitfast, and the devices that each is implemented for."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gaitfast::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name.split("::")[1]: {key for key in ("CPU", "CUDA") if has(name, key)} for name in names}


def _distributed(torch: Any) -> list[Check]:
    checks = []
    beside = Path(sys.executable).with_name("deepspeed")
    launcher = shutil.which("deepspeed") or (str(beside) if beside.exists() else None)
    single = "python gaitfast/pretrain.py runs a single process without it"
    checks.append(
        Check("launcher", OK, launcher) if launcher else Check("launcher", OPTIONAL, f"no deepspeed; {single}")
    )
    if torch is None:
        return [*checks, Check("torch.distributed", CHECK, "unknown without torch")]
    distributed = torch.distributed
    if not distributed.is_available():
        return [*checks, Check("torch.distributed", MISSING, "not in this torch; DeepSpeed needs it")]
    gloo, nccl, cuda = distributed.is_gloo_available(), distributed.is_nccl_available(), torch.cuda.is_available()
    checks.append(Check("gloo", OK if gloo else OPTIONAL if cuda else MISSING, "several processes on CPU"))
    checks.append(Check("nccl", OK if nccl else MISSING if cuda else OPTIONAL, "several processes on GPUs"))
    return checks


def _files() -> list[Check]:
    weights = PACKAGE / "assets" / "silhouette_autoencoder.safetensors"
    checks = []
    if weights.is_file():
        checks.append(Check("autoencoder", OK, f"{weights.name}, {weights.stat().st_size / (1 << 20):.1f} MiB"))
    else:
        remedy = "gaitfast train-autoencoder, or --set autoencoder.weights=FILE with a local TAESD"
        checks.append(Check("autoencoder", MISSING, f"assets/{weights.name} is not there", remedy))
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    absent = Check("chromium", OPTIONAL, "absent; a test looks at the report with it", "apt-get install chromium")
    return [*checks, Check("chromium", OK, browser) if browser else absent]


def _needs(file: str, overrides: Sequence[str], ranks: int) -> list[Check]:
    """The memory that each process of a run with this config needs, on this machine."""
    from gaitfast import needs
    from gaitfast.config import UserError

    try:
        fits, line = needs.on_paper(file, overrides, ranks)
    except UserError as error:
        return [Check("memory", MISSING, str(error))]
    return [Check("memory", OK if fits else CHECK, line)]


def examine(
    thorough: bool = False, config: str | None = None, overrides: Sequence[str] = (), ranks: int = 1
) -> dict[str, list[Check]]:
    """Every check, by section. A check that fails itself becomes a line that says so."""
    torch, broken = _torch()
    sections: dict[str, Callable[[], list[Check]]] = {
        "software": lambda: _packages(thorough, _engine(torch)[0]),
        "machine": lambda: [*_machine(), *_accelerators(torch)],
        "compiled extension": lambda: _extension(torch),
        "backends": lambda: _ops(torch),
        "distributed": lambda: _distributed(torch),
        "files and tools": _files,
    }
    if config:
        run = f"a run of {' '.join((config, *overrides))}" + (f", each of {ranks} processes" if ranks > 1 else "")
        sections[run] = lambda: _needs(config, overrides, ranks)
    result = {}
    for title, check in sections.items():
        try:
            result[title] = check()
        except Exception as error:  # the doctor must say what it can on a machine that is ill
            result[title] = [Check(title, CHECK, f"could not be examined: {error.__class__.__name__}: {error}")]
    torch_listed = next(c for c in result["software"] if c.name in ("torch", "software"))
    if broken and torch_listed.state == OK:
        result["software"].append(
            Check("torch", MISSING, f"does not import: {broken}", "pip install --force-reinstall torch")
        )
    return result


def ready(sections: dict[str, list[Check]]) -> bool:
    return all(check.state != MISSING for checks in sections.values() for check in checks)


def _print(sections: dict[str, list[Check]], colour: bool) -> None:
    width = max(len(check.name) for checks in sections.values() for check in checks)
    print(f"gaitfast {gaitfast.__version__} in {PACKAGE}")
    for title, checks in sections.items():
        print(f"\n{title}")
        for check in checks:
            mark = f"{check.state:<8}"
            mark = f"\033[{COLOURS[check.state]}m{mark}\033[0m" if colour else mark
            print(f"  {mark}  {check.name:<{width}}  {check.detail}".rstrip())
            if check.remedy:
                indent = " " * (width + 14)
                print(textwrap.fill(check.remedy, 100, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   "))
    named = {s: [c.name for checks in sections.values() for c in checks if c.state == s] for s in (MISSING, CHECK)}
    verdict = f"cannot run; missing: {', '.join(dict.fromkeys(named[MISSING]))}" if named[MISSING] else "can run"
    print(f"\npretraining {verdict}" + (f"\nlook at: {', '.join(named[CHECK])}" if named[CHECK] else ""))


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--thorough", action="store_true", help="import every package for real (slower)")
    parser.add_argument("--config", metavar="FILE", help="also say what memory a run with this config needs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value of FILE, as in pretrain",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="processes that share the run of FILE (default: 1)")


def _mistake(args: argparse.Namespace) -> str:
    """What is wrong with the command line, or nothing."""
    if args.ranks is not None and args.ranks < 1:
        return f"--ranks: must be positive, got {args.ranks}"
    alone = "--set" if args.set else "--ranks" if args.ranks else ""
    return f"{alone}: say which run with --config FILE" if alone and not args.config else ""


def main(args: argparse.Namespace) -> int:
    if mistake := _mistake(args):  # no UserError: that takes yaml, and this may be a bare Python
        print(f"gaitfast: error: {mistake}", file=sys.stderr)
        return 2
    sections = examine(args.thorough, args.config, args.set, args.ranks or 1)
    healthy = ready(sections)
    if args.json:
        plain = {title: [asdict(check) for check in checks] for title, checks in sections.items()}
        print(json.dumps({"gaitfast": gaitfast.__version__, "ready": healthy, "sections": plain}, indent=2))
    else:
        _print(sections, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    return 0 if healthy else 1


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="gaitfast doctor", description=__doc__.split("\n\n")[0])
    configure(_parser)
    sys.exit(main(_parser.parse_args()))
