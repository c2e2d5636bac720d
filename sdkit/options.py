"""The arguments that all four tasks share: `Options` types and documents them, `Settings` holds them with defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.guidance import Classifier, Guidance
from sdkit.noise import Generators, Variation
from sdkit.preview import PreviewMode

if TYPE_CHECKING:
    from sdkit.pipeline import StableDiffusion

StepCallback = Callable[
    ["StableDiffusion", int, float, dict[str, Tensor]], "dict[str, Tensor] | Literal['stop'] | None"
]


class Options(TypedDict, total=False):
    """Arguments by name of `text_to_image`, `image_to_image`, `inpaint` and `depth_to_image`.

    What is made:
        height, width: pixels, multiples of the VAE's factor; the model's own by default. The image tasks take the
            picture's own size, and resize the picture where both are given.
        num_images_per_prompt: pictures of each prompt.
        output_type: "pil", "pt" or "latent".

    Text:
        prompt_embeds, negative_prompt_embeds: [P, M, D] in place of prompt and negative_prompt.
        prompt_weighting: read A1111's weights; False takes a prompt literally, without tags either.
        clip_skip: last layers of the text encoder left out (A1111's number is one higher).

    Sampling:
        num_inference_steps: 30 by default.
        sampler, sigmas, timestep_spacing, eta: as in ``make_plan``; the model's own by default.

    Guidance, as in `sdkit.guidance.Guidance`:
        guidance_scale: uncond + s (cond - uncond), s 7.5 by default; 0 ignores the prompt, 1 the negative prompt.
        guidance_rescale, guidance_interval, dynamic_threshold, sample_max_value, clip_sample_range.
        classifier, classifier_scale, class_labels: classifier guidance; a label for each image.

    Noise:
        seed: image i of the batch has seed + i; or one for each image; drawn at random when None. Noise is drawn on
            the CPU in float32, for each image apart, in the order of `sdkit.noise.Noise`.
        generator, latents: as in diffusers: draw from this generator (or one for each image) instead; start from
            this standard normal [B, C, h, w].
        variation_seed, variation_strength: as in `sdkit.noise.Variation`.

    Memory:
        max_batch_size: pictures that the networks see at once; a larger batch goes through them in parts, which changes
            a picture by rounding at most. None: all, and smaller parts when a GPU's memory runs out.
        vae_tiling: encode and decode tile by tile, which changes a picture by rounding at most; None: where a whole
            picture would not fit in the free memory.

    Watching:
        callback_on_step_end: called as (self, k, timestep, {"latents": ...}) after network call k; it may return
            a dict with new latents, or "stop".
        preview_every, preview_mode: decode what the picture looks like every so many network calls, by the VAE
            ("decode") or a linear projection of the latents ("fast").
        attention_maps: record where in the picture each word of the prompt was looked at (`sdkit.attention_maps`).
        progress: show a bar.
    """

    height: int | None
    width: int | None
    num_images_per_prompt: int
    output_type: str
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    prompt_weighting: bool
    clip_skip: int
    num_inference_steps: int
    sampler: str | None
    sigmas: str | None
    timestep_spacing: str | None
    eta: float
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    dynamic_threshold: float | None
    sample_max_value: float | None
    clip_sample_range: float | None
    classifier: Classifier | None
    classifier_scale: float
    class_labels: Sequence[int] | Tensor | None
    seed: int | Sequence[int] | None
    generator: Generators | None
    latents: Tensor | None
    variation_seed: int | Sequence[int] | None
    variation_strength: float
    max_batch_size: int | None
    vae_tiling: bool | None
    callback_on_step_end: StepCallback | None
    preview_every: int
    preview_mode: PreviewMode
    attention_maps: bool
    progress: bool


@dataclass(frozen=True)
class Settings:
    """`Options` with their defaults. Raises ConfigError for a value without meaning."""

    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    output_type: str = "pil"
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    prompt_weighting: bool = True
    clip_skip: int = 0
    num_inference_steps: int = 30
    sampler: str | None = None
    sigmas: str | None = None
    timestep_spacing: str | None = None
    eta: float = 0.0
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    dynamic_threshold: float | None = None
    sample_max_value: float | None = None
    clip_sample_range: float | None = None
    classifier: Classifier | None = None
    classifier_scale: float = 1.0
    class_labels: Sequence[int] | Tensor | None = None
    seed: int | Sequence[int] | None = None
    generator: Generators | None = None
    latents: Tensor | None = None
    variation_seed: int | Sequence[int] | None = None
    variation_strength: float = 0.0
    max_batch_size: int | None = None
    vae_tiling: bool | None = None
    callback_on_step_end: StepCallback | None = None
    preview_every: int = 0
    preview_mode: PreviewMode = "decode"
    attention_maps: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.output_type not in ("pil", "pt", "latent"):
            raise ConfigError(f'output_type: expected "pil", "pt" or "latent", found {self.output_type!r}')
        check_count("num_images_per_prompt", self.num_images_per_prompt)
        if self.max_batch_size is not None:
            check_count("max_batch_size", self.max_batch_size)
        if self.latents is not None and self.variation_strength:
            raise ConfigError("variation_strength, latents: give one of them; variations are of seeds")
        if self.attention_maps and self.guidance_scale == 0:
            raise ConfigError("attention_maps: expected a guidance_scale above 0, which ignores the prompt; found 0")

    @property
    def guidance(self) -> Guidance:
        return Guidance(
            self.guidance_scale, self.guidance_rescale, self.guidance_interval, self.dynamic_threshold,
            self.sample_max_value, self.clip_sample_range, self.classifier, self.classifier_scale, self.class_labels,
        )  # fmt: skip

    @property
    def variation(self) -> Variation:
        return Variation(self.variation_strength, self.variation_seed)

    def facts(self) -> dict[str, object]:
        """What of them a picture's metadata holds, so that it can be made again; what is at rest is left out."""
        always = (
            "num_inference_steps", "guidance_scale", "guidance_rescale", "sigmas", "timestep_spacing", "eta",
            "clip_skip", "prompt_weighting",
        )  # fmt: skip
        seldom = ("guidance_interval", "dynamic_threshold", "sample_max_value", "clip_sample_range")
        facts = {name: getattr(self, name) for name in always}
        facts |= {name: getattr(self, name) for name in seldom if getattr(self, name) is not None}
        if self.guidance_interval is not None:  # JSON has no infinity
            facts["guidance_interval"] = [None if math.isinf(level) else level for level in self.guidance_interval]
        if self.variation_strength:
            facts["variation_strength"] = self.variation_strength
        if self.classifier is not None:
            facts["classifier"] = type(self.classifier).__name__
        return facts


def check_count(name: str, value: int) -> None:
    """Raise ConfigError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected a whole number of at least 1, found {value!r}")
