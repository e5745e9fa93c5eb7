"""DeepSpeed ZeRO around what is trained: optimizer, learning rates, precision, one optimizer step, gathered weights."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from gaitfast.config import (
    OptimizerConfig,
    PretrainConfig,
    StepOptimizerConfig,
    TransferConfig,
    UserError,
    deepspeed_config,
    zero_stage,
)
from gaitfast.engine.norms import synchronize_norms
from gaitfast.engine.world import World

# Deprecations inside DeepSpeed's own collectives, once per step and rank; nothing a user could act on.
warnings.filterwarnings("ignore", message=r".*(reduce_scatter_tensor|all_gather_into_tensor).*", category=FutureWarning)


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The types that `train.precision` names."""


def learning_rate_factor(step: int, iterations: int, optimizer: OptimizerConfig, start: int = 0) -> float:
    """Factor on a learning rate at `step` (0-based): linear warm-up, then cosine annealing to 0 (Table 6).

    A pure function of the step, so that resuming needs no scheduler state. It is 0 before `start`.
    """
    if step < start:
        return 0.0
    step, iterations = step - start, iterations - start
    if step < optimizer.warmup:
        return optimizer.warmup_factor + (1 - optimizer.warmup_factor) * step / optimizer.warmup
    progress = (step - optimizer.warmup) / max(1, iterations - optimizer.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def milestones(iterations: int, optimizer: StepOptimizerConfig) -> list[int]:
    """The steps at which the rates drop in a run of `iterations`: as written, or scaled with the length of the run."""
    scale = iterations / optimizer.milestones_for if optimizer.milestones_for else 1
    return [round(milestone * scale) for milestone in optimizer.milestones]


def stepped_factor(step: int, iterations: int, optimizer: StepOptimizerConfig) -> float:
    """Factor on a learning rate at `step` (0-based): gamma for each milestone reached; a function of the step alone."""
    return optimizer.gamma ** sum(step >= milestone for milestone in milestones(iterations, optimizer))


class Group(NamedTuple):
    """Parameters that share a learning rate."""

    name: str
    parameters: list[nn.Parameter]
    rate: Callable[[int], float]
    """Learning rate at a step (0-based)."""


def build_optimizer(config: OptimizerConfig | StepOptimizerConfig, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer that the config names, one of its groups for each of ours.

    Fused: each weight and its moments pass the memory once (AdamW of 13 M weights on one core: 25 ms instead of 81).
    """
    parameters = [{"params": group.parameters, "lr": group.rate(0)} for group in groups]
    decay = config.weight_decay
    if isinstance(config, OptimizerConfig):
        return torch.optim.AdamW(parameters, betas=config.betas, weight_decay=decay, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, weight_decay=decay, fused=True)
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return adam(parameters, weight_decay=decay, fused=True)


class ZeroEngine:
    """The objective under DeepSpeed. Batch norms span the ranks.

    Args:
        objective: module whose output has the scalar loss.
        groups: what is trained; parameters that are in none stay as they are.
        config: the run's config; the DeepSpeed dict is derived from it in gaitfast.config.
        world: this process.
    """

    def __init__(
        self,
        objective: nn.Module,
        groups: Sequence[Group],
        config: PretrainConfig | TransferConfig,
        world: World,
    ):
        import deepspeed
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        self.config = config
        self._groups = groups
        self.stage = zero_stage(config.train, world.size)
        # DeepSpeed warns of every optimizer that is not Adam; what ZeRO does with SGD is tested here.
        deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
        if world.size > 1 or (world.device.type == "cpu" and config.train.precision == "fp32"):
            objective = synchronize_norms(objective, world.device)
        self._copy = copy.deepcopy(objective).to(world.device) if self.stage == 3 else None
        settings = deepspeed_config(config, world.size)
        if "compute_grad_norm" not in DeepSpeedZeroConfig.model_fields:  # before DeepSpeed 0.19
            settings["zero_optimization"].pop("compute_grad_norm", None)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective.to(world.device),
            optimizer=build_optimizer(config.optimizer, groups),
            config=settings,
        )

    @property
    def objective(self) -> nn.Module:
        return self.engine.module

    @property
    def trained(self) -> set[int]:
        """id() of every parameter that the optimizer changes."""
        return {id(p) for group in self._groups for p in group.parameters if p.requires_grad}

    def autocast(self) -> contextlib.AbstractContextManager:
        """The run's precision for work outside the engine's own forward: the encoder and the evaluations."""
        dtype = TYPES[self.config.train.precision]
        return torch.autocast(self.engine.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def set_learning_rate(self, step: int) -> dict[str, float]:
        """Set every group's rate for `step`; returns them as {"lr_NAME": rate}."""
        rates = {f"lr_{group.name}": group.rate(step) for group in self._groups}
        for group, rate in zip(self.optimizer.param_groups, rates.values()):
            group["lr"] = rate
        return rates

    def backward_and_step(self, loss: torch.Tensor) -> None:
        """One micro-batch; DeepSpeed updates the weights after the last one of the accumulation.

        UserError if ZeRO finds gradients that are not finite, which it looks for where it has to know their norm.
        """
        self.engine.backward(loss)
        last = self.engine.is_gradient_accumulation_boundary()
        sharded = self.engine.optimizer if self.stage else None
        if last and sharded and self.scaler and (clip := self.config.optimizer.clip):
            # ZeRO clips gradients while they still carry the scale of fp16, and takes that scale for 1.
            sharded.clip_grad = clip * self.scaler.get_scale()
        self.engine.step()
        if last and getattr(sharded, "overflow", False):
            if self.scaler is None:
                raise UserError(
                    "the gradients of a step are not finite; the last checkpoint is untouched: begin anew in another "
                    "run folder with lower learning rates or train.precision=fp32"
                )
            # ZeRO skips such a step without telling the scaler, which would never come down.
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16, wherever DeepSpeed keeps it."""
        inside = getattr(self.engine.optimizer, "torch_autocast_gradscaler", None)
        return inside or getattr(self.engine, "torch_autocast_z0_gradscaler", None)

    def whole(self) -> nn.Module:
        """The objective with all its weights on every rank, for evaluation and export; every rank must call it.

        It is the trained module itself, except under ZeRO-3, which keeps the weights partitioned and gathers them by
        collectives inside every forward: there it is a copy, so that ranks may do different work with it.
        """
        if self._copy is None:
            return self.objective
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.objective.parameters())):
            self._copy.load_state_dict(self.objective.state_dict())
        return self._copy
