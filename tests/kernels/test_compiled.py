"""What holds for the compiled kernels alone: the same bits on any number of threads, refusals, one pool of threads."""

from pathlib import Path

import pytest
import torch

from gaitfast import kernels
from tests.kernels.cases import (
    ARGUMENTS,
    backend,
    film,
    group_norm_film_silu,
    layer_norm,
    normal,
    results,
    site_attention,
    temporal_attention,
    typed,
)

# Large enough for a second thread, and odd.
LARGE = {
    "group_norm_film_silu": group_norm_film_silu(5, 7, 5, 3, 96),
    "layer_norm": layer_norm(900, 72),
    "linear_attention": site_attention(3, 5, 9),
    "spatial_attention": site_attention(3, 5, 9),
    "temporal_attention": temporal_attention(3, 9, 7, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operation", LARGE)
def test_the_number_of_threads_changes_no_bit(operation, dtype):
    arguments = typed(operation, LARGE[operation], dtype, "cpu")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(operation, arguments, "compiled"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_there_is_one_pool_of_threads():
    results(
        "group_norm_film_silu",
        typed("group_norm_film_silu", LARGE["group_norm_film_silu"], torch.float32, "cpu"),
        "compiled",
    )
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) <= 1, loaded


@pytest.mark.parametrize("operation", [name for name in kernels.OPERATIONS if name != "film"])
def test_no_elements_give_no_elements(operation):
    arguments = typed(operation, ARGUMENTS[operation](), torch.float32, "cpu")
    empty = (arguments[0][:0], *arguments[1:])
    if operation == "group_norm_film_silu":
        empty = (*empty[:4], empty[4][:0], empty[5][:0], empty[6])
    out, *gradients = results(operation, empty, "compiled")
    assert out.numel() == 0
    leaves = [
        a for i, a in enumerate(empty) if isinstance(a, torch.Tensor) and (operation, i) != ("temporal_attention", 2)
    ]
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operation", LARGE)
def test_what_is_not_a_number_stays_visible(operation, dtype):
    first, *rest = typed(operation, LARGE[operation], dtype, "cpu")
    first[0] = float("nan")
    with backend("compiled"):
        out = getattr(kernels, operation)(first, *rest)
    assert out[0].isnan().all() and out[1:].isfinite().all()


@pytest.mark.parametrize(
    "operation,arguments,why",
    [
        ("layer_norm", layer_norm(2, 8), "no compiled kernel for float64"),
        ("film", film(), "no compiled kernel for float64"),
        ("layer_norm", typed("layer_norm", layer_norm(2, 5000), torch.float32, "cpu"), "4096 channels"),
        (
            "group_norm_film_silu",
            typed("group_norm_film_silu", group_norm_film_silu(1, 1, 1, 1, 600, 1), torch.float32, "cpu"),
            "512 channels in a group",
        ),
        (
            "temporal_attention",
            typed("temporal_attention", temporal_attention(1, 65, 1), torch.float32, "cpu"),
            "64 frames",
        ),
        (
            "temporal_attention",
            typed("temporal_attention", temporal_attention(dim_head=16), torch.float32, "cpu"),
            "heads of 16 features",
        ),
        ("linear_attention", typed("linear_attention", site_attention(sites=65), torch.float32, "cpu"), "64 sites"),
        ("spatial_attention", typed("spatial_attention", site_attention(sites=65), torch.float32, "cpu"), "64 sites"),
    ],
)
def test_what_they_cannot_do_is_refused_when_forced_and_else_left_to_the_reference(
    operation, arguments, why, monkeypatch
):
    monkeypatch.setenv("GAITFAST_BACKEND", "compiled")
    with pytest.raises(kernels.BackendError, match=f"compiled: {operation}: .*{why}"):
        getattr(kernels, operation)(*arguments)
    monkeypatch.delenv("GAITFAST_BACKEND")
    name, reason = kernels.backend_of(operation, *arguments)
    assert name == "reference" and why in reason
    getattr(kernels, operation)(*arguments)


def test_a_rotation_that_wants_a_gradient_is_left_to_the_reference():
    qkv, bias, rotation, heads = typed("temporal_attention", temporal_attention(), torch.float32, "cpu")
    assert kernels.backend_of("temporal_attention", qkv, bias, rotation.requires_grad_(), heads)[0] == "reference"
    with torch.no_grad():
        assert kernels.backend_of("temporal_attention", qkv, bias, rotation, heads)[0] == "compiled"


@pytest.mark.parametrize(
    "operation,arguments",
    [("spatial_attention", site_attention(sites=4)), ("layer_norm", layer_norm(2, 256)), ("film", film())],
)
def test_what_is_measured_to_be_no_faster_is_left_to_the_reference_unless_forced(operation, arguments, monkeypatch):
    monkeypatch.delenv("GAITFAST_BACKEND", raising=False)
    arguments = typed(operation, arguments, torch.float32, "cpu")
    name, reason = kernels.backend_of(operation, *arguments)
    assert name == "reference" and "no faster" in reason
    with backend("compiled"):
        assert kernels.backend_of(operation, *arguments)[0] == "compiled"


def test_another_device_is_left_to_the_reference():
    x = normal(2, 4).float().to("meta")
    assert kernels.backend_of("layer_norm", x, x[0], 1e-5)[0] == "reference"


def test_operators_check_what_they_are_given():
    x, weight = normal(2, 4).float(), normal(5).float()
    with pytest.raises(RuntimeError, match="weight must be"):
        torch.ops.gaitfast.layer_norm(x, weight, 1e-5)
    with pytest.raises(RuntimeError, match="result's shape"):
        torch.ops.gaitfast.layer_norm_backward(x[:1], x, weight[:4], 1e-5)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        torch.ops.gaitfast.spatial_attention(normal(1, 2, 3, 96), 1)
    with pytest.raises(RuntimeError, match="bias must be"):
        torch.ops.gaitfast.temporal_attention(normal(1, 2, 3, 96).float(), normal(1, 3, 3).float(), weight, 1)
