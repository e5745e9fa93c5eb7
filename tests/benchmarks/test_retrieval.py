"""The references of retrieval give the right answers, wrong ones are noticed, and the command writes its file."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import retrieval
from benchmarks.reference_retrieval import opengait_report, torch_search
from benchmarks.retrieval_cases import Case, make_features
from benchmarks.retrieval_check import check_search, float64_distances
from gaitfast.retrieval import search
from tests.retrieval import oracle

METRICS = ("cosine", "euclidean")


def small(data="gait"):
    return make_features(data, 30, 60, channels=8, parts=3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("vectorised", [False, True])
def test_the_plain_report_is_right(metric, vectorised):
    data = small()
    expected = oracle.report(
        float64_distances(data.queries, data.gallery, metric).numpy(),
        data.query_ids.tolist(),
        data.gallery_ids.tolist(),
    )
    found = opengait_report(*data, metric, vectorised=vectorised)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_distances_in_float64_are_right(metric):
    data = small()
    expected = oracle.distances(data.queries[:3], data.gallery[:7], metric)
    found = float64_distances(data.queries[:3], data.gallery[:7], metric, at_once=2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("metric", METRICS)
def test_wrong_neighbours_are_noticed(metric):
    data = small("normal")
    answers = {"ours": search(data.queries, data.gallery, 5, metric), "torch": torch_search(*data[:2], 5, metric)}
    assert check_search(metric, data, answers)["torch"]["places_decided"] > 0.5
    values, items = answers["torch"]
    swapped = items.clone()
    swapped[4, :2] = items[4, [1, 0]]  # of a query whose distances are not looked at in float64
    with pytest.raises(AssertionError, match="other neighbours"):
        check_search(metric, data, {**answers, "torch": (values, swapped)})
    with pytest.raises(AssertionError, match="that far off"):
        check_search(metric, data, {**answers, "torch": (values, items.flip(1))})
    with pytest.raises(AssertionError, match="not float64's order"):
        check_search(metric, data, {**answers, "ours": (answers["ours"][0], answers["ours"][1].flip(1))})


def test_features_of_people_lie_as_those_of_a_model():
    data = make_features("gait", 200, 400)
    assert torch.equal(data.queries, make_features("gait", 200, 400).queries)
    found = opengait_report(*data, vectorised=True)
    assert 20.0 < found["rank1"] < 95.0
    assert float(float64_distances(data.queries[:5], data.gallery, "cosine").max()) < 0.7


def test_the_command_writes_rows_and_a_headline(tmp_path, monkeypatch, capsys):
    cases = [
        Case(kind="search", queries=40, gallery=50, k=3, levels=("", "generic"), rounds=1),
        Case(kind="search", queries=40, gallery=50, k=3, metric="euclidean", rounds=1),
        *(Case(kind="report", queries=60, gallery=80, rounds=1, third=third) for third in range(2)),
    ]
    monkeypatch.setattr(retrieval, "QUICK", cases)
    kept = {"case": cases[-1].name, "side": "opengait", "over_ours": 12.5, "seconds": [1.0, 1.0, 1.0]}
    (tmp_path / "a.json").write_text(json.dumps({"rows": [kept, {"case": "of another size"}]}))
    options = ["--part", "time", "--without", "faiss", "--only", "search", "third1", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["retrieval", "--quick", *options])
    assert retrieval.main() == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found) >= {"machine", "commit", "versions", "headline", "rows"}
    assert {row["case"] for row in found["rows"]} == {case.name for case in cases}
    assert {"search_vs_torch", "report_vs_opengait", "report_over_search", "vs_torch_at_worst"} <= set(
        found["headline"]
    )
    assert kept in found["rows"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found["headline"]
