"""One picture for each idea of latent diffusion, of any model: noise added and taken away, how well it is predicted,
what latents keep, and what each way of steering does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdkit.checkpoints.loading import MODELS
from sdkit.errors import CheckpointError, ConfigError
from sdkit.images.depth import DepthSource, read_depth
from sdkit.images.inputs import Pictures, picture_tensors
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet, stacked
from sdkit.networks.text_encoder import pooled
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.encoding import encode_prompts
from sdkit.sampling.plot import INK_CODE, LINE, PALE, empty_figure, rendered
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.viewing.previews import latent_to_rgb

if TYPE_CHECKING:
    from sdkit.stable_diffusion import StableDiffusion

SIDE = 160  # pixels that a picture has on a sheet, at least
TIMESTEPS = (0, 100, 250, 500, 750, 999)
COLOURS = (LINE, "#c1666b", "#6a994e", "#8d6cab")
ENLARGED_DIFFERENCE = 4
IMAGE_ENCODER = "image_encoder"  # in a model's folder: with its text encoder a CLIP


# Noise added


def noising_sheet(sd: StableDiffusion, image: Pictures, timesteps: Sequence[int] = TIMESTEPS) -> Image.Image:
    """A picture at rising noise: above its pixels, below its latents as the colours that they stand for, and what the
    VAE makes of these. All have the same noise level in a column, which says signal / noise in power."""
    pixels, latents = _one_picture(sd, image)
    rows: list[list[Tensor]] = [[], [], []]
    for t in timesteps:
        noisy = sd.schedule.add_noise(pixels, _noise(pixels), t)
        noisy_latents = sd.schedule.add_noise(latents, _noise(latents), t)
        rows[0].append(noisy)
        rows[1].append(latent_to_rgb(sd.vae, noisy_latents).cpu())
        rows[2].append(_decoded(sd, noisy_latents))

    shape = "{} x {} x {}".format(*latents.shape[1:])
    labels = [f"t = {t}, SNR {float(sd.schedule.snr(t)):.3g}" for t in timesteps]
    labels += [f"latents, {shape}"] * len(timesteps) + ["decoded"] * len(timesteps)
    return _sheet([to_pil(x.clamp(-1, 1))[0] for row in rows for x in row], labels, len(timesteps))


def schedules_figure(schedules: dict[str, NoiseSchedule], image: Pictures, columns: int = 8) -> Image.Image:
    """The signal's share sqrt(acp) of each schedule over the timesteps, and a picture noised by it at even steps."""
    pixels = picture_tensors(image, None, None, 1)[:1]
    figure = empty_figure(8.0, 3.2)
    axes = figure.add_axes((0.09, 0.17, 0.88, 0.72))
    images: list[Image.Image] = []
    labels: list[str] = []
    for (name, schedule), colour in zip(schedules.items(), _colours(len(schedules)), strict=True):
        axes.plot(schedule.alphas_cumprod.sqrt().numpy(), color=colour, lw=1.5, label=name)
        for t in torch.linspace(0, schedule.num_train_timesteps - 1, columns).long().tolist():
            images.append(to_pil(schedule.add_noise(pixels, _noise(pixels), t).clamp(-1, 1))[0])
            labels.append(f"{name}, t = {t}")

    axes.set(xlabel="timestep", ylabel="signal, sqrt(acp)")
    _dress(axes)
    return stacked([rendered(figure), _sheet(images, labels, columns)])


# Noise predicted


@torch.no_grad()
def prediction_figure(
    sd: StableDiffusion, images: Pictures, prompts: Sequence[str], wrong: Sequence[str], points: int = 12
) -> Image.Image:
    """How wrong the network's prediction is over the timesteps, told the right text of each picture, none, and a wrong
    one: the mean squared error of what it is trained to predict. prompts, wrong: one for each picture."""
    pixels = picture_tensors(images, None, None, sd.vae.config.factor)
    timesteps = torch.linspace(0, sd.schedule.num_train_timesteps - 1, points).long().tolist()

    figure = empty_figure(8.0, 3.6)
    axes = figure.add_axes((0.12, 0.15, 0.85, 0.76))
    texts = {"the right text": list(prompts), "no text": [""] * len(pixels), "a wrong text": list(wrong)}
    for (name, own), colour in zip(texts.items(), _colours(3), strict=True):
        errors = prediction_errors(sd, pixels / 2 + 0.5, own, timesteps)
        axes.plot(timesteps, errors, "o-", color=colour, lw=1.5, ms=4, label=name)
    axes.set(xlabel="timestep", ylabel=f"error of {sd.schedule.prediction_type}", yscale="log")
    _dress(axes)
    return rendered(figure)


@torch.no_grad()
def prediction_errors(
    sd: StableDiffusion, images: Pictures, prompts: Sequence[str], timesteps: Sequence[int]
) -> list[float]:
    """The mean squared error of what the network is trained to predict, at each timestep, over pictures that have a
    prompt each. The noise is the same for all prompts."""
    pixels = picture_tensors(images, None, None, sd.vae.config.factor)
    if len(pixels) != len(prompts):
        raise ConfigError(
            f"prediction errors: expected as many prompts as pictures, {len(pixels)}, found {len(prompts)}"
        )
    latents = _encoded(sd, pixels)
    context = encode_prompts(sd.tokenizer, sd.text_encoder, list(prompts), None)[0].to(sd.device, sd.dtype)
    return [_prediction_error(sd, latents, t, context) for t in timesteps]


def _prediction_error(sd: StableDiffusion, latents: Tensor, t: int, context: Tensor) -> float:
    noise = _noise(latents)
    x_t = sd.schedule.add_noise(latents, noise, t).to(sd.device, sd.dtype)
    prediction = sd.unet(x_t, torch.full((len(x_t),), t, device=sd.device), context).float().cpu()
    return float((prediction - sd.schedule.target(latents, noise, t)).square().mean())


def denoising_sheet(sd: StableDiffusion, prompt: str, columns: int = 8, **options: Any) -> Image.Image:
    """A picture emerging: above, the noisy latents decoded; below, what the network takes the picture to be.

    options: of `StableDiffusion.text_to_image`.
    """
    steps = int(options.pop("num_inference_steps", 30))
    shown = {round(i * (steps - 1) / (columns - 1)) for i in range(columns)} if columns > 1 else {steps - 1}
    own: dict[str, Any] = {"progress": False, "num_inference_steps": steps, "preview_every": 1}
    out = sd.text_to_image(prompt, **(own | options))

    previews = [preview for preview in out.previews if preview.step in shown]
    noisy = [to_pil(_decoded(sd, preview.latents[:1].float().cpu()).clamp(-1, 1))[0] for preview in previews]
    labels = [f"after step {preview.step + 1}" for preview in previews] + ["the estimate in it"] * len(previews)
    return _sheet([*noisy, *(preview.images[0] for preview in previews)], labels, len(previews))


# Latents


@torch.no_grad()
def reconstruction_sheet(vae: AutoencoderKL, images: Pictures) -> Image.Image:
    """Pictures, what the VAE makes of them, and four times the difference on grey."""
    pixels = picture_tensors(images, None, None, vae.config.factor)
    weight = next(vae.parameters())
    again = vae(pixels.to(weight.device, weight.dtype)).float().cpu().clamp(-1, 1)
    difference = (ENLARGED_DIFFERENCE * (again - pixels)).clamp(-1, 1)
    decibels = [-10 * float(((a - b) / 2).square().mean().log10()) for a, b in zip(again, pixels, strict=True)]

    labels = [""] * len(pixels) + [f"{value:.1f} dB" for value in decibels]
    labels += [f"difference x {ENLARGED_DIFFERENCE}"] * len(pixels)
    return _sheet(to_pil(torch.cat([pixels, again, difference])), labels, len(pixels))


def interpolation_sheet(sd: StableDiffusion, first: Pictures, second: Pictures, columns: int = 7) -> Image.Image:
    """From one picture to another: above, a mean of their pixels; below, the decoded mean of their latents."""
    shares = torch.linspace(0, 1, columns).tolist()
    of_pixels, of_latents = between(sd, first, second, shares)

    labels = [f"pixels, {share:.2f}" for share in shares] + [f"latents, {share:.2f}" for share in shares]
    return _sheet([to_pil(x[:1] * 2 - 1)[0] for x in (*of_pixels, *of_latents)], labels, columns)


def between(
    sd: StableDiffusion, first: Pictures, second: Pictures, shares: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Pictures between each of ``first`` (share 0) and of ``second`` (share 1), [N, 3, H, W] in [0, 1] for every share:
    the means of their pixels, and the decoded means of their latents."""
    pixels, others = (picture_tensors(each, None, None, sd.vae.config.factor) for each in (first, second))
    if pixels.shape != others.shape:
        found = f"{list(pixels.shape)} and {list(others.shape)}"
        raise ConfigError(f"interpolation: expected as many pictures of one size, found {found}")
    latents, other_latents = _encoded(sd, pixels), _encoded(sd, others)

    decoded = [_decoded(sd, torch.lerp(latents, other_latents, share)) for share in shares]
    return [torch.lerp(pixels, others, share) / 2 + 0.5 for share in shares], [
        x.clamp(-1, 1) / 2 + 0.5 for x in decoded
    ]


# Text


def similarity_figure(likeness: Tensor, captions: Sequence[str], title: str = "") -> Image.Image:
    """A matrix [N, N] of cosines between N captions (rows) and N pictures (columns), as a map of colours."""
    count = len(captions)
    if likeness.shape != (count, count):
        raise ConfigError(f"similarity figure: expected a matrix {count} x {count}, found {list(likeness.shape)}")
    words, side = 0.3 + 0.075 * max(map(len, captions)), 0.32 * count  # inches
    width, height = words + side + 0.2, side + 0.6
    figure = empty_figure(width, height)
    axes = figure.add_axes((words / width, 0.1 / height, side / width, side / height))
    axes.imshow(likeness.float().numpy(), cmap="viridis")
    axes.set_yticks(range(count), captions, fontsize="small", color=INK_CODE)
    axes.set_xticks([])
    axes.set_title(title or "cosine of caption and picture", loc="left", fontsize="medium", color=INK_CODE)
    return rendered(figure)


@torch.no_grad()
def clip_likeness(sd: StableDiffusion, model: str | Path, images: Pictures, texts: Sequence[str]) -> Tensor:
    """The cosine of every text (rows) and every picture (columns), float32 [T, N], by a model's own two encoders.

    model: the name or folder that ``sd`` was loaded from; its folder has `image_encoder`, whose embeddings are as wide
    as the text encoder's hidden states. Raises CheckpointError where there is none, ConfigError where it does not fit.
    """
    from transformers import CLIPVisionModelWithProjection

    folder = MODELS / str(model) if (MODELS / str(model) / IMAGE_ENCODER).is_dir() else Path(model)
    if not (folder / IMAGE_ENCODER).is_dir():
        raise CheckpointError(f"{model}: expected a model with an {IMAGE_ENCODER}, found none in its folder")
    load: Any = CLIPVisionModelWithProjection.from_pretrained
    vision = load(folder / IMAGE_ENCODER, local_files_only=True).float().eval()
    width, side = sd.text_encoder.config.hidden_size, vision.config.image_size
    if vision.config.projection_dim != width:
        found = vision.config.projection_dim
        raise ConfigError(
            f"{folder / IMAGE_ENCODER}: expected embeddings as wide as the text's, {width}, found {found}"
        )

    ids = sd.tokenizer(list(texts), padding="longest", truncation=True, return_tensors="pt").input_ids
    text_encoder: Any = sd.text_encoder
    hidden = text_encoder(input_ids=ids.to(sd.device)).last_hidden_state
    text = F.normalize(pooled(hidden, ids.to(sd.device), sd.tokenizer.eos_token_id).float().cpu(), dim=-1)
    picture = F.normalize(vision(pixel_values=picture_tensors(images, side, side, 1)).image_embeds, dim=-1)
    return text @ picture.T


# Steering


def options_sheet(
    draw: Callable[..., Any], name: str, values: Sequence[Any], seeds: Sequence[int] = (1,), **options: Any
) -> Image.Image:
    """What an option does: a column for each of its values, a row for each seed.

    draw: a task of a model, such as ``sd.text_to_image``; options: its other arguments.
    """
    images: list[Image.Image] = []
    for seed in seeds:
        for value in values:
            arguments = {"progress": False} | options | {name: value, "seed": seed}
            images.append(draw(**arguments).images[0])
    return _sheet(images, [f"{name} {_short(value)}" for _ in seeds for value in values], len(values))


def depth_sheet(
    sd: StableDiffusion, prompt: str, image: Pictures, depth: DepthSource | None = None, **options: Any
) -> Image.Image:
    """A picture, its depth, given or estimated, near ones bright, and pictures of the prompt with that depth."""
    pixels = picture_tensors(image, None, None, sd.vae.config.factor)[:1]
    values = sd.depth_estimator.estimate(pixels, sd.device).cpu() if depth is None else read_depth(depth)
    low, high = float(values.min()), float(values.max())
    grey = ((values[:1, None] - low) / max(high - low, 1e-6) * 2 - 1).expand(-1, 3, -1, -1)
    arguments: dict[str, Any] = {"progress": False} | options
    out = sd.depth_to_image(prompt, pixels / 2 + 0.5, values[:1], **arguments)
    images = [to_pil(pixels)[0], to_pil(grey)[0].resize(to_pil(pixels)[0].size), *out.images]
    return _sheet(images, ["picture", "depth", *[prompt] * len(out.images)], len(images))


# Parts that figures share


def _one_picture(sd: StableDiffusion, image: Pictures) -> tuple[Tensor, Tensor]:
    """A picture [1, 3, H, W] in [-1, 1] and its latents [1, C, h, w], on the CPU in float32."""
    pixels = picture_tensors(image, None, None, sd.vae.config.factor)[:1]
    return pixels, _encoded(sd, pixels)


@torch.no_grad()
def _encoded(sd: StableDiffusion, pixels: Tensor) -> Tensor:
    weight = next(sd.vae.parameters())
    mean = sd.vae.encode(pixels.to(weight.device, weight.dtype)).mode()
    return (mean.float() * sd.vae.config.scaling_factor).cpu()


@torch.no_grad()
def _decoded(sd: StableDiffusion, latents: Tensor) -> Tensor:
    weight = next(sd.vae.parameters())
    return sd.vae.decode((latents / sd.vae.config.scaling_factor).to(weight.device, weight.dtype)).float().cpu()


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sheet(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    width, height = max((image.size for image in images), key=lambda size: size[0] * size[1])
    factor = max(1, -(-SIDE // min(width, height)))
    size = (width * factor, height * factor)
    scaled = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    return contact_sheet(scaled, columns, labels)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _dress(axes: Any) -> None:
    """Grid, legend and colours of a plot."""
    axes.grid(color=PALE, lw=0.5)
    axes.legend(frameon=False, fontsize="small")
    axes.tick_params(which="both", color=PALE, labelcolor=INK_CODE)
    axes.xaxis.label.set_color(INK_CODE)
    axes.yaxis.label.set_color(INK_CODE)
    for spine in axes.spines.values():
        spine.set_color(PALE)
