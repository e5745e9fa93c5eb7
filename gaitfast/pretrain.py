"""Diffusion pretraining of a gait backbone (paper, Sec. 3.1).

    deepspeed gaitfast/pretrain.py --config configs/pretrain/demo.yaml [--set section.key=value ...]

or, as a single process, `python gaitfast/pretrain.py --config F`. The same command resumes from the newest complete
checkpoint of its run folder and continues exactly where it stopped.
"""

from __future__ import annotations

import gaitfast  # noqa: F401 (before torch: it settles how the threads wait)

# isort: split
import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from einops import rearrange

from gaitfast import files, kernels
from gaitfast.cli import user_errors
from gaitfast.config import PretrainConfig, UserError, batch_per_rank, dump, load, to_dict
from gaitfast.data.packed import PackedDataset
from gaitfast.data.pipeline import build_loader
from gaitfast.data.sampling import Sampler
from gaitfast.diffusion import NoiseSchedule, loss_weights
from gaitfast.diffusion.objective import DiffusionObjective
from gaitfast.engine import checkpoint, world
from gaitfast.engine.loop import train
from gaitfast.engine.meters import Meters, Records
from gaitfast.engine.portable import save_backbone, source_commit
from gaitfast.engine.zero import ZeroEngine
from gaitfast.measure import Measures
from gaitfast.models import build_autoencoder, build_denoiser, build_recognizer
from gaitfast.pictures import write_pictures
from gaitfast.randomness import normal_tensor, uniform_tensor

_WITHOUT_EFFECT = {
    *("run", "log_every", "train.stop_after", "checkpoint.every", "checkpoint.keep"),
    *("data.path", "data.threads", "data.prefetch"),  # the dataset is known by its fingerprint, wherever it lies
}
"""Keys that may change when a run goes on: they do not change what is trained."""


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
    process = world.start()
    try:
        Pretraining(config, process).run()
    finally:
        world.stop()
    return 0


class Pretraining:
    """One run: everything that the config names, built; then `run`."""

    def __init__(self, config: PretrainConfig, process: world.World):
        self.config, self.world = config, process
        self.started = time.perf_counter()
        self.folder = Path(config.run)
        self.per_rank = batch_per_rank(config.train, process.size)
        self._require_same_config()
        self.dataset = PackedDataset.open(config.data.path)

        recognizer = build_recognizer(
            config.backbone.name, config.backbone.variant, width=config.backbone.width, seed=config.seed
        )
        backbone = recognizer.backbone
        self.sampling = recognizer.sampling
        self.autoencoder = build_autoencoder(config.autoencoder.weights).to(process.device)
        self.schedule = NoiseSchedule(config.diffusion.schedule)
        weights = loss_weights(
            self.schedule, config.diffusion.weighting, config.diffusion.gamma, config.diffusion.normalize_weights
        )
        denoiser = build_denoiser(config.denoiser.dim, cond_dim=recognizer.feature_channels, seed=config.seed)
        objective = DiffusionObjective(backbone, denoiser, self.schedule, weights, config.diffusion.pooling)
        groups = [
            (list(denoiser.parameters()), config.optimizer.lr_denoiser, 0),
            (list(backbone.parameters()), config.optimizer.lr_backbone, config.optimizer.backbone_start),
        ]
        self.engine = ZeroEngine(objective, groups, config, process)

        found = checkpoint.newest(self.folder, report=process.is_main)
        fingerprint = self.dataset.fingerprint
        self.start, pending = checkpoint.load(self.engine, found, process, fingerprint) if found else (0, [])
        self._make_folder()
        if process.is_main:
            if not found:  # what a run that died before its first checkpoint left is not this run's
                for stale in ("summary.json", "pictures.safetensors", "backbone.safetensors"):
                    (self.folder / stale).unlink(missing_ok=True)
            self.evaluations = Records(self.folder / "evaluations.jsonl", self.start if found else -1)
        self.meters = Meters(
            self.folder,
            process,
            start=self.start,
            iterations=config.train.iterations,
            log_every=config.log_every,
            batch=config.train.batch,
            losses=pending,
        )
        if found:
            self.meters.say(f"resumed from {found.path} at step {self.start}")
        self.measures = Measures(config, self.dataset, self.encode, self.sampling, process)
        first = process.rank * self.per_rank
        self.samples = torch.arange(first, first + self.per_rank, device=process.device)

    def _require_same_config(self) -> None:
        """UserError if the run folder holds checkpoints of a run with another config."""
        path = self.folder / "config.resolved.yaml"
        if not path.exists() or not any(self.folder.glob("checkpoints/step_*")):
            return
        changed = _differences(to_dict(self.config), to_dict(load(PretrainConfig, path)))
        changed -= _WITHOUT_EFFECT
        if changed:
            raise UserError(
                f"{path}: this folder holds a run with another {', '.join(sorted(changed))}; "
                "choose another folder with --set run=FOLDER, or delete this one"
            )

    def _make_folder(self) -> None:
        """The run folder and the config in it, once everything that the config names was found."""
        if not self.world.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run: cannot create {self.folder} ({error.strerror})") from None
        path = self.folder / "config.resolved.yaml"
        files.write_atomically(path, lambda temporary: temporary.write_text(dump(self.config), encoding="utf-8"))

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
        micro = self.per_rank // config.train.accumulation
        for first in range(0, self.per_rank, micro):
            part = slice(first, first + micro)
            loss = self.engine.engine(
                self.encode(batch.clip_e[part]),
                batch.clip_g[part].float() / 255,
                noise[part],
                timestep[part],
                drop[part],
            )
            self.engine.backward_and_step(loss)
            losses.append(loss.detach().float())
        return torch.stack(losses).mean()

    def evaluate(self, step: int) -> None:
        """Measure after `step` steps, unless a previous start of this run already did."""
        known = self.evaluations.at(step) if self.world.is_main else None
        if self.world.any(known is not None):
            return
        objective = self.engine.whole()
        with self.engine.autocast():
            objective.eval()
            row = {"step": step, **self.measures(objective)}
            objective.train()
        if self.world.is_main:
            self.evaluations.add(row)
            self.meters.evaluation(step, row)
            self.meters.say(
                f"step {step}: rank-1 {row['rank1']:.1f} %, gap {row['gap']:.4f}; "
                f"denoising loss {row['loss_same']:.4f}, {row['identity']:+.4%} with another person's feature, "
                f"{row['loss_null'] / row['loss_same'] - 1:+.4%} with none"
            )

    def save(self, step: int) -> None:
        """Checkpoint and portable backbone after `step` steps."""
        pending, fingerprint = self.meters.pending_losses(), self.dataset.fingerprint
        checkpoint.save(self.engine, self.folder, step, self.config, self.world, pending, fingerprint)
        self.export(step)
        self.world.barrier()

    def export(self, step: int) -> None:
        """The portable backbone after `step` steps, with the evaluation of that step if there is one."""
        objective = self.engine.whole()
        if self.world.is_main:
            metrics = self.evaluations.at(step) or {}
            metadata = {"config": to_dict(self.config), "step": step, "metrics": metrics}
            save_backbone(self.folder / "backbone.safetensors", objective.backbone, metadata)

    def run(self) -> None:
        config, process = self.config, self.world
        sampler = Sampler(
            self.dataset.starts,
            self.dataset.split(config.data.split),
            config.data,
            sampling=self.sampling,
            seed=config.seed,
            batch=config.train.batch,
        )
        loader = build_loader(
            self.dataset,
            config.data,
            sampling=self.sampling,
            seed=config.seed,
            batch=config.train.batch,
            rank=process.rank,
            world_size=process.size,
            device=process.device,
            start_step=self.start,
        )
        try:
            done = train(
                self.engine,
                iter(loader),
                self.train_step,
                config=config,
                world=process,
                meters=self.meters,
                start=self.start,
                evaluate=self.evaluate,
                save=self.save,
                describe=lambda step: [self.dataset.sequence_name(i) for i in sampler.sequences(step)],
            )
        finally:
            loader.close()
        if done == config.train.iterations:
            self.evaluate(done)
            self.export(done)
            self.finish(done)
        else:
            self.meters.say(f"stopped cleanly after step {done}; the same command continues")
        self.meters.close()

    def finish(self, step: int) -> None:
        """Pictures and summary of a complete run."""
        objective = self.engine.whole().eval()
        if not self.world.is_main:
            return
        with self.engine.autocast():
            write_pictures(
                self.folder / "pictures.safetensors",
                self.measures,
                objective,
                self.autoencoder,
                self.schedule,
                self.config.seed,
            )
        before, after = self.evaluations.at(0), self.evaluations.at(step)
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        summary = {
            "rank1_before": before["rank1"],
            "rank1_after": after["rank1"],
            "gap_before": before["gap"],
            "gap_after": after["gap"],
            **{key: after[key] for key in ("loss_self", "loss_same", "loss_other", "loss_null")},
            "steps": step,
            "seconds": self.meters.seconds,
            "seconds_this_start": time.perf_counter() - self.started,
            "seed": self.config.seed,
            "backend": {
                "device": str(process_device(self.world.device)),
                "loader": "dali-gpu" if self.world.device.type == "cuda" else "dali-cpu",
                "optimizer": f"deepspeed-zero{self.config.train.zero_stage}",
                "precision": self.config.train.precision,
                **{op: kernels.backend_of(op)[0] for op in kernels.OPERATIONS},
            },
            "world_size": self.world.size,
            "peak_memory_bytes": usage,
            "commit": source_commit(),
            "before": before,
            "after": after,
        }
        files.write_json(self.folder / "summary.json", summary)
        self.meters.say(f"done: {self.folder / 'summary.json'}; draw the report with: gaitfast report {self.folder}")


def process_device(device: torch.device) -> str:
    """The device's name as a person knows it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _differences(ours: dict, theirs: dict, prefix: str = "") -> set[str]:
    """Dotted keys whose values differ."""
    changed = set()
    for key in ours.keys() | theirs.keys():
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.add(f"{prefix}{key}")
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gaitfast/pretrain.py", description=__doc__.split("\n\n")[0])
    configure(parser)
    with user_errors():
        sys.exit(main(parser.parse_args()))
