"""Attention maps laid over their picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.viewing.attention_maps import AttentionMaps, Word
from sdkit.viewing.attention_sheet import attention_sheet


def bump(row: int, column: int, height: float) -> Tensor:
    values = torch.full((8, 8), 0.01)
    values[row, column] = height
    return values


def test_sheet() -> None:
    values = torch.stack([bump(0, 0, 1), bump(0, 0, 1), bump(1, 1, 0.3), bump(6, 5, 0.06)])[None]
    maps = AttentionMaps(values, ((Word("the", (1,)), Word("sphere", (2,)), Word(",", (0,)), Word("cube", (3,))),))
    picture = Image.new("RGB", (64, 64), (120, 120, 120))

    def panels(**options: Any) -> list[np.ndarray]:
        sheet = np.asarray(attention_sheet(picture, maps, **options)).astype(int)
        assert sheet.shape[0] < 310, "one row"
        return [sheet[8 : 8 + 256, x : x + 256].sum(2) for x in range(8, sheet.shape[1] - 256, 264)]

    plain, sphere, cube = panels()  # neither "the" nor ","
    assert (plain == 360).all(), "the picture itself comes first, four times as large"
    for panel, centre in ((sphere, (48, 48)), (cube, (208, 176))):
        peak = np.unravel_index(panel.argmax(), panel.shape)
        assert max(abs(int(a) - b) for a, b in zip(peak, centre, strict=True)) < 20
    assert abs(int(sphere.max()) - int(cube.max())) < 10, "each over its own range"
    _, first, second = panels(scale="shared")
    assert np.array_equal(first, sphere) and second.max() < 0.6 * cube.max(), "the weaker word is darker"
    assert len(panels(words=["the", "cube", ","])) == 4
    assert len(panels(words=[])) == 1
    second_of_two = AttentionMaps(torch.cat([values.flip(1), values]), ((), maps.words[0]))
    expected = attention_sheet(picture, maps)
    assert np.array_equal(np.asarray(attention_sheet(picture, second_of_two, index=1)), np.asarray(expected))
    with pytest.raises(ConfigError, match="'both'"):
        attention_sheet(picture, maps, scale="both")
    with pytest.raises(ConfigError, match="'torus' is not"):
        attention_sheet(picture, maps, ["torus"])
