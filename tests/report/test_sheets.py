"""Picture sheets: the right tiles in the right order, wrong tensors named, nothing invented."""

import io

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gaitfast.report.run import Run
from gaitfast.report.sheets import SHOWN_CLIPS, SHOWN_FRAMES, draw, read_sheets
from gaitfast.report.style import LIGHT, render
from tests.report.fake_run import pictures


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return pictures(np.random.Generator(np.random.Philox(1)))


def read(folder, tensors):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "pictures.safetensors")
    run = Run(folder)
    return read_sheets(run), run.notices


def test_tiles_are_the_stored_pictures(tmp_path, tensors):
    sheets, notices = read(tmp_path, tensors)
    assert notices == []
    columns = sheets.augmentation.columns
    assert columns == ("Original", "Affine", "Perspective", "Flip", "Part dilate", "Part blur")
    keys = ("original", "affine", "perspective", "flip", "part_dilate", "part_blur")
    for i, row in enumerate(sheets.augmentation.rows):
        for key, tile in zip(keys, row.tiles):
            np.testing.assert_array_equal(tile, tensors[f"augment.{key}"][i])
    assert len(sheets.samples) == SHOWN_CLIPS
    shown = sheets.samples[1].rows
    assert [row.label for row in shown] == ["Condition", "Target", "Noised", "Denoised", "Generated"]
    assert all(len(row.tiles) == SHOWN_FRAMES for row in shown)
    np.testing.assert_array_equal(shown[0].tiles[0], tensors["samples.condition"][1, 0])
    np.testing.assert_array_equal(shown[4].tiles[-1], tensors["samples.generated"][1, -1])


def test_reconstruction_error_is_measured_on_all_frames(tmp_path, tensors):
    sheets, _ = read(tmp_path, tensors)
    difference = tensors["autoencoder.frames"].astype(float) - tensors["autoencoder.decoded"]
    assert f"over the 6 frames stored: {100 * np.abs(difference).mean() / 255:.2f}%" in sheets.autoencoder.facts


def test_latent_colours_are_signed_and_centred(tmp_path, tensors):
    latents = np.zeros((6, 4, 8, 8), np.float32)
    latents[0, 0, 0, :3] = -2, 2, np.nan
    sheets, notices = read(tmp_path, {**tensors, "autoencoder.latents": latents})
    tile = sheets.autoencoder.rows[0].tiles[1].astype(int)
    assert notices == [] and tile.shape == (8, 8, 3)
    negative, positive, bad, zero = tile[0, 0], tile[0, 1], tile[0, 2], tile[5, 5]
    assert negative[2] > negative[0] + 80 and positive[0] > positive[2] + 80
    assert zero.min() > 225 and bad.max() == 0
    zeros, notices = read(tmp_path, {**tensors, "autoencoder.latents": np.zeros_like(latents)})
    assert notices == [] and zeros.autoencoder.rows[0].tiles[1].min() > 225


@pytest.mark.parametrize(
    ("name", "tensor", "lost"),
    [
        ("autoencoder.latents", np.zeros((6, 3, 8, 8), np.float32), "autoencoder"),
        ("autoencoder.latents", np.zeros((6, 4, 8, 8), np.float64), "autoencoder"),
        ("autoencoder.decoded", np.zeros((5, 64, 64), np.uint8), "autoencoder"),
        ("autoencoder.decoded", np.zeros((6, 64, 44), np.uint8), "autoencoder"),
        ("autoencoder.frames", np.zeros((0, 64, 64), np.uint8), "autoencoder"),
        ("augment.flip", np.zeros((6, 64), np.uint8), ""),
        ("samples.noised", np.zeros((3, 30, 64, 64), np.float32), ""),
    ],
)
def test_wrong_tensor_is_named_and_the_rest_is_shown(tmp_path, tensors, name, tensor, lost):
    sheets, notices = read(tmp_path, {**tensors, name: tensor})
    assert len(notices) == 1 and name.split(".")[1] in notices[0] and notices[0].startswith("pictures.safetensors: ")
    assert (sheets.autoencoder is None) == (lost == "autoencoder")
    assert sheets.augmentation is not None and sheets.samples


def test_parts_may_be_absent(tmp_path, tensors):
    sheets, notices = read(tmp_path, {name: t for name, t in tensors.items() if name.startswith("augment")})
    assert notices == [] and sheets.autoencoder is None and sheets.samples == ()
    (tmp_path / "pictures.safetensors").unlink()
    assert read_sheets(Run(tmp_path)).augmentation is None


def test_short_clips_show_every_frame_once(tmp_path):
    clips = np.arange(2 * 4 * 64 * 64, dtype=np.uint64).reshape(2, 4, 64, 64).astype(np.uint8)
    clips[:] = np.arange(4, dtype=np.uint8)[:, None, None]
    sheets, _ = read(tmp_path, {"samples.target": clips})
    assert [int(tile[0, 0]) for tile in sheets.samples[0].rows[0].tiles] == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0garbage", b"\xff" * 100])
def test_corrupt_file_is_a_notice(tmp_path, content):
    (tmp_path / "pictures.safetensors").write_bytes(content)
    run = Run(tmp_path)
    assert read_sheets(run).augmentation is None
    assert len(run.notices) == 1 and "pictures.safetensors: cannot be read" in run.notices[0]


def test_drawn_sheet_shows_the_silhouettes(tmp_path):
    """The one PNG of a sheet has the tiles where they belong: white where the picture is white, black elsewhere."""
    original = np.zeros((2, 64, 64), np.uint8)
    original[0, :32] = 255
    sheets, _ = read(tmp_path, {"augment.original": original, "augment.flip": 255 - original})
    png = render(lambda theme: draw([sheets.augmentation], theme), LIGHT)
    grey = np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=int)
    dark = grey < 40
    tile_rows = np.flatnonzero(dark.mean(axis=1) > 0.3)
    first = grey[tile_rows[0] : tile_rows[-1]]
    height, width = first.shape[0] // 2, first.shape[1] // 2
    assert dark[tile_rows].mean() > 0.3
    upper_right, lower_left = first[: height // 3, width + 30 : -30], first[height + 30 :, 40 : width - 40]
    assert upper_right.mean() < 20 and lower_left.mean() < 20
