"""The baseline of benchmarks/step.py computes what ours computes."""

import pytest
import torch

from benchmarks import step
from benchmarks.plain_step import FORWARDS, PlainBackbone, PlainEncoder
from gaitfast.config import PretrainConfig, TransferConfig
from gaitfast.models import build_autoencoder, build_recognizer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["gait3d", "grew"])
@pytest.mark.parametrize("name", FORWARDS)
def test_plain_backbones_are_ours(name, variant, training):
    torch.manual_seed(0)
    recognizer = build_recognizer(name, variant, width=0.125)
    plain = PlainBackbone(recognizer).train(training)
    clips = torch.rand(2, 4, 64, 44)
    ours = recognizer.backbone.train(training)(clips)
    assert torch.allclose(plain(clips), ours, rtol=1e-4, atol=1e-5)


def test_the_plain_encoder_is_ours():
    torch.manual_seed(0)
    autoencoder, frames = build_autoencoder(), torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(PlainEncoder(autoencoder)(frames), autoencoder.encode(frames), atol=1e-5)


def test_every_case_is_a_config(tmp_path):
    arguments = step.parser().parse_args(["--full"])
    cases = step.cases_of(arguments)
    assert len(cases) == 11 and len({case.label for case in cases}) == 11
    for case in cases:
        config = step.config_of(case, tmp_path, tmp_path / "run")
        assert isinstance(config, PretrainConfig if case.stage == "pretrain" else TransferConfig)
        assert config.train.precision == "bf16"


def test_the_headline_is_that_of_the_stated_size():
    row = {"vs": {"plain": 2.0, "compiled": 1.5}, "memory_ratio": {"extra_mib": 0.4}}
    rows = [{"case": "pretrain/gaitset", **row}, {"case": "pretrain/smplgait", **row}, {"case": "pretrain/demo", **row}]
    assert step.headline_of(rows[:1]) == {}
    assert step.headline_of(rows) == {
        **{"vs_plain": 2.0, "vs_plain_compile": 1.5, "peak_memory_ratio": 0.4},
        **{"demo_vs_plain": 2.0, "demo_vs_plain_compile": 1.5, "demo_peak_memory_ratio": 0.4},
    }
