"""Masks: what they select in every way of storing them, what a cell is, what is refused."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from sdkit.errors import ConfigError
from sdkit.images.masks import feather, mask_to_tensor, read_masks, sampled, touched
from sdkit.images.pixels import to_tensor
from tests.sdkit.tiny import mask

SQUARE = np.zeros((6, 8), bool)
SQUARE[1:4, 2:5] = True
GREY = Image.new("L", (8, 6), 128)
STROKES = [Image.fromarray(SQUARE.astype(np.uint8) * 200)]


def selected(source: Any) -> np.ndarray[Any, Any]:
    return mask_to_tensor(source)[0, 0].numpy() > 0


# ---- how a mask is stored --------------------------------------------------------------------------------------------


def palette(colours: list[int], on: int = 1, off: int = 0) -> Image.Image:
    labels = Image.fromarray(np.where(SQUARE, on, off).astype(np.uint8))
    image = Image.frombytes("P", labels.size, labels.tobytes())
    image.putpalette(colours + [9, 9, 9] * (256 - len(colours) // 3))
    return image


STORED: dict[str, Callable[[], Any]] = {
    "bool": lambda: SQUARE,
    "0 and 1, 8 bits": lambda: SQUARE.astype(np.uint8),
    "0 and 255, 8 bits": lambda: SQUARE.astype(np.uint8) * 255,
    "0 and 1, 64 bits": lambda: SQUARE.astype(np.int64),
    "0 and 255, 64 bits": lambda: SQUARE.astype(np.int64) * 255,
    "0 and 65535, 16 bits": lambda: SQUARE.astype(np.uint16) * 65535,
    "floats": lambda: SQUARE.astype(np.float32),
    "one channel": lambda: SQUARE[:, :, None].astype(np.uint8),
    "three channels": lambda: SQUARE[:, :, None].repeat(3, 2).astype(np.uint8) * 255,
    "tensor of bools": lambda: torch.from_numpy(SQUARE),
    "tensor of bytes": lambda: torch.from_numpy(SQUARE.astype(np.uint8))[None] * 255,
    "tensor of integers": lambda: torch.from_numpy(SQUARE.astype(np.int64))[None, None],
    "tensor of floats": lambda: torch.from_numpy(SQUARE).half()[None],
    "Pillow 1": lambda: Image.fromarray(SQUARE),
    "Pillow L": lambda: Image.fromarray(SQUARE.astype(np.uint8) * 255),
    "Pillow L of 0 and 1": lambda: Image.fromarray(SQUARE.astype(np.uint8)),
    "Pillow LA": lambda: Image.fromarray(SQUARE.astype(np.uint8) * 255).convert("LA"),
    "Pillow RGB of 0 and 1": lambda: Image.fromarray(SQUARE.astype(np.uint8)).convert("RGB"),
    "Pillow I of 0 and 1": lambda: Image.fromarray(SQUARE.astype(np.int32)),
    "Pillow I of 0 and 255": lambda: Image.fromarray(SQUARE.astype(np.int32) * 255),
    "Pillow I of 0 and 65535": lambda: Image.fromarray(SQUARE.astype(np.int32) * 65535),
    "Pillow I;16": lambda: Image.fromarray(SQUARE.astype(np.uint16) * 65535),
    "Pillow F of 0 and 1": lambda: Image.fromarray(SQUARE.astype(np.float32)),
    "Pillow F of 0 and 255": lambda: Image.fromarray(SQUARE.astype(np.float32) * 255),
    "Pillow CMYK": lambda: Image.fromarray(SQUARE.astype(np.uint8) * 255).convert("CMYK"),
    "Pillow LAB": lambda: Image.merge("LAB", [Image.fromarray(SQUARE.astype(np.uint8) * 255), GREY, GREY]),
    "palette, white": lambda: palette([0, 0, 0, 255, 255, 255]),
    "palette, white first": lambda: palette([255, 255, 255, 0, 0, 0], on=0, off=1),
    "palette of one dark label": lambda: palette([0, 0, 0, 128, 0, 0]),
    "palette of one bright label": lambda: palette([0, 0, 0] * 5 + [230, 230, 0], on=5),
    "palette, both labels bright": lambda: palette([255, 255, 0, 0, 255, 0]),
    "palette without a label 0": lambda: palette([9, 9, 9] * 3 + [90, 0, 0, 0, 0, 0], on=3, off=4),
    "palette of greys": lambda: palette([v for n in range(9) for v in (n, n, n)], on=7),
    "white on transparent": lambda: rgba(np.full((6, 8), 255), SQUARE * 255),
    "white on transparent black": lambda: rgba(SQUARE * 255, SQUARE * 255),
    "black on transparent": lambda: rgba(np.zeros((6, 8)), SQUARE * 255),
    "red on transparent": lambda: Image.merge("RGBA", [*STROKES, *2 * [Image.new("L", (8, 6))], *STROKES]),
    "black and white, half transparent": lambda: rgba(SQUARE * 255, np.full((6, 8), 90)),
}


def rgba(grey: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(np.stack([grey, grey, grey, alpha], axis=2).astype(np.uint8), "RGBA")


@pytest.mark.parametrize("stored", STORED)
def test_a_mask_selects_the_same_however_it_is_stored(stored: str, tmp_path: Path) -> None:
    given = STORED[stored]()
    found = read_masks(given, 6, 8)
    assert found.dtype == torch.float32 and np.array_equal(found[0, 0].numpy(), SQUARE)
    if isinstance(given, Image.Image) and given.mode != "LAB":
        file = tmp_path / ("mask.tif" if given.mode in ("I", "F", "CMYK") else "mask.png")
        given.save(file)
        assert np.array_equal(selected(file), SQUARE)


def test_soft_strokes_on_transparent_count_from_half_alpha_on() -> None:
    alpha = np.array([[0, 60, 200, 255]])
    assert selected(rgba(np.array([[0, 255, 255, 255]]), alpha)).tolist() == [[False, False, True, True]]


def test_greys_count_from_one_half_on() -> None:
    assert selected(np.array([[0, 127, 128, 255]], np.uint8)).tolist() == [[False, False, True, True]]
    assert selected(np.array([[0.49, 0.5]])).tolist() == [[False, True]]


def test_an_alpha_that_is_opaque_but_for_rounding_tells_nothing() -> None:
    grey, alpha = np.zeros((6, 6)), np.full((6, 6), 254)
    grey[2:4, 2:4], alpha[0, 0], alpha[5, 5] = 255, 255, 251
    assert selected(rgba(grey, alpha)).sum() == 4

    alpha[0, 0] = 0  # a rounded corner
    with pytest.raises(ConfigError, match="4 pixels are bright, 35 opaque, 4 both"):
        mask_to_tensor(rgba(grey, alpha))


def test_where_brightness_and_alpha_disagree_both_readings_are_named() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (6, 8))
    bright = int((photo >= 128).sum())
    with pytest.raises(ConfigError, match=f"{bright} pixels are bright, 39 opaque, .*'RGB'.*getchannel"):
        mask_to_tensor(rgba(photo, ~SQUARE * 255))  # a hole in a picture
    top = np.zeros((6, 8), bool)
    top[:3] = True
    with pytest.raises(ConfigError, match="9 pixels are bright, 24 opaque, 6 both"):
        mask_to_tensor(rgba(SQUARE * 255, top * 255))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4), np.uint8), "selects nothing: expected white (from 0.5 on) on black, found brightness from 0"),
        (np.full((4, 4), 0.25), "on black, found brightness from 0.25 to 0.25"),
        (rgba(np.zeros((2, 2)), np.zeros((2, 2))), "found brightness from 0 to 0 and alpha from 0 to 0"),
        (np.zeros((2, 2, 5)), "expected an array [H, W] or [H, W, 1 to 4], found [2, 2, 5]"),
        (np.full((2, 2), -1), "expected values from 0 to one of 1, 255, 65535, 2147483647; found -1 to 0"),
        (np.full((2, 2), np.nan), "found nan to nan"),
        (np.array([["a", "b"]]), "expected bools, integers or floats, found <U1"),
    ],
)
def test_what_is_no_mask_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="mask_image: .*" + re.escape(message)):
        mask_to_tensor(source)


def test_a_palette_of_many_coloured_labels_is_refused() -> None:
    image = palette([0, 0, 0, 128, 0, 0, 224, 224, 192])
    image.putpixel((7, 5), 2)
    with pytest.raises(ConfigError, match=r"a palette of 3 colours \(0, 1, 2\): expected .* one label beside 0"):
        mask_to_tensor(image)


# ---- sizes and cells -------------------------------------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], Any]:
    """A random mask that selects something, as bools and as one of the ways to store it."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    share = draw(st.sampled_from([0.002, 0.03, 0.3, 0.9]))
    wanted = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < share
    wanted[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = True

    bytes_ = Image.fromarray(wanted.astype(np.uint8) * 255)
    stored: dict[str, Any] = {
        "bools": wanted,
        "labels": wanted.astype(np.int32),
        "floats": wanted.astype(np.float32),
        "alpha": Image.merge("LA", [Image.new("L", bytes_.size, 255), bytes_]),
        **{mode: bytes_.convert(mode) for mode in ("1", "L", "I", "F", "RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV")},
        "I;16": Image.fromarray(wanted.astype(np.uint16) * 65535),
    }
    return wanted, stored[draw(st.sampled_from(sorted(stored)))]


def overlaps(size: int, cells: int) -> np.ndarray[Any, Any]:
    """[cells, size]: whether a cell and a pixel have more than an edge in common, in exact fractions."""
    ends = [(Fraction(size * i, cells), Fraction(size * (i + 1), cells)) for i in range(cells)]
    return np.array([[low < p + 1 and p < high for p in range(size)] for low, high in ends])


@settings(max_examples=300, deadline=None)
@given(masks(), st.sampled_from([2, 4, 8]), st.integers(1, 6), st.integers(1, 6))
def test_a_cell_is_repainted_exactly_if_the_mask_touches_it(
    drawn: tuple[np.ndarray[Any, Any], Any], factor: int, rows: int, columns: int
) -> None:
    wanted, stored = drawn
    pixels = read_masks(stored, rows * factor, columns * factor)
    expected = overlaps(wanted.shape[0], rows).astype(int) @ wanted @ overlaps(wanted.shape[1], columns).T > 0
    assert np.array_equal(touched(pixels, (rows, columns))[0, 0].numpy() > 0, expected)
    finer = overlaps(wanted.shape[0], rows * factor).astype(int) @ wanted
    assert np.array_equal(pixels[0, 0].numpy() > 0, finer @ overlaps(wanted.shape[1], columns * factor).T > 0)


@pytest.mark.parametrize(("low", "high"), [((17, 17), (24, 24)), ((100, 60), (107, 400)), ((13, 0), (14, 512))])
def test_small_masks_at_512_pixels_are_not_lost(low: tuple[int, int], high: tuple[int, int]) -> None:
    white = np.zeros((512, 512), np.uint8)
    white[low[0] : high[0], low[1] : high[1]] = 255
    cells = touched(read_masks(white, 512, 512), (64, 64))[0, 0]
    sides = [math.ceil(b / 8) - a // 8 for a, b in zip(low, high, strict=True)]
    assert cells.sum() == sides[0] * sides[1]
    assert cells[low[0] // 8, low[1] // 8] == 1 == cells[(high[0] - 1) // 8, (high[1] - 1) // 8]


def test_masks_come_to_the_pictures_size() -> None:
    large = mask().resize((96, 64), Image.Resampling.NEAREST)
    both = read_masks([large, torch.ones(1, 5, 5)], 32, 48)
    assert torch.equal(both[:1], (to_tensor(mask())[:, :1] > 0).float()) and both[1].min() == 1


def test_the_mask_channel_is_the_nearest_pixel_of_each_cell_and_loses_nothing() -> None:
    white = np.zeros((64, 64), np.uint8)
    white[18:45, 13:50] = 255
    expected = torch.nn.functional.interpolate(torch.from_numpy(white)[None, None] / 255, (8, 8))
    assert torch.equal(sampled(mask_to_tensor(white), (8, 8)), expected) and expected.sum() == 15
    white[1:8, 2:23] = 255  # touches three cells, and the pixel of none
    found = sampled(mask_to_tensor(white), (8, 8))
    expected[0, 0, 0, :3] = 1
    assert torch.equal(found, expected)


# ---- soft edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [0, 1, 4])
def test_a_feather_falls_evenly_with_the_distance(pixels: int) -> None:
    """Chessboard distance, by scipy."""
    white = torch.rand(1, 1, 30, 40, generator=torch.Generator().manual_seed(0)).gt(0.98).float()
    distance = torch.from_numpy(distance_transform_cdt(white[0, 0].numpy() == 0, "chessboard"))
    expected = (1 - distance / (pixels + 1)).clamp(0)
    weights = feather(white, pixels)[0, 0]
    assert torch.allclose(weights, expected.float(), atol=1e-6)
    assert torch.equal(weights == 0, expected == 0) and torch.equal(weights == 1, white[0, 0] == 1)
