"""The contender of the data benchmark makes the right clips, and the commands write their files."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import data, data_alternatives, data_stages, opengait_loader
from gaitfast.config import AugmentConfig, DataConfig
from gaitfast.data import codec, reference
from gaitfast.data.augment import draw_parameters
from tests.data.silhouettes import walk

pytestmark = pytest.mark.skipif(not codec.compiled(), reason="the extension is not built")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> data.Tree:
    return data.make_tree(tmp_path_factory.mktemp("walkers"), people=2)


@pytest.mark.parametrize("operation", ["affine", "perspective", "flip", "part_dilate", "part_blur"])
@pytest.mark.parametrize("cut", [False, True])
def test_each_transform_is_the_references(operation, cut):
    off = dict.fromkeys(("affine", "perspective", "flip", "part_dilate", "part_blur"), 0.0)
    config = AugmentConfig(**{**off, operation: 1.0})
    address = {"seed": 5, "purpose": "test", "step": 0, "sample": np.arange(4)}
    parameters = draw_parameters(config, **address, width=44 if cut else 64)
    for i, drawn in enumerate(opengait_loader.drawn_by_engine(config, **address)):
        frames = walk(i, 5)
        found = np.round(opengait_loader.transform(frames, drawn, cut) * 255)
        warped = operation in ("affine", "perspective")
        assert np.abs(found - reference.augment_clip(frames, parameters, i)).max() <= (1 if warped else 0)


def test_draws_are_as_frequent_as_the_config_says():
    drawn = [opengait_loader.draw(AugmentConfig()) for _ in range(4000)]
    shares = [np.mean([bool(one[k]) for one in drawn]) for k in range(5)]
    np.testing.assert_allclose(shares, [0.2, 0.2, 0.5, 0.2, 0.2], atol=0.04)  # five standard errors


def test_the_two_loaders_agree_and_a_difference_is_noticed(tree, monkeypatch):
    found = data_stages.compare(tree.dataset, batch=8, frames=5, steps=2)
    assert found["largest_difference"] <= 1
    monkeypatch.setattr(opengait_loader, "flip", lambda frames: frames)
    with pytest.raises(AssertionError, match="differ from OpenGait's"):
        data_stages.compare(tree.dataset, batch=8, frames=5, steps=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_are_what_opengait_hands_over(tree, workers):
    batches = opengait_loader.pairs(tree.root, tree.subjects, AugmentConfig(), batch=3, frames=6, workers=workers)
    for clips_e, clips_g in itertools.islice(batches, 2):
        assert clips_e.shape == (3, 6, 64, 64) and clips_g.shape == (3, 6, 64, 44)
        for clips in (clips_e, clips_g):
            assert clips.dtype == torch.float64 and 0.0 <= clips.min() and 0.9 < clips.max() <= 1.0
    batches.close()


def test_the_command_writes_rows_and_a_headline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "QUICK", data.Case(batch=4, frames=5, rounds=1, batches=1, seconds=0.0))
    monkeypatch.setattr(data, "PEOPLE", {False: 2, True: 2})
    monkeypatch.setattr(sys, "argv", ["data", "--quick", "--tree", str(tmp_path), "--json", str(tmp_path / "a.json")])
    assert data.main() == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found) >= {"machine", "commit", "versions", "headline", "rows", "agreement"}
    assert set(found["headline"]) >= {"pairs_vs_opengait_loader", "frames_per_s"}
    assert all(value > 0 for value in found["headline"].values())
    assert {row.get("side") for row in found["rows"]} >= {"opengait 2 workers", "ours dali mapped all threads"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found["headline"]


def test_every_stage_has_a_row(tree):
    rows = data_stages.stages(tree.dataset, batch=4, frames=5, rounds=1)
    assert len(rows) == 11 and all(min(min(t) for t in row["us_per_frame"].values()) > 0 for row in rows)


def test_the_other_storages_hold_the_same_clips(tmp_path):
    dataset, clips = data_alternatives.make_clips(tmp_path)
    np.testing.assert_array_equal(dataset.frames(np.arange(dataset.num_frames)), clips.reshape(-1, 64, 64))
    call, size = data_alternatives.film_strips(tmp_path, clips, ".png", "cpu", 1)
    np.testing.assert_array_equal(call()[0].as_array().reshape(clips.shape), clips)
    assert size < clips.nbytes / 4
    call, _ = data_alternatives.numpy_files(tmp_path, clips, "cpu", 1)
    np.testing.assert_array_equal(call()[0].as_array(), clips)
    call, _ = data_alternatives.chunks(dataset, "cpu", 1)
    assert call().shape == clips.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("residency", ["mapped", "host", "device"])
def test_batches_end_on_the_gpu(tree, residency):
    case = data.Case(batch=4, frames=5, rounds=1, batches=1, seconds=0.0)
    side = data.ours(tree, case, "cuda", DataConfig(residency=residency))
    side.round(case)
    side.close()
    assert side.row()["frames_per_s"] > 0
