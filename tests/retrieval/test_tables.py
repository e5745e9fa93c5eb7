"""Tables for people: aligned, with the mean of each probe view, and no number where there is none."""

import doctest

from gaitfast.retrieval import tables
from gaitfast.retrieval.scoring import Evaluation, Table


def test_the_examples_in_the_documentation():
    assert doctest.testmod(tables).failed == 0


def test_metrics_line_up():
    results = {
        m: Evaluation({"rank1": 7.0, "rank1_unseen": 100.0}, probes=1, gallery=1, unmatched=0) for m in ("a", "b")
    }
    assert tables.metrics(results).splitlines() == [
        "percent   rank1  rank1_unseen",
        "a          7.00        100.00",
        "b          7.00        100.00",
    ]


def test_a_table_by_view_ends_in_the_mean_of_each_row():
    table = Table("rank-1 NM", ["000", "018"], ["000", "018"], [[None, 50.0], [75.0, None]], [50.0, 75.0])
    title, *lines = tables.by_view(table, "cosine").splitlines()
    assert title == "rank-1 NM, cosine; rows: probe view, columns: gallery view"
    assert [line.split() for line in lines] == [
        ["000", "018", "mean"],
        ["000", "-", "50.00", "50.00"],
        ["018", "75.00", "-", "75.00"],
    ]
    assert len(set(map(len, lines))) == 1


def test_models_against_datasets():
    lines = tables.matrix(
        ["short", "a longer name"], ["gait3d", "a wide dataset"], [[1, 2], [3, 100]], "rank1"
    ).splitlines()
    assert lines == [
        "rank1; rows: model, columns: dataset",
        "               gait3d  a wide dataset",
        "short            1.00            2.00",
        "a longer name    3.00          100.00",
    ]
