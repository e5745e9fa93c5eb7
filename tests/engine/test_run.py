"""What may change when a run goes on in its folder."""

import pytest
import torch

from gaitfast.config import PretrainConfig, UserError, dump, load
from gaitfast.engine import checkpoint
from gaitfast.engine.run import TrainingRun
from gaitfast.engine.world import World


def going_on(folder, *changes, **manifest):
    """A run as it is started again in a folder with a checkpoint."""
    settings = [f"run={folder / 'run'}", "train.keep_memory=false"]
    (folder / "empty.yaml").write_text("{}")
    begun = load(PretrainConfig, folder / "empty.yaml", settings)
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run/config.resolved.yaml").write_text(dump(begun))
    checkpoint.write(folder / "run", {"x": torch.zeros(1)}, {"step": 3, **manifest}, begun.checkpoint)
    config = load(PretrainConfig, folder / "empty.yaml", [*settings, *changes])
    run = TrainingRun(config, World(0, 1, torch.device("cpu")))
    run.events.close()
    return run


@pytest.mark.parametrize("change", ["data.residency=host", "data.threads=3", "log_every=7"])
def test_what_does_not_change_the_training_may_change(tmp_path, change):
    assert going_on(tmp_path, change).found.step == 3


def test_what_changes_the_training_may_not(tmp_path):
    with pytest.raises(UserError, match=r"another data\.frames"):
        going_on(tmp_path, "data.frames=8")


def test_the_origin_goes_from_checkpoint_to_checkpoint(tmp_path):
    assert going_on(tmp_path, origin="abc").origin == "abc"
    (tmp_path / "older").mkdir()
    assert going_on(tmp_path / "older").origin is None
