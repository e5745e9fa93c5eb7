"""The loss of the transfer stage: over all ranks as over one, frozen backbones, what is reported."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gaitfast.engine.norms import RankBatchNorm, synchronize_norms
from gaitfast.models import build_recognizer
from gaitfast.recognition import RecognitionObjective, identity_loss, triplet_loss
from tests.recognition.objective_ranks import CASES, step

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes got, by case."""
    out = tmp_path_factory.mktemp("ranks") / "result"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.recognition.objective_ranks", str(out)]
        environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_of_one(two_ranks, case):
    quantities, gradients, buffers = step(**CASES[case])
    for result in two_ranks:
        theirs = result[case]
        torch.testing.assert_close(theirs[0], quantities, rtol=1e-12, atol=0)
        assert theirs[1].keys() == gradients.keys() and theirs[2].keys() == buffers.keys()
        for name, gradient in gradients.items():
            # Gradients that cancel (before a batch norm) are rounding alone: they are held against the others' size.
            scale = max(g.abs().max() for g in gradients.values())
            assert (theirs[1][name] - gradient).abs().max() <= 1e-12 * max(1, scale), name
        for name, buffer in buffers.items():
            torch.testing.assert_close(theirs[2][name], buffer, rtol=1e-12, atol=1e-14, msg=name)
    assert any(g.abs().max() > 1e-4 for g in gradients.values())


def test_the_loss_is_the_weighted_sum_and_the_share_of_triplets():
    recognizer = build_recognizer("smplgait", "gait3d", 6, width=0.125, seed=0).train()
    objective = RecognitionObjective(recognizer, triplet_weight=2.0, identity_weight=0.5, margin=0.3, scale=4.0)
    silhouettes = torch.rand(6, 2, 64, 44, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 0, 0, 5, 5, 2])
    loss, quantities = objective(silhouettes, label)
    result = recognizer(silhouettes)
    triplet = triplet_loss(result.embedding, label, 0.3, "cosine")
    identity = identity_loss(result.logits, label, scale=4.0, smoothing=0.1)
    torch.testing.assert_close(loss, 2 * triplet.loss + 0.5 * identity.loss)
    assert objective.quantities == ("loss", "triplet", "active", "identity", "accuracy")
    # 3 anchors x 3 positives x 3 negatives, 2 x 2 x 4, 1 x 1 x 5
    expected = [loss, triplet.loss, triplet.active / (27 + 16 + 5), identity.loss, identity.accuracy]
    torch.testing.assert_close(quantities, torch.stack(expected).detach())
    assert not quantities.requires_grad


def test_without_an_identity_loss_there_is_none():
    recognizer = build_recognizer("gaitset", "gait3d", width=0.125, seed=0)
    objective = RecognitionObjective(recognizer)
    loss, quantities = objective(torch.rand(4, 2, 64, 44), torch.tensor([0, 0, 1, 1]))
    assert objective.quantities == ("loss", "triplet", "active") and len(quantities) == 3
    assert loss.item() == quantities[0].item() == quantities[1].item()


def test_a_frozen_backbone_stays_bit_for_bit():
    recognizer = build_recognizer("gaitbase", "gait3d", 4, width=0.125, seed=0).train()
    objective = RecognitionObjective(recognizer, identity_weight=1.0, freeze=True)
    before = {name: value.clone() for name, value in recognizer.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        objective.train()
        loss, _ = objective(torch.rand(4, 2, 64, 44), torch.tensor([0, 0, 1, 1]))
        loss.backward()
        optimizer.step()
    assert recognizer.head.training and not any(module.training for module in recognizer.backbone.modules())
    changed = {name for name, value in recognizer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("head.") for name in changed)


def test_synchronized_norms_keep_names_weights_and_eval():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    model(torch.rand(5, 1, 8, 8))
    state, parameters = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())
    model.eval()
    x = torch.rand(5, 1, 8, 8)
    expected = model(x)
    synchronized = synchronize_norms(model, torch.device("cpu"))
    assert [type(m) for m in synchronized.modules()].count(RankBatchNorm) == 2
    assert all(a is b for a, b in zip(synchronized.parameters(), parameters, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in synchronized.state_dict().items())
    assert torch.equal(synchronized(x), expected)


def test_gradients_in_float32_are_close_to_float64():
    """PyTorch's own kernel misses this bound more than fivefold on channels_last images."""

    def gradients(dtype):
        recognizer = build_recognizer("gaitbase", "gait3d", 4, width=0.125, seed=0).to(dtype)
        objective = RecognitionObjective(recognizer.train(), identity_weight=1.0)
        synchronize_norms(objective, torch.device("cpu"))
        clips = torch.rand(8, 4, 64, 44, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        objective((clips > 0.5).to(dtype), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))[0].backward()
        return {name: parameter.grad.double() for name, parameter in objective.named_parameters()}

    ours, exact = gradients(torch.float32), gradients(torch.float64)
    errors = {name: ((ours[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    assert max(errors.values()) < 2e-4, errors
