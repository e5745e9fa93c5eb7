"""Everything that a machine with a GPU can say, in one command and under nine minutes: `make gpu-report`.

Builds the extension, runs the tests that need a GPU, times operations and network, tries other launch settings while
time remains. Nothing is fetched or installed. After every part the report is written, so that a run that is cut off
keeps what it has: benchmarks/results/<gpu>-<commit>.json and a table beside it (.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.environment import envelope
from gaitfast import files

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 525
"""In all; the limit is nine minutes."""


class Part(NamedTuple):
    """A Python or shell program to run; {seconds} in its arguments is what it may take, {json} a file for its rows."""

    name: str
    most: int
    """Seconds."""
    arguments: tuple[str, ...]


PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") else ()
"""Most of a test's time is the compilation of its kernels."""

PARTS = (
    Part("build", 100, ("setup.py", "--quiet", "build_ext", "--inplace")),
    Part("kernel tests", 110, ("-m", "pytest", "-m", "gpu", "tests/kernels", *PARALLEL)),
    Part("kernels", 55, ("-m", "benchmarks.kernels", "--full", "--budget", "{seconds}", "--json", "{json}")),
    Part("denoiser", 105, ("-m", "benchmarks.denoiser", "--full", "--json", "{json}")),
    Part("step", 65, ("-m", "benchmarks.step", "--no-memory", "--seconds", "8", "--json", "{json}")),
    Part("other tests", 40, ("-m", "pytest", "-m", "gpu", "--ignore=tests/kernels", "--continue-on-collection-errors")),
    Part("memory accesses", 50, ("benchmarks/gpu_retrieval.sh",)),
    Part("sweep", 300, ("-m", "benchmarks.sweep", "--budget", "{seconds}", "--json", "{json}")),
)
"""In the order of their worth, but for the build, which comes first because the others may use it."""


def run(part: Part, seconds: float) -> dict:
    """The end of what the part printed, its exit code (None: stopped), its rows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        # What a part does after its own budget, a last row or a table, must fit as well.
        values = {"seconds": str(int(seconds * 0.8)), "json": str(rows)}
        arguments = [a.format(**values) if a.startswith("{") else a for a in part.arguments]
        program = "bash" if arguments[0].endswith(".sh") else sys.executable
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MAX_JOBS": str(os.cpu_count()), "PYTHON": sys.executable}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        for name in ("GAITFAST_BACKEND", "TRITON_INTERPRET"):
            environment.pop(name, None)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                [program, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
            said, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as stopped:
            said, code = stopped.stdout or "", None  # bytes all the same, in some versions of Python
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
        result = {"exit": code, "seconds": round(time.perf_counter() - started, 1), "said": said[-6000:]}
        if rows.exists():
            result["result"] = json.loads(rows.read_text())
        return result


def passed(said: str) -> str:
    """pytest's last line."""
    found = re.findall(r"^.*\b(?:passed|failed|error|deselected)\b.*$", said, re.M)
    return found[-1].strip("= ") if found else "nothing"


def table(report: dict) -> str:
    """The report as Markdown: parts, headline figures, timings, the best of the sweep."""
    parts = report["parts"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# {', '.join(report['machine']['gpus'])}, commit {report['commit'][:12]}", "", versions, ""]
    lines += ["| part | seconds | outcome |", "|---|---|---|"]
    for name, part in parts.items():
        outcome = "stopped" if part["exit"] is None else "done" if part["exit"] == 0 else f"exit {part['exit']}"
        if "tests" in name:
            outcome += f": {passed(part['said'])}"
        lines.append(f"| {name} | {part['seconds']} | {outcome} |")
    lines += ["", "Headline: `" + json.dumps(report["headline"]) + "`"]
    rows = parts.get("denoiser", {}).get("result", {}).get("rows", [])
    if rows:
        lines += ["", "| training step | ms | 20-80 % | TFLOP/s |", "|---|---|---|---|"]
        for row in rows:
            median, low, high = row["ms"]
            lines.append(f"| {row['side']} | {median:.3f} | {low:.3f}-{high:.3f} | {row['tflops']:.1f} |")
    rows = parts.get("kernels", {}).get("result", {}).get("rows", [])
    if rows:
        lines += ["", "| call | direction | ms | of copy | eager | compiled | sdpa |", "|---|---|---|---|---|---|---|"]
        for row in rows:
            others = " | ".join(f"{row[k]:.2f}x" if k in row else "" for k in ("vs_eager", "vs_compiled", "vs_sdpa"))
            lines.append(
                f"| {row['call']} | {row['direction']} | {row['ms']['ours'][0]:.4f} | {row['share']:.0%} | {others} |"
            )
    rows = parts.get("sweep", {}).get("result", {}).get("rows", [])
    if rows:
        lines += ["", "| kernel | config | ms |", "|---|---|---|"]
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            mine = [r for r in rows if r["kernel"] == kernel and "ms" in r]
            default = [r for r in mine if r["config"] == "default"]
            for row in [*default, *sorted(mine, key=lambda r: r["ms"])[:3]]:
                lines.append(f"| {kernel} | {row['config']} | {row['ms']:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.split(":")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results", help="of the two files")
    parser.add_argument("--commit", default="", help="where there is no git to ask")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in PARTS], default=[p.name for p in PARTS])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    end = time.perf_counter() + arguments.seconds
    report = {**envelope({}, []), "parts": {}}
    report["commit"] = arguments.commit or report["commit"] or "unknown"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    target = arguments.folder / f"{name}-{report['commit'][:9]}.json"
    for part in PARTS:
        left = end - time.perf_counter()
        if part.name not in arguments.parts or left < 10:
            continue
        print(f"{part.name} ...", flush=True)
        report["parts"][part.name] = done = run(part, min(part.most, left))
        print(done["said"][-1500:], flush=True)
        for key, value in done.get("result", {}).get("headline", {}).items():
            report["headline"][f"{part.name}.{key}"] = value
        files.write_json(target, report)
        target.with_suffix(".md").write_text(table(report))
    print(table(report))
    failed = [n for n, part in report["parts"].items() if "tests" in n and part["exit"] not in (0, 5)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
