"""Reads a model from any file that holds one: backbone.safetensors, recognizer.safetensors, an OpenGait checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from gaitfast.config import BackboneConfig, UserError
from gaitfast.engine import portable
from gaitfast.interop import opengait
from gaitfast.models import build_recognizer
from gaitfast.models.recognizer import Recognizer

PARTS = ("all", "backbone")
WITHOUT_CLASSIFIER = ("gaitset", "gaitpart")
"""Models that are trained by the triplet loss alone."""


class ModelFile(NamedTuple):
    """A model and what its file says about it."""

    recognizer: Recognizer
    """In eval mode, on the CPU."""
    config: BackboneConfig
    part: str
    """all, or backbone: then the recognizer's head is as it was initialised."""
    classes: int | None
    """K of the classifier in the file; None without one."""
    metadata: dict[str, Any]
    """Of a safetensors file: its metadata, decoded. Of an OpenGait checkpoint: `step`, where the file says it."""
    unused: list[str]
    """Keys of an OpenGait checkpoint that found no use: the head, where the backbone alone was asked for."""
    alike: list[BackboneConfig]
    """Other variants that the weights of an OpenGait checkpoint fit as well."""


def parse_model(text: str, option: str) -> BackboneConfig:
    """NAME:VARIANT or NAME:VARIANT:WIDTH, the value of the command-line option that an error names."""
    name, *rest = text.split(":")
    if not 1 <= len(rest) <= 2:
        raise UserError(f"{option} {text}: write NAME:VARIANT or NAME:VARIANT:WIDTH, as in smplgait:gait3d:0.5")
    try:
        width = float(rest[1]) if len(rest) == 2 else 1.0
    except ValueError:
        raise UserError(f"{option} {text}: the width {rest[1]!r} is not a number") from None
    return BackboneConfig(name=name, variant=rest[0], width=width)


def describe_model(config: BackboneConfig) -> str:
    """The inverse of `parse_model`."""
    return f"{config.name}:{config.variant}" + (f":{config.width:g}" if config.width != 1 else "")


def is_pytorch(path: str | Path) -> bool:
    """Whether a file is to be read as a PyTorch checkpoint: by its first bytes, else by its name."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        head = b""
    if head[8:] == b"{":  # safetensors: eight bytes of length, then JSON
        return False
    return head.startswith((b"PK\x03\x04", b"\x80")) or path.suffix in (".pt", ".pth")


def read_model(
    path: str | Path, part: str | None = None, *, model: BackboneConfig | None = None, old_bnneck_order: bool = False
) -> ModelFile:
    """Read a model.

    Args:
        path: a file of `portable.save_backbone` or `save_recognizer`, or an OpenGait checkpoint.
        part: "all" or "backbone"; None: what the file holds.
        model: which network an OpenGait checkpoint is for; None: the one that its keys fit.
        old_bnneck_order: see `opengait.load_state_dict`.

    Raises:
        UserError: unreadable, another model or number of classes than it says, or no head though `part` is "all".
    """
    assert part in (None, *PARTS), f"part is one of {', '.join(PARTS)} or None, got {part!r}"
    if is_pytorch(path):
        return _read_opengait(path, part, model, old_bnneck_order)
    if old_bnneck_order:
        raise UserError(f"{path}: is no OpenGait checkpoint, so its neck has one order only; drop --old-bnneck-order")
    file = _read_portable(path, part)
    if model not in (None, file.config):
        raise UserError(f"{path}: holds {describe_model(file.config)}, not {describe_model(model)}; drop --model")
    return file


def _read_portable(path: str | Path, part: str | None) -> ModelFile:
    """A safetensors file, whose metadata names the network."""
    configs: list[BackboneConfig] = []
    recognizers: list[Recognizer] = []

    def build(config: dict[str, Any], classes: int | None = None) -> Recognizer:
        try:
            configs.append(BackboneConfig(**config["backbone"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: its config does not describe a backbone ({error})") from None
        if classes != found and configs[0].name not in WITHOUT_CLASSIFIER:
            raise UserError(
                f"{path}: its classifier has {found} classes, the network needs {classes} by its metadata;"
                " export it again"
            )
        recognizers.append(build_recognizer(configs[0].name, configs[0].variant, classes, width=configs[0].width))
        return recognizers[0]

    content = portable.content(path)
    found = _classes(path)
    if content == "backbone":
        if part == "all":
            raise UserError(f"{path}: holds a backbone without a head; use --part backbone or a recognizer.safetensors")
        _, metadata = portable.load_backbone(path, lambda config: build(config).backbone)
    else:
        _, metadata = portable.load_recognizer(path, build)
    part = "backbone" if content == "backbone" else part or "all"
    return ModelFile(recognizers[0].eval(), configs[0], part, found, metadata, [], [])


def _classes(path: str | Path) -> int | None:
    """K of the classifier in a safetensors file, from its header: a false number must not allocate memory."""
    with safe_open(path, framework="pt") as file:
        for name in {"head.neck.weight", "head.classifier.weight"}.intersection(file.keys()):
            return [None, *file.get_slice(name).get_shape()][-1]
    return None


def _read_opengait(path: str | Path, part: str | None, model: BackboneConfig | None, old: bool) -> ModelFile:
    """An OpenGait checkpoint, whose keys and shapes tell the network at published width."""
    weights, iteration = opengait.read_checkpoint(path)
    metadata = {} if iteration is None else {"step": iteration}
    try:
        fits = [model] if model else [BackboneConfig(name=n, variant=v) for n, v in opengait.identify(weights)]
        if not fits:
            raise UserError("its weights fit no known model at published width; name it with --model")
        classes = opengait.num_classes(weights)
        built = None if part == "backbone" else classes  # GREW's classifiers hold hundreds of megabytes
        recognizer = build_recognizer(fits[0].name, fits[0].variant, built, width=fits[0].width)
        if part is None:
            part = "all" if opengait.holds_head(recognizer, weights) else "backbone"
        report = opengait.load_state_dict(recognizer, weights, part, old_bnneck_order=old)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('checkpoint: ')}") from None
    return ModelFile(recognizer.eval(), fits[0], part, classes, metadata, report.ignored, fits[1:])
