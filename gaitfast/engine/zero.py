"""DeepSpeed ZeRO around the two trained networks: optimizer, precision, one optimizer step, gathered weights."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from gaitfast.config import OptimizerConfig, PretrainConfig, deepspeed_config
from gaitfast.engine.world import World

# A deprecation inside DeepSpeed's own collectives, once per step and rank; nothing a user could act on.
warnings.filterwarnings("ignore", message=r".*reduce_scatter_tensor.*", category=FutureWarning)


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


class ZeroEngine:
    """The objective under DeepSpeed.

    Args:
        objective: module that returns the scalar loss.
        groups: (parameters, learning rate, step at which they start to train) of each parameter group.
        config: the run's config; the DeepSpeed dict is derived from it in gaitfast.config.
        world: this process.
    """

    def __init__(
        self,
        objective: nn.Module,
        groups: Sequence[tuple[list[nn.Parameter], float, int]],
        config: PretrainConfig,
        world: World,
    ):
        import deepspeed

        self.config = config
        self._rates = [(rate, start) for _, rate, start in groups]
        fused = world.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for parameters, rate, _ in groups],
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=fused,
        )
        self._copy = copy.deepcopy(objective).to(world.device) if config.train.zero_stage == 3 else None
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective.to(world.device), optimizer=optimizer, config=deepspeed_config(config, world.size)
        )

    @property
    def objective(self) -> nn.Module:
        return self.engine.module

    def autocast(self) -> contextlib.AbstractContextManager:
        """The run's precision for work outside the engine's own forward: the encoder and the evaluations."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.config.train.precision]
        return torch.autocast(self.engine.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def set_learning_rate(self, step: int) -> list[float]:
        """Set every group's rate for `step`; returns them."""
        train, optimizer = self.config.train, self.config.optimizer
        rates = [rate * learning_rate_factor(step, train.iterations, optimizer, start) for rate, start in self._rates]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        return rates

    def backward_and_step(self, loss: torch.Tensor) -> None:
        """One micro-batch; DeepSpeed updates the weights after the last one of the accumulation."""
        self.engine.backward(loss)
        self.engine.step()

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
