"""The options of the transfer stage: what is refused, and that the shipped configs are the rows of Tables 1 and 2."""

from pathlib import Path

import pytest
import torch

from gaitfast.config import TransferConfig, UserError, batch_per_rank, deepspeed_config, dump, load, to_dict
from gaitfast.engine.zero import milestones
from gaitfast.models import build_recognizer

CONFIGS = Path(__file__).resolve().parent.parent / "configs/transfer"
PATHS = sorted(CONFIGS.rglob("*.yaml"))
RATIOS = {  # Table 1
    "gait3d": {"gaitgl": 0.1, "gaitpart": 0.5, "gaitset": 0.5, "smplgait": 0.5, "gaitbase": 1.0},
    "grew": {"gaitgl": 1.0, "gaitset": 1.0, "smplgait": 1.0, "gaitbase": 0.5},
}


def read(path, *overrides):
    return load(TransferConfig, path, overrides)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_loads_and_its_network_exists(path):
    config = read(path)
    assert config.run.startswith("runs/") and config != TransferConfig()
    with torch.device("meta"):
        classes = 11 if config.identity.weight else None
        recognizer = build_recognizer(config.backbone.name, config.backbone.variant, classes)
        has_classifier = any("neck" in name or "classifier" in name for name in recognizer.state_dict())
    assert has_classifier == (config.identity.weight > 0)
    assert not config.data.augment.enabled and config.triplet.metric == config.eval.metric == "cosine"
    drops = milestones(config.train.iterations, config.optimizer)
    assert drops and all(0 < drop < config.train.iterations for drop in drops)
    if config.data.frames_range != (0, 0):
        assert recognizer.sampling[0] == "unordered"


def test_the_configs_are_the_rows_of_table_1_and_2():
    names = {f"{path.parent.name}/{path.stem}" for path in PATHS if path.parent != CONFIGS}
    rows = {f"{d}/{model}-{kind}" for d in RATIOS for model in RATIOS[d] for kind in ("scratch", "frozen", "finetune")}
    rows |= {f"grew/{model}-finetune-75k" for model in ("gaitgl", "gaitset", "smplgait")}
    assert names == rows
    for dataset, ratios in RATIOS.items():
        for model, ratio in ratios.items():
            scratch, frozen, finetune = (
                read(CONFIGS / dataset / f"{model}-{kind}.yaml") for kind in ("scratch", "frozen", "finetune")
            )
            assert (scratch.transfer.init, scratch.transfer.freeze, scratch.transfer.ratio) == (
                "xavier_uniform",
                False,
                1,
            )
            assert frozen.transfer.freeze and not finetune.transfer.freeze and finetune.transfer.ratio == ratio
            assert frozen.transfer.init == finetune.transfer.init == f"runs/{dataset}-{model}/backbone.safetensors"
            for config in (scratch, frozen, finetune):
                assert config.backbone.name == model and config.data.path == f"datasets/{dataset}"
                assert config.train.batch == (32, 4)
            lengths = [config.train.iterations for config in (scratch, frozen, finetune)]
            if dataset == "gait3d":
                assert lengths == ([60_000] * 3 if model == "gaitbase" else [180_000, 60_000, 60_000])
            else:
                assert lengths == ([180_000, 90_000, 90_000] if model == "gaitbase" else [250_000, 125_000, 125_000])
                decay = [config.optimizer.weight_decay for config in (scratch, frozen, finetune)]
                assert decay == ([5e-4] * 3 if model == "gaitbase" else [0, 0, 5e-5])
    for model in ("gaitgl", "gaitset", "smplgait"):
        short = to_dict(read(CONFIGS / "grew" / f"{model}-finetune-75k.yaml"))
        long = to_dict(read(CONFIGS / "grew" / f"{model}-finetune.yaml", "train.iterations=75000"))
        assert {key for key in short if short[key] != long[key]} <= {"run", "eval"}


def test_milestones_of_the_fact_sheet():
    """The scaled milestones that the resolution of the paper's silence names."""

    def of(name, *overrides):
        config = read(CONFIGS / f"{name}.yaml", *overrides)
        return milestones(config.train.iterations, config.optimizer)

    assert of("gait3d/gaitset-finetune") == [10_000, 30_000]
    assert of("gait3d/gaitbase-finetune") == [20_000, 40_000, 50_000]
    assert of("grew/gaitset-finetune") == [75_000]
    assert of("grew/gaitbase-finetune") == [40_000, 60_000, 75_000]
    assert of("grew/gaitbase-finetune", "train.iterations=120000") == [53_333, 80_000, 100_000]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("transfer.ratio=0", "transfer.ratio: lies in (0, 100], got 0.0; transfer.freeze is r = 0"),
        ("transfer.init=", "transfer.init: names a checkpoint"),
        ("transfer.inti=he", "transfer.inti: unknown key; did you mean transfer.init?"),
        ("train.batch=[32]", "train.batch: needs 2 values"),
        ("train.batch=[32, 1]", "train.batch: needs at least 2 people x 2 sequences"),
        ("train.batch=64", "train.batch: needs 2 values"),
        ("train.accumulation=2", "train.accumulation: a batch-all triplet loss needs the whole batch at once"),
        ("optimizer.name=lion", "optimizer.name: is one of sgd, adam, adamw"),
        ("optimizer.lr=.inf", "optimizer.lr: must not be negative"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.milestones=[5, 3]", "optimizer.milestones: must be positive and increase"),
        ("optimizer.milestones=[x]", "optimizer.milestones[0]: expected int"),
        ("optimizer.milestones=7", "optimizer.milestones: is a list"),
        ("optimizer.gamma=0", "optimizer.gamma"),
        ("triplet.metric=manhattan", "triplet.metric: is one of cosine, euclidean"),
        ("triplet.weight=0", "triplet.weight: must be positive"),
        ("identity.smoothing=1", "identity.smoothing: lies in [0, 1)"),
        ("eval.output=logits", "eval.output: is one of embedding, feature"),
        ("data.frames_range=[5, 3]", "data.frames_range: needs 1 <= low <= high"),
        ("data.frames_range=[0, 3]", "data.frames_range: needs 1 <= low <= high"),
        ("data.augment.rotate=2", "data.augment.rotate: a probability"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(UserError) as error:
        read(path, override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_round_trip_and_the_deepspeed_dict(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {batch: [8, 6]}\noptimizer: {milestones: [1, 2, 3], clip: 0.5}\n")
    config = read(path)
    assert config.optimizer.milestones == (1, 2, 3)
    path.write_text(dump(config))
    assert read(path) == config
    derived = deepspeed_config(config, world_size=4)
    assert (derived["train_batch_size"], derived["train_micro_batch_size_per_gpu"]) == (48, 12)
    assert derived["gradient_accumulation_steps"] == 1 and derived["gradient_clipping"] == 0.5
    assert batch_per_rank(config.train, 3) == 16
    with pytest.raises(UserError, match=r"train\.batch: 48 does not divide by 5 ranks"):
        batch_per_rank(config.train, 5)
