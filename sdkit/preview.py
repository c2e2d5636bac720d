"""Watching a picture emerge: previews during sampling, the film strip made of them, and plots of the noise levels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sdkit.errors import ConfigError, NumericalError
from sdkit.image import INK, PAPER, grid, to_pil, write_png
from sdkit.vae import AutoencoderKL, decode_latents

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sdkit.plan import Plan

PreviewMode = Literal["decode", "fast"]

_PAPER, _INK = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (PAPER, INK))
_PALE, _LINE = "#c8c8c4", "#3b6ea5"

_projections: WeakKeyDictionary[AutoencoderKL, torch.Tensor] = WeakKeyDictionary()


@dataclass(frozen=True)
class Preview:
    """What the pictures of a batch looked like after a step."""

    step: int  # counted from 0
    timestep: float  # of the network call, in training timesteps
    images: list[Image.Image]  # one per picture of the batch

    @property
    def label(self) -> str:
        return f"t = {self.timestep:.0f}"


@dataclass(frozen=True)
class Previewer:
    """Turns latents into preview pictures, every ``every`` network calls (0: never).

    ``mode`` "decode" runs the VAE decoder: full size, exact. "fast" projects each latent cell to one pixel
    (``latent_to_rgb``): tiny, rough, almost free. Raises ConfigError for a negative ``every`` or another mode.
    """

    vae: AutoencoderKL
    every: int = 0
    mode: PreviewMode = "decode"

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 0:
            raise ConfigError(f"preview_every: expected 0 (none) or a number of steps, found {self.every!r}")
        if self.mode not in ("decode", "fast"):
            raise ConfigError(f"preview mode: expected 'decode' or 'fast', found {self.mode!r}")

    def wants(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is to be shown: the first, and every ``every``-th after it."""
        return self.every > 0 and step % self.every == 0

    @torch.no_grad()
    def frames(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents [B, C, h, w] in the noise predictor's scale, usually its estimate of x0.

        Raises NumericalError when they are not finite.
        """
        if self.mode == "fast":
            return to_pil(latent_to_rgb(self.vae, latents), stage="preview")
        return to_pil(decode_latents(self.vae, latents), stage="preview, VAE decoder")


def latent_to_rgb(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w], in the noise predictor's scale, to pictures [B, 3, h, w], float32, about [-1, 1].

    The best linear guess at the decoder: see ``rgb_projection``.
    """
    projection = rgb_projection(vae).to(latents.device)
    return torch.einsum("bchw,ck->bkhw", latents.float(), projection[:-1]) + projection[-1][:, None, None]


@torch.no_grad()
def rgb_projection(vae: AutoencoderKL, pictures: int = 12, cells: int = 8) -> torch.Tensor:
    """The matrix [C + 1, 3] (the last row is the bias) that takes a latent cell to its mean colour.

    Least squares over what the decoder makes of ``pictures`` smooth random latents of cells x cells, each cell
    against the mean of its pixels. Fitted once per VAE object and kept while it lives; draws from a generator
    of its own. Raises NumericalError when the decoder gives nothing finite.
    """
    known = _projections.get(vae)
    if known is not None:
        return known
    weight, channels = next(vae.parameters()), vae.config.latent_channels
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(pictures, channels, 1, 1, generator=generator)
    detail = F.interpolate(torch.randn(pictures, channels, 4, 4, generator=generator), (cells, cells), mode="bicubic")
    latents = 0.7 * (base + detail)  # about the spread that scaled latents have
    decoded = vae.decode((latents / vae.config.scaling_factor).to(weight.device, weight.dtype))
    colours = F.adaptive_avg_pool2d(decoded.float().cpu(), (cells, cells)).permute(0, 2, 3, 1).reshape(-1, 3).double()
    features = F.pad(latents.permute(0, 2, 3, 1).reshape(-1, channels), (0, 1), value=1.0).double()
    finite = colours.isfinite().all(1)
    if int(finite.sum()) <= channels:
        raise NumericalError("preview: the VAE decoder gives no finite colours to fit the fast projection to")
    # Not the default "gels": a constant latent channel leaves the system short of rank, which it cannot solve.
    solution = torch.linalg.lstsq(features[finite], colours[finite], driver="gelsd").solution.float()
    _projections[vae] = solution
    return solution


def film_strip(
    previews: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    final: Image.Image | None = None,
    columns: int = 10,
    min_side: int = 160,
) -> Image.Image:
    """The picture emerging from noise: ``previews`` in order, then ``final``, each with a small label below.

    All frames get the final picture's size (the largest preview's when there is none), scaled up by a whole
    factor to at least ``min_side`` pixels; more than ``columns`` frames go on in the next row. Raises
    ConfigError for no frame, or when the numbers of labels and previews differ.
    """
    texts = list(labels) if labels is not None else [""] * len(previews)
    if len(texts) != len(previews):
        raise ConfigError(f"film strip: {len(texts)} labels for {len(previews)} previews")
    frames = list(previews)
    if final is not None:
        frames.append(final)
        texts.append("final" if labels is not None else "")
    if not frames:
        raise ConfigError("film strip: there is no frame")
    width, height = (final or max(frames, key=lambda f: f.width * f.height)).size
    factor = -(-min_side // min(width, height)) if min(width, height) < min_side else 1
    size = (width * factor, height * factor)
    scaled = [f if f.size == size else f.convert("RGB").resize(size, Image.Resampling.BICUBIC) for f in frames]
    rows = -(-len(scaled) // columns)
    return grid(scaled, -(-len(scaled) // rows), texts if any(texts) else None, gap=max(6, size[0] // 24), font_size=13)


def plot_plan(plan: Plan, path: str | os.PathLike[str] | None = None) -> Image.Image:
    """The noise levels of a plan (`draw_plan`) as a picture, also written to ``path`` as PNG when one is given."""
    figure = _figure(8.0, 4.2)
    draw_plan(plan, figure.add_axes((0.1, 0.14, 0.87, 0.66)))
    picture = _rendered(figure)
    if path is not None:
        write_png(picture, path)
    return picture


def draw_plan(plan: Plan, axes: Axes) -> None:
    """Draw a plan's noise levels into matplotlib axes: noise / signal, which is Karras's sigma, before each network
    call and at the end; timesteps stand along the top.

    Calls that draw fresh noise have hollow marks. A level without noise (or without signal) has no place on a
    logarithmic axis: it lies on the axes' edge, at the end of a dotted line.
    """
    calls, heights, limits = len(plan.timesteps), *_heights(plan)
    at = np.arange(calls + 1)
    exact = (heights > limits[0]) & (heights < limits[1])
    for k in range(calls):
        axes.plot(at[k : k + 2], heights[k : k + 2], "-" if exact[k : k + 2].all() else ":", color=_LINE, lw=1.5)
    fresh = np.append(plan.draws_noise.numpy(), False)
    for marked, fill, label in ((~fresh, _LINE, "network call"), (fresh, _PAPER, "network call that draws noise")):
        if marked[:calls].any():
            here = marked & (at < calls)
            axes.plot(at[here], heights[here], "o", ms=5.5, mec=_LINE, mfc=fill, label=label, clip_on=False, zorder=3)
    end = "end" if exact[-1] else "end, no noise"
    axes.plot(calls, heights[-1], "s", ms=6, mfc=_INK, mec=_INK, label=end, clip_on=False, zorder=3, ls="none")

    axes.set(yscale="log", ylim=limits, xlim=(-0.3, calls + 0.3), xlabel="call", ylabel="noise / signal")
    axes.set_title(f"{plan.sampler}, {plan.num_steps} steps", loc="left", fontsize="medium", color=_INK)
    ticks = at[: calls : max(1, -(-calls // 10))]
    axes.set_xticks(ticks)
    top = axes.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{t:.0f}" for t in plan.timesteps[ticks].tolist()])
    top.set_xlabel("timestep")
    axes.grid(color=_PALE, lw=0.5)
    axes.legend(frameon=False, fontsize="small")
    for part in (axes, top):
        part.tick_params(which="both", color=_PALE, labelcolor=_INK)
        part.xaxis.label.set_color(_INK)
        part.yaxis.label.set_color(_INK)
        for spine in part.spines.values():
            spine.set_color(_PALE)


def trajectory_figure(
    plan: Plan, previews: Sequence[Preview], index: int = 0, final: Image.Image | None = None, most: int = 10
) -> Image.Image:
    """The way from noise to the picture: the plan's noise levels, and below them what picture number ``index`` of the
    batch looked like at the calls that were previewed (``most`` at most, evenly picked), then ``final``.

    Raises ConfigError without a preview, or for one of a call that the plan does not have.
    """
    if not previews or most < 1:
        raise ConfigError(f"trajectory figure: expected previews and most >= 1, found {len(previews)} and {most}")
    calls, heights, limits = len(plan.timesteps), *_heights(plan)
    if max(p.step for p in previews) >= calls:
        raise ConfigError(f"trajectory figure: a preview of call {max(p.step for p in previews)} of {calls}")
    picked = np.unique(np.linspace(0, len(previews) - 1, min(most, len(previews))).round().astype(int))
    thumbnails = [(p.step, f"call {p.step}\n{p.label}", p.images[index]) for p in (previews[i] for i in picked)]
    if final is not None:
        thumbnails.append((calls, "final", final))

    left, right, below = 0.8, 0.2, 1.9  # inches beside and below the axes
    width, height = left + right + 1.3 * max(6, len(thumbnails)), below + 3.5
    figure = _figure(width, height)
    axes = figure.add_axes((left / width, (below + 0.4) / height, 1 - (left + right) / width, 2.3 / height))
    draw_plan(plan, axes)
    axes.set_xlabel("")
    axes.tick_params(axis="x", labelbottom=False)
    slot = (width - left - right) / len(thumbnails)
    for i, (call, label, image) in enumerate(thumbnails):
        x = (left + slot * (i + 0.5)) / width
        panel = figure.add_axes((x - 0.61 / width, 0.5 / height, 1.22 / width, 1.22 / height), frameon=False)
        panel.imshow(image.convert("RGB"), interpolation="bicubic")
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(label, fontsize="small", color=_INK)
        axes.vlines(call, limits[0], heights[call], color=_INK, lw=0.6)
        axes.annotate(
            "", (call, 0), (x, 1.74 / height), axes.get_xaxis_transform(), "figure fraction",
            {"arrowstyle": "-", "color": _INK, "lw": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    return _rendered(figure)


def _heights(plan: Plan) -> tuple[np.ndarray, tuple[float, float]]:
    """Noise / signal [K + 1] before each call and at the end, and the limits of an axis that has room for them.

    What a logarithmic axis cannot hold, 0 and infinity, is put on its limits.
    """
    signal, noise = plan.levels.unbind(1)
    sigma = (noise / signal).numpy()
    held = sigma[np.isfinite(sigma) & (sigma > 0)]
    limits = (float(held.min()) / 3, float(held.max()) * 3) if held.size else (0.1, 10.0)
    return np.clip(sigma, *limits), limits


def _figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches, apart from pyplot and its global state."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=110, facecolor=_PAPER)


def _rendered(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
