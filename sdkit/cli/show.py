"""The command that shows an idea of latent diffusion as one picture, on any model: ``sdkit show TOPIC``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdkit.cli.options import BackendOption, DeviceOption, DtypeOption, ModelOption
from sdkit.cli.output import destinations
from sdkit.errors import ConfigError, SDKitError
from sdkit.files import replacing
from sdkit.model_parts import ModelParts, load_model

if TYPE_CHECKING:
    from PIL import Image

    from sdkit.stable_diffusion import StableDiffusion

EXAMPLES = {  # prompts of the models that ship, where none is given
    "tabletop": (
        "a red sphere on a wooden table", "a green cone and a yellow torus", "a blue cube on a white table",
        "a large white cylinder", "a purple sphere on a grey table", "a cyan torus on a black table",
        "an orange cube and a white cone", "a small yellow cylinder",
    ),
}  # fmt: skip
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
GUIDANCE = (0.0, 1.0, 2.0, 4.0, 7.5, 15.0)
CLASSIFIER = (1.0, 3.0, 10.0, 30.0)
SEEDS = 2  # rows of the sheets of an option


class Topic(StrEnum):
    """What is shown."""

    forward = "forward"
    reverse = "reverse"
    noise = "noise"
    schedule = "schedule"
    plan = "plan"
    clip = "clip"
    vae = "vae"
    attention = "attention"
    strength = "strength"
    guidance = "guidance"
    classifier = "classifier"
    depth = "depth"


@dataclass(frozen=True)
class Asked:
    """What the command was given; ``model`` is the name or path of ``sd``."""

    sd: StableDiffusion
    model: str
    prompt: Sequence[str]
    image: Sequence[Path]
    seed: int
    steps: int
    sampler: str | None
    classifier: str | None
    label: str | None

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of a task."""
        return {"num_inference_steps": self.steps, "sampler": self.sampler, "progress": False}

    def prompts(self, count: int) -> list[str]:
        """The first ``count`` prompts. Raises ConfigError where there are fewer."""
        found = list(self.prompt) or list(EXAMPLES.get(self.model, ()))
        if len(found) < count:
            raise ConfigError(f"--prompt: expected {count} of them, found {len(found)}")
        return found[:count]

    def images(self, count: int) -> list[Any]:
        """The pictures that were given, or else one that the model draws of each of the first prompts."""
        if not self.image:
            return self.sd.text_to_image(self.prompts(count), seed=self.seed, **self.sampling).images
        if len(self.image) < count:
            raise ConfigError(f"--image: expected {count} of them, found {len(self.image)}")
        return list(self.image[:count])


# The topics, each a figure of `sdkit.figures` or of its neighbours


def _forward(asked: Asked) -> Image.Image:
    from sdkit.figures import noising_sheet

    return noising_sheet(asked.sd, asked.images(1))


def _reverse(asked: Asked) -> Image.Image:
    from sdkit.figures import denoising_sheet

    return denoising_sheet(asked.sd, asked.prompts(1)[0], seed=asked.seed, **asked.sampling)


def _noise(asked: Asked) -> Image.Image:
    from sdkit.figures import prediction_figure

    count = max(2, len(asked.prompt), len(asked.image)) if asked.prompt or asked.image else 8
    prompts = asked.prompts(count)
    return prediction_figure(asked.sd, asked.images(count), prompts, [*prompts[1:], prompts[0]])


def _schedule(asked: Asked) -> Image.Image:
    from sdkit.figures import schedules_figure
    from sdkit.sampling.schedule import NoiseSchedule

    schedules = {
        "the model's": asked.sd.schedule,
        "linear": NoiseSchedule(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        "cosine": NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
        "zero terminal SNR": NoiseSchedule(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
    }
    return schedules_figure(schedules, asked.images(1))


def _plan(asked: Asked) -> Image.Image:
    return asked.sd.make_plan(asked.steps, asked.sampler).plot()


def _clip(asked: Asked) -> Image.Image:
    from sdkit.figures import clip_likeness, similarity_figure

    count = max(len(asked.prompt), len(asked.image)) or 8
    prompts = asked.prompts(count)
    return similarity_figure(clip_likeness(asked.sd, asked.model, asked.images(count), prompts), prompts)


def _vae(asked: Asked) -> Image.Image:
    from sdkit.figures import reconstruction_sheet

    return reconstruction_sheet(asked.sd.vae, asked.images(len(asked.image) or len(asked.prompt) or 4))


def _attention(asked: Asked) -> Image.Image:
    from sdkit.viewing.attention_sheet import attention_sheet

    out = asked.sd.text_to_image(asked.prompts(1), seed=asked.seed, attention_maps=True, **asked.sampling)
    assert out.attention_maps is not None
    return attention_sheet(out.images[0], out.attention_maps)


def _strength(asked: Asked) -> Image.Image:
    from sdkit.figures import options_sheet

    prompts = asked.prompts(1 if asked.image else 2)  # the picture's, where none is given, and then the new one
    seeds = range(asked.seed, asked.seed + SEEDS)
    options = {"prompt": prompts[-1], "image": asked.images(1)} | asked.sampling
    return options_sheet(asked.sd.image_to_image, "strength", STRENGTHS, seeds, **options)


def _guidance(asked: Asked) -> Image.Image:
    from sdkit.figures import options_sheet

    seeds = range(asked.seed, asked.seed + SEEDS)
    options = {"prompt": asked.prompts(1)[0]} | asked.sampling
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt: ignored at guidance_scale 0")  # that is what the sheet shows
        return options_sheet(asked.sd.text_to_image, "guidance_scale", GUIDANCE, seeds, **options)


def _classifier(asked: Asked) -> Image.Image:
    from sdkit.checkpoints.classifier_folder import load_classifier
    from sdkit.figures import options_sheet

    if asked.label is None:
        raise ConfigError("--label: expected the class to draw")
    classifier = load_classifier(asked.classifier or f"{asked.model}-classifier", asked.sd.device)
    seeds = range(asked.seed, asked.seed + SEEDS)
    options = {"prompt": "", "guidance_scale": 0.0, "classifier": classifier} | asked.sampling
    options |= {"class_labels": classifier.labels([asked.label])}
    return options_sheet(asked.sd.text_to_image, "classifier_scale", CLASSIFIER, seeds, **options)


def _depth(asked: Asked) -> Image.Image:
    from sdkit.figures import depth_sheet

    if not asked.image:
        raise ConfigError("--image: expected the picture whose depth is kept")
    options: dict[str, Any] = {"seed": asked.seed, "num_images_per_prompt": 4} | asked.sampling
    return depth_sheet(asked.sd, asked.prompts(1)[0], asked.images(1), **options)


Figure = Callable[[Asked], "Image.Image"]
DRAWING = {"prompt", "image", "seed", "steps", "sampler"}
SAMPLING = DRAWING - {"image"}
TOPICS: dict[Topic, tuple[Figure, set[str], str]] = {
    Topic.forward: (_forward, DRAWING, "A picture at rising noise: pixels, latents, and these decoded."),
    Topic.reverse: (_reverse, SAMPLING, "A picture emerging: noisy latents, and the estimate in them."),
    Topic.noise: (_noise, DRAWING, "The predictor's error with the right text, none, and another picture's."),
    Topic.schedule: (_schedule, DRAWING, "How much signal is left over the timesteps, of several schedules."),
    Topic.plan: (_plan, {"steps", "sampler"}, "The noise levels that a sampler visits."),
    Topic.clip: (_clip, DRAWING, "How near captions and pictures are to each other."),
    Topic.vae: (_vae, DRAWING, "Pictures, their reconstruction, and the difference."),
    Topic.attention: (_attention, SAMPLING, "Where in a picture each word of its prompt was looked at."),
    Topic.strength: (_strength, DRAWING, "Image-to-image over strength."),
    Topic.guidance: (_guidance, SAMPLING, "Classifier-free guidance over its scale."),
    Topic.classifier: (_classifier, {"seed", "steps", "sampler", "classifier", "label"}, "Classifier guidance."),
    Topic.depth: (_depth, DRAWING, "A picture, its depth, and others with that depth."),
}


def show(
    topic: Annotated[Topic, typer.Argument(help="What is shown.")],
    prompt: Annotated[list[str], typer.Option(help="What a picture shows, once for each.")] = [],  # noqa: B006
    image: Annotated[list[Path], typer.Option(help="A picture, in place of one drawn; once for each.")] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture (default: 1).", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps (default: 30).", min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help="The sampler (default: the model's).")] = None,
    classifier: Annotated[str | None, typer.Option(help="A classifier's folder (default: MODEL-classifier).")] = None,
    label: Annotated[str | None, typer.Option(help="The class that a classifier draws.")] = None,
    model: ModelOption = "tabletop",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    out: Annotated[str | None, typer.Option(help="A .png file (default: TOPIC.png).")] = None,
) -> None:
    figure, reads, _ = TOPICS[topic]
    given = {
        "prompt": prompt, "image": image, "seed": seed, "steps": steps, "sampler": sampler, "classifier": classifier,
        "label": label,
    }  # fmt: skip
    for name, value in given.items():
        if value not in (None, []) and name not in reads:
            raise ConfigError(f"--{name}: sdkit show {topic} has no use for it")

    places = destinations(out or f"{topic}.png", 1)
    sd = load_model(ModelParts(model), device, dtype, backend)
    asked = Asked(sd, model, prompt, image, 1 if seed is None else seed, steps or 30, sampler, classifier, label)
    picture = figure(asked)
    with places.taken() as (path,), replacing(path, SDKitError) as temporary:
        picture.save(temporary, "PNG", optimize=True)
    print(path)


show.__doc__ = "Show an idea of latent diffusion as one picture.\n\n" + "\n\n".join(
    f"{topic}: {help}" for topic, (_, _, help) in TOPICS.items()
)
