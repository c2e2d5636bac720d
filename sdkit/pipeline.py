"""StableDiffusion: a model's parts, and the way from a prompt to a picture.

Argument names are those of diffusers' pipelines. What differs on purpose: guidance scales below 1 interpolate, every
image of a batch has its own seed, and nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import sdkernels
import sdkit
from sdkit.checkpoint import Components, load_folder, save_folder
from sdkit.denoise import denoise
from sdkit.errors import CheckpointError, ConfigError, NumericalError
from sdkit.guidance import Guidance
from sdkit.image import check_size, to_pil
from sdkit.noise import Generators, Noise, given_latents
from sdkit.plan import Plan, make_plan
from sdkit.preview import Preview, Previewer, PreviewMode
from sdkit.schedule import read_scheduler_config, write_scheduler_config
from sdkit.text import encode_prompts
from sdkit.vae import decode_latents

MODELS = Path(__file__).parent / "models"
"""The models that ship with us, each a diffusers folder."""

StepCallback = Callable[
    ["StableDiffusion", int, float, dict[str, Tensor]], "dict[str, Tensor] | Literal['stop'] | None"
]


@dataclass(frozen=True)
class Output:
    """What a task returns.

    images: a list of Pillow images ("pil"; ``sdkit.image.write_png(image, path, image.info)`` keeps in the PNG what
        made them), a tensor [B, 3, H, W] in [0, 1] ("pt"), or the latents ("latent").
    latents: the final ones [B, C, h, w], in the noise predictor's scale.
    seeds: one for each image; empty when generators or latents were given.
    num_steps_run: whole sampling steps.
    """

    images: Any
    latents: Tensor
    seeds: list[int]
    num_steps_run: int
    previews: list[Preview] = field(default_factory=list[Preview])


class StableDiffusion:
    """A latent diffusion model: unet, vae, text_encoder, tokenizer, schedule.

    ``plan_defaults`` are the arguments of ``make_plan`` that the model's scheduler configuration stands for.
    """

    def __init__(self, components: Components, backend: str | None = None) -> None:
        self.unet, self.vae = components.unet, components.vae
        self.text_encoder: Any = components.text_encoder
        self.tokenizer: Any = components.tokenizer
        self.scheduler_config, self.extra = components.scheduler_config, components.extra
        self.schedule, self.plan_defaults = read_scheduler_config(components.scheduler_config)
        if backend not in (None, *sdkernels.BACKENDS):
            raise ConfigError(f"backend: expected {', '.join(sdkernels.BACKENDS)} or None, found {backend!r}")
        self.backend = backend
        try:
            sdkernels.current()
        except ValueError as error:  # what the environment names
            raise ConfigError(str(error)) from None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tabletop",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        variant: str | None = None,
    ) -> Self:
        """Load a model that ships with us by its name, or a diffusers folder by its path.

        ``device`` is the GPU if there is one, else the CPU; ``dtype`` float16 on a GPU, else float32; ``backend``
        as in ``sdkernels.backend``, None for the one in force. Raises CheckpointError.
        """
        device, dtype = _defaults(device, dtype)
        shipped = MODELS / str(model)
        names = sorted(p.parent.name for p in MODELS.glob("*/model_index.json"))
        folder = shipped if str(model) in names else Path(model)
        if not folder.exists():
            raise CheckpointError(f"{model}: no such folder; models that ship with sdkit: {', '.join(names)}")
        return cls(load_folder(folder, dtype=dtype, variant=variant), backend).to(device)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        preset: str | None = None,
        prediction_type: str | None = None,
        use_ema: bool = False,
    ) -> Self:
        """Load a ``.safetensors`` or ``.ckpt`` file in the layout of CompVis and Stability.

        ``preset``, ``prediction_type`` and ``use_ema`` as in ``sdkit.single_file.load_single_file``, the others as in
        ``from_pretrained``. Raises CheckpointError.
        """
        from sdkit.single_file import load_single_file

        device, dtype = _defaults(device, dtype)
        components = load_single_file(
            path, preset=preset, prediction_type=prediction_type, use_ema=use_ema, dtype=dtype
        )
        return cls(components, backend).to(device)

    @property
    def components(self) -> Components:
        """The parts, as the files have them."""
        config = self.scheduler_config
        if read_scheduler_config(config) != (self.schedule, self.plan_defaults):
            config = write_scheduler_config(self.schedule, self.plan_defaults)
        return Components(self.unet, self.vae, self.text_encoder, self.tokenizer, config, self.extra)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move every network to ``device`` and cast it to ``dtype``, either may be given first; returns self."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = None if device is None else _device(device)
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(device=device, dtype=dtype)
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers folder. Raises CheckpointError when that is not possible."""
        save_folder(self.components, folder, dtype)

    def save_single_file(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one ``.safetensors`` file in the layout of CompVis and Stability. Raises CheckpointError."""
        from sdkit.single_file import save_single_file

        save_single_file(self.components, path, dtype=dtype)

    @torch.no_grad()
    def text_to_image(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        clip_skip: int = 0,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        preview_every: int = 0,
        preview_mode: PreviewMode = "decode",
        sigmas: str | None = None,
        timestep_spacing: str | None = None,
        prompt_weighting: bool = True,
        progress: bool = True,
    ) -> Output:
        """Make pictures of prompts.

        prompt and negative_prompt: one or several, with A1111's weights unless ``prompt_weighting`` is off; or
            prompt_embeds and negative_prompt_embeds [P, M, D].
        height, width: pixels, multiples of the VAE's factor; the model's own by default.
        guidance_scale: uncond + s (cond - uncond); 0 ignores the prompt, 1 skips the unconditional pass.
        seed: image i of the batch has seed + i; or one for each image; drawn at random when None. Noise is drawn on
            the CPU in float32, for each image apart: its initial noise, then one normal a stochastic step.
        generator, latents: as in diffusers: draw from this generator (or one for each image) instead; start from
            this standard normal [B, C, h, w].
        sampler, sigmas, timestep_spacing, eta: as in ``make_plan``; the model's own by default.
        clip_skip: last layers of the text encoder left out (A1111's number is one higher).
        output_type: "pil", "pt" or "latent".
        callback_on_step_end: called as (self, k, timestep, {"latents": ...}) after network call k; it may return
            a dict with new latents, or "stop".
        preview_every: decode what the picture looks like every so many network calls, by the VAE ("decode") or a
            linear projection of the latents ("fast").

        Prompts of one batch are padded to the same number of 75-token chunks, which a picture feels: beside a longer
        prompt the same seed gives another picture.

        Raises ConfigError for an argument without meaning, NumericalError for latents or pixels that are not finite.
        """
        guidance = Guidance(guidance_scale, guidance_rescale)
        if output_type not in ("pil", "pt", "latent"):
            raise ConfigError(f'output_type: expected "pil", "pt" or "latent", found {output_type!r}')
        height, width = self._size(height, width)
        plan = self.make_plan(num_inference_steps, sampler, sigmas, timestep_spacing, eta)
        previewer = Previewer(self.vae, preview_every, preview_mode)
        with self._backend():
            prompts = _prompts(prompt, prompt_embeds, guidance)
            cond, uncond = self._contexts(
                prompts, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance, clip_skip, prompt_weighting
            )
            n = _count("num_images_per_prompt", num_images_per_prompt)
            batch = len(cond if cond is not None else uncond) * n  # type: ignore[arg-type]  # one is there
            cond, uncond = (None if c is None else c.repeat_interleave(n, 0) for c in (cond, uncond))
            noise = Noise(self._latent_shape(batch, height, width), seed, generator, self.device, self.dtype)
            start = noise.draw() if latents is None else given_latents(latents, noise.shape, self.device)
            previews: list[Preview] = []
            calls = 0

            def on_step(k: int, t: float, now: Tensor, x0: Callable[[], Tensor]) -> Tensor | Literal["stop"] | None:
                nonlocal calls
                calls = k + 1
                bar.update()
                if previewer.wants(k):
                    previews.append(Preview(k, t, previewer.frames(x0())))
                if callback_on_step_end is None:
                    return None
                answer = callback_on_step_end(self, k, t, {"latents": now})
                return answer.get("latents") if isinstance(answer, dict) else answer

            predict = self._predictor(plan, cond, uncond)
            with tqdm(total=len(plan.timesteps), disable=not progress, leave=False) as bar:
                first = plan.start(start.to(torch.promote_types(self.dtype, torch.float32)))
                final = denoise(plan, predict, first, noise.draw, guidance, on_step)
            images = final if output_type == "latent" else decode_latents(self.vae, final)
            if not bool(images.isfinite().all()):
                raise NumericalError("VAE decoder: pixels are not finite")

        seeds = noise.seeds if latents is None else []
        if output_type == "pil":
            facts = {
                "negative_prompt": negative_prompt, "height": height, "width": width,
                "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
                "guidance_rescale": guidance_rescale, "sampler": plan.sampler, "sigmas": sigmas,
                "timestep_spacing": timestep_spacing, "eta": eta, "clip_skip": clip_skip,
                "prompt_weighting": prompt_weighting, "dtype": str(self.dtype).removeprefix("torch."),
                "version": sdkit.__version__,
            }  # fmt: skip
            images = _with_info(to_pil(images), facts, prompts, negative_prompt, seeds, n)
        elif output_type == "pt":
            images = (images / 2 + 0.5).clamp(0, 1)
        steps_run = plan.num_steps * calls // max(1, len(plan.timesteps))
        return Output(images, final, seeds, steps_run, previews)

    def make_plan(
        self,
        num_inference_steps: int,
        sampler: str | None = None,
        sigmas: str | None = None,
        timestep_spacing: str | None = None,
        eta: float = 0.0,
        strength: float = 1.0,
    ) -> Plan:
        """``sdkit.make_plan`` with this model's schedule; None stands for the model's own setting."""
        given = {"sampler": sampler, "sigmas": sigmas, "timestep_spacing": timestep_spacing}
        arguments: dict[str, Any] = self.plan_defaults | {k: v for k, v in given.items() if v is not None}
        return make_plan(
            schedule=self.schedule, num_inference_steps=num_inference_steps, eta=eta, strength=strength, **arguments
        )

    @contextlib.contextmanager
    def _backend(self) -> Generator[None]:
        """The kernels that this model was asked to use."""
        try:
            context = contextlib.nullcontext() if self.backend is None else sdkernels.backend(self.backend)
            with context:
                yield
        except sdkernels.UnsupportedError as error:
            raise ConfigError(str(error)) from None

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, checked."""
        own: int | tuple[int, int] = self.unet.config.sample_size or 64
        rows, columns = own if isinstance(own, tuple) else (own, own)
        factor = self.vae.config.factor
        height = rows * factor if height is None else height
        width = columns * factor if width is None else width
        check_size(width, height, factor)
        channels, latent = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels != latent:
            raise ConfigError(f"text_to_image: expected a UNet of {latent} input channels, this one has {channels}")
        return height, width

    def _latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.vae.config.factor
        return batch, self.vae.config.latent_channels, height // factor, width // factor

    def _contexts(
        self,
        prompts: list[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        guidance: Guidance,
        clip_skip: int,
        weighted: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The conditional and the unconditional context [P, M, D], each None where the guidance needs none."""
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ConfigError("negative_prompt, negative_prompt_embeds: give one of them, not both")
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        width = self.unet.config.per_block(self.unet.config.cross_attention_dim)[0]
        for name, given in embeds.items():
            if given is not None and (given.dim() != 3 or given.shape[-1] != width):
                raise ConfigError(f"{name}: expected [prompts, tokens, {width}], found {list(given.shape)}")
        count = len(prompts) if prompts is not None else len(cast("Tensor", prompt_embeds))
        negatives = _negatives(negative_prompt, count)
        cond = prompt_embeds if guidance.needs_cond else None
        uncond = negative_prompt_embeds if guidance.needs_uncond else None
        encode = partial(encode_prompts, self.tokenizer, self.text_encoder, clip_skip=clip_skip, weighted=weighted)
        encode_uncond = guidance.needs_uncond and uncond is None
        if guidance.needs_cond and cond is None:
            cond, encoded = encode(cast("list[str]", prompts), negatives if encode_uncond else None)
            uncond = encoded if encode_uncond else uncond
        elif encode_uncond:
            uncond, _ = encode(negatives, None)
            if cond is not None and cond.shape[1] % uncond.shape[1] == 0:  # as many chunks as the embeddings have
                uncond = uncond.repeat(1, cond.shape[1] // uncond.shape[1], 1)
        cond, uncond = (None if c is None else c.to(self.device, self.dtype) for c in (cond, uncond))
        if cond is not None and uncond is not None and cond.shape != uncond.shape:
            raise ConfigError(
                f"negative_prompt_embeds: expected the prompt's shape {list(cond.shape)}, found {list(uncond.shape)}"
            )
        return cond, uncond

    def _predictor(
        self, plan: Plan, cond: Tensor | None, uncond: Tensor | None
    ) -> Callable[[Tensor, int], tuple[Tensor | None, Tensor | None]]:
        """The network call of the loop, with all that does not depend on the latent computed here, once."""
        contexts = [c for c in (uncond, cond) if c is not None]
        context_kv = self.unet.context_kv(torch.cat(contexts))
        times = self.unet.time_projections(plan.timesteps.to(self.device, torch.float32))

        def predict(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
            x = x.to(self.dtype)
            inputs = torch.cat([x] * len(contexts))
            out = self.unet(
                inputs, plan.timesteps[k], None, context_kv, [projection[k : k + 1] for projection in times]
            )
            if uncond is not None and cond is not None:
                unconditional, conditional = out.chunk(2)
                return unconditional, conditional
            return (out, None) if cond is None else (None, out)

        return predict


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: {str(error).splitlines()[0]}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {place} was asked for, but torch finds no CUDA GPU here")
    return place


def _defaults(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return place, dtype or (torch.float16 if place.type == "cuda" else torch.float32)


def _prompts(prompt: str | Sequence[str] | None, embeds: Tensor | None, guidance: Guidance) -> list[str] | None:
    """The prompts as a list, or None where embeddings were given."""
    if (prompt is None) == (embeds is None):
        raise ConfigError("prompt, prompt_embeds: expected exactly one of them")
    if prompt is None:
        return None
    if not isinstance(prompt, Sequence):
        raise ConfigError(f"prompt: expected words, or a list of prompts, found {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    empty = not prompts or any(isinstance(p, str) and not p.strip() for p in prompts)  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
    if empty and guidance.needs_cond:
        raise ConfigError(
            "prompt: expected words, found an empty prompt (guidance_scale=0 makes a picture without one)"
        )
    return prompts


def _negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """A negative prompt for each of ``count`` prompts."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    if len(negative_prompt) != count:
        raise ConfigError(f"negative_prompt: expected one or {count}, found {len(negative_prompt)}")
    return list(negative_prompt)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise ConfigError(f"{name}: expected a whole number of at least 1, found {value!r}")
    return value


def _with_info(
    images: list[Image.Image],
    facts: dict[str, Any],
    prompts: list[str] | None,
    negative_prompt: str | Sequence[str] | None,
    seeds: list[int],
    per_prompt: int,
) -> list[Image.Image]:
    """Give each picture the parameters that make it again, as its ``info``."""
    for i, image in enumerate(images):
        own = dict(facts)
        if prompts is not None:
            own = {"prompt": prompts[i // per_prompt]} | own
            own["negative_prompt"] = _negatives(negative_prompt, len(prompts))[i // per_prompt]
        if seeds:
            own["seed"] = seeds[i]
        image.info.update(own)
    return images
