"""Compile kernels for sm_90 as launches with unusual sizes specialise them: `python -m tests.kernels.compile_cases`.

The interpreter runs Python; a compiled kernel is another program. Triton makes a constant of every integer argument
that is 1, for example, which is how a batch of 1 can fail on a GPU after every test under the interpreter has passed.
Runs in a process of its own, where Triton is not interpreted. Exits with 1 if anything does not compile.
"""

import sys

import torch

from benchmarks.aot import compiled, variant
from gaitfast.kernels import triton_ops
from gaitfast.kernels.triton_ops import _launch
from tests.kernels.cases import ARGUMENTS, typed

SIZES = {
    "film": [{"batch": 1, "time": 1, "condition": 1, "channels": (1,)}],
    "group_norm_film_silu": [
        {"batch": 1, "frames": 1, "height": 1, "width": 1, "channels": 1, "groups": 1},
        {"batch": 1, "frames": 33, "channels": 96, "modulated": False},
        {"batch": 2, "frames": 64, "height": 8, "width": 8},
    ],
    "layer_norm": [{"rows": 1, "channels": 1}, {"rows": 3, "channels": 96}],
    "linear_attention": [{"frames": 1, "sites": 1, "heads": 1}, {"sites": 5, "dim_head": 16}],
    "spatial_attention": [{"frames": 1, "sites": 1, "heads": 1}, {"sites": 33, "dim_head": 64}],
    "temporal_attention": [
        {"frames": 1, "sites": 1, "heads": 1},
        {"frames": 33, "sites": 5, "heads": 3, "dim_head": 16},
        {"frames": 30, "dim_head": 64},
    ],
}


def main() -> int:
    done, failed = set(), 0
    for operation, cases in SIZES.items():
        for case in cases:
            arguments = typed(operation, ARGUMENTS[operation](**case), torch.bfloat16, "cpu")
            leaves = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor)]
            if operation == "temporal_attention":
                leaves.pop().requires_grad_(False)
            with _launch.recorded() as found:
                out = triton_ops.MODULES[operation].run(*arguments)
                out = out if isinstance(out, torch.Tensor) else out[0][0]
                torch.autograd.grad(out, leaves, torch.empty_like(out))
            for launch in found:
                key = launch[0].fn.__name__, str(variant(*launch))
                if key in done:
                    continue
                done.add(key)
                try:
                    compiled(*launch, 90)
                except Exception as error:
                    failed += 1
                    print(f"{key[0]} for {case}: {error}")
    print(f"{len(done)} variants, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
