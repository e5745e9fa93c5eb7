"""Every option, once, as typed dataclasses; strict YAML; the DeepSpeed dict is derived here and nowhere else.

A config file holds only what differs from the defaults below, which are the paper's (Table 6). An unknown key is an
error that names the nearest one. `--set a.b=c` overrides one value; the resolved config is written into the run folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class UserError(Exception):
    """A mistake of the user's: one clear line that names the file or key, what is wrong and what to do. Exit code 2."""


def _check(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise UserError(f"{key}: {message}")


BACKBONES = ("gaitset", "gaitpart", "gaitgl", "smplgait", "gaitbase")
VARIANTS = ("gait3d", "grew", "casia-b", "ou-mvlp", "grew-bnneck")


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Probabilities of the five augmentations (Table 6; part blur from OpenGait's DA4GaitSSB recipe)."""

    affine: float = 0.2
    perspective: float = 0.2
    flip: float = 0.5
    part_dilate: float = 0.2
    part_blur: float = 0.2
    part_top: tuple[int, int] = (9, 20)
    """Inclusive range of the first row that the two part operations touch."""
    part_bottom: tuple[int, int] = (39, 50)
    """Inclusive range of the row behind the last one that the two part operations touch."""

    def __post_init__(self) -> None:
        for name in ("affine", "perspective", "flip", "part_dilate", "part_blur"):
            value = getattr(self, name)
            _check(0.0 <= value <= 1.0, f"data.augment.{name}", f"a probability lies in 0..1, got {value}")
        for name in ("part_top", "part_bottom"):
            low, high = getattr(self, name)
            _check(0 <= low <= high <= 64, f"data.augment.{name}", f"needs 0 <= low <= high <= 64, got {low}, {high}")
        _check(
            self.part_top[1] < self.part_bottom[0], "data.augment.part_top", "must end above data.augment.part_bottom"
        )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the clips come from and how a pair (s_E, s_G) is drawn (Sec. 3.1.5)."""

    path: str = ""
    """A folder that `gaitfast prepare` wrote."""
    split: str = "train"
    """`train`: the partition's TRAIN_SET; `test`: its TEST_SET; `all`: every sequence."""
    frames: int = 30
    """N, the frames of each of the two clips."""
    same_clip: bool = False
    """s_E = s_G, the paper's Fig. 5."""
    sampler: str = "auto"
    """Frames of s_G: `auto` (the rule of the backbone's authors), `unordered`, `ordered`."""
    frames_skip: int = 0
    """For `ordered`: extra frames of the window from which N are chosen (GaitPart 10, GaitGL 0)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    threads: int = 0
    """DALI's CPU threads; 0: one per core, at most 16."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""

    def __post_init__(self) -> None:
        _check(self.split in ("train", "test", "all"), "data.split", f"is train, test or all, got {self.split!r}")
        _check(1 <= self.frames <= 64, "data.frames", f"lies in 1..64, got {self.frames}")
        _check(
            self.sampler in ("auto", "unordered", "ordered"),
            "data.sampler",
            f"is auto, unordered or ordered, got {self.sampler!r}",
        )
        _check(self.frames_skip >= 0, "data.frames_skip", "must not be negative")
        _check(self.threads >= 0, "data.threads", "must not be negative")
        _check(1 <= self.prefetch <= 16, "data.prefetch", f"lies in 1..16, got {self.prefetch}")


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    """The gait feature extractor G that pretraining is for (Sec. 3.1.3)."""

    name: str = "smplgait"
    variant: str = "gait3d"
    width: float = 1.0
    """Multiplies every channel count; 1 is the published network."""

    def __post_init__(self) -> None:
        _check(self.name in BACKBONES, "backbone.name", f"is one of {', '.join(BACKBONES)}, got {self.name!r}")
        _check(self.variant in VARIANTS, "backbone.variant", f"is one of {', '.join(VARIANTS)}, got {self.variant!r}")
        _check(0 < self.width <= 4, "backbone.width", f"lies in (0, 4], got {self.width}")


@dataclass(kw_only=True, slots=True)
class AutoencoderConfig:
    """The frozen autoencoder E (Sec. 3.1.1)."""

    weights: str = "builtin"
    """`builtin`: trained by this project on silhouettes; or a local TAESD file (.safetensors or .pth, original or
    diffusers keys); `official:FILE` also checks the published SHA-256."""


@dataclass(kw_only=True, slots=True)
class DenoiserConfig:
    """The video denoiser D (Sec. 3.1.2, Table 6)."""

    dim: int = 64
    """Initial dimension: 32, 64, 128 are the paper's 3.7, 11.6, 40.2 M."""

    def __post_init__(self) -> None:
        _check(
            self.dim >= 32 and self.dim % 32 == 0,
            "denoiser.dim",
            f"must be a multiple of 32, got {self.dim}",
        )


@dataclass(kw_only=True, slots=True)
class DiffusionConfig:
    """Noise, weighting and condition (Sec. 3.1.4, 3.1.6, Table 3)."""

    schedule: str = "inverted_cosine"
    weighting: str = "mnp"
    gamma: float = 5.0
    """Clamp of the signal-to-noise ratio in Min-SNR and MNP."""
    normalize_weights: bool = False
    """Divide the weights by their mean over t, so that the effective learning rate does not depend on gamma."""
    pooling: str = "mean"
    """Of the feature (C, P) over the parts: mean, max or mean+max."""
    p_uncond: float = 0.15
    """Probability that the condition of a sample is replaced by the learned null condition."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("schedule", ("inverted_cosine", "cosine", "linear")),
            ("weighting", ("mnp", "min_snr", "uniform")),
            ("pooling", ("mean", "max", "mean+max")),
        ):
            value = getattr(self, name)
            _check(value in choices, f"diffusion.{name}", f"is one of {', '.join(choices)}, got {value!r}")
        _check(self.gamma > 0, "diffusion.gamma", f"must be positive, got {self.gamma}")
        _check(0 <= self.p_uncond < 1, "diffusion.p_uncond", f"lies in [0, 1), got {self.p_uncond}")


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine annealing (Table 6)."""

    lr_denoiser: float = 1e-4
    lr_backbone: float = 5e-4
    weight_decay: float = 0.01
    """PyTorch's default of AdamW; the paper is silent."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 2000
    warmup_factor: float = 0.01
    backbone_start: int = 0
    """Steps during which the denoiser trains alone; 0: none (the paper). In a short run a denoiser that cannot use the
    condition yet teaches the backbone to say nothing first; over the paper's 120,000 iterations it does not matter."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no clipping (the paper names none)."""

    def __post_init__(self) -> None:
        for name in ("lr_denoiser", "lr_backbone"):
            _check(getattr(self, name) >= 0, f"optimizer.{name}", "must not be negative")
        _check(self.weight_decay >= 0, "optimizer.weight_decay", "must not be negative")
        _check(all(0 <= b < 1 for b in self.betas), "optimizer.betas", f"lie in [0, 1), got {self.betas}")
        for name in ("warmup", "backbone_start"):
            _check(getattr(self, name) >= 0, f"optimizer.{name}", "must not be negative")
        _check(0 < self.warmup_factor <= 1, "optimizer.warmup_factor", f"lies in (0, 1], got {self.warmup_factor}")
        _check(self.clip >= 0, "optimizer.clip", "must not be negative")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length, batch and precision of the run."""

    iterations: int = 120_000
    batch: int = 64
    """Sequences in the global batch of one optimizer step (Gait3D 64, GREW 128)."""
    accumulation: int = 1
    """Micro-batches into which each rank's share of the batch is cut."""
    precision: str = "bf16"
    """Autocast to bf16 or fp16 with float32 master weights, or fp32 throughout."""
    zero_stage: int = 2
    stop_after: int = 0
    """Stop cleanly (checkpoint, exit 0) after this many steps of this process; 0: run to the end."""

    def __post_init__(self) -> None:
        _check(self.iterations >= 1, "train.iterations", f"must be positive, got {self.iterations}")
        _check(self.batch >= 1, "train.batch", f"must be positive, got {self.batch}")
        _check(self.accumulation >= 1, "train.accumulation", f"must be positive, got {self.accumulation}")
        _check(
            self.precision in ("bf16", "fp16", "fp32"),
            "train.precision",
            f"is bf16, fp16 or fp32, got {self.precision!r}",
        )
        _check(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", f"lies in 0..3, got {self.zero_stage}")
        _check(self.stop_after >= 0, "train.stop_after", "must not be negative")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What is measured during training, on the test partition."""

    every: int = 5_000
    """Steps between evaluations; 0: only before and after."""
    path: str = ""
    """Dataset to evaluate on; empty: the one trained on."""
    protocol: str = "auto"
    """A protocol of `gaitfast rank`; auto: the one that the dataset names."""
    condition_clips: int = 256
    """Held-out clips in the direct measure loss_self, loss_same, loss_other, loss_null."""
    condition_timesteps: int = 8
    """Fixed timesteps per clip of that measure, spread over 1..1000."""
    frames_limit: int = 720
    """Frames of a sequence that are embedded at most (OpenGait's frames_all_limit)."""

    def __post_init__(self) -> None:
        _check(self.every >= 0, "eval.every", "must not be negative")
        _check(self.condition_clips >= 1, "eval.condition_clips", "must be positive")
        _check(self.condition_timesteps >= 1, "eval.condition_timesteps", "must be positive")
        _check(self.frames_limit >= 1, "eval.frames_limit", "must be positive")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the run is saved, and how many checkpoints stay."""

    every: int = 5_000
    keep: int = 2

    def __post_init__(self) -> None:
        _check(self.every >= 1, "checkpoint.every", "must be positive")
        _check(self.keep >= 1, "checkpoint.keep", "must be positive")


@dataclass(kw_only=True, slots=True)
class PretrainConfig:
    """One pretraining run, whole."""

    run: str = "runs/pretrain"
    """Folder of the run: config, metrics, checkpoints, backbone, report."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 50

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**63, "seed", f"lies in 0..2^63-1, got {self.seed}")
        _check(self.log_every >= 1, "log_every", "must be positive")


# --- strict reading ---------------------------------------------------------------------------------------------------


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` from YAML as `kind`, or a UserError that names the key."""
    if dataclasses.is_dataclass(kind):
        _check(isinstance(value, dict), key, f"is a section, got {value!r}")
        return _build(kind, value, key)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        _check(
            isinstance(value, (list, tuple)) and len(value) == len(items),
            key,
            f"needs {len(items)} values, got {value!r}",
        )
        return tuple(_convert(v, k, f"{key}[{i}]") for i, (v, k) in enumerate(zip(value, items)))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _build(cls: type, values: dict, prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)
            raise UserError(f"{key}: unknown key; did you mean {prefix + '.' if prefix else ''}{near[0]}?")
        if value is None and isinstance(hints[name], types.UnionType):
            arguments[name] = None
        else:
            arguments[name] = _convert(value, hints[name], key)
    return cls(**arguments)


def _override(tree: dict, assignment: str) -> None:
    """Put `a.b=c` into a nested dict."""
    key, equals, text = assignment.partition("=")
    _check(bool(equals) and bool(key), f"--set {assignment}", "write --set section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment}: the value is not YAML ({error.__class__.__name__})") from None
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        _check(isinstance(node, dict), f"--set {key}", f"{name} is not a section")
    node[last] = "" if value is None else value


def load(cls: type, path: str | Path, overrides: typing.Sequence[str] = ()) -> Any:
    """Read `cls` from a YAML file and `a.b=c` overrides. UserError for a missing file, bad YAML, a bad key or value."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    _check(isinstance(tree, dict), str(path), "the top level must be keys and values")
    for assignment in overrides:
        _override(tree, assignment)
    try:
        return _build(cls, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_dict(config: Any) -> dict:
    """Plain nested dict of a config, tuples as lists, for YAML, JSON and checkpoint metadata."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def dump(config: Any) -> str:
    """The config as YAML, every value written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# --- what follows from a config ---------------------------------------------------------------------------------------


def batch_per_rank(train: TrainConfig, world_size: int) -> int:
    """Sequences of the global batch that one rank takes. UserError if the batch does not divide."""
    _check(
        train.batch % (world_size * train.accumulation) == 0,
        "train.batch",
        f"{train.batch} does not divide by {world_size} ranks x {train.accumulation} accumulation steps",
    )
    return train.batch // world_size


def deepspeed_config(config: PretrainConfig, world_size: int) -> dict:
    """The dict for `deepspeed.initialize`: ZeRO stage, precision, accumulation; the schedule is in engine/zero.py."""
    train = config.train
    micro = batch_per_rank(train, world_size) // train.accumulation
    precision: dict[str, Any] = {}
    if train.precision != "fp32":
        # Autocast with float32 master weights: what the paper's AMP did, and the norms keep float32 parameters.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[train.precision]
        precision["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": train.zero_stage},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **precision,
    }
