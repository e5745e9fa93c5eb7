"""Strict reading of configs: types, ranges, unknown keys, overrides, and what is derived from them."""

from pathlib import Path

import pytest
import yaml

from gaitfast.config import PretrainConfig, UserError, batch_per_rank, deepspeed_config, dump, load, to_dict

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return _write


def test_defaults_are_the_papers(write):
    config = load(PretrainConfig, write(""))
    assert config == PretrainConfig()
    assert (config.train.iterations, config.train.batch, config.data.frames) == (120_000, 64, 30)
    assert (config.optimizer.lr_denoiser, config.optimizer.lr_backbone) == (1e-4, 5e-4)
    assert (config.optimizer.warmup, config.optimizer.warmup_factor) == (2000, 0.01)
    assert (config.diffusion.schedule, config.diffusion.weighting, config.diffusion.pooling) == (
        "inverted_cosine",
        "mnp",
        "mean",
    )
    assert (config.diffusion.p_uncond, config.denoiser.dim) == (0.15, 64)
    augment = config.data.augment
    assert [augment.affine, augment.perspective, augment.flip, augment.part_dilate, augment.part_blur] == [
        0.2,
        0.2,
        0.5,
        0.2,
        0.2,
    ]


def test_file_and_overrides(write):
    path = write("train:\n  batch: 32\noptimizer:\n  lr_denoiser: 1e-3\n")
    config = load(PretrainConfig, path, ["train.iterations=7", "data.augment.part_top=[3, 5]", "run=elsewhere"])
    assert (config.train.batch, config.train.iterations, config.run) == (32, 7, "elsewhere")
    assert config.optimizer.lr_denoiser == 1e-3
    assert config.data.augment.part_top == (3, 5)


def test_round_trip(write):
    config = load(PretrainConfig, write("seed: 5\ndata:\n  same_clip: true\n"))
    assert load(PretrainConfig, write(dump(config))) == config
    assert yaml.safe_load(dump(config)) == to_dict(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian:\n  batch: 1\n", "trian: unknown key; did you mean train?"),
        ("train:\n  bacth: 1\n", "train.bacth: unknown key; did you mean train.batch?"),
        ("train:\n  batch: many\n", "train.batch: expected int"),
        ("train:\n  batch: 1.5\n", "train.batch: expected int"),
        ("train:\n  batch: true\n", "train.batch: expected int"),
        ("train:\n  batch: 0\n", "train.batch: must be positive"),
        ("train: 3\n", "train: is a section"),
        ("diffusion:\n  schedule: sine\n", "diffusion.schedule: is one of inverted_cosine"),
        ("backbone:\n  name: gaitnet\n", "backbone.name: is one of gaitset"),
        ("data:\n  augment:\n    flip: 1.5\n", "data.augment.flip: a probability"),
        ("data:\n  augment:\n    part_top: [1]\n", "data.augment.part_top: needs 2 values"),
        ("denoiser:\n  dim: 48\n", "denoiser.dim: must be a multiple of 32"),
        ("- a\n- b\n", "the top level must be keys and values"),
        ("a: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_mistakes_are_named(write, text, message):
    path = write(text)
    with pytest.raises(UserError) as error:
        load(PretrainConfig, path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_overrides(write):
    with pytest.raises(UserError, match="write --set section"):
        load(PretrainConfig, write(""), ["train.batch"])
    with pytest.raises(UserError, match="seed is not a section"):
        load(PretrainConfig, write("seed: 1"), ["seed.a=1"])


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        load(PretrainConfig, tmp_path / "absent.yaml")


def test_batch_must_divide():
    train = PretrainConfig().train
    assert batch_per_rank(train, 8) == 8
    with pytest.raises(UserError, match="64 does not divide by 3 ranks x 1"):
        batch_per_rank(train, 3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_dict(precision, stage):
    config = PretrainConfig()
    config.train.precision, config.train.zero_stage, config.train.accumulation = precision, stage, 4
    derived = deepspeed_config(config, world_size=2)
    assert derived["train_batch_size"] == 64
    assert derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 2 == 64
    assert derived["zero_optimization"]["stage"] == stage
    assert ("torch_autocast" in derived) == (precision != "fp32")
    assert ("compute_grad_norm" in derived["zero_optimization"]) == (stage in (1, 2) and precision != "fp16")
    config.optimizer.clip = 1.0
    assert "compute_grad_norm" not in deepspeed_config(config, world_size=2)["zero_optimization"]
    alone = deepspeed_config(config, world_size=1)
    assert alone["zero_optimization"]["stage"] == (3 if stage == 3 else 0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[ap]*/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    config = load(PretrainConfig, path)
    assert config != PretrainConfig()
    assert config.run.startswith("runs/")


def test_the_ablations_are_the_rows_of_table_3():
    changed = set()
    for path in CONFIGS.glob("ablation/*.yaml"):
        config = load(PretrainConfig, path)
        config.run, config.data.path = PretrainConfig().run, ""
        assert config != PretrainConfig(), path
        changed.add(dump(config))
    assert len(changed) == 13
