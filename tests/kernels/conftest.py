"""Where the Triton tests run: on the CPU under the interpreter, or compiled on a GPU (`-m gpu`, make test-gpu).

Triton is imported inside functions: this file is read before tests/conftest.py has chosen between the two.
"""

import pytest
import torch


def pytest_generate_tests(metafunc) -> None:
    from gaitfast.kernels import triton_ops

    if "device" in metafunc.fixturenames:
        compiled = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", ["cpu" if triton_ops.INTERPRETED else compiled], indirect=True)


@pytest.fixture
def device(request, monkeypatch) -> str:
    """The device under test; what a kernel forgets to write is NaN there."""

    def poisoned(allocate):
        def call(*arguments, **keywords):
            out = allocate(*arguments, **keywords)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type == request.param else out

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def precision(request) -> tuple[torch.dtype, float]:
    """(type, how many times plain PyTorch's distance to float64 a kernel may have).

    Triton's interpreter computes float32 and float16 as a GPU does. bfloat16 it cuts off where it should round, which
    alone doubles an error, and cannot multiply at all (the kernels then feed tl.dot float32): such cases prove loads,
    stores and types; the rule of 2 holds them on a GPU.
    """
    from gaitfast.kernels import triton_ops

    cut_off = triton_ops.INTERPRETED and request.param == torch.bfloat16
    return request.param, 4.0 if cut_off else 2.0
