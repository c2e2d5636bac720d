"""The four tasks as data: what sets one apart from the others in the loop that all share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from sdkit.depth import DepthSource, read_depth
from sdkit.errors import ConfigError
from sdkit.image import check_size
from sdkit.inputs import Pictures, paths_of, read_masks, read_pictures
from sdkit.options import Settings, check_count

if TYPE_CHECKING:
    from sdkit.pipeline import StableDiffusion

UPSCALERS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Hires:
    """A second stage: the finished latents enlarged by ``scale``, then noised and denoised as by image_to_image.

    steps: num_inference_steps of the second stage, of which ``strength`` runs a part; the first stage's when None.
    upscaler: one of `UPSCALERS`. Raises ConfigError for a value without meaning.
    """

    scale: float
    strength: float = 0.7
    steps: int | None = None
    upscaler: str = "bilinear"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int | float) or not 1 <= self.scale <= 16:
            raise ConfigError(f"hires_scale: expected a number from 1 to 16, found {self.scale!r}")
        if not isinstance(self.strength, int | float) or not 0 <= self.strength <= 1:
            raise ConfigError(f"hires_strength: expected a number from 0 to 1, found {self.strength!r}")
        if self.steps is not None:
            check_count("hires_steps", self.steps)
        if self.upscaler not in UPSCALERS:
            raise ConfigError(f"hires_upscaler: expected {', '.join(UPSCALERS)}, found {self.upscaler!r}")

    def enlarge(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w], each side times ``scale``, rounded to a whole cell."""
        size = [round(side * self.scale) for side in latents.shape[2:]]
        return F.interpolate(latents, size, mode=self.upscaler)


@dataclass(frozen=True)
class Task:
    """What sets one task apart in the loop that all share: data alone.

    For P prompts there are 1 or P of the pictures, masks and depth maps.
    """

    name: str
    height: int
    width: int
    strength: float = 1.0
    picture: Tensor | None = None  # [N, 3, height, width] in [-1, 1]: what the latents start from
    mask: Tensor | None = None  # [N, 1, height, width], 1 where the picture is repainted
    mask_blur: int = 0
    depth: Tensor | None = None  # [N, ?, ?]
    hires: Hires | None = None
    sources: Mapping[str, Sequence[str | None]] = field(default_factory=dict[str, "Sequence[str | None]"])


def text_task(sd: StableDiffusion, settings: Settings, hires: Hires | None) -> Task:
    """From noise alone, at the size asked for or the model's own."""
    check_channels(sd, "text_to_image", 0)
    own: int | tuple[int, int] = sd.unet.config.sample_size or 64
    rows, columns = own if isinstance(own, tuple) else (own, own)
    factor = sd.vae.config.factor
    height = rows * factor if settings.height is None else settings.height
    width = columns * factor if settings.width is None else settings.width
    check_size(width, height, factor)
    return Task("text_to_image", height, width, hires=hires)


def image_task(
    sd: StableDiffusion, settings: Settings, image: Pictures, strength: float, name: str = "image_to_image"
) -> Task:
    """From pictures."""
    if name == "image_to_image":
        check_channels(sd, name, 0)
    picture = read_pictures(image, settings.height, settings.width, sd.vae.config.factor)
    height, width = picture.shape[2:]
    return Task(name, height, width, strength, picture, sources={"image": paths_of(image)})


def inpaint_task(
    sd: StableDiffusion, settings: Settings, image: Pictures, mask_image: Pictures, strength: float, mask_blur: int
) -> Task:
    """From pictures, in the white parts of masks."""
    if isinstance(mask_blur, bool) or not isinstance(mask_blur, int) or mask_blur < 0:
        raise ConfigError(f"mask_blur: expected a whole number of pixels from 0, found {mask_blur!r}")
    check_channels(sd, "inpaint", 0, sd.vae.config.latent_channels + 1)
    task = image_task(sd, settings, image, strength, "inpaint")
    mask = read_masks(mask_image, task.height, task.width)
    pictures = len(task.sources["image"])
    if 1 not in (len(mask), pictures) and len(mask) != pictures:
        raise ConfigError(f"mask_image: expected 1, or {pictures} as there are pictures; found {len(mask)}")
    return replace(task, mask=mask, mask_blur=mask_blur, sources={**task.sources, "mask_image": paths_of(mask_image)})


def depth_task(
    sd: StableDiffusion,
    settings: Settings,
    image: Pictures,
    depth_map: DepthSource | Sequence[DepthSource] | None,
    strength: float,
) -> Task:
    """From pictures and their depth, given or estimated."""
    check_channels(sd, "depth_to_image", 1)
    task = image_task(sd, settings, image, strength, "depth_to_image")
    if depth_map is not None:
        sources = {**task.sources, "depth_map": paths_of(depth_map)}
        return replace(task, depth=read_depth(depth_map), sources=sources)
    assert task.picture is not None
    return replace(task, depth=sd.depth_estimator.estimate(task.picture, sd.device))


def check_channels(sd: StableDiffusion, task: str, *extra: int) -> None:
    """Raise ConfigError unless the UNet takes the latents, and beside them one of these numbers of channels."""
    latent, found = sd.vae.config.latent_channels, sd.unet.config.in_channels
    if found not in [latent + more for more in extra]:
        expected = " or ".join(str(latent + more) for more in extra)
        made_for = {latent: "text_to_image", 2 * latent + 1: "inpaint", latent + 1: "depth_to_image"}.get(found)
        hint = f", which is for {made_for}" if made_for else ""
        raise ConfigError(f"{task}: expected a UNet of {expected} input channels, this one has {found}{hint}")
