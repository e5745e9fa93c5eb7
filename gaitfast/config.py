"""Every option, once, as typed dataclasses; the DeepSpeed dict is derived in engine_config.py and nowhere else.

A config file holds only what differs from the defaults below, the paper's (Table 6 for pretraining; OpenGait's
recipe for transfer). An unknown key is an error that names the nearest one. `--set a.b=c` overrides one value; the
resolved config is written into the run folder. How a file is read: strict_yaml.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gaitfast.engine_config import ProfileConfig, batch_per_rank, deepspeed_config, zero_stage
from gaitfast.strict_yaml import UserError, check, check_choice, dump, load, to_dict

__all__ = ["UserError", "batch_per_rank", "deepspeed_config", "dump", "load", "to_dict", "zero_stage"]

BACKBONES = ("gaitset", "gaitpart", "gaitgl", "smplgait", "gaitbase")
VARIANTS = ("gait3d", "grew", "casia-b", "ou-mvlp", "grew-bnneck", "grew-baseline", "ou-mvlp-baseline")
METRICS = ("cosine", "euclidean")


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Probabilities of the augmentations (Table 6; part blur from OpenGait's DA4GaitSSB recipe)."""

    affine: float = 0.2
    perspective: float = 0.2
    flip: float = 0.5
    rotate: float = 0.0
    """By up to 10 degrees; not part of pretraining's recipe."""
    part_dilate: float = 0.2
    part_blur: float = 0.2
    part_top: tuple[int, int] = (9, 20)
    """Inclusive range of the first row that the two part operations touch."""
    part_bottom: tuple[int, int] = (39, 50)
    """Inclusive range of the row behind the last one that the two part operations touch."""

    def __post_init__(self) -> None:
        for name in ("affine", "perspective", "flip", "rotate", "part_dilate", "part_blur"):
            value = getattr(self, name)
            check(0.0 <= value <= 1.0, f"data.augment.{name}", f"a probability lies in 0..1, got {value}")
        for name in ("part_top", "part_bottom"):
            low, high = getattr(self, name)
            check(0 <= low <= high <= 64, f"data.augment.{name}", f"needs 0 <= low <= high <= 64, got {low}, {high}")
        check(
            self.part_top[1] < self.part_bottom[0], "data.augment.part_top", "must end above data.augment.part_bottom"
        )


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where the clips come from and which of their frames are taken."""

    path: str = ""
    """A folder that `gaitfast prepare` wrote."""
    split: str = "train"
    """`train`: the partition's TRAIN_SET; `test`: its TEST_SET; `all`: every sequence."""
    frames: int = 30
    """N, the frames of a clip."""
    sampler: str = "auto"
    """Frames of what the model sees: `auto` (the rule of its authors), `unordered`, `ordered`."""
    frames_skip: int = 0
    """For `ordered`: extra frames of the window from which N are chosen (GaitPart 10, GaitGL 0)."""
    threads: int = 0
    """CPU threads of the loader; 0: one per core, at most 16."""
    prefetch: int = 2
    """Batches prepared ahead of the step."""
    engine: str = "auto"
    """Who decodes and augments: `dali`; `compiled` (CPU only, needs the extension); `auto`: DALI on a GPU, on a CPU the
    compiled operator, which was measured to be faster there."""
    residency: str = "mapped"
    """Where the packed split lies: `mapped` files, `host` memory (page-locked for a GPU), or the `device`'s memory."""
    corrupt: str = "refuse"
    """A frame that does not match its checksum: `refuse` stops, `skip` warns and takes the nearest sound frame of its
    sequence instead."""

    def __post_init__(self) -> None:
        check_choice(self.corrupt, ("refuse", "skip"), "data.corrupt")
        check_choice(self.split, ("train", "test", "all"), "data.split")
        check(1 <= self.frames <= 64, "data.frames", f"lies in 1..64, got {self.frames}")
        check_choice(self.sampler, ("auto", "unordered", "ordered"), "data.sampler")
        check(self.frames_skip >= 0, "data.frames_skip", "must not be negative")
        check(self.threads >= 0, "data.threads", "must not be negative")
        check(1 <= self.prefetch <= 16, "data.prefetch", f"lies in 1..16, got {self.prefetch}")
        check_choice(self.engine, ("auto", "compiled", "dali"), "data.engine")
        check_choice(self.residency, ("mapped", "host", "device"), "data.residency")


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    """How a pair (s_E, s_G) is drawn (Sec. 3.1.5); the sampler is that of s_G."""

    same_clip: bool = False
    """s_E = s_G, the paper's Fig. 5."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    """The gait feature extractor G that pretraining is for (Sec. 3.1.3)."""

    name: str = "smplgait"
    variant: str = "gait3d"
    width: float = 1.0
    """Multiplies every channel count; 1 is the published network."""

    def __post_init__(self) -> None:
        check_choice(self.name, BACKBONES, "backbone.name")
        check_choice(self.variant, VARIANTS, "backbone.variant")
        check(0 < self.width <= 4, "backbone.width", f"lies in (0, 4], got {self.width}")


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
        check(
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
            check_choice(getattr(self, name), choices, f"diffusion.{name}")
        check(self.gamma > 0, "diffusion.gamma", f"must be positive, got {self.gamma}")
        check(0 <= self.p_uncond < 1, "diffusion.p_uncond", f"lies in [0, 1), got {self.p_uncond}")


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
            check(getattr(self, name) >= 0, f"optimizer.{name}", "must not be negative")
        check(self.weight_decay >= 0, "optimizer.weight_decay", "must not be negative")
        check(all(0 <= b < 1 for b in self.betas), "optimizer.betas", f"lie in [0, 1), got {self.betas}")
        for name in ("warmup", "backbone_start"):
            check(getattr(self, name) >= 0, f"optimizer.{name}", "must not be negative")
        check(0 < self.warmup_factor <= 1, "optimizer.warmup_factor", f"lies in (0, 1], got {self.warmup_factor}")
        check(self.clip >= 0, "optimizer.clip", "must not be negative")


@dataclass(kw_only=True, slots=True)
class LengthConfig:
    """Length and precision of a run."""

    iterations: int = 120_000
    precision: str = "bf16"
    """Autocast to bf16 or fp16 with float32 master weights, or fp32 throughout."""
    zero_stage: int = 2
    """ZeRO stage: what the ranks share out, of moments (1), gradients (2) and weights (3). One process has nobody to
    share with: below 3 it runs at stage 0."""
    accumulation: int = 1
    """Micro-batches into which each rank's share of the batch is cut."""
    keep_memory: bool = True
    """On a CPU: memory that a step frees stays with the process for the next one, which saves clearing it anew."""
    timeout: int = 600
    """Seconds that a process waits for the others, at the start and in every exchange, before it gives up."""
    stop_after: int = 0
    """Stop cleanly (checkpoint, exit 0) after this many steps of this process; 0: run to the end."""

    def __post_init__(self) -> None:
        check(self.iterations >= 1, "train.iterations", f"must be positive, got {self.iterations}")
        check(self.accumulation >= 1, "train.accumulation", f"must be positive, got {self.accumulation}")
        check_choice(self.precision, ("bf16", "fp16", "fp32"), "train.precision")
        check(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", f"lies in 0..3, got {self.zero_stage}")
        check(self.timeout >= 1, "train.timeout", f"must be positive, got {self.timeout}")
        check(self.stop_after >= 0, "train.stop_after", "must not be negative")


@dataclass(kw_only=True, slots=True)
class TrainConfig(LengthConfig):
    """Length, batch and precision of a pretraining run."""

    batch: int = 64
    """Sequences in the global batch of one optimizer step (Gait3D 64, GREW 128)."""
    encode_ahead: bool = False
    """Encode the next batch while a step trains, on a stream of its own; the same latents. Holds one batch more."""
    compile: str = "none"
    """torch.compile around the objective's forward and backward pass: none, default, reduce-overhead (with CUDA graphs)
    or max-autotune. For ZeRO stages 0 to 2."""

    def __post_init__(self) -> None:
        LengthConfig.__post_init__(self)
        check_choice(self.compile, ("none", "default", "reduce-overhead", "max-autotune"), "train.compile")
        check(self.compile == "none" or self.zero_stage < 3, "train.compile", "needs train.zero_stage 0, 1 or 2")
        graphs = self.compile in ("reduce-overhead", "max-autotune")
        check(not graphs or self.accumulation == 1, "train.compile", "CUDA graphs need train.accumulation=1")
        check(self.batch >= 1, "train.batch", f"must be positive, got {self.batch}")

    @property
    def sequences(self) -> int:
        """Sequences in the global batch."""
        return self.batch


@dataclass(kw_only=True, slots=True)
class RankingConfig:
    """When and on what rank-1 is measured during training: the test partition."""

    every: int = 5_000
    """Steps between evaluations; 0: only before and after."""
    path: str = ""
    """Dataset to evaluate on; empty: the one trained on."""
    protocol: str = "auto"
    """A protocol of `gaitfast rank`; auto: the one that the dataset names."""
    frames_limit: int = 720
    """Frames of a sequence that are embedded at most (OpenGait's frames_all_limit)."""

    def __post_init__(self) -> None:
        check(self.every >= 0, "eval.every", "must not be negative")
        check(self.frames_limit >= 1, "eval.frames_limit", "must be positive")


@dataclass(kw_only=True, slots=True)
class EvalConfig(RankingConfig):
    """What is measured during pretraining."""

    condition_clips: int = 256
    """Held-out clips in the direct measure loss_self, loss_same, loss_other, loss_null."""
    condition_timesteps: int = 8
    """Fixed timesteps per clip of that measure, spread over 1..1000."""

    def __post_init__(self) -> None:
        RankingConfig.__post_init__(self)
        check(self.condition_clips >= 1, "eval.condition_clips", "must be positive")
        check(self.condition_timesteps >= 1, "eval.condition_timesteps", "must be positive")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When the run is saved, and how many checkpoints stay."""

    every: int = 5_000
    keep: int = 2
    """The newest that stay."""
    keep_every: int = 0
    """Those of multiples of this many steps stay too; 0: none."""

    def __post_init__(self) -> None:
        check(self.every >= 1, "checkpoint.every", "must be positive")
        check(self.keep >= 1, "checkpoint.keep", "must be positive")
        check(self.keep_every >= 0, "checkpoint.keep_every", "must not be negative")


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
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    log_every: int = 50

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, "seed", f"lies in 0..2^63-1, got {self.seed}")
        check(self.log_every >= 1, "log_every", "must be positive")


# --- the transfer stage (Sec. 3.2) ------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class SupervisedAugmentConfig(AugmentConfig):
    """Augmentation of supervised training: the GaitBase paper's, which Sec. 4.1 cites."""

    enabled: bool = False
    """The paper's columns without and with data augmentation."""
    affine: float = 0.0
    flip: float = 0.2
    rotate: float = 0.2
    part_dilate: float = 0.0
    part_blur: float = 0.0
    per_batch: bool = False
    """One draw for the whole batch, as OpenGait does where the number of frames is drawn (GaitBase)."""


@dataclass(kw_only=True, slots=True)
class ClipConfig(SourceConfig):
    """Which sequences are trained on, and the clip of each."""

    frames_range: tuple[int, int] = (0, 0)
    """Draw the frames of each clip from this inclusive range instead (OpenGait's `unfixed`); (0, 0): `frames`."""
    augment: SupervisedAugmentConfig = field(default_factory=SupervisedAugmentConfig)

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        low, high = self.frames_range
        check(
            self.frames_range == (0, 0) or 1 <= low <= high <= 64,
            "data.frames_range",
            f"needs 1 <= low <= high <= 64, or 0, 0 for a fixed number; got {low}, {high}",
        )


@dataclass(kw_only=True, slots=True)
class InitConfig:
    """Where the backbone's weights come from and how they are trained; the head always starts anew."""

    init: str = "xavier_uniform"
    """`backbone.safetensors` of a run, an OpenGait checkpoint (.pt, of which the backbone is taken), or a way to draw
    every weight: xavier_uniform (OpenGait's), xavier_normal, he (A.9)."""
    freeze: bool = False
    """Leave the backbone as it is, its batch norms in eval mode (Sec. 4.3.1)."""
    ratio: float = 1.0
    """r: learning rate of the backbone over that of the head (Sec. 4.3.2)."""

    def __post_init__(self) -> None:
        check(bool(self.init), "transfer.init", "names a checkpoint, or xavier_uniform, xavier_normal or he")
        check(0 < self.ratio <= 100, "transfer.ratio", f"lies in (0, 100], got {self.ratio}; transfer.freeze is r = 0")


@dataclass(kw_only=True, slots=True)
class TripletConfig:
    """Batch-all triplet loss per part (Sec. 3.2)."""

    weight: float = 1.0
    margin: float = 0.2
    metric: str = "cosine"
    """cosine (the paper) or euclidean (OpenGait)."""

    def __post_init__(self) -> None:
        check(0 < self.weight < 1e6, "triplet.weight", f"must be positive, got {self.weight}")
        check(0 <= self.margin < 1e6, "triplet.margin", f"must not be negative, got {self.margin}")
        check_choice(self.metric, METRICS, "triplet.metric")


@dataclass(kw_only=True, slots=True)
class IdentityConfig:
    """Cross-entropy over the identities, for models with a classifier (eq. 5)."""

    weight: float = 0.1
    """0: no identity loss, and no classifier is built."""
    scale: float = 16.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        check(0 <= self.weight < 1e6, "identity.weight", f"must not be negative, got {self.weight}")
        check(0 < self.scale < 1e6, "identity.scale", f"must be positive, got {self.scale}")
        check(0 <= self.smoothing < 1, "identity.smoothing", f"lies in [0, 1), got {self.smoothing}")


@dataclass(kw_only=True, slots=True)
class StepOptimizerConfig:
    """SGD, Adam or AdamW, whose learning rate drops at milestones."""

    name: str = "adam"
    lr: float = 1e-3
    """Of the head; the backbone's is `transfer.ratio` times it."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 5e-4
    """Added to the gradient (sgd, adam) or decoupled from it (adamw)."""
    milestones: tuple[int, ...] = (30_000, 90_000)
    """Steps at which the rates are multiplied by gamma."""
    milestones_for: int = 180_000
    """Length of the run that `milestones` are written for: with another train.iterations each one is multiplied by
    train.iterations / milestones_for and rounded. 0: taken as written."""
    gamma: float = 0.1
    clip: float = 0.0
    """Largest norm of the gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        check_choice(self.name, ("sgd", "adam", "adamw"), "optimizer.name")
        check(0 <= self.lr < 1e6, "optimizer.lr", f"must not be negative, got {self.lr}")
        check(0 <= self.momentum < 1, "optimizer.momentum", f"lies in [0, 1), got {self.momentum}")
        check(0 <= self.weight_decay < 1e6, "optimizer.weight_decay", "must not be negative")
        increasing = all(a < b for a, b in zip((0, *self.milestones), self.milestones))
        check(increasing, "optimizer.milestones", f"must be positive and increase, got {list(self.milestones)}")
        check(self.milestones_for >= 0, "optimizer.milestones_for", "must not be negative")
        check(0 < self.gamma <= 1, "optimizer.gamma", f"lies in (0, 1], got {self.gamma}")
        check(self.clip >= 0, "optimizer.clip", "must not be negative")


@dataclass(kw_only=True, slots=True)
class TransferTrainConfig(LengthConfig):
    """Length, batch and precision of a transfer run."""

    iterations: int = 60_000
    batch: tuple[int, int] = (32, 4)
    """P people and K sequences of each in the global batch."""

    def __post_init__(self) -> None:
        LengthConfig.__post_init__(self)
        check(min(self.batch) >= 2, "train.batch", f"needs at least 2 people x 2 sequences, got {list(self.batch)}")
        check(
            self.accumulation == 1,
            "train.accumulation",
            "a batch-all triplet loss needs the whole batch at once; use more ranks or a smaller train.batch",
        )

    @property
    def sequences(self) -> int:
        """Sequences in the global batch, P x K."""
        return self.batch[0] * self.batch[1]


@dataclass(kw_only=True, slots=True)
class TransferEvalConfig(RankingConfig):
    """What is measured during transfer."""

    metric: str = "cosine"
    output: str = "embedding"
    """embedding (of the head) or feature (of the backbone)."""

    def __post_init__(self) -> None:
        RankingConfig.__post_init__(self)
        check_choice(self.metric, METRICS, "eval.metric")
        check_choice(self.output, ("embedding", "feature"), "eval.output")


@dataclass(kw_only=True, slots=True)
class TransferConfig:
    """One transfer run, whole. The defaults are those of SMPLGait w/o 3D on Gait3D."""

    run: str = "runs/transfer"
    """Folder of the run: config, metrics, checkpoints, recognizer, backbone, report."""
    seed: int = 0
    data: ClipConfig = field(default_factory=ClipConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    transfer: InitConfig = field(default_factory=InitConfig)
    triplet: TripletConfig = field(default_factory=TripletConfig)
    identity: IdentityConfig = field(default_factory=IdentityConfig)
    optimizer: StepOptimizerConfig = field(default_factory=StepOptimizerConfig)
    train: TransferTrainConfig = field(default_factory=TransferTrainConfig)
    eval: TransferEvalConfig = field(default_factory=TransferEvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    log_every: int = 50

    __post_init__ = PretrainConfig.__post_init__
