"""What must survive a crash: atomic files, the rows of a resumed run, checkpoints that are whole or passed over."""

import errno
import fcntl
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gaitfast import files
from gaitfast.config import CheckpointConfig, OptimizerConfig, UserError
from gaitfast.engine import checkpoint
from gaitfast.engine.events import Events
from gaitfast.engine.meters import Meters, Records
from gaitfast.engine.portable import load_backbone, save_backbone
from gaitfast.engine.world import World, contact
from gaitfast.engine.zero import learning_rate_factor

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_failed_write_leaves_the_old_file(tmp_path, number):
    path = tmp_path / "a.json"
    files.write_json(path, {"value": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))

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
    assert second.done == 4
    second.log({"lr_denoiser": 0.1})
    second.close()
    row = second.records.rows[-1]
    assert (row["step"], row["loss"], row["lr_denoiser"]) == (4, 2.0, 0.1)
    assert row["clips_per_s"] > 0 and 0 <= row["data_wait"] <= 1


def test_the_first_non_finite_step_is_found(tmp_path):
    some = meters(tmp_path, start=10)
    for loss in (1.0, float("inf"), float("nan")):
        some.step(torch.tensor(loss), 0.0)
    assert some.first_non_finite() == 11
    some.close()


def write_checkpoint(run, step, **policy):
    manifest = {"step": step, "world_size": 1, "dataset": "abc"}
    tensors = {"weights/a": torch.arange(6.0).view(2, 3), "buffers/n": torch.tensor(step)}
    return checkpoint.write(run, tensors, manifest, CheckpointConfig(**{"keep": 9, **policy}))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "manifest", "another format", "renamed", "folder"])
def test_the_newest_good_checkpoint_is_found(tmp_path, capsys, damage):
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 10)
    assert checkpoint.newest(tmp_path).step == 10
    whole = newest.read_bytes()
    if damage == "flip":
        newest.write_bytes(whole[:-1] + b"!")
    elif damage == "truncate":
        newest.write_bytes(whole[:-1])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "manifest":
        newest.write_bytes(whole.replace(b"abc", b"abd"))
    elif damage == "another format":
        newest.write_bytes(whole.replace(b"checkpoint-2", b"checkpoint-9"))
    elif damage == "renamed":
        newest = newest.rename(newest.with_name("step_00000011.safetensors"))
    else:
        newest.unlink()
        newest.with_suffix("").mkdir()
    assert checkpoint.newest(tmp_path).step == 5
    assert f"{newest.stem} is broken" in capsys.readouterr().err.replace(".safetensors", "")


def test_a_checkpoint_holds_what_was_written(tmp_path):
    write_checkpoint(tmp_path, 7)
    found = checkpoint.newest(tmp_path)
    assert found.manifest == {"step": 7, "world_size": 1, "dataset": "abc"}
    tensors = found.tensors()
    assert torch.equal(tensors["weights/a"], torch.arange(6.0).view(2, 3)) and int(tensors["buffers/n"]) == 7


def test_a_run_does_not_begin_anew_by_itself(tmp_path):
    for step in (5, 10):
        write_checkpoint(tmp_path, step).write_bytes(b"")
    with pytest.raises(UserError, match=r"step_00000010.* is broken.*step_00000005.* is broken.*to begin anew"):
        checkpoint.newest(tmp_path)


def test_pruning_keeps_what_was_just_saved_and_what_the_policy_names(tmp_path):
    for step in (5, 10, 15, 20, 25, 30):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 21, keep=2, keep_every=10)  # 25 and 30 were broken, or 21 were not new
    assert [int(path.stem[-2:]) for path in checkpoint.listing(tmp_path)] == [21, 20, 15, 10]


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    kept = write_checkpoint(tmp_path, 5)
    for left in (tmp_path / ".metrics.jsonl.12.partial", kept.with_name(".step_00000010.safetensors.12.partial")):
        left.write_bytes(b"half")
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [kept.name]


def test_the_writer_keeps_the_order_and_tells_what_failed():
    writer, done = checkpoint.Writer(), []

    def full():
        raise UserError("no space left")

    for number in range(20):
        writer.submit(lambda number=number: done.append(number))
    writer.wait()
    assert done == list(range(20)) and not writer.failed
    writer.submit(full)
    with pytest.raises(UserError, match="no space left"):
        writer.wait()
    assert writer.failed
    with pytest.raises(UserError, match="no space left"):
        writer.submit(lambda: done.append("after"))
    with pytest.raises(UserError, match="no space left"):
        writer.close()
    writer.close()  # whoever cleans up after that failure finds nothing left to wait for
    assert done == list(range(20))


def test_the_contents_of_the_folder_that_are_no_checkpoints_are_left_alone(tmp_path):
    kept = write_checkpoint(tmp_path, 5)
    copy = kept.with_name(kept.name + ".bak")
    copy.write_bytes(b"a copy")
    (kept.parent / "step_00000003").mkdir()
    write_checkpoint(tmp_path, 10, keep=1)
    assert sorted(path.name for path in kept.parent.iterdir()) == [
        "step_00000003",
        copy.name,
        "step_00000010.safetensors",
    ]
    assert checkpoint.newest(tmp_path).step == 10


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES])
def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"events\.jsonl: cannot be written and locked \(.*--set run=FOLDER"):
        Events(tmp_path, 0).claim()


def test_processes_that_are_gone_are_one_line():
    two = World(1, 2, torch.device("cpu"))
    with pytest.raises(UserError, match=r"rank 1 of 2 lost the other processes at the start .*Connection closed"):
        with contact(two):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shape"):
        with contact(two):
            raise RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="gloo"), contact(ALONE):
        raise RuntimeError("gloo")


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
