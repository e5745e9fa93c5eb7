"""Supervised training of a gait recognizer, from a pretrained backbone or from scratch (paper, Sec. 3.2).

    deepspeed gaitfast/transfer.py --config configs/transfer/walkers.yaml [--set section.key=value ...]

or, as a single process, `gaitfast transfer --config F`. The same command resumes from the newest complete checkpoint of
its run folder and continues exactly where it stopped.
"""

from __future__ import annotations

import gaitfast  # noqa: F401 (before torch: it settles how the threads wait)

# isort: split
import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gaitfast import needs
from gaitfast.cli import user_errors
from gaitfast.config import TransferConfig, UserError, load
from gaitfast.data.batch import RecognitionBatch
from gaitfast.data.packed import PackedDataset
from gaitfast.data.pipeline import build_loader
from gaitfast.data.sampling import PeopleSampler
from gaitfast.engine import world
from gaitfast.engine.embed import embed
from gaitfast.engine.portable import save_backbone, save_recognizer
from gaitfast.engine.run import TrainingRun
from gaitfast.engine.zero import Group, ZeroEngine, stepped_factor
from gaitfast.measure import rank_unseen
from gaitfast.model_files import describe_model, is_pytorch, read_model
from gaitfast.models import build_recognizer
from gaitfast.models.recognizer import INITIALIZATIONS, Recognizer, initialize
from gaitfast.recognition import RecognitionObjective
from gaitfast.retrieval import protocols


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/transfer/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value, as in transfer.ratio=0.5"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it


def main(args: argparse.Namespace) -> int:
    config = load(TransferConfig, args.config, args.set)
    process = world.start(config.train.timeout)
    try:
        with world.contact(process):
            Transfer(config, process).go(build_loader)
    finally:
        world.stop()
    return 0


def initialize_from(recognizer: Recognizer, config: TransferConfig) -> None:
    """Give a fresh recognizer the weights that `transfer.init` names; from a file, the backbone's alone.

    UserError for a file that holds another network than the recognizer's backbone.
    """
    if config.transfer.init in INITIALIZATIONS:
        initialize(recognizer, config.transfer.init, config.seed)
    else:
        recognizer.backbone.load_state_dict(_pretrained(recognizer, config))


def _pretrained(recognizer: Recognizer, config: TransferConfig) -> dict[str, torch.Tensor]:
    """The weights of the backbone in the file `transfer.init`. UserError as `initialize_from`."""
    init, ours = config.transfer.init, config.backbone
    if not Path(init).suffix and not Path(init).exists():
        raise UserError(f"transfer.init: {init!r} is neither a file nor one of {', '.join(INITIALIZATIONS)}")
    file = read_model(init, "backbone", model=ours if is_pytorch(init) else None)
    weights, own = file.recognizer.backbone.state_dict(), recognizer.backbone.state_dict()
    alike = weights.keys() == own.keys() and all(weights[name].shape == own[name].shape for name in own)
    if file.config.name != ours.name or not alike:  # variants may share a backbone
        raise UserError(
            f"{init}: holds {describe_model(file.config)}, this run trains {describe_model(ours)}; "
            "set backbone.name, backbone.variant and backbone.width to the file's"
        )
    return weights


def origin(recognizer: Recognizer, config: TransferConfig) -> str | None:
    """Digest of the backbone in `transfer.init`; None where its weights are drawn, or the file is gone.

    Of the weights, not of the file's bytes: a finished pretraining run that is started again writes the same backbone
    with its metadata in another order.
    """
    init = config.transfer.init
    if init in INITIALIZATIONS or not Path(init).exists():
        return None
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_pretrained(recognizer, config).items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def require_same_origin(theirs: str | None, recognizer: Recognizer, config: TransferConfig) -> None:
    """UserError if `transfer.init` holds another backbone than the one that a run with `origin` `theirs` began with.

    A file that is gone is no hindrance: checkpoints hold all that is needed.
    """
    if theirs and (ours := origin(recognizer, config)) and ours != theirs:
        raise UserError(
            f"{config.transfer.init}: differs from the file that this run began with; "
            "restore that one, or choose another folder with --set run=FOLDER"
        )


class Transfer(TrainingRun):
    """One run: everything that the config names, built; then `run`."""

    results = ("summary.json", "recognizer.safetensors", "backbone.safetensors")

    def __init__(self, config: TransferConfig, process: world.World):
        super().__init__(config, process)
        dataset = PackedDataset.open(config.data.path, corrupt=config.data.corrupt)
        self.evaluated = PackedDataset.open(config.eval.path) if config.eval.path else dataset
        self.protocol = protocols.resolve(config.eval.protocol, self.evaluated)
        protocols.check(self.protocol, self.evaluated)
        backbone = config.backbone
        # Without a classifier: what ranks, in evaluations. It takes the weights of the trained one each time.
        self.ranker = build_recognizer(backbone.name, backbone.variant, width=backbone.width).to(process.device).eval()
        self.sampling = self.ranker.sampling
        sampler = PeopleSampler(
            dataset.starts,
            dataset.subject,
            dataset.split(config.data.split),
            config.data,
            sampling=self.sampling,
            seed=config.seed,
            batch=config.train.batch,
        )
        self.classes = sampler.num_classes if config.identity.weight else None
        recognizer = build_recognizer(
            backbone.name, backbone.variant, self.classes, width=backbone.width, seed=config.seed
        )
        if self.classes and recognizer.state_dict().keys() == self.ranker.state_dict().keys():
            raise UserError(f"identity.weight: {backbone.name} has no classifier; set identity.weight=0")
        if self.found:
            process.agree(lambda: require_same_origin(self.origin, recognizer, config))
        else:
            initialize_from(recognizer, config)
            self.origin = process.agree(lambda: origin(recognizer, config))
        objective = RecognitionObjective(
            recognizer.train(),
            triplet_weight=config.triplet.weight,
            margin=config.triplet.margin,
            metric=config.triplet.metric,
            identity_weight=config.identity.weight,
            scale=config.identity.scale,
            smoothing=config.identity.smoothing,
            freeze=config.transfer.freeze,
        )
        _, memory = needs.report(config, recognizer.to(process.device), process.device, process.size)
        engine = ZeroEngine(objective, groups(recognizer, config), config, process)
        self.begin(engine, dataset, sampler.sequences, quantities=objective.quantities)
        self.meters.say(memory)

    def train_step(self, batch: RecognitionBatch, step: int) -> torch.Tensor:
        loss, quantities = self.engine.engine(batch.silhouettes.float() / 255, batch.label, batch.lengths)
        self.engine.backward_and_step(loss)
        return quantities

    def measure(self, objective: RecognitionObjective) -> dict[str, float]:
        """Retrieval in float32 whatever the run's precision, so that `gaitfast rank` gives the same figures."""
        started = time.perf_counter()
        config = self.config.eval
        weights = objective.recognizer.state_dict()
        self.ranker.load_state_dict({name: weights[name] for name in self.ranker.state_dict()})
        if config.output == "feature":
            function = self.ranker.backbone
        else:

            def function(silhouettes: torch.Tensor, lengths: list[int]) -> torch.Tensor:
                return self.ranker(silhouettes, lengths).embedding

        embeddings = embed(
            function,
            self.evaluated,
            protocols.sequences(self.protocol, self.evaluated),
            frames_limit=config.frames_limit,
            device=self.world.device,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        result = protocols.evaluate(self.protocol, self.evaluated, embeddings, metric=config.metric)
        return {**rank_unseen(result), "seconds": time.perf_counter() - started}

    def describe(self, row: dict[str, float]) -> str:
        others = [f"{key} {row[key]:.1f} %" for key in ("rank5", "mAP", "mINP") if key in row]
        return ", ".join((f"rank-1 {row['rank1']:.1f} %", *others))

    def export(self, step: int) -> None:
        """The whole recognizer, and its backbone alone as pretraining writes it."""
        recognizer = self.engine.whole().recognizer
        if self.world.is_main:
            metadata = self.metadata(step)
            save_recognizer(
                self.folder / "recognizer.safetensors", recognizer, {**metadata, "classes": self.classes}, self.later
            )
            save_backbone(self.folder / "backbone.safetensors", recognizer.backbone, metadata, self.later)

    def finish(self, step: int) -> dict[str, Any]:
        return {"classes": self.classes, "init": self.config.transfer.init}


def groups(recognizer: Recognizer, config: TransferConfig) -> list[Group]:
    """What is trained: the head at the config's rate, the backbone at r times that rate, or not at all."""

    def rate(ratio: float):
        return lambda step: (
            ratio * (config.optimizer.lr * stepped_factor(step, config.train.iterations, config.optimizer))
        )

    found = [Group("head", list(recognizer.head.parameters()), rate(1.0))]
    if not config.transfer.freeze:
        found.append(Group("backbone", list(recognizer.backbone.parameters()), rate(config.transfer.ratio)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gaitfast/transfer.py", description=__doc__.split("\n\n")[0])
    configure(parser)
    with user_errors():
        sys.exit(main(parser.parse_args()))
