"""A process of test_resume: trains a small network from one step to another under ZeRO stages and precisions in turn.

python -m tests.engine.resume_ranks FOLDER FIRST LAST, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the
environment. It goes on from FOLDER/CASE/checkpoints where FIRST > 0, and appends a loss per step to FOLDER/CASE/losses.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from gaitfast.config import OptimizerConfig, PretrainConfig, StepOptimizerConfig, TrainConfig, TransferConfig
from gaitfast.config import TransferTrainConfig as SupervisedConfig
from gaitfast.engine import checkpoint, state, world
from gaitfast.engine.zero import Group, ZeroEngine

BATCH = 8
# DeepSpeed remembers an autocast of an earlier engine in its process, so that of float32 come first.
CASES = [(f"zero{stage}-fp32", stage, "fp32", "adamw") for stage in range(4)]
CASES += [("zero1-sgd", 1, "fp32", "sgd"), ("zero0-sgd", 0, "fp32", "sgd")]
CASES += [(f"zero{stage}-bf16", stage, "bf16", "adamw") for stage in range(4)]
CASES += [(f"zero{stage}-fp16", stage, "fp16", "adamw") for stage in range(4)]


class Objective(nn.Module):
    """Convolutions with a batch norm; a frozen parameter, and sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3))
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.full((3,), 1.5), requires_grad=False)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((self.head(self.body(x).mean((2, 3))) * self.scale - y) ** 2).mean()


def config_of(stage: int, precision: str, optimizer: str) -> PretrainConfig | TransferConfig:
    length = {"iterations": 100, "precision": precision, "zero_stage": stage}
    if optimizer == "sgd":
        train = SupervisedConfig(batch=(2, BATCH // 2), **length)
        return TransferConfig(train=train, optimizer=StepOptimizerConfig(name="sgd"))
    return PretrainConfig(train=TrainConfig(batch=BATCH, **length), optimizer=OptimizerConfig(clip=1.0))


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randn(BATCH, 3, generator=generator)


def train(folder: Path, process: world.World, config: PretrainConfig, first: int, last: int) -> list[float]:
    objective = Objective()
    groups = [
        Group("head", [*objective.head.parameters(), objective.scale], lambda step: 0.02),
        Group("body", list(objective.body.parameters()), lambda step: 0.01),
    ]
    engine = ZeroEngine(objective, groups, config, process)
    if first:
        found = checkpoint.newest(folder)
        assert found.step == first
        state.restore(engine, found.tensors() if process.is_main else {}, process)
        if scaler := engine.scaler:
            scaler.load_state_dict(found.manifest["scaler"])
    elif (scaler := engine.scaler) and config.train.zero_stage != 2:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})  # at 65,536 float16 gradients overflow
    losses = []
    share = slice(process.rank * BATCH // process.size, (process.rank + 1) * BATCH // process.size)
    for step in range(first, last):
        engine.set_learning_rate(step)
        loss = engine.engine(*(part[share] for part in batch_of(step)))
        engine.backward_and_step(loss)
        losses.append(float(process.mean(loss.detach().double())))
    tensors, scaler = state.collect(engine, process), engine.scaler
    manifest = {"step": last, "scaler": scaler.state_dict() if scaler else {}}
    process.agree(lambda: checkpoint.write(folder, tensors, manifest, config.checkpoint) and None)
    return losses


def main(folder: str, first: str, last: str) -> None:
    process = world.start(60)
    for name, *case in CASES:
        own = Path(folder) / name
        if process.is_main:
            own.mkdir(parents=True, exist_ok=True)
        process.barrier()
        losses = train(own, process, config_of(*case), int(first), int(last))
        if process.is_main:
            with (own / "losses").open("a") as file:
                file.writelines(json.dumps(loss) + "\n" for loss in losses)
    world.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
