"""Buckets: their sizes, the nearest one, and how a picture is fitted to it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.buckets import bucket_sizes, nearest_bucket, prepare
from sdkit.errors import ConfigError
from sdkit.images.pixels import fit, to_tensor
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
    assert any(torch.equal(crops[0], scaled[..., left : left + 32]) for left in range(29))  # a cut, at full height


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert float(prepare(clear, (32, 32), None, False, "x").min()) == 1.0
