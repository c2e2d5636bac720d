"""Draw the pictures of README.md and docs/README.md with the shipped model: ``make pictures`` (minutes, two cores)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.images.sheet import contact_sheet, enlarged
from sdkit.sampling.samplers import SAMPLERS
from sdkit.viewing.attention_sheet import attention_sheet
from sdkit.viewing.previews import rgb_projection
from sdkit.viewing.trajectory import trajectory_figure

FOLDER = Path(__file__).parent
PROMPT = "a large shiny red sphere on a wooden table"
PAIR = "a green cone and a yellow torus on a white table"


def row(images: list[Image.Image], captions: list[str], columns: int | None = None) -> Image.Image:
    return contact_sheet([enlarged(image, 128) for image in images], columns or len(images), captions)


def samplers(sd: sdkit.StableDiffusion) -> Image.Image:
    """The same seed by every sampler, in 20 steps; the two that expect a distilled network are left out."""
    names = [name for name in SAMPLERS if name not in ("lcm", "tcd")]
    images = [draw(sd, PAIR, sampler=name, num_inference_steps=20, guidance_scale=3.0) for name in names]
    return row(images, names, 8)


def guidance(sd: sdkit.StableDiffusion) -> Image.Image:
    """One seed under each kind of guidance."""
    kinds: dict[str, dict[str, object]] = {
        "scale 0": {"guidance_scale": 0.0},
        "scale 1": {"guidance_scale": 1.0},
        "scale 4": {"guidance_scale": 4.0},
        "scale 7.5": {},
        "scale 20": {"guidance_scale": 20.0},
        "20, rescale 0.7": {"guidance_scale": 20.0, "guidance_rescale": 0.7},
        "20, sigma 0.3 to 5": {"guidance_scale": 20.0, "guidance_interval": (0.3, 5.0)},
        "20, threshold 0.99": {"guidance_scale": 20.0, "dynamic_threshold": 0.99, "clip_sample_range": 3.0},
    }
    return row([draw(sd, PAIR, seed=4, **kind) for kind in kinds.values()], list(kinds), 8)


def classifier_guidance(sd: sdkit.StableDiffusion) -> Image.Image:
    """A classifier of two lines, "more red than blue" of the latents' colours, steers a model that gets no prompt."""
    projection = rgb_projection(sd.vae)

    def redder(x_t: Tensor, t: Tensor) -> Tensor:
        red = torch.einsum("bchw,c->b", x_t, projection[:-1, 0] - projection[:-1, 2]) / x_t[0, 0].numel()
        return torch.stack([-20 * red, 20 * red], dim=1)

    images, captions = list[Image.Image](), list[str]()
    for label, name in ((None, "no prompt"), (1, "towards red"), (0, "towards blue")):
        steer = {} if label is None else {"classifier": redder, "class_labels": [label], "classifier_scale": 30.0}
        for seed in (3, 5):
            images.append(draw(sd, "", guidance_scale=0.0, seed=seed, sampler="ddim", **steer))
            captions.append(f"{name}, seed {seed}")
    return row(images, captions)


def hires(sd: sdkit.StableDiffusion) -> Image.Image:
    """A picture of the model's size, twice that at once, and in two stages."""
    height, width = sd.picture_size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* the model was made for", UserWarning)  # which is what this shows
        at_once = draw(sd, PROMPT, seed=2, height=2 * height, width=2 * width)
    in_two = draw(sd, PROMPT, seed=2, hires_scale=2.0, hires_strength=0.1)
    images = [draw(sd, PROMPT, seed=2), at_once, in_two]
    captions = [f"{width} x {height}", f"{2 * width} x {2 * height} at once", "hires_scale 2"]
    return contact_sheet([image.resize((256, 256), Image.Resampling.NEAREST) for image in images], 3, captions)


def variations(sd: sdkit.StableDiffusion) -> Image.Image:
    """From one seed to another."""
    strengths = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    towards = [{"variation_strength": s, "variation_seed": 8} if s else {} for s in strengths]
    images = [draw(sd, PAIR, seed=3, sampler="ddim", guidance_scale=3.0, **way) for way in towards]
    return row(images, [f"variation_strength {s:g}" for s in strengths])


def attention(sd: sdkit.StableDiffusion) -> Image.Image:
    out = sd.text_to_image(PAIR, seed=1, attention_maps=True, progress=False)
    assert out.attention_maps is not None
    return attention_sheet(out.images[0], out.attention_maps)


def trajectory(sd: sdkit.StableDiffusion) -> Image.Image:
    out = sd.text_to_image(PAIR, seed=1, sampler="dpmpp_2m", sigmas="karras", preview_every=2, progress=False)
    plan = sd.make_plan(30, "dpmpp_2m", "karras")
    return trajectory_figure(plan, out.previews, final=out.images[0])


def strip(sd: sdkit.StableDiffusion) -> Image.Image:
    """README.md's: eight of the steps, and the picture."""
    prompt = "a green cone and a yellow torus"
    out = sd.text_to_image(prompt, num_inference_steps=30, seed=1, preview_every=4, progress=False)
    frames = [preview.images[0] for preview in out.previews]
    return sdkit.film_strip(frames, [preview.label for preview in out.previews], final=out.images[0])


def draw(sd: sdkit.StableDiffusion, prompt: str, **options: object) -> Image.Image:
    arguments: dict[str, object] = {"seed": 1, "progress": False} | options
    return sd.text_to_image(prompt, **arguments).images[0]  # pyright: ignore[reportArgumentType]  # forwarded as given


FIGURES: dict[str, Callable[[sdkit.StableDiffusion], Image.Image]] = {
    "strip": strip,
    "samplers": samplers,
    "guidance": guidance,
    "classifier": classifier_guidance,
    "hires": hires,
    "variations": variations,
    "attention": attention,
    "trajectory": trajectory,
}


def main() -> None:
    sd = sdkit.StableDiffusion.from_pretrained("tabletop", device="cpu")
    for name, figure in FIGURES.items():
        figure(sd).save(FOLDER / f"{name}.png", optimize=True)
        print(FOLDER / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
