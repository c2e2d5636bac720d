"""The noise levels of a sampling run as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from sdkit.images.sheet import INK, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK_CODE, PAPER_CODE = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (INK, PAPER))
"""The colours of sheets, as matplotlib takes them."""

PALE, LINE = "#c8c8c4", "#3b6ea5"


def plot_levels(levels: Tensor, timesteps: Tensor, draws_noise: Tensor, title: str) -> Image.Image:
    """Draw noise levels as a picture of their own (`draw_levels`)."""
    figure = empty_figure(8.0, 4.2)
    draw_levels(figure.add_axes((0.1, 0.14, 0.87, 0.66)), levels, timesteps, draws_noise, title)
    return rendered(figure)


def draw_levels(axes: Axes, levels: Tensor, timesteps: Tensor, draws_noise: Tensor, title: str) -> None:
    """Draw noise / signal (Karras's sigma) into matplotlib axes: before each of K network calls and at the end.

    levels [K + 1, 2], timesteps [K], draws_noise [K] as in `sdkit.sampling.plan.Plan`; timesteps stand along the top.
    Calls that draw fresh noise have hollow marks. A level without noise (or without signal) has no place on a
    logarithmic axis: it lies on the axes' edge, at the end of a dotted line.
    """
    calls, (heights, limits) = len(timesteps), heights_of(levels)
    at = np.arange(calls + 1)
    exact = (heights > limits[0]) & (heights < limits[1])

    # The line, dotted where one of its ends has no place on the axis.
    for k in range(calls):
        axes.plot(at[k : k + 2], heights[k : k + 2], "-" if exact[k : k + 2].all() else ":", color=LINE, lw=1.5)

    # The calls, and the end.
    fresh = np.append(draws_noise.numpy(), False)
    for marked, fill, label in ((~fresh, LINE, "network call"), (fresh, PAPER_CODE, "network call that draws noise")):
        if marked[:calls].any():
            here = marked & (at < calls)
            axes.plot(at[here], heights[here], "o", ms=5.5, mec=LINE, mfc=fill, label=label, clip_on=False, zorder=3)
    end = "end" if exact[-1] else "end, no noise"
    axes.plot(calls, heights[-1], "s", ms=6, mfc=INK_CODE, mec=INK_CODE, label=end, clip_on=False, zorder=3, ls="none")

    # Axes and words.
    axes.set(yscale="log", ylim=limits, xlim=(-0.3, calls + 0.3), xlabel="call", ylabel="noise / signal")
    axes.set_title(title, loc="left", fontsize="medium", color=INK_CODE)
    ticks = at[: calls : max(1, -(-calls // 10))]
    axes.set_xticks(ticks)
    top = axes.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{t:.0f}" for t in timesteps[ticks].tolist()])
    top.set_xlabel("timestep")
    axes.grid(color=PALE, lw=0.5)
    axes.legend(frameon=False, fontsize="small")

    for part in (axes, top):
        part.tick_params(which="both", color=PALE, labelcolor=INK_CODE)
        part.xaxis.label.set_color(INK_CODE)
        part.yaxis.label.set_color(INK_CODE)
        for spine in part.spines.values():
            spine.set_color(PALE)


def heights_of(levels: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Noise / signal [K + 1] of levels [K + 1, 2], and the limits of an axis that has room for them.

    Zero and infinity, which a logarithmic axis cannot hold, are put on its limits.
    """
    signal, noise = levels.unbind(1)
    sigma = (noise / signal).numpy()
    held = sigma[np.isfinite(sigma) & (sigma > 0)]
    limits = (float(held.min()) / 3, float(held.max()) * 3) if held.size else (0.1, 10.0)
    return np.clip(sigma, *limits), limits


def empty_figure(width: float, height: float) -> Figure:
    """A figure of width x height inches, apart from pyplot and its global state."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=110, facecolor=PAPER_CODE)


def rendered(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
