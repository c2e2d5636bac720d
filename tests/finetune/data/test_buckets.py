"""Buckets: their sizes, the nearest one, and how a picture is fitted to it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.buckets import bucket_sizes, covering_size, cropped_share, nearest_bucket, prepare
from sdkit.errors import ConfigError
from sdkit.images.pixels import fit, open_image, to_tensor
from tests.finetune.data.painted import paint


@given(st.integers(2, 16), st.sampled_from([8, 16, 64]), st.integers(1, 6), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_buckets_are_all_the_sizes_that_fit_and_cannot_grow(blocks: int, step: int, low: int, more: int):
    resolution, shortest, longest = blocks * step, low * step, (low + more) * step
    sides = range(shortest, longest + 1, step)
    fitting = {(w, h) for w in sides for h in sides if w * h <= resolution**2}
    grown = {(w, h) for w, h in fitting if (w + step, h) in fitting and (w, h + step) in fitting}
    try:
        found = bucket_sizes(resolution, step, shortest, longest)
    except ConfigError:
        assert not fitting
        return
    assert set(found) <= fitting - grown and len(found) == len(set(found))
    assert {w for w, _ in found} == {w for w, _ in fitting}  # every side that is possible is there
    assert {(h, w) for w, h in found} == set(found)


def test_buckets_of_sd1_hold_the_known_ones():
    found = bucket_sizes(512, 64, 256, 1024)
    assert {(512, 512), (448, 576), (384, 640), (320, 768), (256, 1024), (768, 320)} <= set(found)
    with pytest.raises(ConfigError, match="multiple of 64 pixels, found 500"):
        bucket_sizes(500, 64, 256, 1024)


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_no_bucket_is_nearer(width: int, height: int):
    buckets = bucket_sizes(512, 64, 256, 1024)
    wanted = width / height
    error = {b: max(wanted / (b[0] / b[1]), (b[0] / b[1]) / wanted) for b in buckets}
    assert error[nearest_bucket((width, height), buckets)] == pytest.approx(min(error.values()))


def test_a_picture_is_scaled_and_cut_in_the_middle(tmp_path: Path):
    image = Image.open(paint(tmp_path / "a.png", (150, 80)))
    pixels = prepare(image, (48, 32), None, False, "x")
    expected = to_tensor(fit(image, 48, 32))
    assert pixels.shape == (1, 3, 32, 48) and float((pixels - expected).abs().max()) < 0.06
    assert torch.equal(prepare(image, (48, 32), None, True, "x"), pixels.flip(-1))
    crops = [prepare(image, (32, 32), k, False, "x") for k in (0, 1, 0)]
    assert torch.equal(crops[0], crops[2]) and not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], prepare(image, (32, 32), 0, False, "another file"))
    scaled = to_tensor(image.resize((60, 32), Image.Resampling.LANCZOS))
    near = [float((crops[0] - scaled[..., left : left + 32]).abs().max()) for left in range(29)]
    assert min(near) < 2 / 255 < sorted(near)[1]  # a cut, at full height, but for the rounding to 8 bits


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert float(prepare(clear, (32, 32), None, False, "x").min()) == 1.0
    half = Image.new("RGBA", (40, 40), (255, 0, 0, 51))  # a fifth of red on white
    expected = torch.tensor([1.0, 0.6, 0.6])[None, :, None, None]
    assert torch.allclose(prepare(half, (32, 32), None, False, "x"), expected.expand(1, 3, 32, 32), atol=1e-6)


def ramp() -> np.ndarray:
    """Greys from 0 to 255 in a slope over 90 x 60 pixels."""
    x, y = np.meshgrid(np.linspace(0, 1, 90), np.linspace(0, 1, 60))
    return np.round(255 * (0.7 * x + 0.3 * y)).astype(np.uint8)


def colours() -> Image.Image:
    return Image.fromarray(np.stack([ramp(), ramp()[::-1], ramp()[:, ::-1]], 2))


MODES: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "L": (lambda: Image.fromarray(ramp()), "png"),
    "LA": (lambda: Image.fromarray(ramp()).convert("LA"), "png"),
    "16 bits": (lambda: Image.fromarray(ramp().astype(np.uint16) * 257), "png"),
    "16 bits, TIFF": (lambda: Image.fromarray(ramp().astype(np.uint16) * 257), "tiff"),
    "16 bits, swapped": (lambda: Image.fromarray(ramp().astype(">u2") * 257), "tiff"),
    "32 bits of 8": (lambda: Image.fromarray(ramp().astype(np.int32)), "tiff"),
    "32 bits of 16": (lambda: Image.fromarray(ramp().astype(np.int32) * 257), "tiff"),
    "32 bits": (lambda: Image.fromarray((ramp() / 255 * (2**31 - 1)).astype(np.int32)), "tiff"),
    "floats to 1": (lambda: Image.fromarray((ramp() / 255).astype(np.float32)), "tiff"),
    "floats to 255": (lambda: Image.fromarray(ramp().astype(np.float32)), "tiff"),
    "1": (lambda: Image.fromarray(ramp()).convert("1"), "png"),
    "P": (lambda: colours().convert("P", palette=Image.Palette.ADAPTIVE), "png"),
    "PA": (lambda: colours().convert("P", palette=Image.Palette.ADAPTIVE).convert("PA"), ""),
    "RGBA": (lambda: colours().convert("RGBA"), "webp"),
    "RGBX": (lambda: colours().convert("RGBX"), ""),
    "RGBa": (lambda: colours().convert("RGBA").convert("RGBa"), ""),
    "CMYK": (lambda: colours().convert("CMYK"), "tiff"),
    "YCbCr": (lambda: colours().convert("YCbCr"), ""),
    "HSV": (lambda: colours().convert("HSV"), ""),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_as_its_rgb_does(mode: str, tmp_path: Path):
    """Deep greys as the 8-bit ramp, the others as what Pillow's own conversion to RGB gives."""
    make, kind = MODES[mode]
    image = make()
    rgb = Image.fromarray(ramp()).convert("RGB") if image.mode.startswith(("I", "F")) else image.convert("RGB")
    if kind:
        image.save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {}))
        image = open_image(tmp_path / f"a.{kind}")
    for size in ((90, 60), (48, 32), (32, 48), (128, 96)):
        found, expected = (prepare(picture, size, None, False, "x") for picture in (image, rgb))
        assert found.shape == (1, 3, size[1], size[0]) and float(found.abs().max()) <= 1
        assert float((found - expected).abs().max()) <= 2 / 255  # 1 of 255 in [-1, 1]
        assert float(found.min()) < -0.5 and float(found.max()) > 0.5


def test_sixteen_bits_are_kept(tmp_path: Path):
    fine = np.linspace(30000, 30100, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(fine).save(tmp_path / "a.png")
    found = prepare(open_image(tmp_path / "a.png"), (64, 64), None, False, "x")
    assert torch.allclose(found[0, 1], torch.from_numpy(fine / 65535.0 * 2 - 1).float(), atol=1e-6)
    assert len(found.unique()) > 90


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(bucket_sizes(64, 16, 32, 128)))
@settings(max_examples=60, deadline=None)
def test_the_share_that_cropping_takes_is_what_the_picture_lacks(width: int, height: int, bucket: tuple[int, int]):
    covering = covering_size((width, height), bucket)
    assert covering[0] >= bucket[0] and covering[1] >= bucket[1] and bucket[0] * bucket[1] > 0
    assert covering[0] == bucket[0] or covering[1] == bucket[1]
    ratio = (width / height) / (bucket[0] / bucket[1])
    assert cropped_share((width, height), bucket) == pytest.approx(1 - min(ratio, 1 / ratio), abs=0.5 / 32)
