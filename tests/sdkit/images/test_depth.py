"""Depth maps for the fifth channel."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit.errors import ConfigError
from sdkit.images.depth import depth_channel, read_depth
from tests.conftest import read_image


def test_the_channel_runs_from_minus_1_to_1_in_each_map() -> None:
    depth = (
        torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 900.0])[:, None, None]
    )
    channel = depth_channel(depth, (8, 12))
    assert channel.shape == (2, 1, 8, 12)
    assert torch.allclose(channel.amin((1, 2, 3)), torch.tensor(-1.0)) and torch.allclose(
        channel.amax((1, 2, 3)), torch.tensor(1.0)
    )
    expected = torch.nn.functional.interpolate(depth[:, None], (8, 12), mode="bicubic")
    correlation = torch.corrcoef(torch.stack([channel[1].flatten(), expected[1].flatten()]))[0, 1]
    assert correlation > 1 - 1e-6


@pytest.mark.parametrize("value", [0.0, 0.1, 3e4])
def test_a_constant_map_is_0(value: float) -> None:
    assert not depth_channel(torch.full((1, 33, 17), value), (8, 12)).any()
    mixed = depth_channel(torch.stack([torch.full((9, 9), value), torch.arange(81.0).reshape(9, 9)]), (8, 12))
    assert not mixed[0].any() and mixed[1].max() == 1


def test_maps_come_in_many_forms(tmp_path: Path) -> None:
    """An array is height x width."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 9), dtype=np.uint16)
    expected = torch.from_numpy(values.astype(np.float32))[None]
    Image.fromarray(values).save(tmp_path / "depth.png")
    grey16 = read_image(tmp_path / "depth.png")
    for given in (
        values,
        values[None],
        expected,
        expected[0],
        expected[None],
        grey16,
        tmp_path / "depth.png",
        str(tmp_path / "depth.png"),
        [values],
        Image.fromarray(values.astype(np.float32)),
    ):
        assert torch.equal(read_depth(given), expected)
    assert read_depth([values, values]).shape == (2, 5, 9)
    colour = Image.fromarray(np.dstack([values >> 8] * 3).astype(np.uint8))
    assert torch.equal(read_depth(colour), torch.from_numpy((values >> 8).astype(np.float32))[None])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3, 4, 5)), "found [2, 3, 4, 5]"),
        (np.zeros(3), "found [3]"),
        (np.zeros((0, 3)), "found [0, 3]"),
        (np.full((2, 2), np.nan), "expected finite values"),
        ([], "expected maps of one size, found none"),
        ([np.zeros((2, 2)), np.zeros((3, 2))], "found 2 x 2, 2 x 3"),
    ],
)
def test_maps_without_a_meaning_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_depth(given)
