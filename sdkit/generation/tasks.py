"""The four tasks as data: how one differs from the others in the loop that all share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch.nn.functional as F
from torch import Tensor

from sdkit.checks import check_choice, refuse_unread
from sdkit.diffusion_model import DiffusionModel
from sdkit.errors import ConfigError
from sdkit.generation.options import TASKS, UPSCALERS, Settings, check_argument
from sdkit.images.depth import DepthSource, read_depth
from sdkit.images.inputs import Pictures, paths_of, picture_tensors
from sdkit.images.masks import read_masks
from sdkit.images.pixels import check_size

FAR = 2.5
"""How many times larger or smaller than in training an area is, for a picture's size to be called far from it."""


@dataclass(frozen=True)
class Hires:
    """A second stage: the finished latents enlarged by ``scale``, then noised and denoised as by image_to_image.

    steps: num_inference_steps of the second stage, of which ``strength`` runs a part; the first stage's when None.
    upscaler: "nearest", "bilinear" or "bicubic". Raises ConfigError for a value without meaning.
    """

    scale: float
    strength: float = 0.7
    steps: int | None = None
    upscaler: str = "bilinear"

    def __post_init__(self) -> None:
        for f in fields(self):
            check_argument("text_to_image", f"hires_{f.name}", getattr(self, f.name))
        check_choice("hires_upscaler", self.upscaler, UPSCALERS)

    def enlarge(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w], each side times ``scale``, rounded to a whole cell."""
        size = [round(side * self.scale) for side in latents.shape[2:]]
        return F.interpolate(latents, size, mode=self.upscaler)


def read_hires(scale: float | None, strength: float, steps: int | None, upscaler: str) -> Hires | None:
    """The second stage, None without a scale. Raises ConfigError for what then does nothing."""
    if scale is not None:
        return Hires(scale, strength, steps, upscaler)
    for argument in TASKS["text_to_image"].arguments:
        given = {"hires_strength": strength, "hires_steps": steps, "hires_upscaler": upscaler}
        if argument.name in given:
            refuse_unread(argument.name, given[argument.name], argument.default, "without hires_scale")
    return None


@dataclass(frozen=True)
class Task:
    """One task with its inputs: data alone.

    For P prompts there are 1 or P of the pictures, masks and depth maps. ``strength`` is the part of the schedule that
    is run; ``sources`` holds for each argument that was given as files their paths.
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


def text_task(model: DiffusionModel, settings: Settings, hires: Hires | None) -> Task:
    """The task that starts from noise alone, at the size asked for or the model's own."""
    check_channels(model, "text_to_image", 0)

    rows, columns = model.picture_size
    height = rows if settings.height is None else settings.height
    width = columns if settings.width is None else settings.width

    check_size(width, height, model.vae.config.factor)
    _warn_of_strange_size(model, width, height)
    return Task("text_to_image", height, width, hires=hires)


def _warn_of_strange_size(model: DiffusionModel, width: int, height: int) -> None:
    """Warn where a model that says what size it was made for is asked for one far from it."""
    rows, columns = model.picture_size
    area = width * height / (rows * columns)
    if model.unet.config.sample_size is None or 1 / FAR <= area <= FAR:
        return

    likely = "objects may repeat; hires_scale draws at that size first" if area > 1 else "so small it may show nothing"
    warnings.warn(f"{width} x {height}: the model was made for {columns} x {rows}; {likely}", stacklevel=2)


def image_task(
    model: DiffusionModel, settings: Settings, image: Pictures, strength: float, name: str = "image_to_image"
) -> Task:
    """The task that starts from pictures."""
    if name == "image_to_image":
        check_channels(model, name, 0)
    picture = picture_tensors(image, settings.height, settings.width, model.vae.config.factor)
    height, width = picture.shape[2:]
    return Task(name, height, width, strength, picture, sources={"image": paths_of(image)})


def inpaint_task(
    model: DiffusionModel, settings: Settings, image: Pictures, mask_image: Pictures, strength: float, mask_blur: int
) -> Task:
    """The task that repaints pictures in the white parts of masks."""
    check_argument("inpaint", "mask_blur", mask_blur)
    check_channels(model, "inpaint", 0, model.vae.config.latent_channels + 1)

    task = image_task(model, settings, image, strength, "inpaint")
    mask = read_masks(mask_image, task.height, task.width)
    pictures = len(task.sources["image"])
    if 1 not in (len(mask), pictures) and len(mask) != pictures:
        raise ConfigError(f"mask_image: expected 1, or {pictures} as there are pictures; found {len(mask)}")

    return replace(task, mask=mask, mask_blur=mask_blur, sources={**task.sources, "mask_image": paths_of(mask_image)})


def depth_task(
    model: DiffusionModel,
    settings: Settings,
    image: Pictures,
    depth_map: DepthSource | Sequence[DepthSource] | None,
    strength: float,
) -> Task:
    """The task that starts from pictures and keeps their depth, given or estimated."""
    check_channels(model, "depth_to_image", 1)
    task = image_task(model, settings, image, strength, "depth_to_image")

    if depth_map is not None:
        sources = {**task.sources, "depth_map": paths_of(depth_map)}
        return replace(task, depth=read_depth(depth_map), sources=sources)
    assert task.picture is not None
    return replace(task, depth=model.depth_estimator.estimate(task.picture, model.device))


def check_channels(model: DiffusionModel, task: str, *extra: int) -> None:
    """Raise ConfigError unless the UNet takes the latents, and beside them one of these numbers of channels."""
    latent, found = model.vae.config.latent_channels, model.unet.config.in_channels
    if found not in [latent + more for more in extra]:
        expected = " or ".join(str(latent + more) for more in extra)
        made_for = {latent: "text_to_image", 2 * latent + 1: "inpaint", latent + 1: "depth_to_image"}.get(found)
        hint = f", which is for {made_for}" if made_for else ""
        raise ConfigError(f"{task}: expected a UNet of {expected} input channels, this one has {found}{hint}")
