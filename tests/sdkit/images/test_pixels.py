"""Pictures to tensors and back, masks, metadata, sheets."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sdkit.errors import ConfigError, NumericalError, SDKitError
from sdkit.generation.png import a1111_parameters, read_parameters, write_png
from sdkit.images.pixels import check_size, fit, mask_to_tensor, to_pil, to_tensor
from sdkit.images.sheet import grid

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PARAMETERS: dict[str, Any] = {
    "prompt": "ein grüner Würfel, 赤い球 😀",
    "negative_prompt": "blurry, text:\nugly",
    "num_inference_steps": 30,
    "sampler": "dpmpp_2m",
    "sigmas": "karras",
    "guidance_scale": 7.5,
    "seed": 18446744073709551615,
    "width": 64,
    "height": 96,
    "model": "tabletop",
    "clip_skip": 1,
    "eta": 0.1 + 0.2,
}


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


def test_mask_threshold_alpha_and_nearest_resizing() -> None:
    mask = mask_to_tensor(np.array([[0, 127, 128, 255]], np.uint8))
    assert mask.dtype == torch.float32 and mask.tolist() == [[[[0, 0, 1, 1]]]]
    assert mask_to_tensor(np.array([[0.49, 0.5]])).tolist() == [[[[0, 1]]]]
    assert mask_to_tensor(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).item() == 1
    big = np.zeros((8, 8), np.uint8)
    big[:, 4:] = 255
    assert mask_to_tensor(Image.fromarray(big), size=(2, 4))[0, 0].tolist() == [[0, 0, 1, 1]] * 2


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


def test_png_metadata_round_trip(tmp_path: Path) -> None:
    path = write_png(Image.fromarray(RGB), tmp_path / "a.png", PARAMETERS)
    assert read_parameters(path) == PARAMETERS
    assert np.array_equal(np.asarray(Image.open(path)), RGB)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a1111_reads_the_parameters_chunk(tmp_path: Path) -> None:
    """Parsed by the rules of the web UI's ``parse_generation_parameters``."""
    path = write_png(Image.fromarray(RGB), tmp_path / "a.png", PARAMETERS)
    with Image.open(path) as image:
        *lines, last = image.info["parameters"].strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert values == {
        "Steps": "30",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Model": "tabletop",
        "Seed": "18446744073709551615",
        "Size": "64x96",
        "Clip skip": "2",
        "Version": "sdkit",
    }
    start = next(i for i, line in enumerate(lines) if line.startswith("Negative prompt:"))
    assert "\n".join(lines[:start]) == PARAMETERS["prompt"]
    assert "\n".join(lines[start:]).removeprefix("Negative prompt: ") == PARAMETERS["negative_prompt"]
    assert 'Model: "a, b: c"' in a1111_parameters({"model": "a, b: c"})
    facts = {"strength": 0.6, "mask_blur": 4, "variation_seed": 3, "variation_strength": 0.2}
    expected = "Denoising strength: 0.6, Mask blur: 4, Variation seed: 3, Variation seed strength: 0.2"
    assert expected in a1111_parameters(facts)
    hires = {"hires_scale": 2.0, "hires_strength": 0.5, "hires_steps": 9}
    assert "Denoising strength: 0.5, Hires upscale: 2.0, Hires steps: 9" in a1111_parameters(hires)


def test_pictures_without_our_metadata_say_so(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "plain.png")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sdkit", "{")
    Image.fromarray(RGB).save(tmp_path / "damaged.png", pnginfo=chunks)
    for name, message in (("plain.png", "no sdkit metadata"), ("damaged.png", "damaged sdkit metadata")):
        with pytest.raises(SDKitError, match=f"{name}: {message}"):
            read_parameters(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_png(Image.fromarray(RGB), tmp_path / "a.png", {"seed": 1})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="metadata that JSON cannot hold"):
        write_png(Image.fromarray(RGB), path, {"seed": float("nan")})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SDKitError, match=r"a\.png: cannot be written \(No space left on device\)"):
        write_png(Image.fromarray(RGB), path, {"seed": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("target", ["missing/a.png", "folder"])
def test_unwritable_targets_are_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SDKitError, match=f"{target}: cannot be written"):
        write_png(Image.fromarray(RGB), tmp_path / target)
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


def test_grid_places_every_picture_whole() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    pictures = [Image.new("RGB", (40, 30), c) for c in colours]
    sheet = grid(pictures, columns=2, gap=4)
    assert sheet.size == (2 * 44 + 4, 2 * 34 + 4)
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert [int((pixels == c).all(1).sum()) for c in colours] == [1200] * 3
    captioned = grid(pictures, columns=2, captions=["one", "a caption of many words that has to wrap", ""], gap=4)
    assert captioned.width == sheet.width and captioned.height > sheet.height + 2 * 3 * 12
    pixels = np.asarray(captioned).reshape(-1, 3)
    assert [int((pixels == c).all(1).sum()) for c in colours] == [1200] * 3, "a caption covers a picture"
    with pytest.raises(ConfigError, match="2 captions for 3 pictures"):
        grid(pictures, 2, ["a", "b"])
    with pytest.raises(ConfigError):
        grid([], 2)
