"""The page of a transfer run."""

import json

import numpy as np
import pytest
from PIL import Image

from gaitfast.config import InitConfig, TransferConfig, dump
from gaitfast.report import page
from gaitfast.report.run import read_run
from gaitfast.report.supervised import CURVES
from tests.report.test_page import parse

IDENTITY = {"identity", "accuracy"}


def transfer_run(folder, *, steps=400, finished=True, identity=True, freeze=False):
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(dump(TransferConfig(transfer=InitConfig(freeze=freeze))))
    rng = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, steps + 1, 10):
            row = {"step": step, "loss": 4 / step + 0.3 + 0.02 * rng.random(), "triplet": 0.2, "active": 50 / step}
            if identity:
                row |= {"identity": 9 - step / 100, "accuracy": step / 1000}
            row |= {"lr_head": 1e-3} | ({} if freeze else {"lr_backbone": 5e-4})
            row |= {"clips_per_s": 70.0, "data_wait": 0.01, "seconds": step / 2}
            file.write(json.dumps(row) + "\n")
    with (folder / "evaluations.jsonl").open("w") as file:
        for step in range(0, steps + 1, 100):
            row = {"step": step, "rank1": 20 + step / 10, "rank5": 90.0, "mAP": 12.3 + step / 20, "seconds": 2.0}
            file.write(json.dumps(row) + "\n")
    if finished:
        summary = {"rank1_before": 20.0, "rank1_after": 60.0, "steps": steps, "seconds": 200.0, "seed": 0}
        (folder / "summary.json").write_text(json.dumps({**summary, "backend": {"device": "cpu"}}))
    return folder


def test_every_curve_of_a_transfer_run_is_drawn(tmp_path, capsys):
    result = page.write_report(transfer_run(tmp_path / "run"))
    assert {path.stem for path in result.figures} == set(CURVES)
    for path in result.figures:
        with Image.open(path) as image:
            assert image.width >= 800 and np.asarray(image.convert("L")).std() > 5
    text = " ".join(parse(result.page).text.split())
    assert "gaitfast transfer" in text and "pretraining" not in text and "denois" not in text
    for words in ("Active triplets", "Cross-entropy over", "mAP", "20.0%", "60.0%", "12.3%", "32.3%", "transfer.init"):
        assert words in text, words
    assert "nothing to draw" not in text and "Not everything could be read" not in text
    assert result.headline.sentence() == "Rank-1 on unseen people rose from 20.0% to 60.0%."
    assert [label for label, _ in page._lines(result.headline, "transfer")] == ["rank-1", "training loss"]


@pytest.mark.parametrize("kept", [None, "config.resolved.yaml", "metrics.jsonl"])
def test_parts_of_a_run_make_a_page(tmp_path, kept):
    """No identity loss, a frozen backbone, an unfinished run, and any one file alone."""
    folder = transfer_run(tmp_path / "run", steps=10, finished=False, identity=False, freeze=True)
    for path in folder.iterdir() if kept else ():
        if path.name != kept:
            path.unlink()
    assert read_run(folder).stage == "transfer"
    result = page.write_report(folder)
    assert not IDENTITY & {path.stem for path in result.figures}
    assert "Identity loss: nothing to draw. It needs metrics.jsonl: identity" in parse(result.page).text
