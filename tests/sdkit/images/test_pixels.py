"""Pictures to tensors and back, sizes."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit.errors import ConfigError, NumericalError, SDKitError
from sdkit.images.pixels import check_size, fit, to_pil, to_tensor, unit_floats

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_to_tensor_matches_the_preprocessing_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    image = Image.fromarray(RGB)
    expected = VaeImageProcessor(vae_scale_factor=1).preprocess(image)
    assert to_tensor(image).shape == (1, 3, 6, 8) and to_tensor(image).dtype == torch.float32
    torch.testing.assert_close(to_tensor(image), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(to_tensor(RGB.astype(np.float64) / 255), expected, rtol=0, atol=1e-6)


def test_eight_bit_round_trip_is_exact_and_out_of_range_is_clamped() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(to_pil(to_tensor(levels))[0])[..., 1], levels)
    batch = torch.tensor([-3.0, 3.0])[:, None, None, None].expand(2, 3, 2, 2)
    assert [i.getpixel((0, 0)) for i in to_pil(batch)] == [(0, 0, 0), (255, 255, 255)]
    assert to_pil(torch.full((1, 3, 1, 1), 0.5, dtype=torch.bfloat16))[0].getpixel((0, 0)) == (191, 191, 191)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_agrees_with_pillows_own_conversion(mode: str) -> None:
    image = Image.fromarray(RGB).convert("L" if mode == "LA" else "RGB").convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(np.float32) / 255 * 2 - 1
    assert np.allclose(to_tensor(image)[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_sixteen_bit_grey_keeps_its_levels(tmp_path: Path) -> None:
    levels = np.array([[0, 1, 257], [32768, 65534, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    expected = torch.from_numpy(levels.astype(np.float64) / 65535 * 2 - 1).float()
    for source in (tmp_path / "grey.png", str(tmp_path / "grey.png"), levels):
        tensor = to_tensor(source)
        assert tensor.shape == (1, 3, 2, 3)
        torch.testing.assert_close(tensor[0, 2], expected, rtol=0, atol=2e-7)


LEVELS = np.array([[0, 3, 60], [128, 254, 255]])


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(LEVELS.astype(np.int32)),
        Image.fromarray((LEVELS * 257).astype(np.int32)),
        Image.fromarray((LEVELS / 255 * (2**31 - 1)).astype(np.int32)),
        Image.fromarray((LEVELS / 255).astype(np.float32)),
        Image.fromarray(LEVELS.astype(np.float32)),
        Image.fromarray((LEVELS * 257).astype(np.uint16)),
        Image.fromarray(LEVELS.astype(np.uint8)).convert("LA"),
        Image.fromarray(LEVELS.astype(np.uint8)).convert("PA"),
        Image.fromarray(LEVELS.astype(np.uint8)).convert("RGBX"),
        Image.fromarray(LEVELS.astype(np.uint8)).convert("RGBA").convert("RGBa"),
        Image.fromarray(LEVELS.astype(np.uint8)).convert("LA").convert("La"),
    ],
    ids=lambda image: f"{image.mode} to {np.asarray(image).max():.3g}",
)
def test_pillows_wide_and_rare_modes_have_the_right_levels(image: Image.Image, tmp_path: Path) -> None:
    expected = torch.from_numpy(LEVELS / 255 * 2 - 1).float().expand(1, 3, 2, 3)
    assert torch.allclose(to_tensor(image), expected, atol=1e-6)
    if image.mode in ("I", "F", "I;16"):
        image.save(tmp_path / "grey.tif")
        assert torch.allclose(to_tensor(tmp_path / "grey.tif"), expected, atol=1e-6)


def test_lab_is_read_through_its_profile() -> None:
    white = Image.merge("LAB", [Image.new("L", (1, 1), v) for v in (255, 128, 128)])
    red = Image.merge("LAB", [Image.new("L", (1, 1), v) for v in (136, 208, 195)])  # L 53, a 80, b 67: sRGB's red
    assert np.allclose(unit_floats(white)[0, 0], [1, 1, 1], atol=0.01)
    assert np.allclose(unit_floats(red)[0, 0], [1, 0, 0], atol=0.05)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I", (2, 2), -3), "from 0 to one of 255, 65535, 2147483647; found -3 to 0"),
        (Image.new("F", (2, 2), 300.0), "from 0 to one of 1, 255; found 0 to 300"),
        (Image.new("F", (2, 2), float("nan")), "found nan to nan"),
    ],
)
def test_values_outside_of_every_range_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_tensor(image)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (1, 1), (255, 0, 0, 51))  # alpha 0.2
    torch.testing.assert_close(to_tensor(rgba).flatten(), torch.tensor([1.0, 0.6, 0.6]))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    torch.testing.assert_close(to_tensor(tmp_path / "p.png")[0, :, 0].T, torch.tensor([[1.0, 1, 1], [-1, -1, 1]]))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = to_tensor(image.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(to_tensor(tmp_path / "turned.png"), upright)
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(to_tensor(opened), upright)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2)), "found [2, 2, 2]"),
        (np.zeros((0, 4, 3), np.uint8), "found [0, 4, 3]"),
        (np.zeros((2, 2), np.int64), "found int64"),
        (np.full((2, 2), 255.0), "found floats in [0, 1], found 255 to 255"),
        (np.array([[0.5, np.nan]]), "nan"),
    ],
)
def test_arrays_without_a_meaning_are_refused(array: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message.removeprefix("found floats"))):
        to_tensor(array)


def test_unreadable_files_give_one_line_with_the_name(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:3000])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "text.png", "empty.png", "missing.png", ""):
        with pytest.raises(SDKitError, match=re.escape(str(tmp_path / name))):
            to_tensor(tmp_path / name)


def test_not_finite_names_the_stage_and_the_picture() -> None:
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0, 0, 0] = torch.inf
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match=re.escape("VAE decoder: 2 of 36 values are not finite (pictures [1, 2])")):
        to_pil(images)
    with pytest.raises(ConfigError, match="preview"):
        to_pil(images[0], stage="preview")


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (13, 64, "width 13 is not a positive multiple of 4: use 12 or 16"),
        (64, 2, "height 2 is not a positive multiple of 4: use 4"),
        (0, 8, "width 0 is not a positive multiple of 4: use 4"),
        (8, -5, "height -5 is not a positive multiple of 4: use 4"),
        (6, 7, "use 4 or 8; height 7"),
    ],
)
def test_wrong_sizes_name_the_nearest_valid_ones(width: int, height: int, message: str) -> None:
    check_size(64, 4, 4)
    with pytest.raises(ConfigError, match=message):
        check_size(width, height, 4)


def test_fit_covers_and_crops_in_the_middle() -> None:
    bands = np.zeros((10, 30, 3), np.uint8)
    bands[:, 10:20] = 255
    assert np.asarray(fit(Image.fromarray(bands), 10, 10)).min() == 255
