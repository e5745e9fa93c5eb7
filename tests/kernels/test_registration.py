"""What PyTorch is told about the operations: schemas, fakes, gradients, compilation; and the dispatch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from gaitfast import kernels
from tests.kernels.cases import ARGUMENTS, FLOOR, Side, backend, call, distance, results, typed

ROOT = Path(__file__).resolve().parent.parent.parent


NAMESPACES = {"triton": "gaitfast_triton", "compiled": "gaitfast"}


def registered(operation: str, side: Side) -> tuple:
    """(torch.ops overload, its arguments)."""
    arguments = typed(operation, ARGUMENTS[operation](), torch.float32, side.device)
    if operation == "film":
        arguments = arguments[:4]
    floating = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    if operation == "temporal_attention":
        floating[2].requires_grad_(False)
    return getattr(getattr(torch.ops, NAMESPACES[side.name]), operation).default, tuple(floating)


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_registration_is_sound(operation, either):
    opcheck(*registered(operation, either))


def test_registration_without_modulation_is_sound(either):
    arguments = ARGUMENTS["group_norm_film_silu"](modulated=False)
    given = typed("group_norm_film_silu", arguments, torch.float32, either.device)
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in given]
    opcheck(registered("group_norm_film_silu", either)[0], tuple(leaves))


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_compiles_as_one_graph(operation, either):
    torch._dynamo.reset()
    arguments = typed(operation, ARGUMENTS[operation](), torch.float32, either.device)
    eager = results(operation, arguments, either.name)

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    for ours, expected in zip(results(operation, arguments, either.name, compiled), eager):
        assert distance(ours, expected.double()) <= FLOOR


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_an_empty_gradient_request_is_fine(operation, either):
    arguments = typed(operation, ARGUMENTS[operation](), torch.float32, either.device)
    with backend(either.name), torch.inference_mode():
        out = call(operation, arguments)
    with backend("reference"):
        assert distance(out, call(operation, arguments).double()) < 1e-6


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_autocast_does_not_change_a_result(operation, either):
    arguments = typed(operation, ARGUMENTS[operation](), torch.float32, either.device)
    with backend(either.name):
        with torch.autocast(either.device, torch.bfloat16):
            inside = call(operation, arguments)
        assert torch.equal(inside, call(operation, arguments))


def test_a_forced_kernel_refuses_what_it_cannot_do_and_says_why(device, monkeypatch):
    monkeypatch.setenv("GAITFAST_BACKEND", "triton")
    with pytest.raises(kernels.BackendError, match="layer_norm: no kernel for float64"):
        kernels.layer_norm(torch.ones(2, 4, dtype=torch.float64, device=device), torch.ones(4))
    qkv = torch.ones(1, 2, 65, 96, device=device)
    with pytest.raises(kernels.BackendError, match="linear_attention: more than 64 sites"):
        kernels.linear_attention(qkv, 1)


@pytest.mark.gpu
def test_a_gpu_runs_triton_by_itself(monkeypatch):
    monkeypatch.delenv("GAITFAST_BACKEND", raising=False)
    for operation in kernels.OPERATIONS:
        arguments = typed(operation, ARGUMENTS[operation](), torch.bfloat16, "cuda")
        assert kernels.backend_of(operation) == kernels.backend_of(operation, *arguments) == ("triton", "a CUDA device")
    x = torch.ones(2, 4, dtype=torch.float64, device="cuda")
    assert kernels.backend_of("layer_norm", x, torch.ones(4), 1e-5)[0] == "reference"


def program(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORCED = """
import torch
from gaitfast import kernels
try:
    kernels.layer_norm(torch.ones(2, 4), torch.ones(4))
except kernels.BackendError as error:
    print(error)
"""


def test_triton_forced_on_a_cpu_is_refused_with_what_would_help():
    said = program(FORCED, GAITFAST_BACKEND="triton")
    assert said.startswith("GAITFAST_BACKEND=triton: layer_norm: no Triton on cpu without TRITON_INTERPRET=1; unset it")


def test_a_machine_without_triton_does_without_and_says_so():
    hide = "import sys; sys.modules['triton'] = None\n"
    said = program(hide + FORCED, GAITFAST_BACKEND="triton")
    assert "Triton does not import (ModuleNotFoundError" in said
    plain = "print(kernels.backend_of('layer_norm')[0], 'gaitfast.kernels.triton_ops' in sys.modules)"
    assert program(hide + "from gaitfast import kernels; " + plain, GAITFAST_BACKEND="").strip() == "compiled False"


def test_a_machine_without_the_extension_runs_the_reference_and_says_so():
    hide = "import sys; sys.modules['gaitfast._C'] = None\n"
    assert "the compiled extension does not load (ModuleNotFoundError" in program(
        hide + FORCED, GAITFAST_BACKEND="compiled"
    )
    said = program(hide + "from gaitfast import kernels; print(*kernels.backend_of('layer_norm'))", GAITFAST_BACKEND="")
    assert said.startswith("reference the compiled extension does not load")
