"""The figures of merit: where they come from, and how they read."""

import json

import pytest

from gaitfast.report.headline import Change, digits, duration, headline
from gaitfast.report.run import read_run
from tests.report.fake_run import fake_run, write_lines


def test_summary_gives_the_ends(tmp_path):
    folder = fake_run(tmp_path / "walk", with_pictures=False)
    summary = json.loads((folder / "summary.json").read_text())
    result = headline(read_run(folder))
    assert (result.rank1.first, result.rank1.last) == (summary["rank1_before"], summary["rank1_after"])
    assert (result.gap.first, result.gap.last) == (summary["gap_before"], summary["gap_after"])
    share = (summary["loss_other"] - summary["loss_same"]) / summary["loss_same"]
    assert result.identity.last == pytest.approx(share) and result.identity.first == pytest.approx(0, abs=1e-12)
    assert (result.rank1.first_label, result.rank1.last_label) == ("before", "after")


def test_unfinished_run_says_at_which_step(tmp_path):
    result = headline(read_run(fake_run(tmp_path / "walk", steps=1100, finished=False, with_pictures=False)))
    assert (result.rank1.first_label, result.rank1.last_label) == ("before", "step 1,000")
    assert (result.loss.first_label, result.loss.last_label) == ("step 20", "step 1,100")


def test_one_evaluation_is_no_change(tmp_path):
    rows = [{"step": 0, "rank1": 30.0, "gap": 0.1, "loss_same": 0.5, "loss_other": 0.6}]
    write_lines(tmp_path / "evaluations.jsonl", rows)
    result = headline(read_run(tmp_path))
    assert (result.rank1.first, result.rank1.last, result.rank1.difference) == (30.0, None, None)
    assert result.sentence() == ""
    write_lines(tmp_path / "evaluations.jsonl", [{**rows[0], "step": 500}])
    result = headline(read_run(tmp_path))
    assert (result.rank1.first, result.rank1.last, result.rank1.last_label) == (None, 30.0, "step 500")


@pytest.mark.parametrize("missing", ["loss_same", "loss_other"])
def test_identity_needs_both_losses(tmp_path, missing):
    row = {"step": 0, "loss_same": 0.5, "loss_other": 0.6}
    write_lines(tmp_path / "evaluations.jsonl", [{k: v for k, v in row.items() if k != missing}])
    assert not headline(read_run(tmp_path)).identity.known


@pytest.mark.parametrize(
    ("other", "error", "told"),
    [
        (0.500155, 0.0009, "0.031% ± 0.090% higher|, which"),
        (0.499845, 0.0009, "0.031% ± 0.090% lower|, which"),
        (0.512, 0.0009, "2.4% ± 0.090% higher| (before: 0.0%)"),
        (0.5, 0.0009, "no higher| (before: 0.000%)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_the_difference_between_people_comes_with_its_error(tmp_path, other, error, told, finished):
    rows = [{"step": 0, "loss_same": 0.6, "loss_other": 0.6, "identity_error": 0.5}]
    rows.append({"step": 50, "loss_same": 0.5, "loss_other": other, "identity_error": error})
    write_lines(tmp_path / "evaluations.jsonl", rows)
    if finished:
        summary = {"loss_same": 0.5, "loss_other": other, "after": rows[1]}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    result = headline(read_run(tmp_path))
    assert result.identity.error == error
    sentence = result.sentence()
    assert told.replace("|", " with another person's feature than with the same person's") in sentence
    assert ("which is within its standard error (before" in sentence) == told.endswith("which")


def test_the_error_belongs_to_the_last_value(tmp_path):
    row = {"step": 0, "loss_same": 0.6, "loss_other": 0.6, "identity_error": 0.5}
    write_lines(tmp_path / "evaluations.jsonl", [row])
    assert headline(read_run(tmp_path)).identity.error is None
    (tmp_path / "summary.json").write_text(json.dumps({"loss_same": 0.5, "loss_other": 0.6, "after": "nothing"}))
    assert headline(read_run(tmp_path)).identity.error is None


def test_sentence_tells_losses_too(tmp_path):
    ends = {"rank1_before": 61.0, "rank1_after": 34.0, "gap_before": 0.1, "gap_after": 0.05}
    (tmp_path / "summary.json").write_text(json.dumps({**ends, "loss_same": 0.5, "loss_other": 0.499}))
    assert headline(read_run(tmp_path)).sentence() == (
        "Rank-1 on unseen people fell from 61.0% to 34.0%, the gap between negative and positive distance closed "
        "from 0.100 to 0.050, and the denoising loss is 0.20% lower with another person's feature than with the same "
        "person's."
    )


@pytest.mark.parametrize(
    ("value", "count", "scale", "shown"),
    [
        (0.0, 3, 0, "0"),
        (0.0, 3, 0.138, "0.000"),
        (0.012345, 3, 0, "0.0123"),
        (0.007, 3, 0.138, "0.007"),
        (-1.2345, 3, 0, "-1.23"),
        (12345.6, 3, 0, "12,346"),
        (1e-12, 3, 0, "0.00000000"),
    ],
)
def test_digits(value, count, scale, shown):
    assert digits(value, count, scale) == shown


def test_both_ends_of_a_change_have_equal_decimals():
    change = Change("number", 0.007, 0.1384)
    assert (change.text(change.first), change.text(change.last)) == ("0.007", "0.138")
    assert Change("share", 0.0002, 0.0236).text(0.0236) == "2.4%"
    assert Change("percent", 33.04, 60.0).text(33.04) == "33.0%"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.6, "1 min"), (90, "1 min 30 s"), (3600, "1 h"), (7325, "2 h 2 min"), (3599.7, "1 h")],
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


def test_sentence_of_a_change_too_small_to_name(tmp_path):
    rows = [
        {"step": 0, "rank1": 20.0, "gap": 0.1, "loss_same": 1.0, "loss_other": 1.0},
        {"step": 50, "rank1": 20.01, "gap": 0.1, "loss_same": 1.0, "loss_other": 1.0},
    ]
    write_lines(tmp_path / "evaluations.jsonl", rows)
    assert headline(read_run(tmp_path)).sentence() == (
        "Rank-1 on unseen people stayed at 20.0%, the gap between negative and positive distance stayed at 0.100, and "
        "the denoising loss is no higher with another person's feature than with the same person's (before: 0%)."
    )
