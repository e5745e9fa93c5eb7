"""On a GPU: every call that a denoiser of dim 64 makes at batch 64, and addresses beyond 32 bits."""

import pytest
import torch

from gaitfast import kernels
from tests.kernels.cases import Side, assert_as_good_as_pytorch, backend

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_every_call_of_a_training_step(operation):
    from benchmarks.shapes import denoiser_calls, tensors

    for call in denoiser_calls(64, 64):
        if call.operation == operation:
            arguments = tensors(call, torch.float32, "cuda")
            assert_as_good_as_pytorch(operation, Side("triton", None, "cuda", torch.bfloat16), arguments)
            torch.cuda.empty_cache()


def assert_last_sample_alone(call, x: torch.Tensor) -> None:
    assert x.numel() > 2**31
    with backend("triton"), torch.no_grad():
        out = call(x)
        assert torch.equal(out[-1:], call(x[-1:].clone()))


def test_activations_of_more_than_two_thousand_million_elements():
    x = torch.empty(18_000, 30, 8, 8, 64, dtype=torch.bfloat16, device="cuda").normal_()
    vector = torch.rand(64, device="cuda")
    assert_last_sample_alone(lambda part: kernels.group_norm_film_silu(part, vector, vector, 32), x)
    assert_last_sample_alone(lambda part: kernels.layer_norm(part, vector), x)


@pytest.mark.parametrize("operation", ["temporal_attention", "linear_attention", "spatial_attention"])
def test_projections_of_more_than_two_thousand_million_elements(operation):
    x = torch.empty(1500, 30, 64, 768, dtype=torch.bfloat16, device="cuda").normal_()
    extra = ()
    if operation == "temporal_attention":
        extra = torch.rand(8, 30, 30, device="cuda"), torch.rand(30, 16, 2, device="cuda")
    assert_last_sample_alone(lambda part: getattr(kernels, operation)(part, *extra, 8), x)
