"""The compiled convolutions against PyTorch's: results, gradients, types, odd sizes, bits, registration."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from gaitfast.kernels import convolution
from tests.kernels.cases import FLOOR, distance, normal

pytestmark = pytest.mark.skipif(
    not convolution.takes(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)), reason="needs AVX-512 with bfloat16"
)

# frames, height, width, channels in, channels out, kernel, stride, padding, transposed
CASES = {
    "3x3": (5, 8, 8, 32, 48, 3, 1, 1, False),
    "3x3 many rows": (40, 8, 8, 16, 8, 3, 1, 1, False),
    "3x3 dense": (33, 2, 2, 24, 40, 3, 1, 1, False),
    "3x3 one site": (32, 1, 1, 24, 40, 3, 1, 1, False),
    "3x3 odd sites": (7, 1, 3, 36, 20, 3, 1, 1, False),
    "5x5 few channels": (6, 8, 4, 4, 32, 5, 1, 2, False),
    "shrinking": (5, 8, 8, 32, 32, 4, 2, 1, False),
    "shrinking dense": (32, 4, 4, 20, 12, 4, 2, 1, False),
    "growing": (5, 4, 6, 16, 24, 4, 2, 1, True),
    "growing dense": (32, 2, 2, 20, 12, 4, 2, 1, True),
}


def arguments(name: str, weight_type: torch.dtype = torch.float32) -> tuple:
    frames, height, width, into, out, kernel, stride, padding, transposed = CASES[name]
    x = normal(1, frames, height, width, into, seed=1).bfloat16()
    shape = (into, out, kernel, kernel) if transposed else (out, into, kernel, kernel)
    weight, bias = (normal(*size, seed=seed).to(weight_type) for seed, size in enumerate((shape, (out,)), start=2))
    return x, weight, bias, stride, padding, transposed


def plain(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    function = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    out = function(x.flatten(0, 1).permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype), stride, padding)
    return out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def results(function, given: tuple) -> list[Tensor]:
    """Output and the gradients of x, weight and bias."""
    x, weight, bias, *rest = given
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves, *rest)
    grad = normal(*out.shape, seed=9).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_as_good_as_pytorch(name, weight_type):
    given = arguments(name, weight_type)
    exact = tuple(t.double() if isinstance(t, Tensor) else t for t in given)
    # The products see the weight in bfloat16, as PyTorch's do: that rounding is not theirs.
    exact = (exact[0], given[1].bfloat16().double(), given[2].bfloat16().double(), *exact[3:])
    torch.use_deterministic_algorithms(True, warn_only=True)  # then fresh memory is NaN
    try:
        ours = results(convolution.convolution, given)
    finally:
        torch.use_deterministic_algorithms(False)
    for i, (o, p, t) in enumerate(zip(ours, results(plain, given), results(plain, exact), strict=True)):
        assert o.shape == t.shape and o.dtype == p.dtype and o.is_contiguous() and torch.isfinite(o).all(), i
        allowed = 2 * distance(p, t) + FLOOR
        assert distance(o, t) <= allowed, f"result {i}: {distance(o, t):.2e} of at most {allowed:.2e}"


def test_weight_gradients_keep_float32():
    """What PyTorch rounds to bfloat16 on the way."""
    given = arguments("3x3 many rows")
    exact = tuple(t.double() if isinstance(t, Tensor) else t for t in given)
    ours, truth = (results(f, g)[2:] for f, g in ((convolution.convolution, given), (plain, exact)))
    assert all(distance(o, t) < 1e-5 for o, t in zip(ours, truth))


@pytest.mark.parametrize("name", ["3x3 many rows", "3x3 dense", "growing"])
def test_same_bits_on_any_number_of_threads(name):
    threads, given = torch.get_num_threads(), arguments(name)
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(convolution.convolution, given))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_strided_input_is_read_right():
    x, *rest = arguments("3x3")
    wide = torch.cat((x, x + 1), dim=-1)[..., : x.shape[-1]]
    assert not wide.is_contiguous()
    assert torch.equal(convolution.convolution(wide, *rest), convolution.convolution(x, *rest))


@pytest.mark.parametrize("variable,value", [("GAITFAST_BACKEND", "reference"), ("GAITFAST_CPU", "avx2")])
def test_it_can_be_switched_off(variable, value, monkeypatch):
    x, weight, *_ = arguments("3x3")
    assert convolution.takes(x, weight) and not convolution.takes(x.float(), weight)
    monkeypatch.setenv(variable, value)
    assert not convolution.takes(x, weight)


def test_registration_is_sound():
    frames = normal(3, 4, 4, 8).bfloat16()
    opcheck(torch.ops.gaitfast.weight_gradient.default, (frames, frames, 3, 1, 1))
    opcheck(torch.ops.gaitfast.dense_weight.default, (normal(8, 6, 3, 3).float(), 2, 2, 1, 1))


@pytest.mark.parametrize("name", ["3x3", "3x3 dense", "growing dense"])
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    given = arguments(name)
    compiled = torch.compile(convolution.convolution, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, given), results(convolution.convolution, given)):
        assert torch.equal(a, b)
