"""Numbers stay numbers: unbalanced batches, short and empty clips, all backbones."""

import pytest
import torch

from gaitfast import needs
from gaitfast.config import BACKBONES, PretrainConfig, load
from gaitfast.models import build_recognizer
from gaitfast.recognition import RecognitionObjective


def silhouettes(clips: int, frames: int) -> torch.Tensor:
    """Of each three clips one is black, one white, one noise."""
    x = torch.zeros(clips, frames, 64, 44)
    x[1::3] = 1
    x[2::3] = torch.rand(x[2::3].shape)
    return x


def all_finite(loss: torch.Tensor, module: torch.nn.Module) -> bool:
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return bool(loss.isfinite()) and all(g is None or bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKBONES)
def test_an_unbalanced_batch_of_short_clips_gives_no_nan_in_transfer(name, precision):
    """As in GREW: nearly everybody has few sequences, many of them of one or two frames."""
    torch.manual_seed(0)
    recognizer = build_recognizer(name, "grew", 3, width=0.125)
    classifier = name not in ("gaitset", "gaitpart")
    objective = RecognitionObjective(recognizer.train(), identity_weight=0.1 if classifier else 0.0)
    lengths = [1, 2, 1, 3, 1, 1, 7]
    packed = torch.cat([silhouettes(len(lengths), n)[i] for i, n in enumerate(lengths)]).unsqueeze(0)
    label = torch.tensor([0, 0, 0, 0, 0, 0, 2])
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss, quantities = objective(packed, label, lengths)
    assert quantities.isfinite().all() and all_finite(loss, objective)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss, _ = objective(packed, torch.zeros(7, dtype=torch.int64), lengths)  # no negative at all
    assert all_finite(loss, objective)


def test_a_narrow_gaitbase_on_two_threads():
    """oneDNN's gradient of a strided 1 x 1 convolution of eight channels ends the process; see gaitbase.Projection."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        backbone = build_recognizer("gaitbase", "gait3d", width=0.125).backbone.train()
        for _ in range(5):
            assert all_finite(backbone(silhouettes(3, 1)).square().mean(), backbone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_short_and_empty_clips_give_no_nan_in_pretraining(name, precision, tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "c.yaml"
    file.write_text(f"backbone: {{name: {name}, width: 0.125}}\ndenoiser: {{dim: 32}}\n")
    objective = needs.pretraining_objective(load(PretrainConfig, file))[1]
    for frames in (1, 2):
        latents, noise = torch.zeros(2, 3, 4, frames, 8, 8)
        timestep = torch.tensor([1, 500, 1000])  # least and most noise
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(latents, silhouettes(3, frames), noise, timestep, timestep == 500)
        assert all_finite(loss, objective)
