"""A denoiser's training step against the reference formulation: `python -m benchmarks.denoiser --quick|--full`.

Both networks hold the same weights (benchmarks/reference_denoiser.py loads our state_dict). First their predictions and
gradients are compared, in float32 and in the type that is timed; then forward, loss and backward are timed under
autocast to bfloat16, each side eager, under torch.compile, and on a GPU as a graph without launches, interleaved in one
process. Our eager step is timed a second time beside the compiled ones: `vs_compile` is the compiled reference over
our faster way. The optimizer, the same for both, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.denoiser_stage import OurStage, ReferenceStage, stage_step
from benchmarks.environment import envelope
from benchmarks.reference_denoiser import Unet3D
from benchmarks.timing import Timing, copy_ceiling, interleaved, matmul_ceiling
from gaitfast import files, kernels
from gaitfast.interop import video_diffusion
from gaitfast.models.denoiser import build_denoiser, flops_per_sample

COND_DIM = 256
AGAIN = "ours/eager, again"
"""Our eager step, timed beside the compiled ones."""
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


def check(dim: int, frames: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative distances between the two networks: prediction, and gradients of the condition and of the first weight.

    In float32 they agree but for rounding. In `dtype` ours is at most twice as far from the reference in float32 as the
    reference in `dtype` is.
    """
    model, reference = networks(dim, device)
    latents, timestep, condition, _, noise = batch_of(2, frames, device)
    drop = torch.tensor([True, False], device=device)

    def results(network: nn.Module, stem: nn.Parameter, kind: torch.dtype) -> list[Tensor]:
        given = condition.clone().requires_grad_()
        with torch.autocast(device, kind, enabled=kind != torch.float32):
            out = network(latents, timestep, given, drop)
        gradients = torch.autograd.grad((out.float() - noise).square().mean(), (given, stem))
        return [out.detach(), *(g.flatten() for g in gradients)]

    stems = model.stem.weight, reference.init_conv.weight
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        ours, truth = (results(n, w, torch.float32) for n, w in zip((model, reference), stems))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    names = ("prediction", "gradient of the condition", "gradient of the stem")
    distances = {name: distance(a, b) for name, a, b in zip(names, ours, truth)}
    assert all(d < 1e-4 for d in distances.values()), distances
    if dtype != torch.float32:
        rough, plain = (results(n, w, dtype) for n, w in zip((model, reference), stems))
        for name, a, b, exact in zip(names, rough, plain, truth):
            distances[f"{name}, {dtype}"] = distance(a, exact)
            assert distance(a, exact) <= 2 * distance(b, exact), (name, distance(a, exact), distance(b, exact))
    return distances


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b).norm() / b.norm()).item()


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


def peak_bytes(step: Step, device: str) -> int:
    """Memory that a step takes beyond what lay there before, its gradients included."""
    step()
    if device != "cuda":
        return _peak_of_allocations(step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_allocations(step: Step) -> int:
    """Bytes of PyTorch's allocations that live at once, whatever the allocator below does with freed memory."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def modes(
    networks: dict[str, nn.Module], batch: tuple, dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, tuple[Step, bool]]:
    """name/mode -> (step, whether to time it as a graph), with or without torch.compile."""
    found = {}
    for name, network in networks.items():
        parameters = [p for p in network.parameters() if p.requires_grad]
        step = eager = step_of(network, parameters, batch, dtype, device)
        if compiled and name == "ours":
            found[AGAIN] = eager, False
            if device != "cuda":  # our way there is the eager one, and compiling takes minutes
                continue
        if compiled:
            step = step_of(torch.compile(network, dynamic=False), parameters, batch, dtype, device)
        found[f"{name}/{'compiled' if compiled else 'eager'}"] = step, False
        if device == "cuda":
            found[f"{name}/{'compiled graph' if compiled else 'graph'}"] = step, True
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


def row(timing: Timing, work: int | None, count: int) -> dict:
    """Of a step of `work` operations over `count` clips."""
    found = {"ms": [round(v, 4) for v in timing], "clips_per_s": round(count / timing.median * 1e3, 2)}
    return found if work is None else {**found, "tflops": round(work / timing.median / 1e9, 3)}


def headline_of(timings: dict[str, Timing], memory: dict[str, int]) -> dict[str, float]:
    """The reference's time over ours, mode by mode, and our memory over the reference's."""
    ratios = {
        "vs_eager": ratio(timings, "eager"),
        "vs_compile": best_against(timings, "compiled"),
        "vs_graph": ratio(timings, "graph"),
        "vs_compile_graph": ratio(timings, "compiled graph"),
        "peak_memory_ratio": round(memory["ours"] / memory["reference"], 3),
    }
    return {key: value for key, value in ratios.items() if value is not None}


def best_against(timings: dict[str, Timing], mode: str) -> float | None:
    """The reference in `mode` over the fastest of our ways beside it; of half a stage where that is all."""
    for ours, theirs in (
        ((AGAIN, f"ours/{mode}"), f"reference/{mode}"),
        (("ours/half stage",), f"reference/{mode} half stage"),
    ):
        if theirs in timings and any(name in timings for name in ours):
            best = min(timings[name].median for name in ours if name in timings)
            return round(timings[theirs].median / best, 3)
    return None


def stages(networks: dict[str, nn.Module], plan: dict, frames: int, dtype: torch.dtype, device: str) -> dict:
    """Half of our first stage, and of the reference's under torch.compile."""
    shape = (plan["batch"], plan["dim"], frames, 8, 8)
    made = {
        "ours/half stage": OurStage(networks["ours"]),
        "reference/compiled half stage": ReferenceStage(networks["reference"]),
    }
    width = 4 * plan["dim"] + COND_DIM
    return {name: (stage_step(stage, shape, width, dtype, device), False) for name, stage in made.items()}


def plan_of(arguments: argparse.Namespace, device: str) -> dict:
    """Sizes and lengths. Both sizes of a CPU's are dim 64, batch 8; quick compiles half a stage there."""
    cuda = device == "cuda"
    whole = "whole" if cuda or arguments.full else "stage"
    return {
        "dim": arguments.dim or 64,
        "batch": arguments.batch or (64 if cuda else 8),
        "seconds": arguments.seconds or (3.0 if cuda else 10.0 if arguments.full else 1.0),
        "compile": "nothing" if arguments.no_compile else whole,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denoiser", description=__doc__.split(":")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="few repetitions; on a CPU torch.compile of half a stage; the default"
    )
    size.add_argument("--full", action="store_true", help="torch.compile of the whole, minutes on a CPU")
    parser.add_argument("--batch", type=int, help="64 on a GPU, 8 on a CPU")
    parser.add_argument("--dim", type=int, help="64")
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--type", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="of timing for each side")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan, dtype = plan_of(arguments, device), getattr(torch, arguments.type)

    distances = check(32, min(arguments.frames, 8), dtype, device)
    print(f"checked: {distances}", flush=True)
    both = dict(zip(("ours", "reference"), networks(plan["dim"], device)))
    batch = batch_of(plan["batch"], arguments.frames, device)
    ceilings = {
        "copy_gb_per_s": round(copy_ceiling(device), 1),
        "matmul_tflops": round(matmul_ceiling(device, dtype), 2),
    }
    result = {
        "compile": plan["compile"],
        "ceilings": ceilings,
        "checked": distances,
        "threads": torch.get_num_threads(),
        "failed": {},
    }
    result["backends"] = {operation: kernels.backend_of(operation)[0] for operation in kernels.OPERATIONS}
    timings: dict[str, Timing] = {}
    work = 3 * flops_per_sample(plan["dim"], arguments.frames) * plan["batch"]
    facts = {"dim": plan["dim"], "batch": plan["batch"], "frames": arguments.frames, "type": arguments.type}
    # Compilation last: it takes long, and the file is written before.
    for compiled in (False,) if plan["compile"] == "nothing" else (False, True):
        if compiled and plan["compile"] == "stage":
            sides = stages(both, plan, arguments.frames, dtype, device)
        else:
            sides = modes(both, batch, dtype, device, compiled)
        more, failed = measure(sides, device, plan["seconds"])
        timings |= more
        result["failed"] |= failed
        if not compiled:
            result["memory"] = {name: peak_bytes(sides[f"{name}/eager"][0], device) for name in both}
        headline = headline_of(timings, result["memory"])
        found = [
            {"side": name, **facts, **row(timing, None if "half stage" in name else work, plan["batch"])}
            for name, timing in timings.items()
        ]
        if arguments.json:
            files.write_json(arguments.json, {**envelope(headline, found), **result})
    for line in found:
        low, high = line["ms"][1:]
        rate = f"  {line['tflops']:.2f} TFLOP/s" if "tflops" in line else ""
        print(f"{line['side']:<26} {line['ms'][0]:9.3f} ms ({low:.3f}-{high:.3f}){rate}")
    for name, why in result["failed"].items():
        print(f"{name}: {why}")
    print(json.dumps({**headline, **ceilings}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
