"""Portable networks: one safetensors file with the weights and, as metadata, where they come from.

    backbone.safetensors    what pretraining makes: the backbone alone        format gaitfast-backbone-1
    recognizer.safetensors  what transfer makes: backbone, head, classifier   format gaitfast-recognizer-1

Both carry `config`, the config of the run with its section `backbone` (name, variant, width); a recognizer carries
`classes` too: K, or null where its model has no classifier.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import gaitfast
from gaitfast import files
from gaitfast.config import UserError

_CONTENT = {"gaitfast-backbone-1": "backbone", "gaitfast-recognizer-1": "recognizer"}
BACKBONE, RECOGNIZER = _CONTENT
PLAIN = ("format", "version", "commit")
"""Metadata that is text; all other values are JSON."""
Write = Callable[[], object]


@functools.cache
def source_commit() -> str:
    """The commit of the checkout that runs, with `+` when it has changes; empty for an installed copy."""
    root = Path(gaitfast.__file__).resolve().parent.parent
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""


def _now(write: Write) -> None:
    write()


def save_backbone(
    path: str | Path, backbone: nn.Module, metadata: dict[str, Any], later: Callable[[Write], None] = _now
) -> None:
    """Write the weights of a backbone. Metadata values (config, step, metrics, ...) are stored as JSON strings.

    The weights are copied here; `later` gets the function that writes the file, to call it when it likes.
    """
    _save(path, backbone, BACKBONE, metadata, later)


def save_recognizer(
    path: str | Path, recognizer: nn.Module, metadata: dict[str, Any], later: Callable[[Write], None] = _now
) -> None:
    """Write the weights of a whole recognizer. As for a backbone, with `classes` in the metadata: K, or None."""
    assert "classes" in metadata, "a recognizer's file says how many classes it has"
    _save(path, recognizer, RECOGNIZER, metadata, later)


def load_backbone(path: str | Path, build: Callable[[dict[str, Any]], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a backbone.

    Args:
        path: a file of `save_backbone`.
        build: makes an untrained backbone from the config that the file carries.

    Returns:
        (backbone in eval mode, metadata decoded from JSON).

    Raises:
        UserError: no such file, not a gaitfast backbone, or weights that do not fit the network its config names.
    """
    path = Path(path)
    tensors, metadata = _read(path, BACKBONE)
    return _fill(path, build(metadata["config"]), tensors), metadata


def load_recognizer(
    path: str | Path, build: Callable[[dict[str, Any], int | None], nn.Module]
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a recognizer: as `load_backbone`, where `build` takes the config and the number of classes (or None)."""
    path = Path(path)
    tensors, metadata = _read(path, RECOGNIZER)
    classes = metadata.get("classes")
    if "classes" not in metadata or not (classes is None or (type(classes) is int and classes >= 1)):
        raise UserError(f"{path}: its number of classes is {classes!r}; write the file again with gaitfast")
    return _fill(path, build(metadata["config"], classes), tensors), metadata


def content(path: str | Path) -> str:
    """What a file holds by its metadata: "backbone" or "recognizer". UserError if it is neither."""
    path = Path(path)
    found, _ = _open(path, weights=False)
    if found.get("format") not in _CONTENT:
        raise UserError(_stranger(path, found, "backbone or recognizer"))
    return _CONTENT[found["format"]]


def _save(
    path: str | Path, network: nn.Module, kind: str, metadata: dict[str, Any], later: Callable[[Write], None]
) -> None:
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in network.state_dict().items()}
    text = {"format": kind, "version": gaitfast.__version__, "commit": source_commit()}
    text |= {key: json.dumps(value) for key, value in metadata.items()}
    later(lambda: files.write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=text)))


def _open(path: Path, weights: bool = True) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata as text, and the tensors if asked for."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; a run holds backbone.safetensors, one of transfer recognizer.safetensors too"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _stranger(path: Path, text: dict[str, str], wanted: str) -> str:
    return (
        f"{path}: not a gaitfast {wanted} (format {text.get('format')!r}); use the {wanted.split()[0]}.safetensors of a"
        " run"
    )


def _read(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and decoded metadata of a file of the given kind."""
    text, tensors = _open(path)
    found = text.get("format")
    if found != kind:
        wanted = _CONTENT[kind]
        if found in _CONTENT:
            raise UserError(
                f"{path}: holds a {_CONTENT[found]}, and a {wanted} is needed; use the {wanted}.safetensors of a run"
            )
        raise UserError(_stranger(path, text, wanted))
    try:
        metadata = {key: value if key in PLAIN else json.loads(value) for key, value in text.items()}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: its metadata is not valid JSON ({error})") from None
    if not isinstance(metadata.get("config"), dict):
        raise UserError(f"{path}: carries no config, so the network is unknown")
    return tensors, metadata


def _fill(path: Path, network: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """`network` in eval mode with exactly these weights. UserError where they do not fit or are not finite."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, shape in own.items():
        if name not in tensors:
            raise UserError(f"{path}: weight {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{path}: weight {name} has shape {tuple(tensors[name].shape)}, the network needs {shape}")
    if extra := sorted(set(tensors) - set(own)):
        raise UserError(f"{path}: holds weights that the network does not have: {', '.join(extra[:3])}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: weight {name} is not finite")
    network.load_state_dict(tensors)
    return network.eval()
