"""Every Triton kernel that a denoiser launches, compiled ahead of time for GPUs that need not be here.

`python -m benchmarks.aot --json FILE` compiles for sm_80 and sm_90 and tells registers, stack (spills) and shared
memory of each variant. The launches are those of the operations themselves, recorded instead of run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.environment import envelope
from benchmarks.shapes import Call, denoiser_calls, tensors
from gaitfast import files
from gaitfast.kernels import triton_ops
from gaitfast.kernels.triton_ops import _launch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ARCHITECTURES = (80, 90)
OPTIONS = ("num_warps", "num_stages")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def launches(call: Call, dtype: torch.dtype) -> list[tuple]:
    """(kernel, arguments, constants and options) of the call's forward and backward pass."""
    arguments = tensors(call, dtype, "cpu", empty=True)
    leaves = [a for a in arguments if isinstance(a, Tensor)]
    for leaf in leaves[: 2 if call.operation == "temporal_attention" else None]:
        leaf.requires_grad_()
    with _launch.recorded() as found:
        out = triton_ops.MODULES[call.operation].run(*arguments)
        first = out if isinstance(out, Tensor) else out[0][0]
        if call.operation != "film":  # its backward pass is the library's
            torch.autograd.grad(first, [leaf for leaf in leaves if leaf.requires_grad], torch.empty_like(first))
    return found


def variant(kernel: triton.JITFunction, arguments: tuple, named: dict) -> tuple[dict, dict, dict, dict]:
    """(signature, constants, attributes, options) as a launch with these arguments would specialise the kernel."""
    values = dict(zip(kernel.arg_names, arguments)) | {k: v for k, v in named.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, {k: named[k] for k in OPTIONS if k in named}


def tool(name: str) -> str:
    """cuobjdump or nvdisasm of the Triton package."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack; a spill lies on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found, said.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def compiled(kernel: triton.JITFunction, arguments: tuple, named: dict, architecture: int) -> dict:
    """A row of the table."""
    signature, constants, attributes, options = variant(kernel, arguments, named)
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    sizes = {name: value for name, value in named.items() if isinstance(value, int) and name not in OPTIONS}
    return {
        "kernel": kernel.fn.__name__,
        "type": TYPES[arguments[0].dtype],
        "architecture": f"sm_{architecture}",
        **options,
        **usage(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "sizes": sizes,
    }


def rows(
    dims: list[int], types: list[torch.dtype], architectures: list[int], operations: list[str], frames: list[int]
) -> Iterator[dict]:
    """Each variant once, whoever launches it."""
    done = set()
    for dim in dims:
        for length in frames:
            for call in denoiser_calls(dim, frames=length):
                for dtype in types if call.operation in operations else ():
                    for launch in launches(call, dtype):
                        for architecture in architectures:
                            key = (launch[0].fn.__name__, str(variant(*launch)), architecture)
                            if key not in done:
                                done.add(key)
                                yield {"dim": dim, **compiled(*launch, architecture)}


def table(found: list[dict]) -> str:
    """Per kernel, type and architecture the ranges over its variants, as Markdown."""
    lines = [
        "| kernel | type | variants | sm_80 registers | sm_90 registers | spills | shared memory, KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kind in sorted({(r["kernel"], r["type"]) for r in found}):
        mine = [r for r in found if (r["kernel"], r["type"]) == (name, kind)]

        def span(values: list[int]) -> str:
            return str(max(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"

        per = {a: [r["registers"] for r in mine if r["architecture"] == a] for a in ("sm_80", "sm_90")}
        registers = " | ".join(span(per[a]) if per[a] else "-" for a in ("sm_80", "sm_90"))
        spilled = sum(r["stack"] > 0 for r in mine)
        shared = span([-(-r["shared"] // 1024) for r in mine])
        lines.append(f"| {name} | {kind} | {len(mine)} | {registers} | {spilled or 'none'} | {shared} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--frames", type=int, nargs="+", default=[30, 64, 16])
    parser.add_argument("--types", nargs="+", choices=TYPES.values(), default=list(TYPES.values()))
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--operations", nargs="+", choices=triton_ops.MODULES, default=list(triton_ops.MODULES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if triton_ops.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: nothing is compiled under the interpreter")
    types = [dtype for dtype, name in TYPES.items() if name in arguments.types]
    found = list(rows(arguments.dims, types, arguments.architectures, arguments.operations, arguments.frames))
    spilled = [r for r in found if r["stack"]]
    too_much = [r for r in found if r["shared"] > SHARED_LIMIT[int(r["architecture"][3:])]]
    if arguments.json:
        files.write_json(arguments.json, envelope({"variants": len(found), "spilled": len(spilled)}, found))
    print(table(found))
    for row in spilled + too_much:
        print(f"does not fit: {row}")
    return 1 if spilled or too_much else 0


if __name__ == "__main__":
    sys.exit(main())
