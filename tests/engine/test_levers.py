"""Options that only change the speed change nothing else: encoding ahead, compilation, the profiler's window."""

import json

import pytest
import torch

from gaitfast import needs
from gaitfast.config import PretrainConfig, ProfileConfig, UserError, load
from gaitfast.data.batch import PretrainBatch
from gaitfast.engine.ahead import EncodeAhead, Encoded
from gaitfast.engine.profiling import Window
from gaitfast.models import build_autoencoder


class Loader:
    """Three batches, and whether it was closed."""

    name = "reference"

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        clips = torch.randint(0, 256, (3, 2, 4, 64, 64), generator=generator, dtype=torch.uint8)
        self.batches = [PretrainBatch(i, torch.arange(2), clip, clip[..., 10:54]) for i, clip in enumerate(clips)]
        self.closed = False

    def __iter__(self):
        return iter(self.batches)

    def close(self):
        self.closed = True


def test_latents_ahead_are_the_latents():
    autoencoder, loader = build_autoencoder(), Loader()

    def encode(clips):
        with torch.no_grad():
            latents = autoencoder.encode(clips.flatten(0, 1).unsqueeze(1).float() / 255)
        return latents.unflatten(0, clips.shape[:2]).transpose(1, 2)

    ahead = EncodeAhead(loader, encode, torch.device("cpu"))
    found = list(ahead)
    assert [item.batch for item in found] == loader.batches and all(isinstance(item, Encoded) for item in found)
    for item in found:
        assert torch.equal(item.latents, encode(item.batch.clip_e))
    ahead.close()
    assert loader.closed


class Failing(Loader):
    """Two batches, then a bad one."""

    def __iter__(self):
        yield from self.batches[:2]
        raise UserError("a corrupt frame (read for step 2)")


def test_a_failure_of_the_loader_comes_once_its_step_is_due():
    ahead = EncodeAhead(Failing(), lambda clips: clips, torch.device("cpu"))
    assert [next(ahead).batch.step for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="corrupt"):
        next(ahead)


def test_a_compiled_objective_gives_the_same_loss_and_gradients(tmp_path):
    """Traced as torch.compile traces it, forward and backward, and run by PyTorch's own operations."""
    file = tmp_path / "c.yaml"
    file.write_text("backbone: {width: 0.125}\ndenoiser: {dim: 32}\ndata: {frames: 3}\n")
    config = load(PretrainConfig, file)
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 3, 8, 8)
    arguments = latents, torch.rand(2, 3, 64, 44), noise, torch.tensor([10, 900]), torch.tensor([False, True])
    results = []
    for compiled in (False, True):
        objective = needs.pretraining_objective(config)[1]
        names = list(objective.state_dict())
        if compiled:
            objective.compile(backend="aot_eager", dynamic=False)
            assert list(objective.state_dict()) == names
        loss = objective(*arguments)
        parameters = [p for p in objective.parameters() if p.requires_grad]
        results.append((loss, *torch.autograd.grad(loss, parameters, allow_unused=True)))
    for one, other in zip(*results):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_compilation_and_partitioned_weights_do_not_go_together(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {compile: reduce-overhead, zero_stage: 3}\n")
    with pytest.raises(UserError, match=r"train\.compile: needs train\.zero_stage"):
        load(PretrainConfig, file)


def test_cuda_graphs_and_accumulation_do_not_go_together(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {compile: reduce-overhead, accumulation: 2}\n")
    with pytest.raises(UserError, match=r"train\.compile: CUDA graphs need train\.accumulation=1"):
        load(PretrainConfig, file)


def test_a_window_of_steps_is_profiled(tmp_path):
    said, seen = [], []

    def step(batch, number):
        seen.append(number)
        return torch.ones(8, 8) @ torch.ones(8, 8)

    recorded = Window(step, ProfileConfig(start=2, steps=3), tmp_path, said.append)
    for number in range(7):
        assert recorded(None, number).shape == (8, 8)
    assert seen == list(range(7))
    events = json.loads((tmp_path / "profile_00000002.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sorted({name for name in names if name.startswith("step ")}) == ["step 2", "step 3", "step 4"]
    assert names.count("aten::mm") == 3
    recorded.close()
    assert said == [f"profile of steps 2-4: {tmp_path / 'profile_00000002.json'}"]


def test_a_run_that_ends_inside_the_window_writes_what_there_is(tmp_path):
    said = []
    recorded = Window(lambda batch, number: torch.ones(3), ProfileConfig(start=2, steps=30), tmp_path, said.append)
    for number in range(4):
        recorded(None, number)
    recorded.close()
    recorded.close()
    assert said == [f"profile of steps 2-3: {tmp_path / 'profile_00000002.json'}"]
    assert json.loads((tmp_path / "profile_00000002.json").read_text())["traceEvents"]


def test_without_a_window_nothing_is_recorded(tmp_path):
    recorded = Window(lambda batch, number: torch.ones(3), ProfileConfig(), tmp_path, print)
    assert recorded(None, 20).shape == (3,)
    recorded.close()
    assert not list(tmp_path.iterdir())
