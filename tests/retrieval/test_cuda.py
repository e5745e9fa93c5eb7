"""The CUDA operators: compiled for two architectures, emulated on the CPU, and on a GPU the same bits as on the CPU."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from gaitfast.retrieval import rank_report, search
from tests.retrieval import emulation, oracle
from tests.retrieval.cases import KINDS, features
from tests.retrieval.questions import answers, question

METRICS = ("cosine", "euclidean")
FLOATS = tuple(kind for kind in KINDS if kind != "double")  # float64 features take the plain path
KERNELS = emulation.ROOT / "csrc/cuda/retrieval_kernels.cu"
NUMBER_OF_KERNELS = 32


def assert_equal(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return emulation.load(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """(object file, what the assembler says) of an architecture; warnings are errors."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc (CUDA toolkit 12 or later) on PATH")

    @functools.cache
    def compiled(architecture):
        target = tmp_path_factory.mktemp(architecture) / "kernels.o"
        strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall", "-Xptxas", "-v,-warn-spills"]
        command = ["nvcc", "-std=c++20", "-O3", f"-arch={architecture}", *strict, "-c", "-o", target, KERNELS]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return target, result.stderr

    return compiled


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile_alone_and_spill_nothing(kernels, architecture):
    usage = re.findall(
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers", kernels(architecture)[1]
    )
    assert len(usage) == NUMBER_OF_KERNELS and all(line[:2] == ("0", "0") for line in usage)
    assert max(int(registers) for *_, registers in usage) <= 80  # three blocks of 256 threads on a multiprocessor


@pytest.mark.slow
def test_bindings_compile_against_pytorch_and_ask_for_kernels_that_are_there(kernels, tmp_path):
    """PyTorch's CPU package carries its CUDA headers, but for one that its build makes."""
    stub = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n")
    sources = [KERNELS.parent / name for name in ("retrieval.cpp", "retrieval/passes.cpp", "retrieval/problem.cpp")]
    together = tmp_path / "bindings.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    settings = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"TOP=(.*)", settings)[1])
    emulation.compile_cpp(together, tmp_path / "b.o", "-c", "-O0", f"-isystem{toolkit / 'include'}", include=[tmp_path])
    asked, there = (launches(file, kind) for file, kind in ((tmp_path / "b.o", "U"), (kernels("sm_90")[0], "W")))
    assert len(asked) == NUMBER_OF_KERNELS and asked <= there


def launches(file, kind):
    """The symbols of `launch` in an object file, of kind U (wanted) or W (there)."""
    lines = subprocess.run(["nm", file], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if line.split()[-2] == kind and "6launch" in line}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", FLOATS)
def test_the_emulation_answers_as_the_cpu_does(emulated, kind, metric):
    for seed, sizes in enumerate([(3, 200, 40, 3), (70, 130, 9, 5), (40, 66, 70, 1), (1, 1, 1, 1)]):
        asked = question(kind, metric, seed, sizes, excluded=0.3 * (seed % 2))
        assert_equal(answers(emulated, asked), answers(torch.ops.gaitfast, asked))


@pytest.mark.parametrize("metric", METRICS)
def test_the_emulation_keeps_the_nearest_of_more_near_ties_than_it_has_room_for(emulated, metric):
    for kind in ("neighbours", "copies", "integers"):
        asked = question(kind, metric, 5, (20, 500, 4, 2), k=3, excluded=0.0)
        assert_equal(answers(emulated, asked), answers(torch.ops.gaitfast, asked))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", FLOATS)
def test_the_emulated_exact_distance_is_correctly_rounded(emulated, kind, metric):
    for channels, parts in ((7, 3), (67, 1)):
        queries, gallery = features(kind, 3, 9, channels, parts).split((3, 6))
        rows, items = (x.reshape(-1) for x in torch.meshgrid(torch.arange(3), torch.arange(6), indexing="ij"))
        sides = [
            x for side in (queries, gallery) for x in (side.contiguous(), emulated.part_squares(side.contiguous()))
        ]
        exact = emulated.pair_distances(*sides, rows, items, metric, True)
        np.testing.assert_array_equal(exact.view(3, 6).numpy(), oracle.distances(queries, gallery, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", FLOATS)
def test_the_emulated_planes_hold_what_their_lengths_say(emulated, kind, metric):
    asked = question(kind, metric, 1, (1, 40, 37, 3))
    x = asked.gallery.double()
    squares = emulated.part_squares(asked.gallery)
    planes, lengths = emulated.gallery_plane(asked.gallery, squares, metric, asked.scale)
    unit, low, rest = lengths.double().permute(2, 1, 0)[..., None]
    depth = planes.shape[2] // 2
    chunks = planes[:, :40].split(64, 2)  # 32 high values, then 32 low ones: emulated/sizes.h
    high_plane, low_plane = (torch.cat([c.tensor_split(2, 2)[i] for c in chunks], 2).double() for i in (0, 1))
    if metric == "cosine":
        roots = (squares * 3).sqrt()[:, None]
        true = torch.where(roots > 0, x / roots, 0.0).flatten(1)[None]
    else:
        true = (x * asked.scale).permute(2, 0, 1)
    true = torch.nn.functional.pad(true, (0, depth - true.shape[2]))
    left_out = (true - (high_plane + low_plane / 254) * unit).norm(dim=2, keepdim=True)
    low_length = (low_plane / 254 * unit).norm(dim=2, keepdim=True)
    assert bool((left_out <= rest).all()) and bool((low_length <= low).all())
    assert bool((rest <= unit * (0.5 / 254) * depth**0.5 * (1 + 1e-5) + 1e-13).all())  # tight: half a step each


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", FLOATS)
def test_the_emulated_bounds_hold_the_scores(emulated, kind, metric):
    for sizes in ((70, 90, 37, 3), (9, 70, 300, 1)):
        asked = question(kind, metric, 2, sizes)
        sides = [x for side in (asked.queries, asked.gallery) for x in (side, emulated.part_squares(side))]
        plane = emulated.gallery_plane(*sides[2:], metric, asked.scale)
        near, far = (x.double() for x in emulated.score_bounds(*sides, *plane, metric, asked.scale))
        rows, items = (x.T.reshape(-1) for x in torch.meshgrid(*(torch.arange(n) for n in sizes[:2]), indexing="ij"))
        distance = emulated.pair_distances(*sides, rows, items, metric, True).view_as(near)
        score = 1.0 - distance if metric == "cosine" else -distance * asked.scale
        assert bool((far <= score).all()) and bool((score <= near).all())
        if kind == "normal":  # and tell nearly all apart
            assert float((near - far).max()) < 5e-4 < float(score.std())


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", FLOATS)
def test_a_gpu_answers_as_the_cpu_does(kind, metric):
    for seed, sizes in enumerate([(3, 200, 40, 3), (70, 130, 9, 5), (1, 1, 1, 1), (100, 5000, 24, 2)]):
        asked = question(kind, metric, seed, sizes, positives=0.02, excluded=0.3 * (seed % 2))
        assert_equal(answers(torch.ops.gaitfast, asked, "cuda"), answers(torch.ops.gaitfast, asked))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("kind", "sizes", "k"),
    [
        ("normal", (2500, 9000, 64, 16), 50),
        ("normal", (300, 4100, 256, 16), 5),
        ("copies", (40, 10_000, 8, 2), 10),
        ("neighbours", (33, 9000, 16, 2), 20),
        ("half", (200, 5000, 100, 7), 200),
        ("normal", (5, 40, 70_000, 1), 7),
    ],
)
def test_a_gpu_answers_large_questions_as_the_cpu_does(kind, sizes, k, metric):
    asked = question(kind, metric, 4, sizes, k=k, excluded=0.01, positives=0.002)
    assert_equal(answers(torch.ops.gaitfast, asked, "cuda"), answers(torch.ops.gaitfast, asked))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_search_and_report_on_a_gpu_are_those_of_the_cpu(metric):
    x = features("normal", 8, 3000, 32, 4)
    x[2000:] = x[:1000]
    ids, codes = np.arange(3000) % 50, np.arange(3000) % 7
    results = []
    for device in ("cpu", "cuda"):
        queries, gallery = (side.to(device) for side in x.split((1000, 2000)))
        nearest = search(queries, gallery, 30, metric, exclude=(codes[:1000], codes[1000:]))
        results.append((*(y.cpu() for y in nearest), rank_report(queries, gallery, ids[:1000], ids[1000:], metric)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2]))
    assert results[0][2] == results[1][2]
