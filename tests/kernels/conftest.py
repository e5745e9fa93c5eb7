"""Where the kernels' tests run. Triton's: on the CPU under the interpreter, or compiled on a GPU (`-m gpu`, make
test-gpu). The compiled ones: on the CPU, once for every level of instructions.

Triton is imported inside functions: this file is read before tests/conftest.py has chosen between the two.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.cases import Side

LEVELS = ("generic", "avx2", "avx512", "amx")
"""Values of GAITFAST_CPU; a level that this CPU has not is the best one below it."""


def pytest_generate_tests(metafunc) -> None:
    from gaitfast.kernels import triton_ops

    interpreted = triton_ops.INTERPRETED
    device = "cpu" if interpreted else "cuda"
    marks = () if interpreted else pytest.mark.gpu
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(device, marks=marks)], indirect=True)
    for fixture in {"side", "single", "either", "triton_side"}.intersection(metafunc.fixturenames):
        # Triton's interpreter computes float32 and float16 as a GPU does. bfloat16 it cuts off where it should round,
        # which alone doubles an error, and cannot multiply at all (the kernels then feed tl.dot float32): such cases
        # prove loads, stores and types; the rule of 2 holds them on a GPU.
        factors = {torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 4.0 if interpreted else 2.0}
        sides = [Side("triton", None, device, dtype, factor) for dtype, factor in factors.items()]
        if interpreted and fixture != "triton_side":
            types = (torch.float32, torch.bfloat16)
            sides += [Side("compiled", level, "cpu", dtype, 2.0) for level in LEVELS for dtype in types]
        if fixture in ("single", "either"):
            sides = [side for side in sides if side.dtype == torch.float32]
        if fixture == "either":
            sides = [side for side in sides if side.level in (None, LEVELS[-1])]
        named = [pytest.param(side, id=name_of(side), marks=marks) for side in sides]
        metafunc.parametrize(fixture, named, indirect=True)


def name_of(side: Side) -> str:
    return f"{side.name}-{side.level or side.device}-{str(side.dtype).removeprefix('torch.')}"


def poison(monkeypatch, device: str) -> None:
    """What a kernel forgets to write is NaN, in tensors that Python makes."""

    def poisoned(allocate):
        def call(*arguments, **keywords):
            out = allocate(*arguments, **keywords)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type == device else out

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def device(request, monkeypatch) -> str:
    """Where Triton runs."""
    poison(monkeypatch, request.param)
    return request.param


def prepared(side: Side, monkeypatch) -> Iterator[Side]:
    if side.name == "triton":
        poison(monkeypatch, side.device)
        yield side
        return
    monkeypatch.setenv("GAITFAST_CPU", side.level)
    # PyTorch then fills what C++ allocates with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield side
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def side(request, monkeypatch) -> Iterator[Side]:
    """Every implementation in every type that it takes."""
    yield from prepared(request.param, monkeypatch)


@pytest.fixture
def either(request, monkeypatch) -> Iterator[Side]:
    """Every backend in float32, the compiled one with the best instructions here."""
    yield from prepared(request.param, monkeypatch)


@pytest.fixture
def triton_side(request, monkeypatch) -> Iterator[Side]:
    """Triton in every type that it takes."""
    yield from prepared(request.param, monkeypatch)


@pytest.fixture
def single(request, monkeypatch) -> Iterator[Side]:
    """Every implementation in float32."""
    yield from prepared(request.param, monkeypatch)
