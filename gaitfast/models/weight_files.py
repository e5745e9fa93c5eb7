"""Reads files of foreign weights without running their code, and knows the published TAESD files by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from gaitfast.config import UserError

# TAESD 1.2 (December 2023) is what the paper's date implies; its encoder is still the current one.
OFFICIAL_SHA256 = {
    "160d90c61c3a5ce50fe2cbe6404b3429f5763772d61b38523cc37e1525b4e19f": "encoder 1.2",
    "7442e91c60df146ab22c9deb6386f7f540ef2a70dd676e3bfa88c3b4ae694357": "decoder 1.2",
    "d7956d561b1efbd861ad9b03fd8f01510f9e87eddc07bdfd20837009433f6ee5": "encoder and decoder 1.2",
    "4dbe7a5f07de1045ccab691d09b08ee06a6a42c2e91f09a949ea339ac3b8d601": "encoder and decoder 1.2",
}
OUTDATED_SHA256 = {
    "db7e613f897e3e1efdfb8ecb9cccaff7292c79b2bdbef4eea151d163bca8ae76": "encoder 1.1",
    "437acb532811cccead9bf045b1ff246dc9a55ef15e4159ea660622a32cf40870": "encoder 1.0",
}
# The .pth files are published in a git repository only, so it is their blob ids that can be checked.
OFFICIAL_GIT_BLOB = {
    "65f85afc58480128926e52086fbf0fdc61c2c9b5": "encoder 1.2",
    "5915a429fc08eba4adf62bf74f96705b8b0d5c1f": "decoder",
}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or tensors of a PyTorch file, which has no metadata.

    PyTorch files are unpickled with weights_only, so nothing in them runs. UserError for a file that is missing,
    damaged or something else than a dictionary of tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; autoencoder.weights is builtin or a local TAESD file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two readers raise a dozen types between them for damaged files
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path}: cannot be read as weights ({reason}); get the file again") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: holds something else than a dictionary of tensors; give a TAESD file")
    return dict(weights), {}


def official_version(path: Path) -> str | None:
    """Which published TAESD file `path` is, by its digest; None when it is none of those known, or an outdated one."""
    content = path.read_bytes()
    version = OFFICIAL_SHA256.get(hashlib.sha256(content).hexdigest())
    if version is None and path.suffix != ".safetensors":
        version = OFFICIAL_GIT_BLOB.get(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    return version


def require_official(path: Path) -> None:
    """UserError unless `path` is a published, current TAESD file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; autoencoder.weights=official:FILE names a local TAESD file")
    if official_version(path) is not None:
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest in OUTDATED_SHA256:
        problem = f"is TAESD's {OUTDATED_SHA256[digest]}, older than the paper's 1.2"
    else:
        problem = f"has SHA-256 {digest}, which is no published TAESD file"
    raise UserError(f"{path}: {problem}; get the current file, or leave out official: to use this one")
