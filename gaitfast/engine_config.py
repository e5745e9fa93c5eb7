"""What of a config concerns the engine alone: the profiler's window, and the DeepSpeed dict that follows from it all.

Part of config.py, which has every other option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gaitfast.strict_yaml import check

if TYPE_CHECKING:
    from gaitfast.config import PretrainConfig, TrainConfig, TransferConfig, TransferTrainConfig


BUCKET = 8 * 2**20
"""Gradients that ZeRO sends together. DeepSpeed's own 500 million are a buffer of 2 GB, and every network here is
smaller: all gradients would lie in memory twice before the first is sent."""


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """A window of steps that is recorded into RUN/profile_START.json, a Chrome trace."""

    start: int = 20
    """First step of the window (0-based); the first steps of a run are no measure of the others."""
    steps: int = 0
    """0: none."""

    def __post_init__(self) -> None:
        check(self.start >= 0, "profile.start", "must not be negative")
        check(0 <= self.steps <= 100, "profile.steps", f"lies in 0..100, got {self.steps}")


def batch_per_rank(train: TrainConfig | TransferTrainConfig, world_size: int) -> int:
    """Sequences of the global batch that one rank takes. UserError if the batch does not divide."""
    check(
        train.sequences % (world_size * train.accumulation) == 0,
        "train.batch",
        f"{train.sequences} does not divide by {world_size} ranks x {train.accumulation} accumulation steps",
    )
    return train.sequences // world_size


def zero_stage(train: TrainConfig | TransferTrainConfig, world_size: int) -> int:
    """The ZeRO stage that the run works at: of the stages 1 and 2 nothing is left to one process but their flat copies
    of weights and gradients, which cost it a tenth of the step and a quarter of its memory (docs/speed.md)."""
    return 0 if world_size == 1 and train.zero_stage < 3 else train.zero_stage


def deepspeed_config(config: PretrainConfig | TransferConfig, world_size: int) -> dict:
    """The dict for `deepspeed.initialize`: ZeRO stage, precision, accumulation; the schedule is in engine/zero.py."""
    train = config.train
    micro = batch_per_rank(train, world_size) // train.accumulation
    precision: dict[str, Any] = {}
    if train.precision != "fp32":
        # Autocast with float32 master weights: what the paper's AMP did, and the norms keep float32 parameters.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[train.precision]
        precision["torch_autocast"] = {"enabled": True, "dtype": dtype}
    stage = zero_stage(train, world_size)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage in (1, 2) and not config.optimizer.clip and train.precision != "fp16":
        zero["compute_grad_norm"] = False  # nobody asks for it, and every step would wait for it
    return {
        "train_batch_size": train.sequences,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **precision,
    }
