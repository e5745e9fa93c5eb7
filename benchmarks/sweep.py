"""Other configurations of the Triton kernels, timed on the headline shapes: `python -m benchmarks.sweep --json FILE`.

Each launch setting that the heuristics chose is varied alone and in the combinations below, its results compared with
those of the default, and timed by graph replay. What wins here is written into the heuristic by hand, with the row.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.environment import envelope
from benchmarks.kernels import CACHE, at_full_resolution, bodies, leaves, ours
from benchmarks.shapes import Call, denoiser_calls, tensors
from benchmarks.timing import interleaved
from gaitfast import files
from gaitfast.kernels.triton_ops import _launch

WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3)

GRIDS: dict[str, dict[str, tuple]] = {
    "group_norm_film_silu_fwd": {
        "CHANNELS": (8, 16, 32, 64),
        "BLOCK_P": (128, 256, 512, 1024, 2048),
        "num_warps": (4, 8, 16, 32),
    },
    "group_norm_film_silu_bwd": {
        "CHANNELS": (8, 16, 32, 64),
        "BLOCK_P": (64, 128, 256, 512, 1024, 2048),
        "num_warps": (4, 8, 16, 32),
    },
    "temporal_attention_fwd": {"SITES": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4), "num_stages": STAGES},
    "temporal_attention_bwd": {
        "SITES": (4, 8, 16, 32),
        "KEEP_BIAS": (True, False),
        "num_warps": (1, 2, 4, 8),
        "num_stages": STAGES,
    },
    "linear_attention_fwd": {"FRAMES": (1, 2), "num_warps": (1, 2, 4, 8)},
    "linear_attention_bwd": {"FRAMES": (1, 2), "num_warps": (2, 4, 8)},
    "layer_norm_fwd": {"BLOCK_R": (8, 16, 32, 64, 128), "num_warps": (1, 2, 4, 8)},
    "layer_norm_bwd": {"BLOCK_R": (8, 16, 32, 64), "num_warps": (2, 4, 8)},
}
"""Per kernel the values to try, all combinations."""


def candidates(kernel: str) -> Iterator[dict]:
    grid = GRIDS[kernel]
    for values in itertools.product(*grid.values()):
        config = dict(zip(grid, values))
        if "CHANNELS" in config:
            config["BLOCK_C"] = config["CHANNELS"]
            held = config["BLOCK_P"] * config["CHANNELS"] // (config["num_warps"] * 32)
            if not 8 <= held <= 64:  # of a thread: fewer wastes it, more spills
                continue
        yield config


def headline_calls(batch: int) -> dict[str, Call]:
    """Per operation its call at the full resolution."""
    found: dict[str, Call] = {}
    for call in denoiser_calls(64, batch):
        if call.operation not in found and at_full_resolution(call):
            found[call.operation] = call
    return found


def sweep(kernel: str, call: Call, dtype: torch.dtype, deadline: float) -> list[dict]:
    """Rows of one kernel, the fastest first. `default` is the heuristic's choice."""
    size = torch.Size(call.arguments[0]).numel() * dtype.itemsize
    sets = [tensors(call, dtype, "cuda", seed=i) for i in range(max(1, min(8, CACHE // size)))]
    direction = "forward" if kernel.endswith("fwd") else "forward+backward"
    wanted = leaves(sets[0], call)

    def results() -> list[torch.Tensor]:
        given = [w.detach().requires_grad_() for w in wanted]
        renamed = {id(w): g for w, g in zip(wanted, given)}
        out = ours(call)(*(renamed.get(id(a), a) for a in sets[0]))
        return [out.detach(), *torch.autograd.grad(out, given, out.detach())]

    def milliseconds() -> float:
        return interleaved({"it": bodies(ours(call), sets, call, direction)}, "cuda", seconds=0.05)["it"].median

    truth = results()
    found = [{"kernel": kernel, "config": "default", "ms": round(milliseconds(), 5)}]
    for config in candidates(kernel):
        if time.perf_counter() > deadline:
            break
        row = {"kernel": kernel, "config": config}
        try:
            with _launch.replaced(kernel, config):
                worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(results(), truth))
                row |= {"deviation": worst} if worst > 0.01 else {"ms": round(milliseconds(), 5)}
        except Exception as error:  # more shared memory or registers than there are
            row["error"] = f"{error.__class__.__name__}: {error}"[:120]
        found.append(row)
    return sorted(found, key=lambda row: row.get("ms", float("inf")))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split(":")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--budget", type=float, default=120, help="seconds in all, shared among the kernels")
    parser.add_argument("--kernels", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a sweep needs a CUDA device")
    calls = headline_calls(arguments.batch)
    end = time.perf_counter() + arguments.budget
    rows: list[dict] = []
    for i, kernel in enumerate(arguments.kernels):
        now = time.perf_counter()
        share = (end - now) / (len(arguments.kernels) - i)
        found = sweep(kernel, calls[kernel.rpartition("_")[0]], torch.bfloat16, now + share)
        rows += found
        default = next(r for r in found if r["config"] == "default")
        best = found[0]
        print(
            f"{kernel}: {len(found)} tried, default {default['ms']:.4f} ms, best {best['ms']:.4f} ms {best['config']}"
        )
        if arguments.json:
            files.write_json(arguments.json, envelope({"tried": len(rows)}, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
