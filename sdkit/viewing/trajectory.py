"""The way from noise to a picture, in one figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sdkit.errors import ConfigError
from sdkit.sampling.plan import Plan
from sdkit.sampling.plot import INK_CODE, draw_levels, empty_figure, heights_of, rendered
from sdkit.viewing.previews import Preview


def trajectory_figure(
    plan: Plan, previews: Sequence[Preview], index: int = 0, final: Image.Image | None = None, most: int = 10
) -> Image.Image:
    """Draw the way from noise to the picture: the plan's noise levels, and below them picture number ``index`` of the
    batch as it looked at the calls that were previewed (``most`` at most, evenly picked), then ``final``.

    Raises ConfigError without a preview, or for one of a call that the plan does not have.
    """
    if not previews or most < 1:
        raise ConfigError(f"trajectory figure: expected previews and most >= 1, found {len(previews)} and {most}")
    calls, (heights, limits) = len(plan.timesteps), heights_of(plan.levels)
    if max(p.step for p in previews) >= calls:
        raise ConfigError(f"trajectory figure: a preview of call {max(p.step for p in previews)} of {calls}")

    picked = np.unique(np.linspace(0, len(previews) - 1, min(most, len(previews))).round().astype(int))
    thumbnails = [(p.step, f"call {p.step}\n{p.label}", p.images[index]) for p in (previews[i] for i in picked)]
    if final is not None:
        thumbnails.append((calls, "final", final))

    left, right, below = 0.8, 0.2, 1.9  # inches beside and below the axes
    width, height = left + right + 1.3 * max(6, len(thumbnails)), below + 3.5
    figure = empty_figure(width, height)
    axes = figure.add_axes((left / width, (below + 0.4) / height, 1 - (left + right) / width, 2.3 / height))
    draw_levels(axes, plan.levels, plan.timesteps, plan.draws_noise, plan.title)
    axes.set_xlabel("")
    axes.tick_params(axis="x", labelbottom=False)

    slot = (width - left - right) / len(thumbnails)
    for i, (call, label, image) in enumerate(thumbnails):
        x = (left + slot * (i + 0.5)) / width
        panel = figure.add_axes((x - 0.61 / width, 0.5 / height, 1.22 / width, 1.22 / height), frameon=False)
        panel.imshow(image.convert("RGB"), interpolation="bicubic")
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(label, fontsize="small", color=INK_CODE)
        axes.vlines(call, limits[0], heights[call], color=INK_CODE, lw=0.6)
        axes.annotate(
            "",
            (call, 0),
            (x, 1.74 / height),
            axes.get_xaxis_transform(),
            "figure fraction",
            {"arrowstyle": "-", "color": INK_CODE, "lw": 0.6, "shrinkA": 0, "shrinkB": 0},
        )
    return rendered(figure)
