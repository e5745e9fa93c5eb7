"""Picture sheets out of pictures.safetensors: augmentations (Fig. 7), reconstructions (Fig. 6), denoised clips.

A sheet is labelled rows of tiles. The page lays the tiles out itself, so that labels stay readable on a phone and
follow its colours; `draw` makes the same sheet one PNG for a slide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors import SafetensorError, safe_open

from gaitfast.report.run import Run
from gaitfast.report.style import LIGHT, Theme

NAME = "pictures.safetensors"
SHOWN_ROWS = 4
"""Silhouettes shown of each kind."""
SHOWN_CLIPS = 3
SHOWN_FRAMES = 10
TILE_LIMIT = 4096
"""Longest side and largest count that a picture tensor may have: more is no picture of ours."""

AUGMENTATIONS = (
    ("original", "Original"),
    ("affine", "Affine"),
    ("perspective", "Perspective"),
    ("flip", "Flip"),
    ("part_dilate", "Part dilate"),
    ("part_blur", "Part blur"),
)
STRIPS = (
    ("condition", "Condition", "the clip that the backbone sees"),
    ("target", "Target", "the clip to be denoised"),
    ("noised", "Noised", "target, half-way into the noise"),
    ("denoised", "Denoised", "one step, from the noised clip"),
    ("generated", "Generated", "DDIM from pure noise, with the condition"),
)
LATENT_COLOURS = LinearSegmentedColormap.from_list("latent", ["#1f5f99", "#f4f3ef", "#c4610c"])


@dataclass(frozen=True)
class Row:
    """Tiles uint8 (H, W) or (H, W, 3), left to right; `note` explains the label."""

    tiles: list[np.ndarray]
    label: str = ""
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """`columns` labels the tiles of every row, where tiles mean different things; `facts` are measured on the sheet."""

    title: str
    rows: list[Row]
    columns: tuple[str, ...] = ()
    facts: str = ""


@dataclass(frozen=True)
class Sheets:
    """None, or no clips, where the run holds no such pictures."""

    augmentation: Sheet | None = None
    autoencoder: Sheet | None = None
    samples: tuple[Sheet, ...] = ()


def read_sheets(run: Run) -> Sheets:
    """The sheets of a run. What is unreadable or of the wrong shape is left out with a notice on `run`."""
    path = run.path / NAME
    if not path.is_file():
        return Sheets()
    try:
        with safe_open(path, framework="numpy") as file:
            pictures = _Pictures(run, file)
            return Sheets(_augmentation(pictures), _autoencoder(pictures), _samples(pictures))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        run.notices.append(f"{NAME}: cannot be read ({' '.join(str(error).split())[:120]}), so the sheets are left out")
        return Sheets()


class _Pictures:
    """Checked access: the first pictures of a tensor, or None, with a notice where it is there and not as agreed."""

    def __init__(self, run: Run, file: Any) -> None:
        self.run, self.file, self.keys = run, file, set(file.keys())

    def get(self, key: str, dtype: str, tail: tuple[int | None, ...], count: int) -> np.ndarray | None:
        """At most `count` pictures of `key`, whose shape is (any, *tail); None in `tail` stands for any size."""
        if key not in self.keys:
            return None
        view = self.file.get_slice(key)
        shape, kind = tuple(view.get_shape()), str(view.get_dtype())
        agrees = len(shape) == len(tail) + 1 and all(t in (None, s) for s, t in zip(shape[1:], tail))
        if not agrees or kind != dtype or not all(0 < size <= TILE_LIMIT for size in shape):
            wanted = ", ".join("N" if size is None else str(size) for size in (None, *tail))
            self.run.notices.append(f"{NAME}: {key} is {kind} {shape}, expected {dtype} ({wanted}); left out")
            return None
        return np.asarray(view[: min(count, shape[0])])


def _augmentation(pictures: _Pictures) -> Sheet | None:
    found = []
    for key, label in AUGMENTATIONS:
        tiles = pictures.get(f"augment.{key}", "U8", (None, None), SHOWN_ROWS)
        if tiles is not None:
            found.append((label, tiles))
    if not found:
        return None
    count = min(len(tiles) for _, tiles in found)
    rows = [Row([tiles[i] for _, tiles in found]) for i in range(count)]
    return Sheet("Augmentations", rows, tuple(label for label, _ in found))


def _autoencoder(pictures: _Pictures) -> Sheet | None:
    frames = pictures.get("autoencoder.frames", "U8", (None, None), TILE_LIMIT)
    latents = pictures.get("autoencoder.latents", "F32", (4, None, None), TILE_LIMIT)
    decoded = pictures.get("autoencoder.decoded", "U8", (None, None), TILE_LIMIT)
    if frames is None or latents is None or decoded is None:
        return None
    if not len(frames) == len(latents) == len(decoded) or frames.shape != decoded.shape:
        pictures.run.notices.append(f"{NAME}: autoencoder.frames, latents and decoded disagree in shape; left out")
        return None
    error = 100 * np.abs(frames.astype(np.float32) - decoded).mean() / 255
    scale = float(np.nanmax(np.abs(latents), initial=0.0, where=np.isfinite(latents))) or 1.0
    count = min(SHOWN_ROWS, len(frames))
    rows = [Row([frames[i], *(_latent(z, scale) for z in latents[i]), decoded[i]]) for i in range(count)]
    facts = (
        f"Mean absolute pixel error over the {len(frames)} frames stored: {error:.2f}% (the paper's TAESD: 3.8% on"
        f" Gait3D, 3.4% on GREW). Latent colours: \N{MINUS SIGN}{scale:.1f} blue, 0 white, {scale:.1f} orange."
    )
    return Sheet("Reconstructions", rows, ("Silhouette", *(f"Latent {i}" for i in range(4)), "Decoded"), facts)


def _latent(latent: np.ndarray, scale: float) -> np.ndarray:
    """Latent channel (h, w) in colours, zero in the middle: uint8 (h, w, 3). A non-finite value is black."""
    colours = LATENT_COLOURS(0.5 + 0.5 * np.nan_to_num(latent) / scale, bytes=True)[..., :3].copy()
    colours[~np.isfinite(latent)] = 0
    return colours


def _samples(pictures: _Pictures) -> tuple[Sheet, ...]:
    found = []
    for key, label, note in STRIPS:
        clips = pictures.get(f"samples.{key}", "U8", (None, None, None), SHOWN_CLIPS)
        if clips is not None:
            found.append((label, note, clips))
    if not found:
        return ()
    frames = min(clips.shape[1] for _, _, clips in found)
    chosen = np.unique(np.linspace(0, frames - 1, SHOWN_FRAMES).round().astype(int))
    sheets = []
    for m in range(min(len(clips) for _, _, clips in found)):
        rows = [Row([clips[m, t] for t in chosen], label, note) for label, note, clips in found]
        sheets.append(Sheet(f"Clip {m + 1}", rows, facts=f"{len(chosen)} of {frames} frames"))
    return tuple(sheets)


def draw(sheets: list[Sheet], theme: Theme = LIGHT) -> Figure:
    """Sheets one below the other as one figure, on one axes whose units are inches from the lower left."""
    columns = max(len(row.tiles) for sheet in sheets for row in sheet.rows)
    labelled = any(row.label for sheet in sheets for row in sheet.rows)
    margin, gap, head = 0.14, 0.05, 0.36 + 0.14 * any(sheet.columns for sheet in sheets)
    left = 1.0 if labelled else margin
    tile = min(1.1, (9.6 - left - margin) / columns)
    pitch = tile + gap
    width = left + columns * pitch - gap + margin
    height = sum(head + len(sheet.rows) * pitch for sheet in sheets) + margin
    figure = Figure(figsize=(width, height), facecolor=theme.paper)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    y = height
    for sheet in sheets:
        axes.text(margin, y - 0.22, sheet.title, weight="bold", size=10)
        y -= head
        for i, label in enumerate(sheet.columns):
            axes.text(left + i * pitch + tile / 2, y + 0.06, label, color=theme.muted, size=8.5, ha="center")
        for row in sheet.rows:
            axes.text(left - 0.1, y - tile / 2, row.label, size=8.5, ha="right", va="center")
            for i, picture in enumerate(row.tiles):
                x = left + i * pitch
                axes.add_patch(Rectangle((x, y - tile), tile, tile, color="black", linewidth=0, zorder=-1))
                half = tile / 2 * picture.shape[1] / max(picture.shape[:2])
                extent = (x + tile / 2 - half, x + tile / 2 + half, y - tile, y)
                kind = "nearest" if picture.ndim == 3 else "antialiased"
                axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation=kind, extent=extent, aspect="auto")
            y -= pitch
    axes.set(xlim=(0, width), ylim=(0, height))
    return figure
