"""Embed a dataset with a model and rank its probes under a protocol: rank-1/5/10, mAP, mINP.

    gaitfast rank --dataset DIR --checkpoint runs/NAME/backbone.safetensors

or, on several devices, `deepspeed gaitfast/rank.py --dataset DIR ...`: the embedding is shared out over the ranks.
"""

from __future__ import annotations

import gaitfast  # before torch: it settles how the threads wait

# isort: split
import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import BackboneConfig, UserError
from gaitfast.data.packed import PackedDataset
from gaitfast.engine import world
from gaitfast.engine.embed import embed
from gaitfast.engine.portable import load_backbone, source_commit
from gaitfast.interop import opengait
from gaitfast.models import build_recognizer
from gaitfast.retrieval import protocols

METRICS = {"cosine": ("cosine",), "euclidean": ("euclidean",), "both": ("cosine", "euclidean")}


class Model(NamedTuple):
    """What is ranked: packed silhouettes and lengths -> (N, C, P), and its description for people and for JSON."""

    function: Callable[[torch.Tensor, list[int]], torch.Tensor]
    facts: dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Exit code: 0 done, 2 a mistake."
    parser.add_argument("--dataset", required=True, metavar="DIR", help="a folder that `gaitfast prepare` wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", metavar="FILE", help="backbone.safetensors of a run, or an OpenGait checkpoint (.pt)"
    )
    source.add_argument("--random", metavar="NAME:VARIANT[:WIDTH]", help="random weights, as in smplgait:gait3d:0.5")
    source.add_argument("--mean-silhouette", action="store_true", help="baseline: the mean frame, pixel by pixel")
    parser.add_argument("--model", metavar="NAME:VARIANT", help="of an OpenGait checkpoint; default: what its keys fit")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument(
        "--feature",
        choices=("feature", "embedding"),
        default="feature",
        help="the backbone's feature (default; all that pretraining trains) or the recognizer's embedding",
    )
    parser.add_argument("--protocol", default="auto", help=f"auto (the dataset's), {', '.join(protocols.PROTOCOLS)}")
    parser.add_argument("--metric", choices=tuple(METRICS), default="cosine", help="distance; default cosine")
    parser.add_argument("--frames-limit", type=int, default=720, metavar="N", help="frames of a sequence at most")
    parser.add_argument("--batch-frames", type=int, metavar="N", help="frames of a batch; default 2000, 250 on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--submission", metavar="FILE", help="grew: also write the CSV for GREW's site")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. UserError for a mistake."""
    dataset = PackedDataset.open(args.dataset)
    protocol = protocols.resolve(args.protocol, dataset)
    _check(args, protocol, dataset)
    process = _join(args.device)
    try:
        model = _model(args, process.device)
        progress = not args.quiet
        started = time.perf_counter()
        embeddings = embed(
            model.function,
            dataset,
            protocols.sequences(protocol, dataset),
            frames_limit=args.frames_limit,
            batch_frames=args.batch_frames,
            device=process.device,
            rank=process.rank,
            world_size=process.size,
            progress=progress,
        )
        seconds = {"embed": time.perf_counter() - started}
        if process.is_main:
            started = time.perf_counter()
            embeddings = embeddings.to(process.device)
            results = {
                metric: protocols.evaluate(protocol, dataset, embeddings, metric=metric, progress=progress)
                for metric in METRICS[args.metric]
            }
            if args.submission:
                text = protocols.grew_submission(dataset, embeddings, metric=METRICS[args.metric][0], progress=progress)
                _write(args.submission, text)
            seconds["rank"] = time.perf_counter() - started
            facts = {**model.facts, "shape": list(embeddings.shape[1:])}
            _print(dataset, protocol, facts, results, seconds)
            if args.json:
                files.write_json(Path(args.json), _document(dataset, protocol, facts, results, seconds))
    finally:
        world.stop()
    return 0


def _check(args: argparse.Namespace, protocol: str, dataset: PackedDataset) -> None:
    """Mistakes that are better found before hours of embedding."""
    protocols.check(protocol, dataset)
    if args.frames_limit < 1:
        raise UserError(f"--frames-limit: must be positive, got {args.frames_limit}")
    if args.batch_frames is not None and args.batch_frames < 1:
        raise UserError(f"--batch-frames: must be positive, got {args.batch_frames}")
    if args.submission and protocol != "grew":
        raise UserError(f"--submission: is for the protocol grew, and this is {protocol}")
    if args.mean_silhouette and args.feature == "embedding":
        raise UserError("--feature embedding: the mean silhouette has none; drop one of the two")
    for option, file in (("--json", args.json), ("--submission", args.submission)):
        if file and not Path(file).absolute().parent.is_dir():
            raise UserError(f"{option} {file}: no such folder {Path(file).absolute().parent}; create it first")
        if file and Path(file).is_dir():
            raise UserError(f"{option} {file}: is a folder; name a file")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: lies in 0..2^63-1, got {args.seed}")


def _join(device: str) -> world.World:
    """The process group where a launcher started us, otherwise this process alone."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cpu" and torch.cuda.is_available():
            raise UserError("--device cpu: several processes take the GPUs where there are some; start a single one")
        return world.start()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return world.World(0, 1, torch.device(name))


def _model(args: argparse.Namespace, device: torch.device) -> Model:
    if args.mean_silhouette:
        return Model(mean_silhouette, {"model": "mean silhouette"})
    if args.random:
        config = _parse(args.random, "--random")
        recognizer = build_recognizer(config.name, config.variant, width=config.width, seed=args.seed)
        facts = {"model": _name(config), "weights": f"random, seed {args.seed}"}
    elif Path(args.checkpoint).suffix in (".pt", ".pth"):
        recognizer, config = _opengait(args)
        facts = {"model": _name(config), "weights": args.checkpoint}
    else:
        return _pretrained(args, device)
    recognizer.eval().to(device)
    facts["feature"] = args.feature
    if args.feature == "feature":
        return Model(recognizer.backbone, facts)
    return Model(lambda silhouettes, lengths: recognizer(silhouettes, lengths).embedding, facts)


def _pretrained(args: argparse.Namespace, device: torch.device) -> Model:
    """The backbone that a run wrote."""
    if args.feature == "embedding":
        raise UserError(
            f"--feature embedding: {args.checkpoint} holds a backbone without a head; use --feature feature"
        )
    configs: list[BackboneConfig] = []

    def build(config: dict[str, Any]) -> torch.nn.Module:
        try:
            configs.append(BackboneConfig(**config["backbone"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{args.checkpoint}: its config does not describe a backbone ({error})") from None
        return build_recognizer(configs[0].name, configs[0].variant, width=configs[0].width).backbone

    backbone, metadata = load_backbone(args.checkpoint, build)
    facts = {"model": _name(configs[0]), "weights": args.checkpoint, "step": metadata.get("step"), "feature": "feature"}
    return Model(backbone.to(device), facts)


def _opengait(args: argparse.Namespace) -> tuple[torch.nn.Module, BackboneConfig]:
    """A recognizer with the weights of an OpenGait checkpoint: whole for embeddings, the backbone for features."""
    weights = opengait.read(args.checkpoint)
    if args.model:
        candidates = [_parse(args.model, "--model")]
    else:
        candidates = [BackboneConfig(name=name, variant=variant) for name, variant in opengait.identify(weights)]
    part = "backbone" if args.feature == "feature" else "all"
    error = UserError("its weights fit no known model; name it with --model")
    for config in candidates:
        recognizer = build_recognizer(config.name, config.variant, width=config.width)
        try:
            opengait.load_state_dict(recognizer, weights, part)
        except UserError as problem:  # another variant with the same backbone may have the fitting head
            error = problem
            continue
        return recognizer, config
    raise UserError(f"{args.checkpoint}: {error}")


def _parse(text: str, option: str) -> BackboneConfig:
    name, *rest = text.split(":")
    if not 1 <= len(rest) <= 2:
        raise UserError(f"{option} {text}: write NAME:VARIANT or NAME:VARIANT:WIDTH, as in smplgait:gait3d:0.5")
    try:
        width = float(rest[1]) if len(rest) == 2 else 1.0
    except ValueError:
        raise UserError(f"{option} {text}: the width {rest[1]!r} is not a number") from None
    return BackboneConfig(name=name, variant=rest[0], width=width)


def _name(config: BackboneConfig) -> str:
    return f"{config.name}:{config.variant}" + (f":{config.width:g}" if config.width != 1 else "")


def mean_silhouette(silhouettes: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The mean frame of each sequence as a feature of one part: (1, sum(lengths), 64, 44) -> (N, 64 x 44, 1)."""
    return torch.stack([frames.mean(0).flatten() for frames in silhouettes[0].split(lengths)])[:, :, None]


def _write(path: str, text: str) -> None:
    files.write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _print(
    dataset: PackedDataset, protocol: str, model: dict[str, Any], results: dict[str, Any], seconds: dict[str, float]
) -> None:
    first = next(iter(results.values()))
    unmatched = f", {first.unmatched:,} of them without a match" if first.unmatched else ""
    print(f"{dataset.path}: {protocol}, {first.probes:,} probes{unmatched}, {first.gallery:,} gallery sequences")
    print(", ".join(f"{key} {value}" for key, value in model.items() if value is not None))
    keys = list(first)
    widths = [max(len(key), 6) for key in keys]
    print(f"\n{'percent':<10}" + "".join(f"  {key:>{width}}" for key, width in zip(keys, widths)))
    for metric, result in results.items():
        print(f"{metric:<10}" + "".join(f"  {result[key]:>{width}.2f}" for key, width in zip(keys, widths)))
    for metric, result in results.items():
        for table in result.tables:
            print(f"\n{table.title}, {metric}; rows: probe view, columns: gallery view")
            print(" " * 6 + "".join(f"{column:>7}" for column in table.columns))
            for row, values in zip(table.rows, table.values):
                print(f"{row:<6}" + "".join(f"{'-':>7}" if v is None else f"{v:>7.2f}" for v in values))
    print("\n" + ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items()))


def _document(
    dataset: PackedDataset, protocol: str, model: dict[str, Any], results: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "dataset": {"path": str(dataset.path), "name": dataset.name, "fingerprint": dataset.fingerprint},
        "protocol": protocol,
        **model,
        "results": {
            metric: {
                **result,
                "probes": result.probes,
                "gallery": result.gallery,
                "unmatched": result.unmatched,
                "tables": [asdict(table) for table in result.tables],
            }
            for metric, result in results.items()
        },
        "seconds": seconds,
        "version": gaitfast.__version__,
        "commit": source_commit(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gaitfast/rank.py", description=__doc__.split("\n\n")[0])
    configure(parser)
    with user_errors():
        sys.exit(main(parser.parse_args()))
