"""Diffusion pretraining of a gait backbone (paper, Sec. 3.1).

    deepspeed gaitfast/pretrain.py --config configs/pretrain/demo.yaml [--set section.key=value ...]

or, as a single process, `python gaitfast/pretrain.py --config F`. The same command resumes from the newest complete
checkpoint of its run folder and continues exactly where it stopped.
"""

from __future__ import annotations

import gaitfast  # noqa: F401 (before torch: it settles how the threads wait)

# isort: split
import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange

from gaitfast import kernels, needs
from gaitfast.cli import user_errors
from gaitfast.config import PretrainConfig, load
from gaitfast.data.packed import PackedDataset
from gaitfast.data.pipeline import build_loader
from gaitfast.data.sampling import Sampler
from gaitfast.diffusion import NoiseSchedule
from gaitfast.diffusion.objective import DiffusionObjective
from gaitfast.engine import world
from gaitfast.engine.ahead import EncodeAhead, Encoded
from gaitfast.engine.portable import save_backbone
from gaitfast.engine.run import TrainingRun
from gaitfast.engine.zero import Group, ZeroEngine, learning_rate_factor
from gaitfast.measure import Measures
from gaitfast.models import build_autoencoder
from gaitfast.needs import pretraining_objective
from gaitfast.pictures import write_pictures
from gaitfast.randomness import normal_tensor, uniform_tensor


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/pretrain/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value, as in train.batch=128"
    )
    parser.add_argument("--autoencoder", metavar="FILE", help="a TAESD file: --set autoencoder.weights=FILE")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it


def main(args: argparse.Namespace) -> int:
    overrides = [*args.set, *([f"autoencoder.weights={args.autoencoder}"] if args.autoencoder else [])]
    config = load(PretrainConfig, args.config, overrides)
    process = world.start(config.train.timeout)
    try:
        with world.contact(process):
            Pretraining(config, process).go(build_loader)
    finally:
        world.stop()
    return 0


class Pretraining(TrainingRun):
    """One run: everything that the config names, built; then `run`."""

    results = ("summary.json", "pictures.safetensors", "backbone.safetensors")

    def __init__(self, config: PretrainConfig, process: world.World):
        super().__init__(config, process)
        dataset = PackedDataset.open(config.data.path, corrupt=config.data.corrupt)
        recognizer, objective = pretraining_objective(config)
        backbone = recognizer.backbone
        self.sampling = recognizer.sampling
        self.autoencoder = build_autoencoder(config.autoencoder.weights).to(process.device)
        self.schedule = NoiseSchedule(config.diffusion.schedule)
        denoiser = objective.denoiser
        # Before ZeRO takes the weights apart.
        _, memory = needs.report(config, objective.to(process.device), process.device, process.size)
        if config.train.compile != "none":
            objective.compile(mode=config.train.compile, dynamic=False)
        groups = [
            Group("denoiser", list(denoiser.parameters()), self._rate(config.optimizer.lr_denoiser, 0)),
            Group(
                "backbone",
                list(backbone.parameters()),
                self._rate(config.optimizer.lr_backbone, config.optimizer.backbone_start),
            ),
        ]
        sampler = Sampler(
            dataset.starts,
            dataset.split(config.data.split),
            config.data,
            sampling=self.sampling,
            seed=config.seed,
            batch=config.train.batch,
        )
        self.begin(ZeroEngine(objective, groups, config, process), dataset, sampler.sequences)
        self.meters.say(memory)
        self.measures = Measures(config, dataset, self.encode, self.sampling, process)
        first = process.rank * self.per_rank
        self.samples = torch.arange(first, first + self.per_rank, device=process.device)

    def _rate(self, rate: float, start: int) -> Callable[[int], float]:
        config = self.config
        return lambda step: rate * learning_rate_factor(step, config.train.iterations, config.optimizer, start)

    @torch.no_grad()
    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """E(s_E): clips uint8 (B, T, 64, 64) -> latents float32 (B, 4, T, 8, 8), frame by frame (Sec. 3.1.1)."""
        frames = rearrange(clips, "b t h w -> (b t) 1 h w")
        with self.engine.autocast():  # in parts, which bounds the activations at full resolution
            latents = torch.cat([self.autoencoder.encode(part.float() / 255) for part in frames.split(1024)])
        return rearrange(latents.float(), "(b t) c h w -> b c t h w", b=len(clips))

    def train_step(self, batch, step: int) -> torch.Tensor:
        """Forward, backward and optimizer step on this rank's slice of the global batch; returns the mean loss."""
        config = self.config
        noise = normal_tensor(config.seed, "noise", step, self.samples, (4, config.data.frames, 8, 8))
        draws = uniform_tensor(config.seed, "timestep", step, self.samples, 2)
        timestep = 1 + (draws[:, 0] * self.schedule.timesteps).to(torch.int64)
        drop = draws[:, 1] < config.diffusion.p_uncond
        losses = []
        latents = None
        if isinstance(batch, Encoded):
            batch, latents, _ = batch
        micro = self.per_rank // config.train.accumulation
        for first in range(0, self.per_rank, micro):
            part = slice(first, first + micro)
            loss = self.engine.engine(
                self.encode(batch.clip_e[part]) if latents is None else latents[part],
                batch.clip_g[part].float() / 255,
                noise[part],
                timestep[part],
                drop[part],
            )
            self.engine.backward_and_step(loss)
            losses.append(loss.detach().clone())  # under CUDA graphs the next micro-batch takes its place
        return torch.stack(losses).mean()

    def go(self, build_loader: Callable[..., Any]) -> None:
        if not self.config.train.encode_ahead:
            return super().go(build_loader)
        return super().go(lambda *a, **k: EncodeAhead(build_loader(*a, **k), self.encode, self.world.device))

    def measure(self, objective: DiffusionObjective) -> dict[str, float]:
        with self.engine.autocast():
            return self.measures(objective)

    def describe(self, row: dict[str, float]) -> str:
        return (
            f"rank-1 {row['rank1']:.1f} %, gap {row['gap']:.4f}; "
            f"denoising loss {row['loss_same']:.4f}, {row['identity']:+.4%} with another person's feature, "
            f"{row['loss_null'] / row['loss_same'] - 1:+.4%} with none"
        )

    def export(self, step: int) -> None:
        objective = self.engine.whole()
        if self.world.is_main:
            save_backbone(self.folder / "backbone.safetensors", objective.backbone, self.metadata(step), self.later)

    def finish(self, step: int) -> dict[str, Any]:
        """Pictures, and the measures beside rank-1."""
        objective = self.engine.whole().eval()
        if not self.world.is_main:
            return {}
        with self.engine.autocast():
            write_pictures(
                self.folder / "pictures.safetensors",
                self.measures,
                objective,
                self.autoencoder,
                self.schedule,
                self.config.seed,
            )
        before, after = self.evaluations.at(0) or {}, self.evaluations.at(step)
        return {
            "gap_before": before.get("gap"),
            "gap_after": after["gap"],
            **{key: after[key] for key in ("loss_self", "loss_same", "loss_other", "loss_null")},
            "backend": {op: kernels.backend_of(op)[0] for op in kernels.OPERATIONS},
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gaitfast/pretrain.py", description=__doc__.split("\n\n")[0])
    configure(parser)
    with user_errors():
        sys.exit(main(parser.parse_args()))
