"""The denoiser's fused operations, each against plain PyTorch: `python -m benchmarks.kernels --quick|--full`.

First every operation's results are compared with float64: nothing is timed that is not at most twice as far from it as
plain PyTorch. Then, for the calls that a denoiser makes, forward and backward are timed against the reference
operation, eager and under torch.compile; temporal attention also against scaled_dot_product_attention with the bias as
its mask. `share` is the part of the machine's copy bandwidth at which the floor's bytes would have crossed memory,
`matmul_share` the part of its matrix rate at which the floor's operations would have been done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import envelope
from benchmarks.shapes import Call, denoiser_calls, flops, moved_elements, tensors
from benchmarks.timing import Timing, copy_ceiling, interleaved, matmul_ceiling
from gaitfast import files, kernels

CACHE = 256 * 2**20
"""Bytes of inputs to rotate through on a GPU, several times its cache."""


def merged(out) -> Tensor:
    """An operation's result as one tensor: `film` returns many."""
    return out if isinstance(out, Tensor) else torch.cat([t for pair in out for t in pair], dim=1)


def ours(call: Call) -> Callable[..., Tensor]:
    return lambda *arguments: merged(getattr(kernels, call.operation)(*arguments))


def plain(call: Call) -> Callable[..., Tensor]:
    return lambda *arguments: merged(getattr(kernels.reference, call.operation)(*arguments))


def scaled_dot_product(qkv: Tensor, bias: Tensor, rotation: Tensor, heads: int) -> Tensor:
    """Temporal attention through PyTorch's own attention: rotate, lay out (B * S, N, T, D), attend, lay out again."""
    batch, frames, sites, width = qkv.shape
    parts = qkv.view(batch, frames, sites, 3, heads, -1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    cos, sin = (r.to(qkv.dtype) for r in rotation.unbind(-1))

    def turned(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    out = torch.nn.functional.scaled_dot_product_attention(
        turned(parts[0]), turned(parts[1]), parts[2], attn_mask=bias.to(qkv.dtype)[None]
    )
    return out.view(batch, sites, heads, frames, -1).permute(0, 3, 1, 2, 4).reshape(batch, frames, sites, width // 3)


def leaves(arguments: tuple, call: Call) -> list[Tensor]:
    """The arguments whose gradient a training step takes."""
    found = [a for a in arguments if isinstance(a, Tensor)]
    return found[:2] if call.operation == "temporal_attention" else found


def deviation(values: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative distance among a call's output and gradients."""
    return max(((v.double() - t).norm() / t.norm().clamp_min(1e-30)).item() for v, t in zip(values, truth, strict=True))


def check(call: Call, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """(our distance to float64, plain PyTorch's), output and gradients; AssertionError where ours is over twice."""
    arguments = tensors(call, dtype, device)

    def results(function: Callable[..., Tensor], exact: bool) -> list[Tensor]:
        given = [a.double() if exact and isinstance(a, Tensor) else a for a in arguments]
        wanted = [a.detach().requires_grad_() for a in leaves(tuple(given), call)]
        replaced = iter(wanted)
        skip = 2 if call.operation == "temporal_attention" else len(given)
        given = [next(replaced) if isinstance(a, Tensor) and i < skip else a for i, a in enumerate(given)]
        out = function(*given)
        generator = torch.Generator(device).manual_seed(1)
        outer = torch.randn(out.shape, device=device, generator=generator).to(torch.bfloat16).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, wanted, outer)]

    truth = results(plain(call), True)
    mine, theirs = (deviation(results(f, False), truth) for f in (ours(call), plain(call)))
    assert math.isfinite(mine) and mine <= 2 * theirs + 4 * 2**-23, f"{call.label}: {mine:.2e}, plain {theirs:.2e}"
    return mine, theirs


def bodies(function: Callable[..., Tensor], sets: list[tuple], call: Call, direction: str) -> list[Callable]:
    """The call, its backward pass alone, or both, once per set of inputs."""
    out = []
    for arguments in sets:
        wanted = [a.requires_grad_() for a in leaves(arguments, call)]

        def forward(own=arguments) -> Tensor:
            with torch.no_grad():
                return function(*own)

        if direction == "forward":
            out.append(forward)
        else:

            def step(own=arguments, wanted=wanted) -> tuple:
                result = function(*own)
                return torch.autograd.grad(result, wanted, result)

            out.append(step)
    return out


class Ceilings(NamedTuple):
    """What the machine can do at most."""

    copy_gb_per_s: float
    matmul_tflops: float

    @classmethod
    def of(cls, device: str, dtype: torch.dtype) -> Ceilings:
        return cls(round(copy_ceiling(device), 1), round(matmul_ceiling(device, dtype), 2))


def rows(
    call: Call, dtype: torch.dtype, device: str, ceilings: Ceilings, *, seconds: float, compiled: bool
) -> list[dict]:
    """Forward, and forward with backward, of one call."""
    elements = sum(torch.Size(a).numel() for a in call.arguments[:1])
    size = elements * dtype.itemsize
    count = max(1, min(8, CACHE // size)) if device == "cuda" else 1
    sets = [tensors(call, dtype, device, seed=i) for i in range(count)]
    sides: dict[str, Callable] = {"ours": ours(call), "eager": plain(call)}
    refused = None
    if compiled:
        torch._dynamo.reset()
        sides["compiled"] = torch.compile(plain(call), dynamic=False)
        if refused := refusal(sides["compiled"], sets[:1], call):
            del sides["compiled"]
    if call.operation == "temporal_attention":
        sides["sdpa"] = scaled_dot_product
    forward, backward = moved_elements(call)
    once, again = flops(call)
    width = 4 if call.operation == "film" else dtype.itemsize
    found = []
    for direction, moved, done in (("forward", forward, once), ("forward+backward", forward + backward, once + again)):
        timings = interleaved(
            {name: bodies(side, sets, call, direction) for name, side in sides.items()}, device, seconds=seconds
        )
        rate = moved * width / timings["ours"].median / 1e6
        tflops = done / timings["ours"].median / 1e9
        found.append(
            {
                "call": call.label,
                "per_forward": call.count,
                "type": str(dtype).removeprefix("torch."),
                "direction": direction,
                "backend": kernels.backend_of(call.operation, *sets[0])[0],
                "ms": {name: [round(v, 5) for v in timing] for name, timing in timings.items()},
                "floor_mb": round(moved * width / 1e6, 3),
                "gb_per_s": round(rate, 1),
                "share": round(rate / ceilings.copy_gb_per_s, 4),
                "tflops": round(tflops, 3),
                "matmul_share": round(tflops / ceilings.matmul_tflops, 4),
                **ratios(timings),
                **({"torch_compile_failed": refused} if refused else {}),
            }
        )
    # The backward pass alone is the difference: it cannot run without a forward pass before it.
    difference = found[1]["ms"]["ours"][0] - found[0]["ms"]["ours"][0]
    if difference > 0:
        rate = backward * width / difference / 1e6
        found[1] |= {"backward_gb_per_s": round(rate, 1), "backward_share": round(rate / ceilings.copy_gb_per_s, 4)}
    return found


def refusal(function: Callable[..., Tensor], sets: list[tuple], call: Call) -> str | None:
    """Why torch.compile cannot make this call, or None; it is made once, forward and backward."""
    try:
        for direction in ("forward", "forward+backward"):
            bodies(function, sets, call, direction)[0]()
    except Exception as error:
        return f"{error.__class__.__name__}: {' '.join(str(error).split())}"[:200]
    return None


def ratios(timings: dict[str, Timing]) -> dict[str, float]:
    """How many times ours the others take."""
    return {
        f"vs_{name}": round(timing.median / timings["ours"].median, 3)
        for name, timing in timings.items()
        if name != "ours"
    }


def at_full_resolution(call: Call) -> bool:
    shape = call.arguments[0]
    return len(shape) == 2 or math.prod(shape[2:4]) == 64 or shape[2] == 64


def headline(found: list[dict], batch: int, kind: str) -> dict:
    """The figures that the issue asks for, of the largest shapes in the first type measured."""
    out: dict = {"batch": batch}
    for row in found:
        label = row["call"]
        if row["type"] != kind:
            continue
        if label.startswith("group_norm_film_silu") and "8x8x64 modulated" in label:
            if row["direction"] == "forward":
                out["norm_forward_share"] = row["share"]
            else:
                out["norm_backward_share"] = row.get("backward_share")
        if label.startswith("temporal_attention") and "x64x768" in label and row["direction"] == "forward+backward":
            out["temporal_vs_sdpa"] = row.get("vs_sdpa")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split(":")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="headline calls, small batch on a CPU; the default")
    size.add_argument(
        "--full", action="store_true", help="every call of the denoiser, the largest also against torch.compile"
    )
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--batch", type=int, help="default: 64 on a GPU, 8 on a CPU, 2 there with --quick")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--type", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument("--seconds", type=float, help="of timing for each row")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further call is timed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = arguments.batch or (64 if device == "cuda" else 8 if arguments.full else 2)
    dtypes = [getattr(torch, kind) for kind in arguments.type]
    calls = [c for c in denoiser_calls(arguments.dim, batch) if arguments.full or at_full_resolution(c)]
    small = {c.label: c for c in denoiser_calls(arguments.dim, 2)}
    checked: dict[str, dict] = {kind: {} for kind in arguments.type}
    for kind, dtype in zip(arguments.type, dtypes):
        for call in small.values():
            mine, theirs = check(call, dtype, device)
            checked[kind][call.label] = {"ours": mine, "plain": theirs}
    print(f"{len(small)} calls checked against float64", flush=True)
    ceilings = {kind: Ceilings.of(device, dtype) for kind, dtype in zip(arguments.type, dtypes)}
    seconds = arguments.seconds or (0.3 if device == "cuda" else 2.0)
    found: list[dict] = []
    failed: dict[str, str] = {}

    def write() -> None:
        if arguments.json:
            result = envelope(summary(), found)
            files.write_json(arguments.json, {**result, "checked": checked, "failed": failed})

    def summary() -> dict:
        limits = {kind: limit._asdict() for kind, limit in ceilings.items()}
        return {**headline(found, batch, arguments.type[0]), **limits[arguments.type[0]], "ceilings": limits}

    # The longest first: a run that is cut off has then seen what matters.
    ordered = sorted(calls, key=lambda c: -moved_elements(c)[1])
    for call, kind in itertools.product(ordered, arguments.type):
        if time.perf_counter() - started > arguments.budget:
            break
        try:
            compiled = arguments.full and not arguments.eager_only and at_full_resolution(call)
            new = rows(call, getattr(torch, kind), device, ceilings[kind], seconds=seconds, compiled=compiled)
        except Exception as error:  # the other calls' figures are worth having all the same
            failed[f"{call.label} {kind}"] = f"{error.__class__.__name__}: {error}"[:300]
            print(f"{call.label} {kind}: {error}"[:300], flush=True)
            continue
        found += new
        for row in new:
            others = ", ".join(f"{key[3:]} {row[key]:.2f}x" for key in row if key.startswith("vs_"))
            share = f"{row['share']:.0%} of copy"
            print(
                f"{row['call']:<55} {kind:<8} {row['direction']:<17} {row['ms']['ours'][0]:9.4f} ms {share}; {others}",
                flush=True,
            )
        write()
    write()
    print(json.dumps(summary()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
