"""Files that are complete or absent: write aside, flush to the disk, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from gaitfast.config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""A disk without space, or a quota that is used up."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no space; safetensors reports one in an error of its own."""
    return getattr(error, "errno", None) in FULL or (
        isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in FULL)
    )


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` then rename over `path`; a reader sees the old file or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        if is_full(error):
            raise UserError(f"{path}: no space left on the disk; free some and run the same command again") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """JSON, readable, complete or absent."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def digest(path: Path) -> str:
    """blake2b of a file, hexadecimal."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """UserError when the disk under `folder` has not `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB free on the disk, {needed / 2**20:.0f} MiB needed for a checkpoint; "
            "free some space and run the same command again"
        )
