"""The CUDA implementation of the retrieval operators, run on the CPU: torch.ops.gaitfast_emulated.*.

tests/retrieval/emulated stands before PyTorch's headers, g++ makes loops of the kernels, and the schema is that of the
real operators. What this does not show is what only a GPU can: threads side by side, and its arithmetic units.
"""

import subprocess
from pathlib import Path

import torch

import gaitfast._C  # noqa: F401 (registers the operators)

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("part_squares", "gallery_plane", "search_gallery", "count_before", "pair_distances")
INCLUDE = Path(torch.__file__).parent / "include"


def compile_cpp(source, target, *options, include=()):
    """g++ of one source file with PyTorch's headers, `include` before them; warnings are errors."""
    folders = [f"-I{folder}" for folder in (*include, ROOT / "csrc")] + [f"-isystem{INCLUDE}"]
    command = ["g++", "-std=c++20", "-Wall", "-Werror", "-Wno-psabi", "-ffp-contract=off", "-fPIC", *folders]
    result = subprocess.run([*command, *options, "-o", target, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def load(folder):
    """Builds in `folder` and returns the operators."""
    library = folder / "emulated.so"
    libraries = (f"-L{INCLUDE.parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-Wl,-z,defs")
    emulated = ROOT / "tests/retrieval/emulated"
    compile_cpp(emulated / "retrieval.cpp", library, "-O1", "-shared", *libraries, include=[emulated])
    schema = torch.library.Library("gaitfast_emulated", "DEF")
    for name in NAMES:
        schema.define(str(getattr(torch.ops.gaitfast, name).default._schema).removeprefix("gaitfast::"))
    sides = "Tensor queries, Tensor query_squares, Tensor gallery, Tensor gallery_squares, Tensor plane, Tensor lengths"
    schema.define(f"score_bounds({sides}, str metric, float scale) -> (Tensor near, Tensor far)")
    torch.ops.load_library(library)
    operators = torch.ops.gaitfast_emulated
    operators.schema = schema  # the schema lives as long as its library object
    return operators
