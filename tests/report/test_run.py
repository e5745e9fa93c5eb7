"""Reading a run folder: what is unreadable is named with file and line, and never becomes a number."""

import json

import pytest

from gaitfast.config import UserError
from gaitfast.report.run import finite, read_run
from tests.report.fake_run import fake_run, write_lines


def test_whole_run_is_read_without_notices(tmp_path):
    run = read_run(fake_run(tmp_path / "walk"))
    assert run.notices == []
    assert run.name == "walk" and run.finished and run.step == 6000
    assert len(run.metrics) == 300 and len(run.evaluations) == 13
    assert run.option("backbone.name") == "gaitset" and run.option("backbone.nothing.deeper") is None
    loss = run.metrics.series("loss")
    logged = [json.loads(line)["loss"] for line in (tmp_path / "walk" / "metrics.jsonl").read_text().splitlines()]
    assert loss.values.tolist() == logged and loss.steps[0] == 20 and loss.last == logged[-1]
    assert run.metrics.series("never_logged") is None


def test_unfinished_run(tmp_path):
    run = read_run(fake_run(tmp_path / "walk", steps=700, finished=False, with_pictures=False))
    assert not run.finished and run.step == 700 and run.summary == {} and run.notices == []


@pytest.mark.parametrize(
    ("line", "notice"),
    [
        (b"\xff\xfe", "not valid JSON"),
        (b"{'step': 1}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "no object with a whole number `step`"),
        (b'{"loss": 1}', "no object with a whole number `step`"),
        (b'{"step": true, "loss": 1}', "no object with a whole number `step`"),
        (b'{"step": -1, "loss": 1}', "no object with a whole number `step`"),
        (b'{"step": 1e300, "loss": 1}', "no object with a whole number `step`"),
        (b'{"step": 7, "loss": NaN}', "loss is nan, not a finite number"),
        (b'{"step": 7, "loss": 1e999}', "loss is inf, not a finite number"),
        (b'{"step": 7, "loss": "0.5"}', "loss is '0.5', not a finite number"),
        (b'{"step": 7, "loss": false}', "loss is False, not a finite number"),
        (b'{"step": 7, "loss": 1' + b"0" * 400 + b"}", "loss is 1000"),
    ],
)
def test_bad_line_is_named_and_left_out(tmp_path, line, notice):
    good = b'{"step": 20, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 5, "loss": 0.9}\n' + line + b"\n" + good)
    run = read_run(tmp_path)
    assert len(run.notices) == 1
    assert run.notices[0].startswith("metrics.jsonl, line 2: ") and notice in run.notices[0]
    assert run.metrics.series("loss").values.tolist() == [0.9, 0.5]


def test_last_line_of_an_unfinished_run_is_called_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 0.9}\n{"step": 10, "lo')
    assert read_run(tmp_path).notices == ["metrics.jsonl, line 2: cut off, the run may be writing it; left out"]


def test_absent_measurements_are_no_mistakes(tmp_path):
    write_lines(tmp_path / "evaluations.jsonl", [{"step": 0, "rank1": None, "gap": 0.1, "protocol": "walkers"}])
    run = read_run(tmp_path)
    assert run.notices == [] and run.evaluations.series("rank1") is None
    assert run.evaluations.series("gap").values.tolist() == [0.1]


def test_lines_that_a_resume_wrote_again_replace_the_first(tmp_path):
    steps = [10, 20, 30, 40, 20, 30, 50]
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": i} for i, s in enumerate(steps)])
    run = read_run(tmp_path)
    assert run.metrics.series("loss").steps.tolist() == [10, 20, 30, 50]
    assert run.metrics.series("loss").values.tolist() == [0, 4, 5, 6]
    assert run.notices == ["metrics.jsonl: 3 lines were logged again after a resume; the later ones are shown"]


@pytest.mark.parametrize(
    ("name", "content", "notice"),
    [
        ("summary.json", b'{"rank1_after": 1,\n}', "line 2 is not valid JSON"),
        ("summary.json", b"[1]", "keys and values are expected"),
        ("summary.json", b"\xff", "is not UTF-8 text"),
        ("summary.json", b"", "empty"),
        ("summary.json", b'{"rank1_after": "65"}', "rank1_after is '65', not a finite number"),
        ("config.resolved.yaml", b"a: 1\nb: [1\nc: }", "line 3 is not valid YAML"),
        ("config.resolved.yaml", b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_bad_file_is_named_and_left_out(tmp_path, name, content, notice):
    (tmp_path / name).write_bytes(content)
    run = read_run(tmp_path)
    assert len(run.notices) == 1 and run.notices[0].startswith(name) and notice in run.notices[0]
    assert run.config == {} and run.summary == {}


def test_no_run_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        read_run(tmp_path / "empty")


def test_finite():
    assert finite(2) == 2.0 and finite(-0.5) == -0.5
    assert all(finite(v) is None for v in (None, True, "1", float("nan"), float("-inf"), 10**400, [1]))
