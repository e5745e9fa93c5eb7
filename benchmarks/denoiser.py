"""A denoiser's training step against the reference formulation: `python -m benchmarks.denoiser --quick|--full`.

Both networks hold the same weights (benchmarks/reference_denoiser.py loads our state_dict). First their predictions and
gradients are compared in float32; then forward, loss and backward are timed under autocast to bfloat16, each side
eager, under torch.compile, and on a GPU as a graph without launches: like against like, interleaved in one process.
The optimizer, the same for both, is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.environment import envelope
from benchmarks.reference_denoiser import Unet3D
from benchmarks.timing import Timing, copy_ceiling, interleaved, matmul_ceiling
from gaitfast import files, kernels
from gaitfast.interop import video_diffusion
from gaitfast.models.denoiser import build_denoiser, flops_per_sample

COND_DIM = 256
Step = Callable[[], Tensor]


def networks(dim: int, device: str) -> tuple[nn.Module, nn.Module]:
    """(ours, the reference), of equal weights."""
    model, reference = build_denoiser(dim, COND_DIM), Unet3D(dim, COND_DIM)
    reference.load_state_dict(video_diffusion.state_dict(model))
    return model.to(device), reference.to(device)


def batch_of(size: int, frames: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents, timestep, condition, drop_condition, noise."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    timestep = torch.randint(1, 1001, (size,), device=device, generator=generator)
    drop = torch.rand(size, device=device, generator=generator) < 0.15
    return normal(size, 4, frames, 8, 8), timestep, normal(size, COND_DIM), drop, normal(size, 4, frames, 8, 8)


def check(dim: int, frames: int, device: str) -> dict[str, float]:
    """Relative distances between the two networks in float32: prediction, and gradient of the condition."""
    model, reference = networks(dim, device)
    latents, timestep, condition, _, noise = batch_of(2, frames, device)
    drop = torch.tensor([True, False], device=device)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        results = []
        for network in (model, reference):
            given = condition.clone().requires_grad_()
            out = network(latents, timestep, given, drop)
            (gradient,) = torch.autograd.grad((out - noise).square().mean(), given)
            results.append((out.detach(), gradient))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    distances = {
        name: ((a - b).norm() / b.norm()).item()
        for name, a, b in zip(("prediction", "gradient"), *results, strict=True)
    }
    assert all(d < 1e-4 for d in distances.values()), distances
    return distances


def step_of(network: Callable, parameters: list[nn.Parameter], batch: tuple, dtype: torch.dtype, device: str) -> Step:
    """Forward, loss and backward; the gradients are freed like those of a step after its optimizer ran."""
    latents, timestep, condition, drop, noise = batch

    def step() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = network(latents, timestep, condition, drop)
        loss = (out.float() - noise).square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    return step


def saved_bytes(network: nn.Module, batch: tuple, dtype: torch.dtype, device: str) -> int:
    """Bytes of activation that a forward pass keeps for the backward pass, each memory counted once."""
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            keep.append(tensor)
            seen[memory.data_ptr()] = memory.nbytes()
        return tensor

    keep: list[Tensor] = []
    latents, timestep, condition, drop, _ = batch
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            network(latents, timestep, condition, drop)
    return sum(seen.values())


def peak_bytes(step: Step) -> int:
    """GPU memory that a step takes beyond what lay there before."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def modes(
    name: str, network: nn.Module, batch: tuple, dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, tuple[Step, bool]]:
    """name/mode -> (step, whether to time it as a graph), with or without torch.compile."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    step = step_of(torch.compile(network, dynamic=False) if compiled else network, parameters, batch, dtype, device)
    found = {f"{name}/{'compiled' if compiled else 'eager'}": (step, False)}
    if device == "cuda":
        found[f"{name}/{'compiled graph' if compiled else 'graph'}"] = (step, True)
    return found


def measure(
    sides: dict[str, tuple[Step, bool]], device: str, seconds: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(timings, why a side has none). Sides that launch and sides that replay graphs are timed apart."""
    timings, failed, ready = {}, {}, {}
    for name, (step, graph) in sides.items():
        started = time.perf_counter()
        try:
            step()
        except Exception as error:  # one side that does not compile must not cost the others their figures
            failed[name] = f"{error.__class__.__name__}: {error}"[:300]
            continue
        ready[name] = (step, graph)
        print(f"{name}: first step {time.perf_counter() - started:.1f} s", flush=True)
    for as_graph in (False, True):
        chosen = {name: [step] for name, (step, graph) in ready.items() if graph == as_graph}
        if chosen:
            timings |= interleaved(chosen, device, seconds=seconds * len(chosen), least=3, graphs=as_graph)
    return timings, failed


def ratio(timings: dict[str, Timing], mode: str) -> float | None:
    sides = [timings.get(f"{name}/{mode}") for name in ("reference", "ours")]
    return round(sides[0].median / sides[1].median, 3) if all(sides) else None


def row(timing: Timing, work: int, count: int) -> dict:
    """Of a step of `work` operations over `count` clips."""
    return {
        "ms": [round(v, 4) for v in timing],
        "tflops": round(work / timing.median / 1e9, 3),
        "clips_per_s": round(count / timing.median * 1e3, 2),
    }


def headline_of(timings: dict[str, Timing], memory: dict[str, int], saved: dict[str, int]) -> dict[str, float]:
    """The reference's time over ours, mode by mode, and our memory over the reference's."""
    ratios = {
        "vs_eager": ratio(timings, "eager"),
        "vs_compile": ratio(timings, "compiled"),
        "vs_graph": ratio(timings, "graph"),
        "vs_compile_graph": ratio(timings, "compiled graph"),
        "peak_memory_ratio": round(memory["ours"] / memory["reference"], 3),
        "saved_memory_ratio": round(saved["ours"] / saved["reference"], 3),
    }
    return {key: value for key, value in ratios.items() if value is not None}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denoiser", description=__doc__.split(":")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="on a CPU: dim 32, batch 2, eager only; the default")
    size.add_argument("--full", action="store_true", help="dim 64, batch 64 (8 on a CPU), also under torch.compile")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--type", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="of timing for each side")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = arguments.full or device == "cuda"
    dim = arguments.dim or (64 if large else 32)
    count = arguments.batch or (64 if device == "cuda" else 8 if large else 2)
    dtype = getattr(torch, arguments.type)
    compiled = (arguments.full or device == "cuda") and not arguments.no_compile
    seconds = arguments.seconds or (3.0 if device == "cuda" else 10.0 if large else 4.0)

    distances = check(32, min(arguments.frames, 8), device)
    print(f"checked in float32: {distances}", flush=True)
    ours, reference = networks(dim, device)
    batch = batch_of(count, arguments.frames, device)
    saved = {name: saved_bytes(n, batch, dtype, device) for name, n in (("ours", ours), ("reference", reference))}
    ceilings = {
        "copy_gb_per_s": round(copy_ceiling(device), 1),
        "matmul_tflops": round(matmul_ceiling(device, dtype), 2),
    }
    result = {"memory": saved, "ceilings": ceilings, "checked": distances, "failed": {}}
    result["backends"] = {operation: kernels.backend_of(operation)[0] for operation in kernels.OPERATIONS}
    timings: dict[str, Timing] = {}
    work = 3 * flops_per_sample(dim, arguments.frames) * count
    facts = {"dim": dim, "batch": count, "frames": arguments.frames, "type": arguments.type}
    # Compilation last: it takes minutes, and the file is written before.
    for torch_compiled in (False, True) if compiled else (False,):
        sides = {}
        for name, network in (("ours", ours), ("reference", reference)):
            sides |= modes(name, network, batch, dtype, device, torch_compiled)
        more, failed = measure(sides, device, seconds)
        timings |= more
        result["failed"] |= failed
        if device == "cuda" and not torch_compiled:
            result["memory"] = {name: peak_bytes(sides[f"{name}/eager"][0]) for name in ("ours", "reference")}
        headline = headline_of(timings, result["memory"], saved)
        found = [{"side": name, **facts, **row(timing, work, count)} for name, timing in timings.items()]
        if arguments.json:
            files.write_json(arguments.json, {**envelope(headline, found), **result})
    for line in found:
        low, high = line["ms"][1:]
        print(f"{line['side']:<26} {line['ms'][0]:9.3f} ms ({low:.3f}-{high:.3f})  {line['tflops']:.2f} TFLOP/s")
    for name, why in result["failed"].items():
        print(f"{name}: {why}")
    print(json.dumps({**headline, **ceilings}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
