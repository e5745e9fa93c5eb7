"""Where a figure was measured: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from gaitfast.engine.portable import source_commit

PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "nvidia-dali-cuda130",
    "numpy",
    "opencv-python-headless",
    "safetensors",
    "faiss-cpu",
)


def machine() -> dict:
    """Processor, cores that this process may use, memory in GiB, GPUs."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict:
    """Python and the packages that matter for speed; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def envelope(headline: dict, rows: list[dict]) -> dict:
    """The content of a result file."""
    return {
        "machine": machine(),
        "commit": source_commit(),
        "versions": versions(),
        "headline": headline,
        "rows": rows,
    }
