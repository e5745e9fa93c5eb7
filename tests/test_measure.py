"""The held-out clips of the direct measure: fixed, of test people, matched in all that is known but identity."""

import numpy as np
import pytest
import torch

from gaitfast.config import PretrainConfig, UserError
from gaitfast.data import packed
from gaitfast.engine.world import World
from gaitfast.measure import HeldOut, Measures
from tests.conftest import run_command


@pytest.fixture(scope="module")
def by_camera(tmp_path_factory):
    """Five test people, each twice past each of two cameras."""
    folder = tmp_path_factory.mktemp("by-camera")
    options = ("--subjects", 1, "--test-subjects", 5, "--walks", 4, "--cameras", 2, "--frames", 8, 10, "--workers", 1)
    assert run_command("walkers", folder / "tree", *options) == 0
    assert run_command("prepare", folder / "tree", folder / "packed", "--layout", "opengait", "--workers", 1) == 0
    return packed.PackedDataset.open(folder / "packed")


def config(**settings):
    made = PretrainConfig()
    made.data.frames = 4
    for name, value in settings.items():
        setattr(made.eval, name, value)
    return made


def test_same_and_other_are_what_they_say(by_camera):
    held = HeldOut(by_camera, config(), ("unordered", 0))
    test = set(by_camera.split("test").tolist())
    assert set(held.clip_walk.tolist()) == test
    for clip, same, other in zip(held.clip_walk, held.same_walk, held.other_walk):
        assert {clip, same, other} <= test
        assert clip != same
        assert by_camera.subject[clip] == by_camera.subject[same] != by_camera.subject[other]
        assert by_camera.view[clip] == by_camera.view[same] == by_camera.view[other]
    assert held.clip.shape == (20, 4, 64, 64)
    assert {name: clips.shape for name, clips in held.conditions.items()} == {
        name: (20, 4, 64, 44) for name in ("self", "same", "other")
    }


def test_the_clips_never_change_and_can_be_fewer(by_camera):
    whole, again = (HeldOut(by_camera, config(), ("ordered", 2)) for _ in range(2))
    assert np.array_equal(whole.clip, again.clip)
    assert all(np.array_equal(whole.conditions[name], again.conditions[name]) for name in whole.conditions)
    few = HeldOut(by_camera, config(condition_clips=3), ("ordered", 2))
    assert np.array_equal(few.clip, whole.clip[:3])


def test_clothing_is_matched_like_the_camera(tmp_path):
    """Everyone passes one camera twice in a coat and once without: in a coat, `other` wears one as `same` does."""
    frames = np.full((6, 64, 64), 255, np.uint8)
    sequences = [(name, kind, "000", frames) for name in "abcd" for kind in ("cl-01", "cl-02", "nm-01")]
    partition = {"TRAIN_SET": [], "TEST_SET": list("abcd")}
    dataset = packed.write(tmp_path / "set", sequences, partition=partition)
    held = HeldOut(dataset, config(), ("unordered", 0))

    def coat(walk):
        return dataset.conditions[dataset.condition[walk]].startswith("cl")

    walks = zip(held.clip_walk, held.same_walk, held.other_walk)
    in_coats = [(same, other) for clip, same, other in walks if coat(clip)]
    assert len(in_coats) == 8 and all(coat(same) and coat(other) for same, other in in_coats)
    assert held.matched == pytest.approx(8 / 12)


def test_without_matching_views_any_walk_serves(walkers_dataset):
    dataset = packed.PackedDataset.open(walkers_dataset)
    held = HeldOut(dataset, config(), ("unordered", 0))
    assert len(held.clip_walk) == len(dataset.split("test"))
    assert (dataset.subject[held.clip_walk] == dataset.subject[held.same_walk]).all()
    assert (dataset.subject[held.clip_walk] != dataset.subject[held.other_walk]).all()


def test_people_without_a_name_are_left_out(tmp_path):
    """GREW's probes share one id, so two of them are two people as a rule."""
    frames = np.full((6, 64, 64), 255, np.uint8)
    sequences = [(name, kind, f"{name}{kind}", frames) for name in ("00001", "00002") for kind in ("01", "02")]
    sequences += [("probe", "03", f"v{i}", frames) for i in range(40)]
    partition = {"TRAIN_SET": [], "TEST_SET": ["00001", "00002", "probe"]}
    dataset = packed.write(tmp_path / "set", sequences, protocol="grew", partition=partition)
    held = HeldOut(dataset, config(), ("unordered", 0))
    assert len(held.clip_walk) == 4
    walks = np.concatenate([held.clip_walk, held.same_walk, held.other_walk])
    assert {dataset.subjects[code] for code in dataset.subject[walks]} == {"00001", "00002"}
    measures = Measures(config(), dataset, lambda clips: clips, ("unordered", 0), World(0, 1, torch.device("cpu")))
    subject, clips_e, clips_g = measures._pairs
    assert sorted(dataset.subjects[code] for code in subject) == ["00001", "00001", "00002", "00002"]
    assert clips_e.shape == clips_g.shape == (4, 4, 64, 44)


def test_one_walk_a_person_is_refused(tmp_path):
    frames = np.full((6, 64, 64), 255, np.uint8)
    sequences = [(name, "nm-01", "000", frames) for name in "abc"]
    partition = {"TRAIN_SET": ["a"], "TEST_SET": ["b", "c"]}
    dataset = packed.write(tmp_path / "set", sequences, partition=partition)
    with pytest.raises(UserError, match="no test person with two walks"):
        HeldOut(dataset, config(), ("unordered", 0))
