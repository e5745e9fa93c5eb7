"""Features in files that may be larger than memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gaitfast.config import UserError


def open_features(path: str | Path, name: str = "features") -> torch.Tensor:
    """The tensor `name` (N, C, P) of a safetensors file, mapped into memory: its pages are read as they are used.

    `search` and `rank_report` take it as a gallery of any size. UserError for a file that is missing or damaged, or
    that holds no such tensor of three dimensions.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a safetensors file of features (N, C, P)")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if name not in names:
                raise UserError(f"{path}: holds no tensor {name!r}; it has {', '.join(names[:5]) or 'none'}")
            features = file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if features.ndim != 3:
        raise UserError(f"{path}: {name} must have shape (N, C, P), got {tuple(features.shape)}")
    return features
