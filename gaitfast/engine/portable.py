"""The portable backbone: one safetensors file with the weights and, as metadata, where they come from."""

from __future__ import annotations

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

FORMAT = "gaitfast-backbone-1"


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


def save_backbone(path: str | Path, backbone: nn.Module, metadata: dict[str, Any]) -> None:
    """Write the weights of a backbone. Metadata values (config, step, metrics, ...) are stored as JSON strings."""
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in backbone.state_dict().items()
    }
    text = {"format": FORMAT, "version": gaitfast.__version__, "commit": source_commit()}
    text |= {key: json.dumps(value) for key, value in metadata.items()}
    files.write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=text))


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
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; a finished or running run holds backbone.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if text.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a gaitfast backbone (format {text.get('format')!r}); use the backbone.safetensors of a run"
        )
    plain = ("format", "version", "commit")
    try:
        metadata = {key: value if key in plain else json.loads(value) for key, value in text.items()}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: its metadata is not valid JSON ({error})") from None
    if not isinstance(metadata.get("config"), dict):
        raise UserError(f"{path}: carries no config, so the network is unknown")
    backbone = build(metadata["config"])
    own = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
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
    backbone.load_state_dict(tensors)
    return backbone.eval(), metadata
