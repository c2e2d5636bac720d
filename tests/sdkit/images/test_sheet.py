"""Sheets of pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdkit.errors import ConfigError
from sdkit.images.sheet import contact_sheet


def test_grid_places_every_picture_whole() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    pictures = [Image.new("RGB", (40, 30), c) for c in colours]
    sheet = contact_sheet(pictures, columns=2, gap=4)
    assert sheet.size == (2 * 44 + 4, 2 * 34 + 4)
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert [int((pixels == c).all(1).sum()) for c in colours] == [1200] * 3
    captioned = contact_sheet(
        pictures, columns=2, captions=["one", "a caption of many words that has to wrap", ""], gap=4
    )
    assert captioned.width == sheet.width and captioned.height > sheet.height + 2 * 3 * 12
    pixels = np.asarray(captioned).reshape(-1, 3)
    assert [int((pixels == c).all(1).sum()) for c in colours] == [1200] * 3, "a caption covers a picture"
    with pytest.raises(ConfigError, match="2 captions for 3 pictures"):
        contact_sheet(pictures, 2, ["a", "b"])
    with pytest.raises(ConfigError):
        contact_sheet([], 2)
