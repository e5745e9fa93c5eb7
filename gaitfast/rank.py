"""Embed datasets with models and rank their probes under a protocol: rank-1/5/10, mAP, mINP.

    gaitfast rank --dataset DIR --checkpoint runs/NAME/backbone.safetensors
    gaitfast rank --dataset A --dataset B --checkpoint X --checkpoint Y      every model on every dataset (Table 10)

or, on several devices, `deepspeed gaitfast/rank.py --dataset DIR ...`: the embedding is shared out over the ranks.
docs/evaluation.md says what each protocol averages.
"""

from __future__ import annotations

import gaitfast  # before torch: it settles how the threads wait

# isort: split
import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gaitfast import files
from gaitfast.cli import user_errors
from gaitfast.config import BackboneConfig, UserError
from gaitfast.data import published
from gaitfast.data.packed import PackedDataset
from gaitfast.engine import world
from gaitfast.engine.embed import embed
from gaitfast.engine.portable import source_commit
from gaitfast.model_files import describe_model, is_pytorch, parse_model, read_model
from gaitfast.models import build_recognizer
from gaitfast.retrieval import protocols, tables

METRICS = {"cosine": ("cosine",), "euclidean": ("euclidean",), "both": ("cosine", "euclidean")}
MATRIX = ("rank1", "rank5", "mAP")
"""What is printed of models against datasets, where all of the protocols have it; the JSON has everything."""


class Model(NamedTuple):
    """What is ranked: a network on the CPU, what takes packed silhouettes and lengths to (N, C, P) with it, and its
    description for people and for JSON."""

    network: torch.nn.Module
    function: Callable[[torch.Tensor, list[int]], torch.Tensor]
    facts: dict[str, Any]


class Cell(NamedTuple):
    """One model on one dataset; `results` by distance, empty on the ranks that only embed."""

    dataset: PackedDataset
    protocol: str
    facts: dict[str, Any]
    results: dict[str, protocols.Evaluation]
    seconds: dict[str, float]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Exit code: 0 done, 2 a mistake. docs/evaluation.md says what each protocol averages."
    several = "; may be given several times: then every model is ranked on every dataset"
    parser.add_argument(
        "--dataset", required=True, action="append", metavar="DIR", help=f"a folder of `gaitfast prepare`{several}"
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="FILE",
        help=f"backbone.safetensors or recognizer.safetensors of a run, or an OpenGait checkpoint (.pt){several}",
    )
    parser.add_argument(
        "--random",
        action="append",
        default=[],
        metavar="NAME:VARIANT[:WIDTH]",
        help="random weights, as in smplgait:gait3d:0.5",
    )
    parser.add_argument("--mean-silhouette", action="store_true", help="baseline: the mean frame, pixel by pixel")
    parser.add_argument("--model", metavar="NAME:VARIANT", help="of OpenGait checkpoints; default: what their keys fit")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument(
        "--feature",
        choices=("auto", "feature", "embedding"),
        default="auto",
        help="the backbone's feature, which is all that pretraining trains, or the recognizer's embedding; auto: the"
        " embedding of a checkpoint that has a trained head, otherwise the feature",
    )
    parser.add_argument(
        "--protocol",
        default="auto",
        help=f"auto (the dataset's), {', '.join(protocols.PROTOCOLS)}, or {protocols.ALL_VIEWS} (the dataset's)",
    )
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
    datasets = [PackedDataset.open(path) for path in args.dataset]
    pairs = [(dataset, protocols.resolve(args.protocol, dataset)) for dataset in datasets]
    _check(args, pairs)
    models = _models(args)
    process = _join(args.device)
    try:
        cells = []
        for model in models:
            model.network.to(process.device)
            for dataset, protocol in pairs:
                counter = f" {len(cells) + 1}/{len(models) * len(pairs)}" if len(models) * len(pairs) > 1 else ""
                cells.append(_cell(args, model, dataset, protocol, process, counter))
            model.network.cpu()
        if process.is_main:
            _print(cells, len(pairs))
            if args.json:
                files.write_json(Path(args.json), _document(cells))
    finally:
        world.stop()
    return 0


def _cell(
    args: argparse.Namespace, model: Model, dataset: PackedDataset, protocol: str, process: world.World, counter: str
) -> Cell:
    """Embed and rank; ranks other than the first only embed."""
    progress = not args.quiet
    started = time.perf_counter()
    ranked = protocols.sequences(protocol, dataset)
    numbers = protocols.submission_sequences(dataset) if args.submission else ranked
    embeddings = embed(
        model.function,
        dataset,
        numbers,
        frames_limit=args.frames_limit,
        batch_frames=args.batch_frames,
        device=process.device,
        rank=process.rank,
        world_size=process.size,
        progress=progress,
        title=f"embed{counter}",
    )
    cell = Cell(dataset, protocol, model.facts | {"shape": list(embeddings.shape[1:])}, {}, {})
    cell.seconds["embed"] = time.perf_counter() - started
    if not process.is_main:
        return cell
    started = time.perf_counter()
    embeddings = embeddings.to(process.device)
    scored = embeddings[torch.from_numpy(np.isin(numbers, ranked))] if args.submission else embeddings
    for metric in METRICS[args.metric]:
        cell.results[metric] = protocols.evaluate(protocol, dataset, scored, metric=metric, progress=progress)
    if args.submission:
        text = protocols.grew_submission(dataset, embeddings, metric=METRICS[args.metric][0], progress=progress)
        files.write_atomically(Path(args.submission), lambda file: file.write_text(text, encoding="utf-8"))
    cell.seconds["rank"] = time.perf_counter() - started
    return cell


def _check(args: argparse.Namespace, pairs: list[tuple[PackedDataset, str]]) -> None:
    """Mistakes that are better found before hours of embedding."""
    if not (args.checkpoint or args.random or args.mean_silhouette):
        raise UserError("rank: name what to rank, with --checkpoint FILE, --random NAME:VARIANT or --mean-silhouette")
    for dataset, protocol in pairs:
        protocols.check(protocol, dataset)
        if args.submission and protocol != "grew":
            raise UserError(f"--submission: is for the protocol grew, and this is {protocol}")
    if args.frames_limit < 1:
        raise UserError(f"--frames-limit: must be positive, got {args.frames_limit}")
    if args.batch_frames is not None and args.batch_frames < 1:
        raise UserError(f"--batch-frames: must be positive, got {args.batch_frames}")
    if args.submission and len(pairs) * (len(args.checkpoint) + len(args.random) + args.mean_silhouette) > 1:
        raise UserError("--submission: is the answer of one model on one dataset; name one of each")
    if args.submission:
        protocols.check_submission(pairs[0][0])
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


def _models(args: argparse.Namespace) -> list[Model]:
    """All that is ranked, read before the first of them is used: a wrong file is better found now."""
    named = parse_model(args.model, "--model") if args.model else None
    models = [_checkpoint(path, named, args.feature) for path in args.checkpoint]
    for text in args.random:
        config = parse_model(text, "--random")
        recognizer = build_recognizer(config.name, config.variant, width=config.width, seed=args.seed)
        feature = "feature" if args.feature == "auto" else args.feature
        models.append(_model(recognizer, feature, model=describe_model(config), weights=f"random, seed {args.seed}"))
    if args.mean_silhouette:
        models.append(Model(torch.nn.Identity(), mean_silhouette, {"model": "mean silhouette"}))
    return models


def _checkpoint(path: str, named: BackboneConfig | None, feature: str) -> Model:
    """What a file holds. `named`: the network of an OpenGait checkpoint, if it was named."""
    part = "backbone" if feature == "feature" else None
    file = read_model(path, part, model=named if is_pytorch(path) else None)
    if feature == "auto":
        feature = "embedding" if file.part == "all" else "feature"
    if feature == "embedding" and file.part == "backbone":
        raise UserError(f"--feature embedding: {path} holds a backbone without a head; use --feature feature")
    facts = {"weights": path, "step": file.metadata.get("step"), "classes": file.classes}
    config = file.metadata.get("config") or {}
    facts["trained_on"] = config["data"].get("path") if isinstance(config.get("data"), dict) else None
    return _model(file.recognizer, feature, model=describe_model(file.config), **facts)


def _model(recognizer: torch.nn.Module, feature: str, **facts: Any) -> Model:
    """A recognizer of which one output is ranked."""
    recognizer.eval()
    facts["feature"] = feature
    if feature == "feature":
        return Model(recognizer.backbone, recognizer.backbone, facts)
    return Model(recognizer, lambda silhouettes, lengths: recognizer(silhouettes, lengths).embedding, facts)


def mean_silhouette(silhouettes: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The mean frame of each sequence as a feature of one part: (1, sum(lengths), 64, 44) -> (N, 64 x 44, 1)."""
    return torch.stack([frames.mean(0).flatten() for frames in silhouettes[0].split(lengths)])[:, :, None]


def _print(cells: list[Cell], columns: int) -> None:
    """One model on one dataset in full; several as a matrix under the lists of both."""
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    for cell in rows[0]:
        first = next(iter(cell.results.values()))
        unmatched = f", {first.unmatched:,} of them without a match" if first.unmatched else ""
        sizes = f"{first.probes:,} probes{unmatched}, {first.gallery:,} gallery sequences"
        print(f"{cell.dataset.path}: {cell.protocol}, {sizes}")
        for note in _notes(cell):
            print(f"note: {note}")
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row[0].facts.items() if value is not None))
    if len(cells) == 1:
        print(f"\n{tables.metrics(cells[0].results)}")
        for metric, result in cells[0].results.items():
            for table in result.tables:
                print(f"\n{tables.by_view(table, metric)}")
    else:
        models = [f"{row[0].facts['model']} {row[0].facts.get('weights', '')}".strip() for row in rows]
        names = [cell.dataset.name for cell in rows[0]]
        heads = models, names if len(set(names)) == len(names) else [str(cell.dataset.path) for cell in rows[0]]
        for metric in cells[0].results:
            for key in (k for k in MATRIX if all(k in cell.results[metric] for cell in cells)):
                values = [[cell.results[metric][key] for cell in row] for row in rows]
                print(f"\n{tables.matrix(*heads, values, f'{key} in percent, {metric}')}")
    seconds = {key: sum(cell.seconds[key] for cell in cells) for key in cells[0].seconds}
    print("\n" + ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items()))


def _notes(cell: Cell) -> list[str]:
    findings = cell.dataset.facts.get("findings") or {}
    notes = list(next(iter(cell.results.values())).notes)
    if off := findings.get("published"):
        notes.insert(0, published.describe(cell.dataset.protocol, off))
    if cell.protocol == "grew" and (count := findings.get("unsorted_pairs")):
        notes.append(
            f"of {count:,} ids the types 01 and 02 are not in the order of their names, as those of the raw GREW"
        )
    return notes


def _document(cells: list[Cell]) -> dict[str, Any]:
    """The JSON: one object for one cell, `cells` for several, both with the versions they come from."""
    entries = [_entry(cell) for cell in cells]
    source = {
        "version": gaitfast.__version__,
        "commit": source_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    return (entries[0] if len(cells) == 1 else {"cells": entries}) | source


def _entry(cell: Cell) -> dict[str, Any]:
    dataset = cell.dataset
    facts = {"path": str(dataset.path), "name": dataset.name, "fingerprint": dataset.fingerprint}
    facts |= {"protocol": dataset.protocol, "subjects": len(dataset.subjects), "sequences": dataset.num_sequences}
    return {
        "dataset": facts | {"frames": dataset.num_frames, "partition": dataset.facts["partition"]},
        "protocol": cell.protocol,
        **cell.facts,
        "notes": _notes(cell),
        "results": {
            metric: {
                **result,
                "probes": result.probes,
                "gallery": result.gallery,
                "unmatched": result.unmatched,
                "tables": [asdict(table) for table in result.tables],
            }
            for metric, result in cell.results.items()
        },
        "seconds": cell.seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gaitfast/rank.py", description=__doc__.split("\n\n")[0])
    configure(parser)
    with user_errors():
        sys.exit(main(parser.parse_args()))
