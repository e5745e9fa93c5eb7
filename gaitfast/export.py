"""Write a model in another format: OpenGait's checkpoint, safetensors of this project, or an ONNX graph.

    gaitfast export runs/NAME/recognizer.safetensors gait.onnx --format onnx

The model comes from a run's backbone.safetensors or recognizer.safetensors, or from an OpenGait checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gaitfast
from gaitfast import files, randomness
from gaitfast.config import UserError, to_dict
from gaitfast.engine import portable
from gaitfast.interop import onnx_graph, opengait
from gaitfast.model_files import PARTS, WITHOUT_CLASSIFIER, ModelFile, describe_model, parse_model, read_model

TOLERANCE = 1e-4
"""Largest difference between onnxruntime and PyTorch, in units of the output's largest magnitude if that is above 1."""
CHECKED = ((1, 1), (1, 2), (3, 5), (2, 7))
"""Clips and frames of the batches that are compared; none is the one that was traced."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Exit code: 0 done, 2 a mistake, or a graph that does not compute what the model does."
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="backbone or recognizer .safetensors, or OpenGait .pt")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS))
    parser.add_argument("--part", choices=PARTS, help="what to write; default: all that the file holds")
    parser.add_argument(
        "--model", metavar="NAME:VARIANT[:WIDTH]", help="of an OpenGait checkpoint; default: what its keys fit"
    )
    parser.add_argument(
        "--old-bnneck-order",
        action="store_true",
        help="the OpenGait checkpoint is from before the BN neck's order changed (it touches the logits alone)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. UserError for a mistake."""
    output = Path(args.output)
    _check_output(output, args.checkpoint)
    if args.format == "onnx":
        onnx_graph.require_packages()
    model = parse_model(args.model, "--model") if args.model else None
    file = read_model(args.checkpoint, args.part, model=model, old_bnneck_order=args.old_bnneck_order)
    _print_source(args.checkpoint, file)
    write = FORMATS[args.format]
    try:
        files.write_atomically(output, lambda temporary: write(temporary, output, file))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    print(f"{output}: written, {output.stat().st_size / 2**20:.1f} MiB")
    return 0


def _check_output(output: Path, checkpoint: str) -> None:
    """Mistakes that are better found before the work."""
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file in it")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: no such folder {output.absolute().parent}; create it first")
    if output.exists() and Path(checkpoint).exists() and output.samefile(checkpoint):
        raise UserError(f"{output}: is the checkpoint itself; name another file")


def _print_source(checkpoint: str, file: ModelFile) -> None:
    what = "backbone" if file.part == "backbone" else f"{file.classes or 'no'} classes"
    keys = opengait.keys(file.recognizer, file.part)
    name = describe_model(file.config)
    print(f"{checkpoint}: {name}, {what}, {len(keys)} tensors under OpenGait's keys, each used once")
    if file.alike:
        others = ", ".join(describe_model(config) for config in file.alike)
        print(f"the same network as {others}; --model names another one of them")
    if file.unused:
        print(f"not used, {len(file.unused)} keys: {', '.join(file.unused)}")


def _write_opengait(temporary: Path, output: Path, file: ModelFile) -> None:
    step = file.metadata.get("step")
    iteration = step if type(step) is int and step >= 0 else 0
    opengait.write_checkpoint(temporary, opengait.state_dict(file.recognizer, file.part), iteration)
    if file.part == "backbone" or (file.classes is None and file.config.name not in WITHOUT_CLASSIFIER):
        print("without a classifier or a head, OpenGait takes it with restore_ckpt_strict: false")
    if file.config.width != 1:
        print(f"width {file.config.width:g}: OpenGait needs a config with these channels")


def _write_safetensors(temporary: Path, output: Path, file: ModelFile) -> None:
    facts = {key: value for key, value in file.metadata.items() if key not in (*portable.PLAIN, "classes")}
    facts.setdefault("config", {"backbone": to_dict(file.config)})
    if file.part == "backbone":
        portable.save_backbone(temporary, file.recognizer.backbone, facts)
    else:
        portable.save_recognizer(temporary, file.recognizer, facts | {"classes": file.classes})


def _write_onnx(temporary: Path, output: Path, file: ModelFile) -> None:
    """The graph, left there only if onnxruntime, where it is installed, finds in it what PyTorch computes."""
    facts = {"model": describe_model(file.config), "part": file.part, "gaitfast": gaitfast.__version__}
    if file.metadata.get("step") is not None:
        facts["step"] = str(file.metadata["step"])
    onnx_graph.write(temporary, file.recognizer, file.part, facts)
    if not onnx_graph.has_runtime():
        print("not compared with PyTorch: onnxruntime is not installed (pip install onnxruntime)")
        return
    batches = [_silhouettes(*shape) for shape in CHECKED]
    found = onnx_graph.differences(temporary, file.recognizer, file.part, batches)
    text = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    if not all(value <= TOLERANCE for value in found.values()):
        raise UserError(
            f"{output}: not written, under onnxruntime the graph differs from PyTorch by more than {TOLERANCE:g}"
            f" ({text}); try other versions of onnxscript and torch"
        )
    print(f"onnxruntime against PyTorch on {len(batches)} batches, largest difference: {text}")


def _silhouettes(clips: int, frames: int) -> torch.Tensor:
    """Random binary clips (clips, frames, 64, 44): every pixel counts, so they are a harder case than people."""
    numbers = torch.arange(clips * frames)
    pixels = randomness.uniform_tensor(0, "export.check", frames, numbers, 64 * 44)
    return (pixels > 0.5).float().reshape(clips, frames, 64, 44)


FORMATS: dict[str, Callable[[Path, Path, ModelFile], Any]] = {
    "opengait": _write_opengait,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}
