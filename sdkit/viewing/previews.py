"""Watching a picture emerge: previews during sampling, and the film strip made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from PIL import Image

from sdkit.errors import ConfigError, NumericalError
from sdkit.graphs import Graphs
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet
from sdkit.networks.vae import AutoencoderKL, decode_latents

PreviewMode = Literal["decode", "fast"]


@dataclass(frozen=True)
class Preview:
    """The pictures of a batch as they looked after a step."""

    step: int  # counted from 0
    timestep: float  # of the network call, in training timesteps
    images: list[Image.Image]  # one per picture of the batch: what the network takes it to be
    latents: torch.Tensor  # those after the step, still noisy [B, C, h, w], in the noise predictor's scale

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
    def frames(self, latents: torch.Tensor, graphs: Graphs | None = None) -> list[Image.Image]:
        """Pictures of latents [B, C, h, w] in the noise predictor's scale, usually its estimate of x0; ``graphs`` as in
        `decode_latents`.

        Raises NumericalError when they are not finite.
        """
        if self.mode == "fast":
            return to_pil(latent_to_rgb(self.vae, latents), stage="preview")
        try:
            return to_pil(decode_latents(self.vae, latents, graphs=graphs))
        except NumericalError as error:
            raise NumericalError(f"preview: {error}") from None


def latent_to_rgb(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Turn latents [B, C, h, w], in the noise predictor's scale, into pictures [B, 3, h, w], float32, about [-1, 1].

    The best linear guess at the decoder: see ``rgb_projection``.
    """
    projection = rgb_projection(vae).to(latents.device)
    return torch.einsum("bchw,ck->bkhw", latents.float(), projection[:-1]) + projection[-1][:, None, None]


_projections: WeakKeyDictionary[AutoencoderKL, torch.Tensor] = WeakKeyDictionary()


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
    """Show a picture emerging from noise: ``previews`` in order, then ``final``, each with a small label below.

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
    return contact_sheet(
        scaled, -(-len(scaled) // rows), texts if any(texts) else None, gap=max(6, size[0] // 24), font_size=13
    )
