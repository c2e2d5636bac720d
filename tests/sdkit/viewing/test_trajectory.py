"""The way from noise to a picture, in one figure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit.errors import ConfigError
from sdkit.sampling.planning import make_plan
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.viewing.previews import Preview
from sdkit.viewing.trajectory import trajectory_figure


def test_trajectory_shows_the_previews_in_order_below_the_plan() -> None:
    plan = make_plan("ddim", NoiseSchedule(), 12)
    colours = [(20 * k + 10, 230 - 20 * k, 77) for k in range(12)]
    other = (90, 5, 190)
    pairs = [[Image.new("RGB", (8, 8), color) for color in (other, own)] for own in colours]
    previews = [Preview(k, float(plan.timesteps[k]), pair, torch.empty(0)) for k, pair in enumerate(pairs)]
    final = Image.new("RGB", (8, 8), (250, 5, 5))

    def columns(figure: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
        rows, found = np.nonzero((np.asarray(figure) == colour).all(2))
        assert not len(rows) or rows.min() > figure.height / 2
        return found

    figure = trajectory_figure(plan, previews, 1, final, most=4)
    places = [columns(figure, colour) for colour in [*(colours[k] for k in (0, 4, 7, 11)), (250, 5, 5)]]
    assert all(len(place) > 10_000 for place in places)
    means = [place.mean() for place in places]
    assert means == sorted(means)
    assert not len(columns(figure, colours[5])) and not len(columns(figure, other))
    assert trajectory_figure(plan, previews, 1, final, most=12).width > figure.width
    assert not len(columns(trajectory_figure(plan, previews[:2], 1), (250, 5, 5)))
    with pytest.raises(ConfigError, match="found 0"):
        trajectory_figure(plan, [])
    with pytest.raises(ConfigError, match="call 11 of 5"):
        trajectory_figure(make_plan("ddim", NoiseSchedule(), 5), previews)
