"""What must survive a crash: atomic files, the rows of a resumed run, checkpoints that are whole or passed over."""

import errno
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gaitfast import files
from gaitfast.config import OptimizerConfig, UserError
from gaitfast.engine import checkpoint
from gaitfast.engine.meters import Meters, Records
from gaitfast.engine.portable import load_backbone, save_backbone
from gaitfast.engine.world import World
from gaitfast.engine.zero import learning_rate_factor

ALONE = World(0, 1, torch.device("cpu"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"value": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no space left"):
        files.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_refuses_what_is_not_a_number(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_space_is_asked_for_before_writing(tmp_path):
    files.require_space(tmp_path, 1)
    with pytest.raises(UserError, match="needed for a checkpoint"):
        files.require_space(tmp_path, 2**60)


def test_records_continue_as_if_never_stopped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    records = Records(path, keep_until=2)
    records.add({"step": 3, "loss": 0.5})
    records.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 0.5},
    ]
    assert records.at(2) == {"step": 2, "loss": 2.0} and records.at(9) is None


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        Records(path, keep_until=9)
    assert "nonsense" in path.read_text()


def meters(folder, losses=(), start=0):
    return Meters(folder, ALONE, start=start, iterations=10, log_every=4, batch=2, losses=list(losses))


def test_a_row_logs_the_mean_over_its_steps_across_a_restart(tmp_path):
    first = meters(tmp_path)
    for loss in (4.0, 2.0):
        first.step(torch.tensor(loss), 0.0)
    pending = first.pending_losses()
    first.close()
    second = meters(tmp_path, pending, start=2)
    for loss in (1.0, 1.0):
        second.step(torch.tensor(loss), 0.0)
    second.log(4, {"lr_denoiser": 0.1})
    second.close()
    row = second.records.rows[-1]
    assert (row["step"], row["loss"], row["lr_denoiser"]) == (4, 2.0, 0.1)
    assert row["clips_per_s"] > 0 and 0 <= row["data_wait"] <= 1


def test_the_first_non_finite_step_is_found(tmp_path):
    some = meters(tmp_path)
    for loss in (1.0, float("inf"), float("nan")):
        some.step(torch.tensor(loss), 0.0)
    assert some.first_non_finite(done=13) == 11
    some.close()


def write_checkpoint(run, step):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"weights %d" % step)
    entry = {"bytes": (folder / "state.pt").stat().st_size, "blake2b": files.digest(folder / "state.pt")}
    manifest = {
        "format": checkpoint.FORMAT,
        "step": step,
        "world_size": 1,
        "dataset": "abc",
        "files": {"state.pt": entry},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "empty manifest", "another format"])
def test_the_newest_good_checkpoint_is_found(tmp_path, capsys, damage):
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 10)
    assert checkpoint.newest(tmp_path).step == 10
    state, manifest = newest / "state.pt", newest / "manifest.json"
    if damage == "flip":
        state.write_bytes(state.read_bytes()[:-1] + b"!")
    elif damage == "truncate":
        state.write_bytes(state.read_bytes()[:-1])
    elif damage == "delete":
        state.unlink()
    elif damage == "manifest":
        manifest.unlink()
    elif damage == "empty manifest":
        manifest.write_text("")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    assert checkpoint.newest(tmp_path).step == 5
    assert "step_00000010 is broken" in capsys.readouterr().err


def test_a_run_does_not_begin_anew_by_itself(tmp_path):
    for step in (5, 10):
        (write_checkpoint(tmp_path, step) / "state.pt").unlink()
    with pytest.raises(UserError, match=r"step_00000010 is broken.*step_00000005 is broken.*to begin anew"):
        checkpoint.newest(tmp_path)


def test_pruning_keeps_what_was_just_saved(tmp_path):
    for step in (5, 10, 15, 20, 25):
        write_checkpoint(tmp_path, step)
    checkpoint._prune(tmp_path / "checkpoints", "step_00000015", keep=2)  # 20 and 25 were broken, or 15 were not new
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000010", "step_00000015"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def test_learning_rate_follows_table_6():
    optimizer = OptimizerConfig()
    assert learning_rate_factor(0, 120_000, optimizer) == pytest.approx(0.01)
    assert learning_rate_factor(1000, 120_000, optimizer) == pytest.approx(0.505)
    assert learning_rate_factor(2000, 120_000, optimizer) == pytest.approx(1.0)
    assert learning_rate_factor(61_000, 120_000, optimizer) == pytest.approx(0.5)
    assert learning_rate_factor(119_999, 120_000, optimizer) < 1e-8
    assert learning_rate_factor(99, 1000, optimizer, start=100) == 0
    late = OptimizerConfig(warmup=10)
    assert learning_rate_factor(110, 1000, late, start=100) == pytest.approx(1.0)


def test_portable_backbone_round_trip_and_refusals(tmp_path):
    path = tmp_path / "backbone.safetensors"
    torch.manual_seed(0)
    backbone = nn.Linear(3, 2)
    save_backbone(path, backbone, {"config": {"seed": 4}, "step": 7})
    loaded, metadata = load_backbone(path, lambda config: nn.Linear(3, 2))
    assert torch.equal(loaded.weight, backbone.weight)
    assert (metadata["config"], metadata["step"]) == ({"seed": 4}, 7)
    for build, message in (
        (lambda config: nn.Linear(3, 4), "has shape"),
        (lambda config: nn.Linear(3, 2, bias=False), "does not have: bias"),
        (lambda config: nn.Sequential(nn.Linear(3, 2)), "0.weight is missing"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(path, build)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_backbone(tmp_path / "absent.safetensors", lambda config: backbone)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_backbone(path, lambda config: backbone)
    save_file({"weight": torch.zeros(2, 3)}, path)
    with pytest.raises(UserError, match="not a gaitfast backbone"):
        load_backbone(path, lambda config: backbone)
    with torch.no_grad():
        backbone.weight[0, 0] = float("nan")
    save_backbone(path, backbone, {"config": {}})
    with pytest.raises(UserError, match="weight is not finite"):
        load_backbone(path, lambda config: nn.Linear(3, 2))


def test_the_world_alone_needs_no_process_group():
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.mean(torch.tensor(3.0)) == 3
